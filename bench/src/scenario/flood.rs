//! `packet-rate`: frames that are really sent, through veth pairs; `drop`: the same from sources that are refused.
//!
//! The kernel makes the frames itself (BPF_PROG_TEST_RUN with live frames): a program of the floor object restores each one, gives it
//! the next source and sends it out of the client's interface. Sender, edge and origin are one core's work, so a rate is that of all three.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData, ProgramArray};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use bytemuck::Zeroable;
use nix::net::if_::if_nametoindex;
use proxy_ebpf::abi::{Address, Ban, Guard, guard_bit, name};
use proxy_ebpf::measure::{FRESH_BYTES, Fresh};
use proxy_ebpf::object;
use rig::field::Field;
use rig::namespace::Namespace;
use rig::packet::Frame;
use rig::pass::Pass;
use rig::sandbox;

use super::Bench;
use crate::metric::Metric;
use crate::peer::{Layer, Peer, Site};
use crate::report::{Report, Row};
use crate::say;

/// Frames of one round.
const FRAMES: u32 = 1 << 20;
/// Sources of the flood, one after the other.
const FLOWS: u64 = 4096;
/// The word that the number of the flow is added to: the source of IPv4. Its checksum is wrong then, which only Linux minds.
const SOURCE_AT: u64 = 26;
/// Or the one that ends with the source port, for those who are to forward it.
const PORT_AT: u64 = 32;
/// The first source: 12.0.0.0.
const FIRST: u32 = 0x0c00_0000;
/// Who measures packets by the way.
const FORWARDERS: [&str; 4] = ["sluice", "nftables", "floor/linux", "floor/xdp"];
const BANS: [u32; 3] = [10, 10_000, 1_000_000];

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Value<T>(T);

// SAFETY: a type that is Pod for bytemuck has no padding and any bytes are a value of it.
unsafe impl<T: bytemuck::Pod> aya::Pod for Value<T> {}

/// Makes and sends frames.
struct Flood {
    programs: Ebpf,
    ifindex: u32,
    edge_mac: [u8; 6],
}

/// `packet-rate`: how many of them reach the origin.
pub fn rate(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let field = bench.stage.field()?;
    let mut flood = Flood::prepare(field)?;
    for (case, flows) in [("udp4/1", 1), ("udp4/4096", FLOWS)] {
        if !bench.wants(case) {
            continue;
        }
        turns(bench, report, case, |peer| {
            let (_running, _pass) = start(bench, peer, None)?;
            let site = site();
            let to = if peer.is_floor() {
                site.origin()
            } else {
                site.listen()
            };
            let origin = &field.origins[0];
            flood.send(&field.client, to, (flows, PORT_AT), FRAMES / 16)?;
            let before = received(origin, "eth0")?;
            let elapsed = flood.send(&field.client, to, (flows, PORT_AT), FRAMES)?;
            let arrived = received(origin, "eth0")? - before;
            ensure!(
                arrived >= u64::from(FRAMES) / 10,
                "of {FRAMES} packets {arrived} reached the origin"
            );
            Ok(arrived as f64 / elapsed.as_secs_f64())
        });
    }
    report.remarks.push("who has no XDP program of his own on the edge has an empty one: without it the frames do not arrive".into());
    Ok(())
}

/// `drop`: how many of them are refused, while a client that is not banned goes on asking.
pub fn refuse(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let field = bench.stage.field()?;
    let mut flood = Flood::prepare(field)?;
    let address = site().origin();
    field.origins[0].thread("echo", move || echo(address))?;
    for bans in BANS {
        let case = format!("bans/{bans}");
        if !bench.wants(&case) {
            continue;
        }
        let flows = 1 << u64::from(bans).min(FLOWS).ilog2();
        let mut answers = Vec::new();
        turns(bench, report, &case, |peer| {
            let (_running, _pass) = start(bench, peer, Some(bans))?;
            flood.send(
                &field.client,
                site().listen(),
                (flows, SOURCE_AT),
                FRAMES / 16,
            )?;
            let origin = received(&field.origins[0], "eth0")?;
            let before = received(&field.edge, "client0")?;
            let is_over = Arc::new(AtomicBool::new(false));
            let watched = {
                let (is_over, to) = (
                    is_over.clone(),
                    if peer.is_floor() {
                        site().origin()
                    } else {
                        site().listen()
                    },
                );
                field.client.thread("client", move || watch(to, &is_over))?
            };
            let elapsed = flood.send(&field.client, site().listen(), (flows, SOURCE_AT), FRAMES);
            is_over.store(true, Ordering::Relaxed);
            let (asked, answered) = watched.join().unwrap_or((0, 0));
            let elapsed = elapsed?;
            let arrived = received(&field.edge, "client0")? - before;
            let through = received(&field.origins[0], "eth0")? - origin;
            ensure!(
                through <= asked + 16 || peer.is_floor(),
                "{through} packets of {FRAMES} were not refused"
            );
            answers.push(format!("{}: {answered} of {asked}", peer.name));
            Ok(arrived as f64 / elapsed.as_secs_f64())
        });
        report.remarks.push(format!(
            "a client that is not banned was answered meanwhile in {case}: {}",
            answers.join(", ")
        ));
    }
    report.remarks.push("HAProxy and nginx are not measured: their deny rules see connections, and a flood makes none".into());
    report.remarks.push("prefix lists: not yet".into());
    Ok(())
}

/// Rounds in rotated order, for those that forward packets in the kernel.
fn turns(
    bench: &Bench<'_>,
    report: &mut Report,
    case: &str,
    mut one: impl FnMut(&Peer) -> Result<f64>,
) {
    let measured = bench.candidates.iter();
    let measured = measured.filter(|candidate| FORWARDERS.contains(&candidate.peer.name));
    let mut courses: Vec<_> = measured
        .map(|candidate| (candidate.peer, Vec::new(), candidate.missing.is_some()))
        .collect();
    for round in 0..bench.settings.rounds {
        for number in 0..courses.len() {
            let at = (number + round) % courses.len();
            let (peer, values, over) = &mut courses[at];
            if *over {
                continue;
            }
            match one(peer) {
                Ok(value) => {
                    say::note(&format!(
                        "{:<15} {case:<14} {value:.0} packets/s",
                        peer.name
                    ));
                    values.push(value);
                }
                Err(error) => {
                    *over = true;
                    let why = format!("{} in {case}: {error:#}", peer.name);
                    say::failed(&why);
                    report.fail(why);
                }
            }
        }
    }
    for (peer, values, _) in courses {
        report
            .rows
            .push(Row::new(peer.name, case, Metric::PacketsPerS, values));
    }
}

fn site() -> Site {
    Site {
        layer: Layer::Packets,
        ..Site::default()
    }
}

/// Starts a forwarder, and lets it refuse so many sources.
fn start(
    bench: &Bench<'_>,
    peer: &Peer,
    bans: Option<u32>,
) -> Result<(crate::peer::Running, Option<Pass>)> {
    let folder = sandbox::folder("bench")?;
    let running = peer.start(bench.stage, &folder, site())?;
    let has_own = ["sluice", "floor/xdp"].contains(&peer.name);
    let edge = bench.stage.namespace(Layer::Packets)?;
    let pass = (!has_own)
        .then(|| Pass::attach(edge, "client0"))
        .transpose()?;
    match (peer.name, bans) {
        ("sluice", Some(bans)) => ban_in_maps(bans)?,
        ("nftables", Some(bans)) => ban_by_rules(edge, &folder, bans)?,
        _ => {}
    }
    Ok((running, pass))
}

/// Writes bans where control would: `sluice ban add` takes one at a time, and that is not what is measured.
fn ban_in_maps(bans: u32) -> Result<()> {
    let folder = Path::new("/sys/fs/bpf/sluice/main");
    let open = |name: &str| {
        MapData::from_pin(folder.join(name)).with_context(|| format!("open the pinned map {name}"))
    };
    let mut table: HashMap<_, Value<Address>, Value<Ban>> =
        HashMap::try_from(Map::HashMap(open(name::BANS)?))?;
    let mut guard = Guard::zeroed();
    for source in FIRST..FIRST + bans {
        let key = Address::v4(source.to_be_bytes()).ban_key();
        let ban = Ban {
            until_ns: u64::MAX,
            rule: 1,
            zero: 0,
            dropped: 0,
        };
        table.insert(Value(key), Value(ban), 0)?;
        let bit = guard_bit(&key);
        guard.filter[(bit / 64) as usize] |= 1 << (bit % 64);
    }
    guard.bans = u64::from(bans);
    let mut map: Array<_, Value<Guard>> = Array::try_from(Map::Array(open(name::GUARD)?))?;
    map.set(0, Value(guard), 0)?;
    Ok(())
}

fn ban_by_rules(edge: &Namespace, folder: &Path, bans: u32) -> Result<()> {
    let sources: Vec<String> = (FIRST..FIRST + bans)
        .map(|source| Ipv4Addr::from(source).to_string())
        .collect();
    let rules = format!(
        "table netdev guard {{\n set bans {{ type ipv4_addr; elements = {{ {} }} }}\n chain ingress {{ type filter hook ingress device \"client0\" priority -500; ip saddr @bans drop; }}\n}}\n",
        sources.join(", ")
    );
    let file = folder.join("bans.conf");
    std::fs::write(&file, rules).context("write the rules")?;
    edge.run(&["nft", "-f", &file.display().to_string()])
        .map(drop)
}

impl Flood {
    fn prepare(field: &Field) -> Result<Self> {
        let mut programs = EbpfLoader::new()
            .load(object::FLOOR)
            .context("load the floor")?;
        for name in ["fresh", "tx"] {
            xdp(&mut programs, name)?
                .load()
                .context("the verifier refuses it")?;
        }
        let sender = xdp(&mut programs, "tx")?.fd()?.try_clone()?;
        let map = programs
            .map_mut("measured")
            .context("the map of programs")?;
        ProgramArray::try_from(map)?.set(0, &sender, 0)?;
        let shown = field.edge.run(&["ip", "-o", "link", "show", "client0"])?;
        Ok(Self {
            programs,
            ifindex: field.client.inside(|| if_nametoindex("eth0"))?,
            edge_mac: mac(&shown).context("the address of client0")?,
        })
    }

    /// Sends so many frames to an address, from so many sources or ports: how long that took.
    fn send(
        &mut self,
        client: &Namespace,
        to: SocketAddr,
        (flows, counted_at): (u64, u64),
        frames: u32,
    ) -> Result<Duration> {
        let from = (IpAddr::from(FIRST.to_be_bytes()), 40_000);
        let mac = self.edge_mac;
        let frame = Frame::udp(from, (to.ip(), to.port())).with(|frame| {
            frame.destination_mac = mac;
            frame.payload = vec![0x61; 60];
            // No checksum: it would have to change with the source.
            if let rig::packet::Transport::Udp { checksum, .. } = &mut frame.transport {
                *checksum = false;
            }
        });
        let bytes = frame.bytes();
        let mut template = [0; FRESH_BYTES];
        template.copy_from_slice(&bytes[..FRESH_BYTES]);
        let fresh = Fresh {
            template,
            zero: [0; 2],
            round: 0,
            mask: flows - 1,
            counted_at,
            bytes: 0,
        };
        let map = self
            .programs
            .map_mut("template")
            .context("the map of `fresh`")?;
        let mut map: Array<_, Value<Fresh>> = Array::try_from(map)?;
        map.set(0, Value(fresh), 0)?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, u32::try_from(bytes.len())?, 0, self.ifindex, 0, 0];
        let options = TestRunOptions {
            data_in: Some(&bytes),
            ctx_in: Some(bytemuck::bytes_of(&context)),
            repeat: frames,
            attrs: aya::programs::TestRunAttrs::new().xdp_live_frames(64),
            ..TestRunOptions::default()
        };
        let program = xdp(&mut self.programs, "fresh")?;
        client.inside(|| {
            let start = Instant::now();
            program.test_run(options).context("send frames")?;
            Ok(start.elapsed())
        })
    }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name).context("a program of that name")?;
    Ok(program.try_into()?)
}

/// The hardware address in a line of `ip -o link show`.
fn mac(line: &str) -> Option<[u8; 6]> {
    let text = line.split_once("link/ether ")?.1.split(' ').next()?;
    let bytes: Vec<u8> = text
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes.try_into().ok()
}

/// Packets that the XDP program of an interface saw, by its driver's own statistics.
fn received(namespace: &Namespace, interface: &str) -> Result<u64> {
    let text = namespace.run(&["ethtool", "-S", interface])?;
    let counts = text.lines().filter_map(|line| line.trim().split_once(": "));
    let counts =
        counts.filter(|(name, _)| name.starts_with("rx_queue_") && name.ends_with("_xdp_packets"));
    Ok(counts
        .filter_map(|(_, count)| count.parse::<u64>().ok())
        .sum())
}

/// Sends back what comes, until the bench ends.
fn echo(address: SocketAddr) {
    // Who measures twice has one already.
    let Ok(socket) = UdpSocket::bind(address) else {
        return;
    };
    let mut datagram = [0; 64];
    while let Ok((bytes, from)) = socket.recv_from(&mut datagram) {
        // That the way back is flooded is what is watched.
        let _ = socket.send_to(&datagram[..bytes], from);
    }
}

/// Asks once every two milliseconds: how often, and how often it was answered.
fn watch(to: SocketAddr, is_over: &AtomicBool) -> (u64, u64) {
    let (mut asked, mut answered) = (0, 0);
    let Ok(socket) = UdpSocket::bind(("0.0.0.0", 0)) else {
        return (0, 0);
    };
    let ready = socket
        .connect(to)
        .and_then(|()| socket.set_read_timeout(Some(Duration::from_millis(200))));
    while ready.is_ok() && !is_over.load(Ordering::Relaxed) {
        asked += 1;
        let mut datagram = [0; 64];
        let exchange = socket
            .send(b"still there?")
            .and_then(|_| socket.recv(&mut datagram));
        answered += u64::from(exchange.is_ok());
        std::thread::sleep(Duration::from_millis(2));
    }
    (asked, answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_is_read_from_what_ip_says() {
        let line =
            "2: client0@if2: <UP> mtu 1500 link/ether 0a:1b:00:ff:02:03 brd ff:ff:ff:ff:ff:ff";
        assert_eq!(mac(line), Some([0x0a, 0x1b, 0, 0xff, 2, 3]));
        assert_eq!(mac("2: lo"), None);
    }
}
