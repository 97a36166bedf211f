//! A running Sluice: reloads good and bad, signals, daemons and keepers that die, bans by hand.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::client::{self, Tally, syn_is_ignored, tcp_echo};
use rig::field::{ATTACKER_V4, ATTACKER_V6, CLIENT_V4, Field, L4_V4, L4_V6, WEB_V4};
use rig::harness::Skip;
use rig::http::KeepAlive;
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
            a_daemon_that_dies_over_a_reload_leaves_the_generation_before,
            draining_lets_an_exchange_end_and_takes_no_new_connection,
            an_endpoint_whose_link_is_down_gets_no_new_flows_until_it_is_back,
            a_ban_by_hand_stops_that_source_and_ends_by_itself,
            a_ban_closes_what_the_source_has_open_with_and_without_a_datapath,
            a_ban_of_an_ipv6_source_is_as_wide_as_its_network,
            bans_that_make_no_sense_or_do_not_fit_are_refused,
            a_reload_that_does_not_fit_the_maps_is_refused_whole,
            a_connection_goes_to_the_worker_of_the_cpu_that_took_it,
            maps_of_another_size_are_not_adopted,
            the_keeper_has_the_capabilities_that_it_needs_and_no_other,
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

fn a_daemon_that_dies_over_a_reload_leaves_the_generation_before(stage: &mut Stage) -> Result<()> {
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

fn draining_lets_an_exchange_end_and_takes_no_new_connection(stage: &mut Stage) -> Result<()> {
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

fn an_endpoint_whose_link_is_down_gets_no_new_flows_until_it_is_back(
    stage: &mut Stage,
) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    let tally = |rounds: u8| {
        let mut tally = Tally::default();
        let to = socket(L4_V4, 7000)?;
        for number in 0..rounds {
            tally.count(stage.field.client.inside(|| tcp_echo(to, 100, number)));
        }
        anyhow::Ok(tally)
    };
    ensure!(tally(40)?.per_endpoint.len() == 2);
    let origin = &stage.field.origins[0];
    origin.ip("link set eth0 down")?;
    let resolved = |wanted: bool| {
        wait::until_true("what the neighbour's state is to show", PATIENCE, || {
            let status = sluice.status().unwrap_or_default();
            let endpoint = status.pointer("/upstreams/0/endpoints/0/resolved");
            endpoint.and_then(Value::as_bool) == Some(wanted)
        })
    };
    resolved(false)?;
    let alone = tally(40)?;
    alone.expect_no_failure()?;
    ensure!(alone.per_endpoint.len() == 1, "{:?}", alone.per_endpoint);
    // What the link took with it: its routes and its IPv6 address.
    origin.ip("link set eth0 up\nroute add default via 10.77.1.1\naddress replace fd77:1::2/64 dev eth0 nodad\nroute add default via fd77:1::1")?;
    resolved(true)?;
    let both = tally(40)?;
    both.expect_no_failure()?;
    ensure!(both.per_endpoint.len() == 2, "{:?}", both.per_endpoint);
    stage.end(sluice)
}

fn a_ban_closes_what_the_source_has_open_with_and_without_a_datapath(
    stage: &mut Stage,
) -> Result<()> {
    let to = socket(WEB_V4, 8080)?;
    let (from, other) = (Some(ATTACKER_V4.parse()?), Some(CLIENT_V4.parse()?));
    for text in [CONFIGURATION, PLAIN] {
        let sluice = stage.start(text, &[])?;
        let connect = |from| stage.field.client.inside(|| KeepAlive::connect(from, to));
        let (mut theirs, mut others) = (connect(from)?, connect(other)?);
        ensure!(theirs.get("web.test", "/", "")?.status == 204);
        ensure!(others.get("web.test", "/", "")?.status == 204);
        sluice.command(&["ban", "add", ATTACKER_V4, "--for", "1h"])?;
        wait::until_true("the connection to be closed", PATIENCE, || {
            let metrics = sluice.metrics().unwrap_or_default();
            metrics.value("sluice_guard_connections_closed_total") == 1.0
        })?;
        ensure!(theirs.get("web.test", "/", "").is_err(), "it is open still");
        if text == CONFIGURATION {
            ensure!(
                stage.is_ignored(ATTACKER_V4, WEB_V4)?,
                "its SYN is answered"
            );
        } else {
            let again = connect(from).and_then(|mut again| again.get("web.test", "/", ""));
            ensure!(again.is_err(), "a banned source is answered");
        }
        ensure!(others.get("web.test", "/", "")?.status == 204, "others are");
        sluice.command(&["ban", "del", ATTACKER_V4])?;
        ensure!(connect(from)?.get("web.test", "/", "")?.status == 204);
        stage.end(sluice)?;
    }
    Ok(())
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
    for number in 0..1024_u32 {
        let source = Ipv4Addr::from_bits(0xc633_0000 + number);
        ensure!(post_ban(source)?.starts_with("HTTP/1.1 200"), "{source}");
    }
    let one_more = post_ban(Ipv4Addr::new(192, 0, 2, 1))?;
    ensure!(
        one_more.starts_with("HTTP/1.1 409") && one_more.contains("datapath.bans_max"),
        "{one_more}"
    );
    // One that is there already can still be made longer, and the table is as usable as before.
    ensure!(post_ban(Ipv4Addr::from_bits(0xc633_0000))?.starts_with("HTTP/1.1 200"));
    sluice.command(&["ban", "del", "198.51.0.0"])?;
    sluice.command(&["ban", "add", ATTACKER_V4])?;
    ensure!(stage.is_ignored(ATTACKER_V4, L4_V4)?, "it is not refused");
    stage.echo(L4_V4, 7000)?;
    stage.end(sluice)
}

fn a_reload_that_does_not_fit_the_maps_is_refused_whole(stage: &mut Stage) -> Result<()> {
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

fn a_connection_goes_to_the_worker_of_the_cpu_that_took_it(stage: &mut Stage) -> Result<()> {
    const CONNECTIONS: u64 = 20;
    if available_parallelism()?.get() < 2 {
        return Err(Skip("there is one CPU".to_owned()).into());
    }
    let sluice = stage.start(CONFIGURATION, &["--workers", "2"])?;
    // Nobody accepts, so that each socket's queue shows what came to it.
    let daemon = Pid::from_raw(sluice.daemon()? as i32);
    kill(daemon, Signal::SIGSTOP)?;
    let mut taken_before = vec![0, 0];
    let mut open = Vec::new();
    for cpu in 0..2 {
        open.extend(stage.field.client.inside(|| -> Result<Vec<TcpStream>> {
            let mut set = CpuSet::new();
            set.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &set).context("run on one CPU")?;
            let to = socket(WEB_V4, 8080)?;
            (0..CONNECTIONS)
                .map(|_| client::connect(None, to))
                .collect()
        })?);
        let taken = stage.queues(8080)?;
        let mut new: Vec<u64> = taken
            .iter()
            .zip(&taken_before)
            .map(|(a, b)| a - b)
            .collect();
        new.sort_unstable();
        ensure!(
            new == [0, CONNECTIONS],
            "CPU {cpu}: {taken_before:?}, then {taken:?}"
        );
        taken_before = taken;
    }
    kill(daemon, Signal::SIGCONT)?;
    ensure!(
        taken_before == [CONNECTIONS, CONNECTIONS],
        "{taken_before:?}"
    );
    drop(open);
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

fn the_keeper_has_the_capabilities_that_it_needs_and_no_other(stage: &mut Stage) -> Result<()> {
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

    /// Connections that wait to be accepted, for each socket that listens on a port of the edge, in a lasting order.
    fn queues(&self, port: u16) -> Result<Vec<u64>> {
        let table = self
            .field
            .edge
            .inside(|| fs::read_to_string("/proc/thread-self/net/tcp"))?;
        // Columns (proc(5)): 1 the local address, 3 the state (0A is LISTEN), 4 both queues, 9 the inode.
        let mut queues: Vec<(u64, u64)> = table
            .lines()
            .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
            .filter(|columns| columns.get(3) == Some(&"0A"))
            .filter(|columns| columns[1].ends_with(&format!(":{port:04X}")))
            .filter_map(|columns| {
                let (_, received) = columns.get(4)?.split_once(':')?;
                let inode = columns.get(9)?.parse().ok()?;
                Some((inode, u64::from_str_radix(received, 16).ok()?))
            })
            .collect();
        queues.sort_unstable();
        Ok(queues.into_iter().map(|(_, queue)| queue).collect())
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

/// Bans a source for ten minutes by the admin socket: the whole answer.
fn post_ban(source: Ipv4Addr) -> Result<String> {
    let body = format!("{{\"source\":\"{source}\",\"for\":\"10m\"}}");
    let mut stream = UnixStream::connect("/run/sluice/main/admin.sock")?;
    write!(
        stream,
        "POST /bans HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(std::io::read_to_string(stream)?)
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
