//! What a host can have against a start: told in a sentence, by `run` and by `check` alike, and nothing is half done.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::links::{FdLink, PinnedLink};
use nix::mount::umount;
use nix::sys::signal::Signal;
use rig::field::{Field, WEB_V4};
use rig::http::KeepAlive;
use rig::pass::Pass;
use rig::process::Process;
use rig::sluice::{PATIENCE, Sluice};
use rig::{harness, sandbox, sluice, tests, wait};
use serde_json::{Value, json};

const PINS: &str = "/sys/fs/bpf/sluice";

fn main() -> ExitCode {
    harness::main(
        Field::build,
        |_| String::new(),
        tests![
            a_program_of_somebody_else_is_named_and_left_alone,
            taking_ours_away_leaves_a_program_of_somebody_else,
            an_interface_that_is_not_there_is_refused_with_those_that_are,
            native_mode_where_the_driver_has_none_is_refused_and_what_was_attached_goes_again,
            where_the_driver_has_no_native_mode_auto_says_that_it_is_generic,
            a_port_in_use_is_told_with_its_listener_and_no_program_is_attached,
            a_host_without_io_uring_is_served_by_epoll_which_says_so,
            where_io_uring_is_demanded_and_refused_nothing_is_begun,
            a_capability_that_is_missing_is_named,
            a_second_instance_of_the_same_name_is_told_who_came_first,
            another_instance_on_the_same_interface_is_told_whose_it_is,
            what_up_attached_is_adopted_by_run_without_a_gap,
            a_host_without_the_bpf_file_system_gets_it_and_says_so,
            without_root_and_without_a_file_it_serves_all_the_same,
        ],
    )
}

/// A configuration that serves one address, with the kernel half on these interfaces.
fn configuration(interfaces: &[&str], mode: &str) -> String {
    format!(
        "[datapath]\ninterfaces = {interfaces:?}\nmode = {mode:?}\n\n[[listener]]\nname = \"web\"\naddress = \"{WEB_V4}:8080\"\n\n\
         [[route]]\nmatch = {{ path = \"/*\" }}\nrespond = {{ status = 204 }}\n"
    )
}

fn a_program_of_somebody_else_is_named_and_left_alone(field: &mut Field) -> Result<()> {
    let theirs = Pass::attach(&field.edge, "origin2")?;
    let before = xdp(field, "origin2")?.context("their program is attached")?;
    let text = configuration(&["client0", "origin1", "origin2"], "native");
    for said in refused(field, &text, |_| {})? {
        ensure!(
            said.contains("origin2") && said.contains(&format!("program {before} rig_pass")),
            "{said}"
        );
    }
    nothing_is_attached(field, &["client0", "origin1"])?;
    ensure!(xdp(field, "origin2")? == Some(before), "theirs is gone");
    drop(theirs);
    Ok(())
}

fn taking_ours_away_leaves_a_program_of_somebody_else(field: &mut Field) -> Result<()> {
    let _theirs = Pass::attach(&field.edge, "origin3")?;
    let before = xdp(field, "origin3")?;
    let path = write(&configuration(&["client0", "origin1"], "native"))?;
    let running = Sluice::start(&field.edge, &path)?;
    ensure!(xdp(field, "client0")?.is_some() && xdp(field, "origin1")?.is_some());
    running.command(&["datapath", "down"])?;
    nothing_is_attached(field, &["client0", "origin1"])?;
    ensure!(xdp(field, "origin3")? == before, "theirs is gone");
    wait::until_true("the daemon to notice", PATIENCE, || {
        let status = running.status().unwrap_or_default();
        status.pointer("/datapath/lost") == Some(&json!(["client0", "origin1"]))
    })?;
    let metrics = running.metrics()?;
    ensure!(metrics.labelled("sluice_datapath_attached", "interface", "client0") == 0.0);
    running.stop()
}

fn an_interface_that_is_not_there_is_refused_with_those_that_are(field: &mut Field) -> Result<()> {
    for said in refused(field, &configuration(&["client0", "eth7"], "auto"), |_| {})? {
        ensure!(
            said.contains("no interface eth7") && said.contains("origin3"),
            "{said}"
        );
    }
    nothing_is_attached(field, &["client0"])
}

fn native_mode_where_the_driver_has_none_is_refused_and_what_was_attached_goes_again(
    field: &mut Field,
) -> Result<()> {
    // Only trying tells, so `check` says nothing of it.
    let path = write(&configuration(&["client0", "lo"], "native"))?;
    let said = run_refused(field, &path, |_| {})?;
    ensure!(
        said.contains("lo natively") && said.contains("datapath.mode"),
        "{said}"
    );
    nothing_is_attached(field, &["client0", "lo"])
}

fn where_the_driver_has_no_native_mode_auto_says_that_it_is_generic(
    field: &mut Field,
) -> Result<()> {
    let path = write(&configuration(&["client0", "lo"], "auto"))?;
    let running = Sluice::start(&field.edge, &path)?;
    let status = running.status()?;
    let mode = |number: usize| {
        let pointer = format!("/datapath/interfaces/{number}/mode");
        status.pointer(&pointer).and_then(Value::as_str)
    };
    ensure!(
        (mode(0), mode(1)) == (Some("native"), Some("generic")),
        "{status}"
    );
    ensure!(
        running.log().contains("lo: no native XDP"),
        "{}",
        running.log()
    );
    running.command(&["datapath", "down"])?;
    running.stop()
}

fn a_port_in_use_is_told_with_its_listener_and_no_program_is_attached(
    field: &mut Field,
) -> Result<()> {
    let taken = field
        .edge
        .inside(|| TcpListener::bind(format!("{WEB_V4}:8080")))?;
    for said in refused(field, &configuration(&["client0"], "native"), |_| {})? {
        ensure!(
            said.contains(&format!("cannot listen on {WEB_V4}:8080 for `web`")),
            "{said}"
        );
    }
    nothing_is_attached(field, &["client0"])?;
    drop(taken);
    Ok(())
}

fn a_host_without_io_uring_is_served_by_epoll_which_says_so(field: &mut Field) -> Result<()> {
    let path = write(&configuration(&["client0"], "native"))?;
    let mut check = sluice::command(&field.edge)?;
    check.arg("check").arg("-c").arg(&path);
    forbid_uring(&mut check);
    let done = check.output().context("run check")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.success() && said.contains("will use epoll: io_uring is forbidden here"),
        "{said}"
    );

    let mut running = Sluice::start_as(&field.edge, &path, forbid_uring)?;
    let told = running
        .log()
        .matches("workers use epoll: io_uring is forbidden here")
        .count();
    ensure!(told == 1, "{}", running.log());
    let served = |running: &Sluice| -> Result<()> {
        let status = running.status()?;
        ensure!(
            status.pointer("/net/backend") == Some(&json!("epoll"))
                && status.pointer("/net/refused").is_some_and(Value::is_string),
            "{status}"
        );
        let metrics = running.metrics()?;
        ensure!(metrics.labelled("sluice_net_info", "backend", "epoll") == 1.0);
        let answer = field.client.inside(|| {
            KeepAlive::connect(None, format!("{WEB_V4}:8080").parse()?)?.get("web", "/", "")
        })?;
        ensure!(answer.status == 204, "{answer:?}");
        Ok(())
    };
    served(&running)?;
    // The next daemon has no more to go by than the first one.
    let old = running.kill_daemon()?;
    running.wait_for_other_daemon(old)?;
    served(&running)?;
    running.command(&["datapath", "down"])?;
    running.stop()
}

fn where_io_uring_is_demanded_and_refused_nothing_is_begun(field: &mut Field) -> Result<()> {
    let demand = "[tunables]\n\"net.backend\" = \"uring\"\n";
    let text = configuration(&["client0"], "native") + demand;
    for said in refused(field, &text, forbid_uring)? {
        ensure!(
            said.contains("io_uring is forbidden here") && said.contains("let net.backend be"),
            "{said}"
        );
    }
    nothing_is_attached(field, &["client0"])
}

fn a_capability_that_is_missing_is_named(field: &mut Field) -> Result<()> {
    let path = write(&configuration(&["client0"], "native"))?;
    let unable = ["--bounding-set=-net_admin,-bpf,-sys_admin"];
    for command in ["check", "run"] {
        let mut as_weak = under(field, "setpriv", &unable)?;
        as_weak.arg(command).arg("-c").arg(&path);
        let said = fails(command, as_weak)?;
        ensure!(said.contains("CAP_NET_ADMIN and CAP_BPF"), "{said}");
    }
    nothing_is_attached(field, &["client0"])
}

fn a_second_instance_of_the_same_name_is_told_who_came_first(field: &mut Field) -> Result<()> {
    let path = write(&configuration(&["client0"], "native"))?;
    let first = Sluice::start(&field.edge, &path)?;
    let said = run_refused(field, &path, |_| {})?;
    ensure!(
        said.contains(&format!("runs already, as process {}", first.keeper_pid())),
        "{said}"
    );
    ensure!(first.generation()? == 1, "the first one is disturbed");
    first.command(&["check", "-c", "/run/rig/host/sluice.toml"])?;
    first.command(&["datapath", "down"])?;
    first.stop()
}

fn another_instance_on_the_same_interface_is_told_whose_it_is(field: &mut Field) -> Result<()> {
    let path = write(&configuration(&["client0"], "native"))?;
    let first = Sluice::start(&field.edge, &path)?;
    let before = xdp(field, "client0")?;
    for command in ["check", "run"] {
        let mut second = sluice::command(&field.edge)?;
        second
            .args([command, "--instance", "other", "-c"])
            .arg(&path);
        let said = fails(command, second)?;
        ensure!(said.contains("that of the Sluice instance main"), "{said}");
    }
    ensure!(
        xdp(field, "client0")? == before,
        "the first one is disturbed"
    );
    ensure!(!Path::new(PINS).join("other").exists());
    first.command(&["datapath", "down"])?;
    first.stop()
}

fn what_up_attached_is_adopted_by_run_without_a_gap(field: &mut Field) -> Result<()> {
    let path = write(&configuration(&["client0", "origin1"], "auto"))?;
    let mut up = sluice::command(&field.edge)?;
    up.args(["datapath", "up", "--json", "-c"]).arg(&path);
    let said: Value = serde_json::from_str(&rig::namespace::output(&mut up)?)?;
    ensure!(
        said.pointer("/interfaces/1/name").and_then(Value::as_str) == Some("origin1"),
        "{said}"
    );
    let (links, program) = (links()?, xdp(field, "client0")?);
    ensure!(links.len() == 2 && program.is_some());
    // The links stay, and each has another program in one step: there is no moment without one.
    let running = Sluice::start(&field.edge, &path)?;
    ensure!(self::links()? == links, "attached anew");
    ensure!(xdp(field, "client0")?.is_some() && xdp(field, "client0")? != program);
    let mut again = sluice::command(&field.edge)?;
    again.args(["datapath", "up", "-c"]).arg(&path);
    let said = fails("up", again)?;
    ensure!(said.contains("runs already"), "{said}");
    running.stop()?;

    // An interface that is not named any more is let go.
    let path = write(&configuration(&["client0"], "auto"))?;
    let running = Sluice::start(&field.edge, &path)?;
    nothing_on(field, &["origin1"])?;
    ensure!(xdp(field, "client0")?.is_some());
    running.command(&["datapath", "down"])?;
    running.stop()?;
    nothing_is_attached(field, &["client0"])
}

fn a_host_without_the_bpf_file_system_gets_it_and_says_so(field: &mut Field) -> Result<()> {
    umount("/sys/fs/bpf").context("unmount the BPF file system of this sandbox")?;
    let path = write(&configuration(&["client0"], "native"))?;
    let running = Sluice::start(&field.edge, &path)?;
    ensure!(
        running.log().contains("mounted the BPF file system"),
        "{}",
        running.log()
    );
    running.command(&["datapath", "down"])?;
    running.stop()
}

fn without_root_and_without_a_file_it_serves_all_the_same(field: &mut Field) -> Result<()> {
    const NOBODY: [&str; 4] = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all",
    ];
    let runtime = sandbox::folder("nobody")?;
    std::os::unix::fs::chown(&runtime, Some(65534), Some(65534))?;
    let mut command = under(field, "setpriv", &NOBODY)?;
    command.arg("run").env("XDG_RUNTIME_DIR", &runtime);
    let mut keeper = Process::start("sluice-nobody", command)?;
    let ask = || -> Result<Value> {
        let mut command = under(field, "setpriv", &NOBODY)?;
        command
            .args(["status", "--json"])
            .env("XDG_RUNTIME_DIR", &runtime);
        let done = command.output().context("ask for the status")?;
        serde_json::from_slice(&done.stdout).context("the status is JSON")
    };
    let status = wait::until("an answer", PATIENCE, || match keeper.expect_running() {
        Ok(()) => ask().ok().map(Ok),
        Err(error) => Some(Err(error)),
    })??;
    ensure!(
        status
            .pointer("/listeners/0/addresses/0")
            .and_then(Value::as_str)
            == Some("127.0.0.1:8080/tcp"),
        "{status}"
    );
    ensure!(
        status.pointer("/datapath/state").and_then(Value::as_str) == Some("off"),
        "{status}"
    );
    let page = field.edge.inside(|| {
        KeepAlive::connect(None, "127.0.0.1:8080".parse()?)?.get("localhost", "/", "")
    })?;
    ensure!(
        page.status == 200 && page.text().contains("Sluice"),
        "{page:?}"
    );
    keeper.signal(Signal::SIGTERM)?;
    let ended = keeper.wait(PATIENCE)?;
    ensure!(ended.success(), "SIGTERM ended it with {ended}");
    Ok(())
}

fn write(text: &str) -> Result<std::path::PathBuf> {
    let path = sandbox::folder("host")?.join("sluice.toml");
    fs::write(&path, text).context("write the configuration")?;
    Ok(path)
}

/// What `check` and `run` say when they refuse, both with `prepare` done to their process.
fn refused(field: &Field, text: &str, prepare: fn(&mut Command)) -> Result<[String; 2]> {
    let path = write(text)?;
    let mut check = sluice::command(&field.edge)?;
    check.arg("check").arg("-c").arg(&path);
    prepare(&mut check);
    Ok([fails("check", check)?, run_refused(field, &path, prepare)?])
}

fn run_refused(field: &Field, path: &Path, prepare: fn(&mut Command)) -> Result<String> {
    let mut run = sluice::command(&field.edge)?;
    run.arg("run").arg("-c").arg(path);
    prepare(&mut run);
    fails("run", run)
}

/// Waits for the end, which must be a failure; what was said.
fn fails(name: &str, command: Command) -> Result<String> {
    let log = sandbox::folder("log")?.join(format!("refused-{name}.log"));
    let _ = fs::remove_file(log);
    let mut process = Process::start(&format!("refused-{name}"), command)?;
    let status = process.wait(Duration::from_secs(20))?;
    let said = process.log();
    ensure!(
        status.code() == Some(1),
        "{name} ended with {status}: {said}"
    );
    ensure!(
        !said.contains("panicked"),
        "{name} panicked instead: {said}"
    );
    Ok(said)
}

/// `sluice` as a child of another program that changes what it may do.
fn under(field: &Field, program: &str, arguments: &[&str]) -> Result<Command> {
    let sluice = sluice::command(&field.edge)?;
    let mut command = field.edge.command(program);
    command.args(arguments).arg("--").arg(sluice.get_program());
    Ok(command)
}

/// As container runtimes do: a seccomp filter that answers EPERM to the three calls of io_uring.
fn forbid_uring(command: &mut Command) {
    let statement = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // Load the number of the call; 425 to 427 are io_uring_setup, io_uring_enter and io_uring_register.
    let program = [
        statement(0x20, 0, 0, 0),
        statement(0x35, 0, 2, 425),
        statement(0x25, 1, 0, 427),
        statement(0x06, 0, 0, 0x0005_0000 | libc::EPERM as u32),
        statement(0x06, 0, 0, 0x7fff_0000),
    ];
    // SAFETY: between fork and exec only a system call is made, whose arguments live on the closure's own stack.
    unsafe {
        command.pre_exec(move || {
            let filter = libc::sock_fprog {
                len: program.len() as u16,
                filter: program.as_ptr().cast_mut(),
            };
            match libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
}

/// The id of the XDP program on an interface of the edge.
fn xdp(field: &Field, interface: &str) -> Result<Option<u64>> {
    let text = field
        .edge
        .run(&["ip", "-json", "link", "show", "dev", interface])?;
    let links: Value = serde_json::from_str(&text).context("read what ip says")?;
    Ok(links.pointer("/0/xdp/prog/id").and_then(Value::as_u64))
}

/// Ids of the pinned links.
fn links() -> Result<BTreeSet<u32>> {
    fs::read_dir(Path::new(PINS).join("main"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().contains("/link_"))
        .map(|path| Ok(FdLink::from(PinnedLink::from_pin(path)?).info()?.id()))
        .collect()
}

fn nothing_is_attached(field: &Field, interfaces: &[&str]) -> Result<()> {
    nothing_on(field, interfaces)?;
    ensure!(!Path::new(PINS).exists(), "{PINS} is still there");
    Ok(())
}

fn nothing_on(field: &Field, interfaces: &[&str]) -> Result<()> {
    for interface in interfaces {
        let program = xdp(field, interface)?;
        ensure!(program.is_none(), "{interface} has program {program:?}");
    }
    Ok(())
}
