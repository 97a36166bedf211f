//! Layer 4 through whole proxies by every form of sending on: `nat`, and `direct`, `ipip` and `gue` with origins that answer the client by themselves.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use proxy_ebpf::object;
use rig::capture::Captures;
use rig::client::{PATIENCE, Tally, exchange_datagram, split_echo, tcp_echo, udp_echo, udp_socket};
use rig::field::{Field, L4_V4, L4_V6, NAT_V4, at};
use rig::ledger::Ledger;
use rig::load::Load;
use rig::namespace::Namespace;
use rig::origin::{ECHO_PORT, Origin};
use rig::return_path::{ReturnPath, faults};
use rig::sluice::Sluice;
use rig::world::{World, socket};
use rig::{harness, tests, wait};

/// Endpoints of both families: every form but NAT crosses from one to the other.
const MIXED: [&str; 3] = ["10.77.1.2:7000", "[fd77:2::2]:7000", "10.77.3.2:7000"];
/// Every origin in both: NAT stays in the family.
const BOTH: [&str; 6] = [
    "10.77.1.2:7000",
    "10.77.2.2:7000",
    "10.77.3.2:7000",
    "[fd77:1::2]:7000",
    "[fd77:2::2]:7000",
    "[fd77:3::2]:7000",
];
/// The forms that leave a packet as it is.
const AS_IT_IS: [&str; 3] = ["direct", "ipip", "gue"];

struct Stage {
    world: World,
    back: ReturnPath,
    /// The mode of XDP.
    mode: &'static str,
}

impl Stage {
    /// Puts the listener's form of forwarding and its endpoints in force.
    fn reload(&self, via: &str, endpoints: &[&str]) -> Result<()> {
        self.reload_with(via, endpoints, "follow")
    }

    fn reload_with(&self, via: &str, endpoints: &[&str], fragments: &str) -> Result<()> {
        let text = configuration(self.mode, via, endpoints, fragments);
        self.world.write(&text)?;
        self.world.sluice.command(&["reload"]).map(drop)
    }
}

fn main() -> ExitCode {
    harness::main(
        || {
            let mut world = World::build(&configuration("native", "direct", &MIXED, "follow"))?;
            let back = ReturnPath::lay(&mut world.field, object::FLOOR)?;
            let_the_edge_refuse(&world.field)?;
            Ok(Stage {
                world,
                back,
                mode: "native",
            })
        },
        |stage| stage.world.last_words(),
        tests![
            tcp_and_udp_of_both_families_reach_endpoints_of_both_by_every_form,
            what_is_too_long_for_the_way_out_is_told_to_its_sender_and_tcp_goes_on,
            segments_announced_by_nat_fit_both_links_so_that_nobody_is_told_anything,
            fragments_follow_or_pass_or_are_dropped_by_the_listeners_word,
            an_endpoint_that_is_taken_away_loses_no_flow_and_gets_no_new_one,
            an_endpoint_behind_a_gateway_is_refused_for_direct,
            the_generic_mode_does_the_same,
            an_endpoint_that_is_this_host_itself_is_left_to_its_linux,
        ],
    )
}

/// Who is refused by the edge's own Linux is told so each time: it asks for the client's MAC from a link-local address, for
/// the listener's is none of the link.
fn let_the_edge_refuse(field: &Field) -> Result<()> {
    field.client.set("ipv6/conf/eth0/accept_ra", "0")?;
    field.client.ip("address add fe80::2/64 dev eth0 nodad")?;
    field.edge.ip("address add fe80::1/64 dev client0 nodad")?;
    field.edge.set("ipv4/icmp_ratelimit", "0")?;
    field.edge.set("ipv6/icmp/ratelimit", "0")
}

fn configuration(mode: &str, via: &str, endpoints: &[&str], fragments: &str) -> String {
    format!(
        r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "{mode}"
nat        = {{ source = ["10.77.9.1", "fd77:9::1"], ports = "20000-39999" }}
tunnel     = {{ source = ["10.77.9.1", "fd77:9::1"] }}

[[listener]]
name    = "echo"
address = ["{L4_V4}:7000/tcp", "{L4_V4}:7000/udp", "[{L4_V6}]:7000/tcp", "[{L4_V6}]:7000/udp"]
forward = {{ upstream = "echo", via = "{via}", fragments = "{fragments}" }}

[[upstream]]
name      = "echo"
endpoints = {endpoints:?}
"#
    )
}

fn tcp_and_udp_of_both_families_reach_endpoints_of_both_by_every_form(
    stage: &mut Stage,
) -> Result<()> {
    traffic_by_every_form(stage)
}

fn traffic_by_every_form(stage: &Stage) -> Result<()> {
    for via in ["nat", "direct", "ipip", "gue"] {
        let endpoints = if via == "nat" { &BOTH[..] } else { &MIXED };
        stage.reload(via, endpoints)?;
        traffic(stage, via).with_context(|| format!("via {via}"))?;
    }
    Ok(())
}

/// Connections with full-sized segments and datagrams of both families, to three origins; then the accounts of everybody
/// who saw a packet.
fn traffic(stage: &Stage, via: &str) -> Result<()> {
    let (world, field) = (&stage.world, &stage.world.field);
    let (ledger, seen) = (Ledger::open(field, &world.sluice)?, stage.back.seen()?);
    forget_sizes(field)?;
    // Origins that unwrap do so before they look; the outer headers are what their program looks at.
    let captures = Captures::start(field.far_ends())?;
    let faults_before = faults(field)?;
    ensure!(faults_before.len() > 7, "{faults_before:?}");
    for address in [L4_V4, L4_V6] {
        let to = socket(address, ECHO_PORT)?;
        let (tcp, udp) = field.client.inside(|| {
            let (mut tcp, mut udp) = (Tally::default(), Tally::default());
            for number in 0..40_u8 {
                if !tcp.failures.is_empty() || !udp.failures.is_empty() {
                    break;
                }
                // What does not fit into the tunnel is told to the client, which then sends less.
                tcp.count(tcp_echo(to, 20_000, number));
                udp.count(udp_echo(to, &[number; 100]));
            }
            (tcp, udp)
        });
        for tally in [tcp, udp] {
            tally
                .expect_no_failure()
                .with_context(|| address.to_owned())?;
            ensure!(tally.per_endpoint.len() == 3, "{:?}", tally.per_endpoint);
        }
    }
    let account = ledger.close(field, &world.sluice)?;
    let said = format!("{account:?}");
    let has = |verdict| account.verdicts.contains_key(verdict);
    ensure!(account.balanced && has("forward"), "{said}");
    ensure!(has("return") == (via == "nat"), "{said}");
    ensure!(has("too_big") == (via == "ipip" || via == "gue"), "{said}");
    let forwarded = account.verdicts["forward"];
    let right = captures.finish()?;
    ensure!(right >= forwarded, "{right} frames seen: {said}");
    for (kind, before) in &seen {
        let count = stage.back.seen()?[kind] - before;
        let right = match *kind {
            "ipip" | "gue" if *kind == via => count == forwarded,
            // What the origins' Linux says to neighbours is not forwarded.
            "plain" if via == "nat" || via == "direct" => count >= forwarded,
            "plain" => true,
            _ => count == 0,
        };
        ensure!(right, "origins saw {count} packets as {kind}: {said}");
    }
    ensure!(faults(field)? == faults_before, "{:?}", faults(field)?);
    Ok(())
}

/// Between links of different MTU a NAT is the router that has to tell, where it may not lower the segments that SYNs announce;
/// the peers announce segments as if all links were alike.
fn what_is_too_long_for_the_way_out_is_told_to_its_sender_and_tcp_goes_on(
    stage: &mut Stage,
) -> Result<()> {
    let set = |stage: &Stage, clamp| {
        let setting = format!("datapath.mss_clamp={clamp}");
        stage.world.sluice.command(&["sysctl", "-w", &setting])
    };
    set(stage, "off")?;
    let told = between_unlike_links(stage, true);
    set(stage, "auto")?;
    told
}

/// A segment size that fits is announced instead, and nothing is too long.
fn segments_announced_by_nat_fit_both_links_so_that_nobody_is_told_anything(
    stage: &mut Stage,
) -> Result<()> {
    between_unlike_links(stage, false)
}

fn between_unlike_links(stage: &Stage, is_told: bool) -> Result<()> {
    for narrow in [Narrow::Endpoints, Narrow::Client] {
        narrow.set(stage, 1300)?;
        stage.reload("nat", &BOTH)?;
        let told = told_by_nat(stage, is_told);
        narrow.set(stage, 1500)?;
        told.with_context(|| format!("{narrow:?}"))?;
    }
    stage.reload("nat", &BOTH)
}

/// Which links of the edge are the narrow ones.
#[derive(Clone, Copy, Debug)]
enum Narrow {
    Endpoints,
    Client,
}

impl Narrow {
    fn set(self, stage: &Stage, mtu_bytes: u32) -> Result<()> {
        let field = &stage.world.field;
        let links: Vec<(&str, &Namespace)> = match self {
            Self::Client => vec![("client0", &field.client)],
            Self::Endpoints => ["origin1", "origin2", "origin3"]
                .into_iter()
                .zip(&field.origins)
                .collect(),
        };
        for (link, far) in links {
            field.edge.ip(&format!("link set {link} mtu {mtu_bytes}"))?;
            far.ip(&format!("link set eth0 mtu {mtu_bytes}"))?;
            for (family, mss) in [("-4", 1460), ("-6", 1440)] {
                let routes = far.run(&["ip", family, "route", "show", "default"])?;
                let route = routes.trim().split(" advmss").next().unwrap_or_default();
                let mut words = vec!["ip", family, "route", "replace"];
                words.extend(route.split(' ').filter(|word| !word.is_empty()));
                let mss = mss.to_string();
                words.extend(["advmss", &mss]);
                far.run(&words)?;
            }
        }
        Ok(())
    }
}

fn told_by_nat(stage: &Stage, is_told: bool) -> Result<()> {
    let (world, field) = (&stage.world, &stage.world.field);
    forget_sizes(field)?;
    let before = faults(field)?;
    for address in [L4_V4, L4_V6] {
        let to = socket(address, ECHO_PORT)?;
        if !is_told {
            until_links_are_known(stage, to)?;
        }
        let ledger = Ledger::open(field, &world.sluice)?;
        let mut tally = Tally::default();
        for number in 0..12 {
            tally.count(field.client.inside(|| tcp_echo(to, 40_000, number)));
        }
        tally
            .expect_no_failure()
            .with_context(|| address.to_owned())?;
        let account = ledger.close(field, &world.sluice)?;
        let told = account.verdicts.contains_key("too_big");
        ensure!(
            account.balanced && told == is_told,
            "{address}: {account:?}"
        );
    }
    ensure!(faults(field)? == before, "{:?}", faults(field)?);
    Ok(())
}

/// Waits until connections are told nothing: the edge looks at its links once a second.
fn until_links_are_known(stage: &Stage, to: SocketAddr) -> Result<()> {
    let told = || -> Result<f64> {
        let metrics = stage.world.sluice.metrics()?;
        Ok(metrics.labelled("sluice_datapath_packets_total", "verdict", "too_big"))
    };
    wait::until_true("the edge to know its links", PATIENCE, || {
        let before = told();
        let client = &stage.world.field.client;
        let passed = (0..3).all(|number| client.inside(|| tcp_echo(to, 40_000, number)).is_ok());
        let _ = forget_sizes(&stage.world.field);
        passed
            && before
                .ok()
                .zip(told().ok())
                .is_some_and(|(before, after)| before == after)
    })
}

/// Lets everybody forget what sizes they were told.
fn forget_sizes(field: &Field) -> Result<()> {
    for namespace in field.far_ends() {
        namespace.run(&["ip", "-4", "route", "flush", "cache"])?;
        namespace.run(&["ip", "-6", "route", "flush", "cache"])?;
    }
    Ok(())
}

fn fragments_follow_or_pass_or_are_dropped_by_the_listeners_word(stage: &mut Stage) -> Result<()> {
    let client = &stage.world.field.client;
    for via in ["nat", "direct", "ipip", "gue"] {
        let endpoints = if via == "nat" { &BOTH[..] } else { &MIXED };
        for address in [L4_V4, L4_V6] {
            let to = socket(address, ECHO_PORT)?;
            stage.reload(via, endpoints)?;
            // So that the client knows what fits: a datagram is sent once.
            let mut learned = Tally::default();
            for number in 0..12 {
                learned.count(client.inside(|| tcp_echo(to, 20_000, number)));
            }
            learned.expect_no_failure()?;
            let verdicts = fragmented(stage, to, Answer::Echo)?;
            ensure!(verdicts.contains_key("forward"), "{verdicts:?}");

            stage.reload_with(via, endpoints, "pass")?;
            let verdicts = fragmented(stage, to, Answer::Refused)?;
            ensure!(verdicts.contains_key("unsupported"), "{verdicts:?}");

            stage.reload_with(via, endpoints, "drop")?;
            let verdicts = fragmented(stage, to, Answer::None)?;
            let dropped = verdicts.get("fragment_refused").copied();
            ensure!(dropped.is_some_and(|count| count >= 3), "{verdicts:?}");
        }
    }
    stage.reload("direct", &MIXED)
}

/// What a client hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Echo,
    /// The edge's own Linux has no socket there.
    Refused,
    None,
}

/// Sends a datagram of several fragments after a small one, which is answered always; gives the verdicts.
fn fragmented(stage: &Stage, to: SocketAddr, wanted: Answer) -> Result<BTreeMap<String, u64>> {
    let (world, field) = (&stage.world, &stage.world.field);
    let ledger = Ledger::open(field, &world.sluice)?;
    let large: Vec<u8> = (0..4000_u32).map(|index| (index * 7) as u8).collect();
    let heard = field.client.inside(|| -> Result<Answer> {
        let socket = udp_socket(to)?;
        exchange_datagram(&socket, b"small")?;
        if wanted == Answer::None {
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        }
        socket.send(&large)?;
        let mut buffer = vec![0; 65_536];
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let (_, back) = split_echo(&buffer[..length])?;
                ensure!(back == large, "the echoed datagram differs");
                Ok(Answer::Echo)
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(Answer::Refused),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Answer::None),
            Err(error) => Err(error.into()),
        }
    })?;
    let account = ledger.close(field, &world.sluice)?;
    ensure!(
        account.balanced && heard == wanted,
        "{to}: {heard:?} where it should be {wanted:?}: {account:?}"
    );
    Ok(account.verdicts)
}

fn an_endpoint_that_is_taken_away_loses_no_flow_and_gets_no_new_one(
    stage: &mut Stage,
) -> Result<()> {
    let world = &stage.world;
    for via in AS_IT_IS {
        stage.reload(via, &MIXED)?;
        let client = &world.field.client;
        let loads = [
            Load::streams(client, socket(L4_V4, ECHO_PORT)?, 12)?,
            Load::streams(client, socket(L4_V6, ECHO_PORT)?, 12)?,
            Load::datagrams(client, socket(L4_V4, ECHO_PORT)?, 6)?,
        ];
        loads.iter().try_for_each(|load| load.wait_for(300))?;
        stage.reload(via, &MIXED[1..])?;

        let mut new = Tally::default();
        for number in 0..40 {
            new.count(client.inside(|| tcp_echo(socket(L4_V4, ECHO_PORT)?, 3000, number)));
        }
        new.expect_no_failure()
            .with_context(|| format!("new connections via {via}"))?;
        ensure!(
            !new.per_endpoint.contains_key("origin1") && new.per_endpoint.len() == 2,
            "{:?}",
            new.per_endpoint
        );
        loads.iter().try_for_each(|load| load.wait_for(600))?;
        let mut old = Tally::default();
        for load in loads {
            old.add(&load.stop()?);
        }
        old.expect_no_failure()
            .with_context(|| format!("flows from before, via {via}"))?;
        ensure!(
            old.per_endpoint.contains_key("origin1"),
            "nobody was with the endpoint that went: {:?}",
            old.per_endpoint
        );
    }
    Ok(())
}

fn an_endpoint_behind_a_gateway_is_refused_for_direct(stage: &mut Stage) -> Result<()> {
    let world = &stage.world;
    stage.reload("direct", &MIXED)?;
    world
        .field
        .edge
        .ip("route add 10.99.0.0/24 via 10.77.1.2 dev origin1")?;
    let far = ["10.99.0.2:7000", "10.77.3.2:7000"];
    let Err(said) = stage.reload("direct", &far) else {
        anyhow::bail!("an endpoint behind a gateway was taken");
    };
    let said = format!("{said:#}");
    ensure!(said.contains("behind the gateway 10.77.1.2"), "{said}");
    // What was in force still is, and what can cross gateways is taken.
    wait::until_true("an echo", Duration::from_secs(5), || {
        let to = socket(L4_V4, ECHO_PORT);
        to.is_ok_and(|to| world.field.client.inside(|| udp_echo(to, b"hello")).is_ok())
    })?;
    stage.reload("ipip", &far)
}

fn the_generic_mode_does_the_same(stage: &mut Stage) -> Result<()> {
    let Stage { world, mode, .. } = &mut *stage;
    world.sluice.keeper().signal(Signal::SIGTERM)?;
    world.sluice.keeper().wait(rig::sluice::PATIENCE)?;
    world.sluice.command(&["datapath", "down"])?;
    *mode = "generic";
    world.write(&configuration(mode, "direct", &MIXED, "follow"))?;
    world.sluice = Sluice::start(&world.field.edge, &world.folder.join("sluice.toml"))?;
    traffic_by_every_form(stage)?;
    what_is_too_long_for_the_way_out_is_told_to_its_sender_and_tcp_goes_on(stage)?;
    fragments_follow_or_pass_or_are_dropped_by_the_listeners_word(stage)
}

/// The last one: from then on somebody listens on the edge, whose Linux refused before.
fn an_endpoint_that_is_this_host_itself_is_left_to_its_linux(stage: &mut Stage) -> Result<()> {
    let (world, field) = (&stage.world, &stage.world.field);
    let _origin = Origin::start(&field.edge)?;
    let here = at(NAT_V4, ECHO_PORT);
    let endpoints = [here.as_str(), MIXED[2]];
    let Err(said) = stage.reload("nat", &[endpoints[0], BOTH[5]]) else {
        anyhow::bail!("an endpoint on this host was taken via nat");
    };
    let said = format!("{said:#}");
    ensure!(said.contains("is this host itself"), "{said}");
    for via in AS_IT_IS {
        stage.reload(via, &endpoints)?;
        let ledger = Ledger::open(field, &world.sluice)?;
        let mut names = BTreeMap::<String, u32>::new();
        for address in [L4_V4, L4_V6] {
            let to = socket(address, ECHO_PORT)?;
            for seed in 0..20 {
                let (name, _) = field.client.inside(|| tcp_echo(to, 5000, seed))?;
                *names.entry(name).or_default() += 1;
            }
        }
        ensure!(
            names.len() == 2 && names.contains_key("edge"),
            "via {via}: {names:?}"
        );
        let account = ledger.close(field, &world.sluice)?;
        let local = account.verdicts.get("local").copied().unwrap_or(0);
        ensure!(local > 40, "via {via}: {account:?}");
    }
    Ok(())
}
