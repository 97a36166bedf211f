//! Reloads: all of one, or nothing.

use std::net::TcpListener;
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::field::{L4_V4, L4_V6, WEB_V4};
use rig::http::KeepAlive;
use rig::load::Load;
use rig::sluice::PATIENCE;
use rig::wait;
use rig::world::socket;

use crate::stage::{CONFIGURATION, SECOND, Stage, freeze, last_words};

pub fn a_bad_reload_changes_nothing_and_says_where_it_is_wrong(stage: &mut Stage) -> Result<()> {
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

pub fn reloads_that_many_ask_for_at_once_are_few(stage: &mut Stage) -> Result<()> {
    const ASKED: usize = 60;
    let sluice = stage.start(CONFIGURATION, &[])?;
    let before = sluice.generation()?;
    let begun = Instant::now();
    thread::scope(|scope| {
        let asked = (0..ASKED).map(|_| scope.spawn(|| sluice.command(&["reload"]).map(drop)));
        let asked: Vec<_> = asked.collect();
        asked.into_iter().try_for_each(|one| {
            let done = one.join();
            done.map_err(|_| anyhow::anyhow!("a reload panicked"))?
        })
    })?;
    // One each 100 ms, one at the beginning and one at the end, and what else is due may be a moment early.
    let most = begun.elapsed().as_millis() as u64 / 100 + 3;
    let reloads = sluice.generation()? - before;
    ensure!(
        (1..=most).contains(&reloads),
        "{reloads}, and {most} at most"
    );
    stage.end(sluice)
}

/// An endpoint that never answers: half a second is waited for it before a generation comes into force.
fn with_a_silent_endpoint() -> String {
    CONFIGURATION.replace(
        "[\"10.77.1.2:7000\"",
        "[\"10.77.1.99:7000\", \"10.77.1.2:7000\"",
    )
}

pub fn a_reload_that_is_asked_for_during_another_reads_what_is_there_by_then(
    stage: &mut Stage,
) -> Result<()> {
    const THIRD: &str = "[[listener]]\nname = \"third\"\naddress = \"203.0.113.10:8081\"\n";
    let sluice = stage.start(CONFIGURATION, &[])?;
    let sockets = sluice.listening_inodes()?.len();
    let silent = with_a_silent_endpoint();
    stage.write(&format!("{silent}{THIRD}"))?;
    sluice.signal(Signal::SIGHUP)?;
    wait::until_true("the sockets of the reload", PATIENCE, || {
        sluice
            .listening_inodes()
            .is_ok_and(|now| now.len() > sockets)
    })?;
    stage.write(&format!("{CONFIGURATION}{THIRD}{SECOND}"))?;
    let said = sluice.command(&["reload"])?;
    ensure!(said.contains('3'), "it was answered with another's: {said}");
    stage.echo(L4_V4, 7001)?;
    stage.end(sluice)
}

pub fn a_reload_during_the_start_of_a_new_daemon_waits_for_it(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(&with_a_silent_endpoint(), &[])?;
    let old = sluice.kill_daemon()?;
    wait::until_true("a new daemon", PATIENCE, || {
        sluice.daemon().is_ok_and(|pid| pid != old)
    })?;
    sluice.signal(Signal::SIGHUP)?;
    wait::until_true("the next generation", PATIENCE, || {
        sluice.generation().is_ok_and(|now| now == 2)
    })?;
    let to = socket(WEB_V4, 8080)?;
    let get = || KeepAlive::connect(None, to)?.get("shop.test", "/", "");
    ensure!(stage.field.client.inside(get)?.status == 204);
    stage.end(sluice)
}

pub fn a_reload_adds_and_removes_listeners_and_a_taken_port_refuses_all_of_it(
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

pub fn a_write_that_fails_half_way_is_taken_back(stage: &mut Stage) -> Result<()> {
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

pub fn what_living_flows_and_attached_programs_stand_on_does_not_change(
    stage: &mut Stage,
) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    let load = Load::streams(&stage.field.client, socket(L4_V4, 7000)?, 4)?;
    load.wait_for(50)?;
    for (before, after, why) in [
        (
            "20000-29999",
            "20000-29998",
            "datapath.nat cannot change while flows use it",
        ),
        (", \"origin3\"]", "]", "change only when Sluice starts"),
    ] {
        stage.write(&CONFIGURATION.replace(before, after))?;
        let Err(said) = sluice.command(&["reload"]) else {
            anyhow::bail!("{after} was reloaded");
        };
        ensure!(format!("{said:#}").contains(why), "{said:#}");
    }
    load.wait_for(50)?;
    load.stop()?.expect_no_failure()?;
    stage.echo(L4_V4, 7000)?;
    stage.end(sluice)
}

pub fn a_reload_that_does_not_fit_the_maps_is_refused_whole(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &["--set", "datapath.listeners_max=64"])?;
    let addresses: Vec<String> = (7001..7100)
        .map(|port| format!("\"{L4_V4}:{port}\""))
        .collect();
    let many = format!(
        "[[listener]]\nname = \"many\"\naddress = [{}]\nforward = {{ upstream = \"echo\", via = \"nat\" }}\n",
        addresses.join(", ")
    );
    stage.write(&format!("{CONFIGURATION}{many}"))?;
    let Err(said) = sluice.command(&["reload"]) else {
        anyhow::bail!("99 listeners fit into a table of 64");
    };
    ensure!(
        format!("{said:#}").contains("datapath.listeners_max"),
        "{said:#}"
    );
    ensure!(stage.echo(L4_V4, 7001).is_err(), "half of it was applied");
    stage.echo(L4_V4, 7000)?;
    stage.end(sluice)
}

pub fn a_daemon_that_dies_over_a_reload_leaves_the_generation_before(
    stage: &mut Stage,
) -> Result<()> {
    let mut sluice = stage.start(CONFIGURATION, &[])?;
    let sockets = sluice.listening_inodes()?;
    let daemon = sluice.daemon()?;
    let pid = Pid::from_raw(daemon as i32);
    kill(pid, Signal::SIGSTOP)?;
    stage.write(&format!(
        "{CONFIGURATION}[[listener]]\nname = \"third\"\naddress = \"203.0.113.10:8081\"\n"
    ))?;
    sluice.signal(Signal::SIGHUP)?;
    wait::until_true("the sockets of the reload", PATIENCE, || {
        sluice
            .listening_inodes()
            .is_ok_and(|now| now.len() > sockets.len())
    })?;
    kill(pid, Signal::SIGKILL)?;
    sluice.wait_for_other_daemon(daemon)?;
    ensure!(sluice.generation()? == 1, "{}", last_words());
    ensure!(sluice.listening_inodes()? == sockets, "{}", last_words());
    ensure!(
        last_words().contains("died over generation 2"),
        "{}",
        last_words()
    );
    sluice.command(&["reload"])?;
    ensure!(sluice.generation()? == 2);
    stage.end(sluice)
}
