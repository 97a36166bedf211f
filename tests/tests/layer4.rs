//! Layer 4 through whole proxies: packets balanced by XDP, and what becomes of them when the daemon dies.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::capture::Captures;
use rig::client::{Tally, tcp_echo, udp_echo};
use rig::field::{L4_V4, L4_V6};
use rig::ledger::Ledger;
use rig::load::Load;
use rig::origin::ECHO_PORT;
use rig::world::{World, socket};
use rig::{harness, process, tests, wait};

const CONFIGURATION: &str = r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "native"
nat        = { source = ["10.77.9.1", "fd77:9::1"], ports = "20000-39999" }

[[listener]]
name    = "echo"
address = ["203.0.113.20:7000/tcp", "203.0.113.20:7000/udp", "[2001:db8::20]:7000/tcp", "[2001:db8::20]:7000/udp"]
forward = { upstream = "echo", via = "nat" }

[[listener]]
name    = "many"
address = ["203.0.113.64/30:7100-7101", "203.0.113.80:*", "[2001:db8::80]:*/udp", "[2001:db8::90]/126:7100/udp"]
forward = { upstream = "echo", via = "nat" }

[[listener]]
name    = "wide"
address = ["198.51.0.0/16:7000-7099", "[2001:db8:64::]/64:7000/tcp", "[2001:db8:64::]/64:7000/udp"]
forward = { upstream = "echo", via = "nat" }

[[upstream]]
name      = "echo"
endpoints = [
    "10.77.1.2:7000", "10.77.2.2:7000", "10.77.3.2:7000",
    "[fd77:1::2]:7000", "[fd77:2::2]:7000", "[fd77:3::2]:7000",
]
"#;

fn main() -> ExitCode {
    harness::main(
        || World::build(CONFIGURATION),
        World::last_words,
        tests![
            tcp_and_udp_of_both_families_reach_three_origins_and_the_ledger_balances,
            prefixes_and_several_ports_are_forwarded_as_one_address_is,
            every_address_of_a_wide_prefix_is_forwarded_until_it_is_not_configured_any_more,
            every_daemon_thread_has_no_capability,
            a_daemon_killed_under_load_loses_no_forwarded_packet,
            a_terminated_keeper_leaves_forwarding_on_and_a_new_one_adopts_it,
            an_interface_that_went_and_came_back_is_attached_again,
        ],
    )
}

fn tcp_and_udp_of_both_families_reach_three_origins_and_the_ledger_balances(
    world: &mut World,
) -> Result<()> {
    let ledger = Ledger::open(&world.field, &world.sluice)?;
    let captures = Captures::start(world.field.far_ends())?;
    let mut tallies = vec![];
    for address in [L4_V4, L4_V6] {
        let to = socket(address, ECHO_PORT)?;
        let (tcp, udp) = world.field.client.inside(|| {
            let (mut tcp, mut udp) = (Tally::default(), Tally::default());
            for number in 0..60_u8 {
                tcp.count(tcp_echo(to, 20_000, number));
                udp.count(udp_echo(to, &[number; 100]));
            }
            (tcp, udp)
        });
        tallies.extend([(address, tcp), (address, udp)]);
    }
    // First what arrived: it tells why a connection failed.
    let right = captures.finish()?;
    for (address, tally) in tallies {
        tally.expect_no_failure().context(address)?;
        ensure!(tally.per_endpoint.len() == 3, "{:?}", tally.per_endpoint);
    }
    let account = ledger.close(&world.field, &world.sluice)?;
    ensure!(account.balanced && account.received > 1000, "{account:?}");
    let emitted = account.verdicts["forward"] + account.verdicts["return"];
    ensure!(right >= emitted, "{right} frames seen: {account:?}");
    ensure!(
        account.verdicts.contains_key("forward") && account.verdicts.contains_key("return"),
        "{account:?}"
    );
    Ok(())
}

fn prefixes_and_several_ports_are_forwarded_as_one_address_is(world: &mut World) -> Result<()> {
    let mut tally = Tally::default();
    world.field.client.inside(|| {
        for to in [
            "203.0.113.64:7100",
            "203.0.113.67:7101",
            "203.0.113.80:1",
            "203.0.113.80:65535",
        ] {
            tally.count(to.parse().context(to).and_then(|to| tcp_echo(to, 5000, 7)));
        }
        for to in ["[2001:db8::80]:53", "[2001:db8::93]:7100"] {
            tally.count(to.parse().context(to).and_then(|to| udp_echo(to, b"hello")));
        }
    });
    tally.expect_no_failure()
}

fn every_address_of_a_wide_prefix_is_forwarded_until_it_is_not_configured_any_more(
    world: &mut World,
) -> Result<()> {
    let ledger = Ledger::open(&world.field, &world.sluice)?;
    let tally = world.field.client.inside(|| {
        let mut tally = Tally::default();
        for number in 0..40_u64 {
            let [.., a, b] = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
            let v4 = SocketAddr::from(([198, 51, a, b], 7000 + number as u16));
            let host = [a, b, b, a].map(u16::from);
            let v6 = [0x2001, 0xdb8, 0x64, 0, host[0], host[1], host[2], host[3]];
            let v6 = SocketAddr::from((v6, 7000));
            tally.count(tcp_echo(v4, 5000, a));
            tally.count(tcp_echo(v6, 5000, b));
            tally.count(udp_echo(v6, &[a; 100]));
        }
        tally
    });
    tally.expect_no_failure()?;
    let account = ledger.close(&world.field, &world.sluice)?;
    ensure!(account.balanced, "{account:?}");

    let begin = CONFIGURATION.find("[[listener]]\nname    = \"wide\"");
    let end = CONFIGURATION.find("[[upstream]]");
    let (begin, end) = begin.zip(end).context("the listener")?;
    world.write(&[&CONFIGURATION[..begin], &CONFIGURATION[end..]].concat())?;
    world.sluice.reload()?;
    let is_answered = |world: &World| {
        world.field.client.inside(|| -> Result<bool> {
            let socket = UdpSocket::bind("[::]:0")?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            socket.send_to(b"x", "[2001:db8:64::5:1]:7000")?;
            Ok(socket.recv(&mut [0; 10]).is_ok())
        })
    };
    ensure!(!is_answered(world)?, "a prefix that is gone is forwarded");
    world.write(CONFIGURATION)?;
    world.sluice.reload()?;
    ensure!(
        is_answered(world)?,
        "a prefix that came back is not forwarded"
    );
    Ok(())
}

fn every_daemon_thread_has_no_capability(world: &mut World) -> Result<()> {
    let daemon = world.sluice.daemon()?;
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{daemon}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let fields: BTreeMap<&str, &str> = status
            .lines()
            .filter_map(|line| line.split_once(":\t"))
            .collect();
        for name in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            ensure!(
                fields.get(name) == Some(&"0000000000000000"),
                "{name} of {:?} is {:?}",
                fields.get("Name"),
                fields.get(name)
            );
        }
        ensure!(
            fields.get("NoNewPrivs") == Some(&"1"),
            "{:?} may gain privileges",
            fields.get("Name")
        );
        ensure!(
            !fields
                .get("Uid")
                .is_some_and(|ids| ids.split('\t').any(|id| id == "0")),
            "{:?} is root",
            fields.get("Name")
        );
        threads += 1;
    }
    ensure!(
        threads >= 2,
        "{threads} threads: a control thread and a worker at least"
    );
    Ok(())
}

fn a_daemon_killed_under_load_loses_no_forwarded_packet(world: &mut World) -> Result<()> {
    let client = &world.field.client;
    let datagrams = Load::datagrams(client, socket(L4_V4, ECHO_PORT)?, 4)?;
    let datagrams6 = Load::datagrams(client, socket(L4_V6, ECHO_PORT)?, 2)?;
    let streams = Load::streams(client, socket(L4_V4, ECHO_PORT)?, 8)?;
    datagrams.wait_for(200)?;
    streams.wait_for(200)?;

    let old = world.sluice.kill_daemon()?;
    // New connections too are forwarded while there is no daemon.
    let mut new = Tally::default();
    for number in 0..50 {
        new.count(client.inside(|| tcp_echo(socket(L4_V4, ECHO_PORT)?, 4000, number)));
    }
    datagrams.wait_for(200)?;
    world.sluice.wait_for_other_daemon(old)?;
    datagrams.wait_for(200)?;
    streams.wait_for(200)?;

    new.expect_no_failure().context("new connections")?;
    for (what, load) in [
        ("datagrams", datagrams),
        ("IPv6 datagrams", datagrams6),
        ("streams", streams),
    ] {
        let tally = load.stop()?;
        ensure!(tally.tried > 100, "{what}: only {}", tally.tried);
        tally.expect_no_failure().context(what)?;
    }
    Ok(())
}

fn a_terminated_keeper_leaves_forwarding_on_and_a_new_one_adopts_it(
    world: &mut World,
) -> Result<()> {
    let daemon = world.sluice.daemon()?;
    let load = Load::streams(&world.field.client, socket(L4_V4, ECHO_PORT)?, 4)?;
    load.wait_for(100)?;
    world.sluice.keeper().signal(Signal::SIGTERM)?;
    let status = world.sluice.keeper().wait(rig::sluice::PATIENCE)?;
    ensure!(status.success(), "SIGTERM ended it with {status}");
    wait::until_true("the daemon to end", Duration::from_secs(5), || {
        !process::runs(daemon)
    })?;
    load.wait_for(200)
        .context("forwarding without any process of ours")?;
    world.sluice =
        rig::sluice::Sluice::start(&world.field.edge, &world.folder.join("sluice.toml"))?;
    load.wait_for(200)?;
    load.stop()?.expect_no_failure()
}

fn an_interface_that_went_and_came_back_is_attached_again(world: &mut World) -> Result<()> {
    let to = socket(L4_V4, ECHO_PORT)?;
    let lost = |world: &World| {
        let status = world.sluice.status().unwrap_or_default();
        status.pointer("/datapath/lost").cloned()
    };
    world.field.edge.ip("link del origin1")?;
    wait::until_true("the daemon to notice", Duration::from_secs(10), || {
        lost(world) == Some(serde_json::json!(["origin1"]))
    })?;
    // The other origins have its flows meanwhile.
    wait::until_true("the others to serve", Duration::from_secs(10), || {
        let echo = |seed| world.field.client.inside(|| tcp_echo(to, 100, seed));
        (0..20).all(|seed| echo(seed).is_ok_and(|(name, _)| name != "origin1"))
    })?;
    world.field.rejoin(1)?;
    wait::until_true(
        "the kernel half to be back",
        Duration::from_secs(10),
        || lost(world) == Some(serde_json::json!([])),
    )?;
    wait::until_true("the origin to serve again", Duration::from_secs(20), || {
        let echo = |seed| world.field.client.inside(|| tcp_echo(to, 5000, seed));
        (0..20).any(|seed| echo(seed).is_ok_and(|(name, _)| name == "origin1"))
    })?;
    ensure!(
        world.sluice.log().contains("XDP attached again"),
        "{}",
        world.sluice.log()
    );
    Ok(())
}
