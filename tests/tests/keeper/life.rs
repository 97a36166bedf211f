//! The life of both processes: signals, deaths, and what the next one finds.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use proxy_ebpf::abi::{self, name};
use rig::field::{ATTACKER_V4, L4_V4, WEB_V4};
use rig::http::KeepAlive;
use rig::load::Load;
use rig::sluice::PATIENCE;
use rig::world::socket;
use rig::{process, wait};

use crate::stage::{CONFIGURATION, PLAIN, Stage, banned};

pub fn quit_drains_and_ends_and_forwarding_goes_on(stage: &mut Stage) -> Result<()> {
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

pub fn draining_lets_an_exchange_end_and_takes_no_new_connection(stage: &mut Stage) -> Result<()> {
    let slow = "[[route]]\nmatch = { path = \"/slow\" }\nupstream = \"web\"\n\n\
                [[upstream]]\nname = \"web\"\nendpoints = [\"10.77.1.2:8080\"]\n";
    let mut sluice = stage.start(&format!("{PLAIN}{slow}"), &[])?;
    let to = socket(WEB_V4, 8080)?;
    let connect = || stage.field.client.inside(|| KeepAlive::connect(None, to));
    let (mut busy, mut idle) = (connect()?, connect()?);
    ensure!(idle.get("web.test", "/", "")?.status == 204);
    // nginx sends a MiB a second.
    let exchange =
        std::thread::spawn(move || busy.get("web.test", "/slow", "Range: bytes=0-2097151\r\n"));
    wait::until_true("the exchange to begin", PATIENCE, || {
        let metrics = sluice.metrics().unwrap_or_default();
        metrics.value("sluice_upstream_connects_total") == 1.0
    })?;
    sluice.signal(Signal::SIGQUIT)?;
    wait::until_true("idle connections to be closed", PATIENCE, || {
        idle.get("web.test", "/", "").is_err()
    })?;
    ensure!(!exchange.is_finished(), "it was too fast to test anything");
    let answer = exchange
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))??;
    ensure!(
        (answer.status, answer.body.len()) == (206, 2 << 20),
        "{} with {} bytes",
        answer.status,
        answer.body.len()
    );
    let status = sluice.keeper().wait(PATIENCE)?;
    ensure!(status.success(), "SIGQUIT ended it with {status}");
    ensure!(connect().is_err(), "somebody still listens");
    Ok(())
}

pub fn a_killed_daemon_leaves_sockets_bans_and_tunables_to_the_next(
    stage: &mut Stage,
) -> Result<()> {
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

pub fn a_killed_keeper_takes_its_daemon_along_and_a_new_one_adopts_the_rest(
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

pub fn maps_of_another_size_are_not_adopted(stage: &mut Stage) -> Result<()> {
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

pub fn pins_of_another_abi_or_hash_key_are_refused_and_those_of_others_stay(
    stage: &mut Stage,
) -> Result<()> {
    const FOLDER: &str = "/sys/fs/bpf/sluice/main";
    let refused = |why: &str| -> Result<()> {
        for command in ["check", "run"] {
            let mut other = rig::sluice::command(&stage.field.edge)?;
            let done = other.args([command, "-c"]).arg(stage.path()?).output()?;
            let said = String::from_utf8_lossy(&done.stderr);
            ensure!(
                done.status.code() == Some(1)
                    && said.contains(why)
                    && said.contains("sluice datapath down"),
                "{said}"
            );
        }
        stage
            .echo(L4_V4, 7000)
            .context("what is pinned still forwards")
    };
    let set_abi = |number: u32| -> Result<()> {
        let map = MapData::from_pin(format!("{FOLDER}/{}", name::ABI))?;
        Ok(Array::<_, u32>::try_from(Map::Array(map))?.set(0, number, 0)?)
    };
    stage.start(CONFIGURATION, &[])?.stop()?;
    set_abi(abi::ABI + 1)?;
    refused("holds maps of ABI")?;
    set_abi(abi::ABI)?;
    let keyed = "[datapath]\nhash_key = \"another fleet's key\"";
    stage.write(&CONFIGURATION.replacen("[datapath]", keyed, 1))?;
    refused("datapath.hash_key is not what")?;

    let theirs = format!("{FOLDER}/theirs");
    let map = MapData::from_pin(format!("{FOLDER}/{}", name::ABI))?;
    map.pin(&theirs)?;
    stage.down()?;
    let left: Vec<_> = fs::read_dir(FOLDER)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    ensure!(
        left == [std::path::Path::new(&theirs)] && MapData::from_pin(&theirs).is_ok(),
        "{left:?}"
    );
    fs::remove_file(&theirs)?;
    stage.down()?;
    // The key of a fleet holds from the first start on, and a start with the same key adopts.
    let sluice = stage.start(&CONFIGURATION.replacen("[datapath]", keyed, 1), &[])?;
    sluice.stop()?;
    let sluice = stage.start(&CONFIGURATION.replacen("[datapath]", keyed, 1), &[])?;
    stage.end(sluice)
}

pub fn a_start_replaces_the_programs_under_load_and_loses_no_packet(
    stage: &mut Stage,
) -> Result<()> {
    let tcp = "\"203.0.113.20:7000\"";
    let both = "\"203.0.113.20:7000/tcp\", \"203.0.113.20:7000/udp\"";
    let text = CONFIGURATION.replacen(tcp, both, 1);
    let mut sluice = stage.start(&text, &[])?;
    let program = |sluice: &rig::sluice::Sluice| -> Result<u64> {
        let status = sluice.json(&["datapath", "status"])?;
        let id = status.pointer("/interfaces/0/program");
        id.and_then(serde_json::Value::as_u64)
            .with_context(|| status.to_string())
    };
    let to = socket(L4_V4, 7000)?;
    let datagrams = Load::datagrams(&stage.field.client, to, 4)?;
    let streams = Load::streams(&stage.field.client, to, 4)?;
    for _ in 0..3 {
        let (before, daemon) = (program(&sluice)?, sluice.daemon()?);
        datagrams.wait_for(100)?;
        sluice.keeper().signal(Signal::SIGKILL)?;
        sluice.keeper().wait(PATIENCE)?;
        wait::until_true("the daemon to end", Duration::from_secs(5), || {
            !process::runs(daemon)
        })?;
        // What its urings held is released a moment after its end, in the background.
        wait::until_true("the sockets to be closed", PATIENCE, || {
            stage.queues(8080).is_ok_and(|queues| queues.is_empty())
        })?;
        sluice = stage.start(&text, &[])?;
        ensure!(program(&sluice)? != before, "the program is the old one");
        datagrams.wait_for(100)?;
    }
    streams.wait_for(100)?;
    for load in [datagrams, streams] {
        load.stop()?.expect_no_failure()?;
    }
    stage.end(sluice)
}

pub fn the_keeper_has_the_capabilities_that_it_needs_and_no_other(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    let status = fs::read_to_string(format!("/proc/{}/status", sluice.keeper_pid()))?;
    // CAP_DAC_READ_SEARCH, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_ADMIN and BPF.
    for set in ["CapEff", "CapPrm"] {
        ensure!(
            status.contains(&format!("{set}:\t00000080000015e4")),
            "{status}"
        );
    }
    ensure!(status.contains("CapInh:\t0000000000000000"), "{status}");
    stage.end(sluice)
}

pub fn the_daemon_has_no_terminal_no_file_of_the_keepers_starter_and_no_onlooker(
    stage: &mut Stage,
) -> Result<()> {
    let secret = stage.path()?.with_file_name("secret");
    fs::write(&secret, "canary")?;
    let open = fs::File::open(&secret)?;
    // As a shell or a service manager would leave it open.
    fcntl(&open, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let sluice = stage.start(PLAIN, &[])?;
    drop(open);
    let (keeper, daemon) = (sluice.keeper_pid(), sluice.daemon()?);
    let holds = |pid: u32| -> Result<bool> {
        let mut files = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        Ok(files.any(|file| fs::read_link(file.path()).is_ok_and(|link| link == secret)))
    };
    ensure!(holds(keeper)?, "the keeper did not inherit it either");
    ensure!(!holds(daemon)?, "the daemon holds {}", secret.display());
    let stat = fs::read_to_string(format!("/proc/{daemon}/stat"))?;
    // Fields behind the name (proc(5)): state, parent, group, session.
    let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' '));
    let session = fields.and_then(|mut fields| fields.nth(3));
    ensure!(session == Some(daemon.to_string().as_str()), "{stat}");
    let memory = fs::metadata(format!("/proc/{daemon}/mem"))?;
    ensure!(memory.uid() == 0, "its user's processes may read it");
    sluice.stop()
}
