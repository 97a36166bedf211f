//! A running Sluice: reloads good and bad, signals, daemons and keepers that die, bans by hand.

use std::fs;
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::client::{syn_is_ignored, tcp_echo};
use rig::field::{ATTACKER_V4, ATTACKER_V6, CLIENT_V4, Field, L4_V4, L4_V6, WEB_V4};
use rig::load::Load;
use rig::origin::Origin;
use rig::sluice::{PATIENCE, Sluice};
use rig::world::socket;
use rig::{harness, process, sandbox, tests, wait};
use serde_json::Value;

/// Forwards on one address and serves on another.
const CONFIGURATION: &str = r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "native"
nat        = { source = ["10.77.9.1", "fd77:9::1"], ports = "20000-29999" }

[[listener]]
name    = "echo"
address = ["203.0.113.20:7000", "[2001:db8::20]:7000"]
forward = { upstream = "echo", via = "nat" }

[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[route]]
match   = { path = "/*" }
respond = { status = 204 }

[[upstream]]
name      = "echo"
endpoints = ["10.77.1.2:7000", "10.77.2.2:7000", "[fd77:3::2]:7000"]
"#;

/// Serves, without a kernel half.
const PLAIN: &str = r#"
[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[route]]
match   = { path = "/*" }
respond = { status = 204 }
"#;

/// Another listener that forwards.
const SECOND: &str = r#"
[[listener]]
name    = "second"
address = ["203.0.113.20:7001", "[2001:db8::20]:7001"]
forward = { upstream = "echo", via = "nat" }
"#;

/// Client, edge, origins, and at most one Sluice at a time.
struct Stage {
    field: Field,
    _origins: Vec<Origin>,
}

fn main() -> ExitCode {
    harness::main(
        || {
            let field = Field::build()?;
            let _origins = field.origins.iter().map(Origin::start);
            let _origins = _origins.collect::<Result<_>>()?;
            Ok(Stage { field, _origins })
        },
        |_| last_words(),
        tests![
            a_bad_reload_changes_nothing_and_says_where_it_is_wrong,
            a_reload_adds_and_removes_listeners_and_a_taken_port_refuses_all_of_it,
            a_write_that_fails_half_way_is_taken_back,
            quit_drains_and_ends_and_forwarding_goes_on,
            a_killed_daemon_leaves_sockets_bans_and_tunables_to_the_next,
            without_a_datapath_too_bans_outlive_the_daemon,
            a_killed_keeper_takes_its_daemon_along_and_a_new_one_adopts_the_rest,
            a_ban_by_hand_stops_that_source_and_ends_by_itself,
            a_ban_of_an_ipv6_source_is_as_wide_as_its_network,
            bans_that_make_no_sense_or_do_not_fit_are_refused,
            maps_of_another_size_are_not_adopted,
        ],
    )
}

fn a_bad_reload_changes_nothing_and_says_where_it_is_wrong(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    stage.write(&CONFIGURATION.replace("endpoints =", "endpionts ="))?;
    sluice.signal(Signal::SIGHUP)?;
    wait::until_true("the refusal", PATIENCE, || {
        sluice.log().contains("sluice.toml:22:1")
    })?;
    wait::until_true("the metric", PATIENCE, || {
        let metrics = sluice.metrics().unwrap_or_default();
        metrics.value("sluice_config_last_reload_success") == 0.0
            && metrics.value("sluice_config_generation") == 1.0
    })?;
    let Err(said) = sluice.command(&["reload"]) else {
        anyhow::bail!("`sluice reload` of a bad file succeeded");
    };
    let said = format!("{said:#}");
    ensure!(
        said.contains("sluice.toml:22:1") && said.contains("did you mean"),
        "{said}"
    );
    stage.echo(L4_V4, 7000)?;

    stage.write(CONFIGURATION)?;
    sluice.command(&["reload"])?;
    let metrics = sluice.metrics()?;
    ensure!(metrics.value("sluice_config_generation") == 2.0);
    ensure!(metrics.value("sluice_config_last_reload_success") == 1.0);
    stage.end(sluice)
}

fn a_reload_adds_and_removes_listeners_and_a_taken_port_refuses_all_of_it(
    stage: &mut Stage,
) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    let load = Load::streams(&stage.field.client, socket(L4_V4, 7000)?, 4)?;
    load.wait_for(50)?;
    ensure!(stage.echo(L4_V4, 7001).is_err());

    let both = format!("{CONFIGURATION}{SECOND}");
    let taken = stage
        .field
        .edge
        .inside(|| TcpListener::bind(format!("{WEB_V4}:8081")))?;
    let third = "[[listener]]\nname = \"third\"\naddress = \"203.0.113.10:8081\"\n";
    stage.write(&format!("{both}{third}"))?;
    let Err(said) = sluice.command(&["reload"]) else {
        anyhow::bail!("a taken port was reloaded");
    };
    ensure!(
        format!("{said:#}").contains("another process listens there"),
        "{said:#}"
    );
    ensure!(stage.echo(L4_V4, 7001).is_err(), "half of it was applied");
    drop(taken);

    stage.write(&both)?;
    sluice.command(&["reload"])?;
    stage.echo(L4_V4, 7001)?;
    stage.echo(L4_V6, 7001)?;
    stage.write(CONFIGURATION)?;
    sluice.command(&["reload"])?;
    ensure!(stage.echo(L4_V4, 7001).is_err(), "it still forwards");
    load.wait_for(50)?;
    load.stop()?.expect_no_failure()?;
    stage.end(sluice)
}

fn a_write_that_fails_half_way_is_taken_back(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    // IPv4 listeners are written before IPv6 ones, and these can be written no more.
    freeze("/sys/fs/bpf/sluice/main/listeners6")?;
    stage.write(&format!("{CONFIGURATION}{SECOND}"))?;
    let Err(said) = sluice.command(&["reload"]) else {
        anyhow::bail!("a map that cannot be written was written");
    };
    ensure!(format!("{said:#}").contains("write a listener"), "{said:#}");
    ensure!(stage.echo(L4_V4, 7001).is_err(), "half of it was applied");
    stage.echo(L4_V4, 7000)?;
    stage.echo(L4_V6, 7000)?;
    ensure!(sluice.generation()? == 1);

    // What can be written still comes into force.
    let four = SECOND.replace(", \"[2001:db8::20]:7001\"", "");
    stage.write(&format!("{CONFIGURATION}{four}"))?;
    sluice.command(&["reload"])?;
    stage.echo(L4_V4, 7001)?;
    stage.end(sluice)
}

fn quit_drains_and_ends_and_forwarding_goes_on(stage: &mut Stage) -> Result<()> {
    let mut sluice = stage.start(CONFIGURATION, &["--set", "worker.drain_timeout=2s"])?;
    let load = Load::streams(&stage.field.client, socket(L4_V4, 7000)?, 4)?;
    load.wait_for(50)?;
    sluice.keeper().signal(Signal::SIGQUIT)?;
    let status = sluice.keeper().wait(PATIENCE)?;
    ensure!(status.success(), "SIGQUIT ended it with {status}");
    ensure!(sluice.log().contains("draining"), "{}", sluice.log());
    load.wait_for(50)?;
    load.stop()?.expect_no_failure()?;
    stage.down()
}

fn a_killed_daemon_leaves_sockets_bans_and_tunables_to_the_next(stage: &mut Stage) -> Result<()> {
    let mut sluice = stage.start(CONFIGURATION, &[])?;
    let sockets = sluice.listening_inodes()?;
    ensure!(!sockets.is_empty());
    sluice.command(&["ban", "add", ATTACKER_V4, "--for", "1h"])?;
    sluice.command(&["sysctl", "-w", "http.head_timeout=7s"])?;
    let old = sluice.kill_daemon()?;
    ensure!(
        stage.is_ignored(ATTACKER_V4, L4_V4)?,
        "nobody refuses it now"
    );
    sluice.wait_for_other_daemon(old)?;
    ensure!(sluice.listening_inodes()? == sockets, "other sockets");
    ensure!(banned(&sluice)? == [ATTACKER_V4]);
    ensure!(stage.is_ignored(ATTACKER_V4, L4_V4)?, "the ban is gone");
    let timeout = sluice.command(&["sysctl", "-n", "http.head_timeout"])?;
    ensure!(timeout.trim() == "7s", "{timeout}");
    ensure!(sluice.status()?["daemon_restarts"] == 1);
    sluice.command(&["ban", "del", ATTACKER_V4])?;
    ensure!(
        !stage.is_ignored(ATTACKER_V4, L4_V4)?,
        "it is still refused"
    );
    stage.end(sluice)
}

fn without_a_datapath_too_bans_outlive_the_daemon(stage: &mut Stage) -> Result<()> {
    let mut sluice = stage.start(PLAIN, &[])?;
    ensure!(
        sluice
            .status()?
            .pointer("/datapath/state")
            .and_then(Value::as_str)
            == Some("off")
    );
    sluice.command(&["ban", "add", ATTACKER_V4, "--for", "1h"])?;
    let old = sluice.kill_daemon()?;
    sluice.wait_for_other_daemon(old)?;
    ensure!(banned(&sluice)? == [ATTACKER_V4]);
    stage.end(sluice)
}

fn a_killed_keeper_takes_its_daemon_along_and_a_new_one_adopts_the_rest(
    stage: &mut Stage,
) -> Result<()> {
    let mut sluice = stage.start(CONFIGURATION, &[])?;
    let daemon = sluice.daemon()?;
    let load = Load::streams(&stage.field.client, socket(L4_V4, 7000)?, 4)?;
    load.wait_for(50)?;
    sluice.command(&["ban", "add", ATTACKER_V4, "--for", "1h"])?;
    sluice.keeper().signal(Signal::SIGKILL)?;
    sluice.keeper().wait(PATIENCE)?;
    wait::until_true("the daemon to end", Duration::from_secs(5), || {
        !process::runs(daemon)
    })?;
    load.wait_for(50)?;
    let next = stage.start(CONFIGURATION, &[])?;
    ensure!(banned(&next)? == [ATTACKER_V4]);
    load.wait_for(50)?;
    load.stop()?.expect_no_failure()?;
    stage.end(next)
}

fn a_ban_by_hand_stops_that_source_and_ends_by_itself(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    ensure!(!stage.is_ignored(ATTACKER_V4, L4_V4)?);
    sluice.command(&["ban", "add", ATTACKER_V4, "--for", "3s"])?;
    ensure!(stage.is_ignored(ATTACKER_V4, L4_V4)?, "L4 answers it");
    ensure!(stage.is_ignored(ATTACKER_V4, WEB_V4)?, "L7 answers it");
    ensure!(!stage.is_ignored(CLIENT_V4, L4_V4)?, "others are refused");
    let list = sluice.json(&["ban", "list"])?;
    ensure!(
        list.pointer("/0/rule").and_then(Value::as_str) == Some("operator"),
        "{list}"
    );
    let dropped = list.pointer("/0/packets_dropped").and_then(Value::as_u64);
    ensure!(dropped >= Some(2), "{list}");
    ensure!(sluice.metrics()?.value("sluice_guard_bans") == 1.0);
    wait::until_true("the ban to end", PATIENCE, || {
        banned(&sluice).is_ok_and(|banned| banned.is_empty())
    })?;
    ensure!(
        !stage.is_ignored(ATTACKER_V4, L4_V4)?,
        "it is refused for ever"
    );
    wait::until_true("the metric", PATIENCE, || {
        let metrics = sluice.metrics().unwrap_or_default();
        metrics.value("sluice_guard_bans") == 0.0
    })?;
    stage.end(sluice)
}

fn a_ban_of_an_ipv6_source_is_as_wide_as_its_network(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    sluice.command(&["ban", "add", "fd77:0:0:66::1234", "--for", "1h"])?;
    ensure!(
        stage.is_ignored(ATTACKER_V6, L4_V6)?,
        "its neighbour is answered"
    );
    stage.echo(L4_V6, 7000).context("another network")?;
    sluice.command(&["ban", "del", ATTACKER_V6])?;
    ensure!(banned(&sluice)?.is_empty());
    ensure!(!stage.is_ignored(ATTACKER_V6, L4_V6)?);
    stage.end(sluice)
}

fn bans_that_make_no_sense_or_do_not_fit_are_refused(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &["--set", "datapath.bans_max=1024"])?;
    for (arguments, why) in [
        (vec!["ban", "add", "0.0.0.0"], "no address of a source"),
        (vec!["ban", "add", "192.0.2.1", "--for", "soon"], "soon"),
        (vec!["ban", "del", "192.0.2.1"], "is not banned"),
    ] {
        let Err(said) = sluice.command(&arguments) else {
            anyhow::bail!("{arguments:?} succeeded");
        };
        ensure!(format!("{said:#}").contains(why), "{said:#}");
    }
    stage.end(sluice)
}

fn maps_of_another_size_are_not_adopted(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    sluice.stop()?;
    let bans_max = ["--set", "datapath.bans_max=2048"];
    for command in ["check", "run"] {
        let mut other = rig::sluice::command(&stage.field.edge)?;
        other
            .args([command, "-c"])
            .arg(stage.path()?)
            .args(bans_max);
        let done = other.output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(
            done.status.code() == Some(1) && said.contains("sluice datapath down"),
            "{said}"
        );
    }
    stage
        .echo(L4_V4, 7000)
        .context("the old maps still forward")?;
    stage.down()
}

impl Stage {
    fn path(&self) -> Result<std::path::PathBuf> {
        Ok(sandbox::folder("keeper")?.join("sluice.toml"))
    }

    fn write(&self, text: &str) -> Result<()> {
        fs::write(self.path()?, text).context("write the configuration")
    }

    fn start(&self, text: &str, arguments: &[&str]) -> Result<Sluice> {
        self.write(text)?;
        Sluice::start_with(&self.field.edge, &self.path()?, arguments)
    }

    /// Stops it and takes its kernel half away: the next test begins on a bare host.
    fn end(&self, sluice: Sluice) -> Result<()> {
        sluice.stop()?;
        self.down()
    }

    fn down(&self) -> Result<()> {
        let mut command = rig::sluice::command(&self.field.edge)?;
        rig::namespace::output(command.args(["datapath", "down"])).map(drop)
    }

    /// One connection of the well-behaved client through the kernel half.
    fn echo(&self, address: &str, port: u16) -> Result<()> {
        let to = socket(address, port)?;
        self.field.client.inside(|| tcp_echo(to, 2000, 7)).map(drop)
    }

    /// Whether a SYN from that source is dropped without a word.
    fn is_ignored(&self, from: &str, to: &str) -> Result<bool> {
        let from: IpAddr = from.parse()?;
        let to = socket(to, if to == WEB_V4 { 8080 } else { 7000 })?;
        let limit = Duration::from_millis(300);
        self.field.client.inside(|| syn_is_ignored(from, to, limit))
    }
}

fn last_words() -> String {
    let log = fs::read_to_string("/run/rig/log/sluice.log").unwrap_or_default();
    process::last_lines(&log, 30)
}

/// Sources that `ban list` shows.
fn banned(sluice: &Sluice) -> Result<Vec<String>> {
    let list = sluice.json(&["ban", "list"])?;
    let bans = list.as_array().context("a list of bans")?;
    Ok(bans
        .iter()
        .filter_map(|ban| ban["source"].as_str())
        .map(str::to_owned)
        .collect())
}

/// Makes a pinned map one that no system call can write (BPF_MAP_FREEZE).
fn freeze(path: &str) -> Result<()> {
    const BPF_OBJ_GET: libc::c_long = 7;
    const BPF_MAP_FREEZE: libc::c_long = 22;
    let path = std::ffi::CString::new(path)?;
    // union bpf_attr: `pathname` and `bpf_fd` of BPF_OBJ_GET; `map_fd` of BPF_MAP_FREEZE.
    let get = [path.as_ptr() as u64, 0];
    // SAFETY: the kernel reads 16 bytes of a live array and the path it points at.
    let map = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, 16) };
    ensure!(map >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it for us.
    let map = unsafe { OwnedFd::from_raw_fd(map as i32) };
    let freeze = [map.as_raw_fd() as u32];
    // SAFETY: the kernel reads 4 bytes of a live array.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_FREEZE, &raw const freeze, 4) };
    ensure!(done == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}
