//! Thousands of packets and states that nobody thought of, each through the kernel half and through the model.

use std::net::IpAddr;

use bytemuck::Zeroable;
use proxy_ebpf::abi::{Endpoint, LOCAL, NatFlow, Tunnel, mode, option};
use proxy_ebpf::verdict::Verdict;
use rig::dice::Dice;
use rig::fuzz::{corpus, frames as frames_of};
use rig::generated::World;
use rig::packet::{TCP, UDP};

use crate::loaded::{INGRESS, Loaded, OTHER, address, load, now_ns};

/// Another seed, and how many states, for a longer search.
const SEED: &str = "SLUICE_GENERATED_SEED";
const STATES: &str = "SLUICE_GENERATED_STATES";

const PACKETS_PER_STATE: usize = 500;
const PORT_FIRST: u16 = 20_000;
const LISTENER_PORTS: [u16; 4] = [80, 81, 443, 20_003];
const HOUR_NS: u64 = 3_600_000_000_000;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().unwrap())
}

fn v4(a: u8, b: u8) -> IpAddr {
    IpAddr::from([10, 1, a, b])
}

fn v6(a: u16, b: u16) -> IpAddr {
    IpAddr::from([0x2001, 0xdb8, a, 0, 0, 0, 0, b])
}

fn both(count: u8, group: u8) -> Vec<IpAddr> {
    let of = |number| [v4(group, number), v6(u16::from(group), u16::from(number))];
    (1..=count).flat_map(of).collect()
}

/// Endpoints 1 to 4 are IPv4, 5 to 8 IPv6.
fn endpoint_at(id: u16) -> (IpAddr, u16) {
    let address = if id <= 4 { v4(9, id as u8) } else { v6(9, id) };
    (address, 8000 + id)
}

fn members(dice: &mut Dice, ids: std::ops::RangeInclusive<u16>) -> Vec<(u16, (IpAddr, u16))> {
    let mut members: Vec<_> = ids.map(|id| (id, endpoint_at(id))).collect();
    members.retain(|_| !dice.once_in(3));
    members
}

fn set_endpoint(loaded: &mut Loaded, id: u16, dice: &mut Dice) {
    let ifindex = dice.one(&[INGRESS, INGRESS, OTHER, OTHER, OTHER, 0, LOCAL]);
    let limits = [0, 0, 1500, 1400, 576, 100];
    let (mtu_bytes, plain_mtu_bytes) = (dice.one(&limits), dice.one(&limits));
    let back_mtu_bytes = dice.one(&limits);
    let mss_bytes = dice.one(&[0, 0, 536, 1240]);
    let vlan = dice.one(&[0u16, 0, 0, 12]).to_be_bytes();
    loaded.endpoint_entry(id, endpoint_at(id), ifindex, |endpoint: &mut Endpoint| {
        (endpoint.mtu_bytes, endpoint.plain_mtu_bytes) = (mtu_bytes, plain_mtu_bytes);
        endpoint.back_mtu_bytes = back_mtu_bytes;
        endpoint.mss_bytes = mss_bytes;
        endpoint.vlan = vlan;
    });
}

/// A mode, and an upstream that mostly fits the family.
fn way(dice: &mut Dice, v4: bool) -> (u32, u32) {
    let modes = [
        mode::SERVE,
        mode::NAT,
        mode::DIRECT,
        mode::IPIP,
        mode::GUE,
        mode::NAT,
    ];
    let mode = if dice.once_in(30) {
        99
    } else {
        dice.one(&modes)
    };
    // Upstream 1 has IPv4 endpoints, 2 IPv6 ones, 3 both, 4 none, 5 no ring; 99 does not exist.
    let fitting = if v4 { 1 } else { 2 };
    let target = match dice.below(10) {
        0..=5 => fitting,
        6 | 7 => dice.one(&[1, 2, 3]),
        _ => dice.one(&[3, 4, 5, 99]),
    };
    (mode, target)
}

fn set_options(loaded: &mut Loaded, dice: &mut Dice) {
    loaded.options = dice.one(&[0, 0, 0, option::FRAGMENTS_PASS, option::FRAGMENTS_DROP]);
    if dice.once_in(3) {
        loaded.options |= option::UDP_MOVE;
    }
}

fn set_listener(loaded: &mut Loaded, at: IpAddr, port: u16, dice: &mut Dice) {
    let (mode, target) = way(dice, at.is_ipv4());
    set_options(loaded, dice);
    let protocol = dice.one(&[TCP, UDP]);
    loaded.listener((at, port), protocol, mode, target);
}

/// Prefixes around and below an address, some of which have ports that others have, too.
fn set_prefixes(loaded: &mut Loaded, at: IpAddr, dice: &mut Dice) {
    let v4 = at.is_ipv4();
    for _ in 0..dice.below(4) {
        let bits = if v4 {
            dice.one(&[0, 8, 23, 24, 25, 31, 32])
        } else {
            dice.one(&[0, 32, 63, 64, 65, 127, 128])
        };
        set_options(loaded, dice);
        let protocol = dice.one(&[TCP, UDP]);
        let mut listeners = vec![];
        let mut next = dice.one(&[0u16, 1, 79, 80, 100]);
        while listeners.len() < 16 && !dice.once_in(5) {
            let last = next.saturating_add(dice.one(&[0, 1, 5, 300, 40_000]));
            let (mode, target) = way(dice, v4);
            listeners.push(((next, last), mode, target));
            if last > u16::MAX - 20 {
                break;
            }
            next = last + 1 + dice.one(&[0, 1, 20]);
        }
        let network = leading(at, bits);
        loaded.prefix((network, bits), protocol, &listeners);
    }
}

/// The address without what is behind so many bits.
fn leading(at: IpAddr, bits: u32) -> IpAddr {
    match at {
        IpAddr::V4(at) => {
            let kept = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            IpAddr::from((u32::from(at) & kept).to_be_bytes())
        }
        IpAddr::V6(at) => {
            let kept = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            IpAddr::from((u128::from(at) & kept).to_be_bytes())
        }
    }
}

/// A state: listeners of every mode, rings that have changed, endpoints of every kind, bans, NAT with few ports.
fn build(loaded: &mut Loaded, world: &World, dice: &mut Dice) {
    let sources: Vec<IpAddr> = match dice.below(6) {
        0 => vec![],
        1 => vec![v4(8, 1)],
        2 => vec![v6(8, 1)],
        3 => vec![v4(8, 1), v4(8, 2), v4(8, 3), v6(8, 1), v6(8, 2)],
        _ => vec![v4(8, 1), v6(8, 1)],
    };
    if !sources.is_empty() {
        loaded.nat(&sources, PORT_FIRST, dice.one(&[4, 16, 64]));
    }
    let mut tunnel = Tunnel::zeroed();
    if !dice.once_in(6) {
        tunnel.source4 = address(v4(7, 0));
        tunnel.source6 = address(v6(7, 0));
    }
    (tunnel.entropy4, tunnel.entropy6) = (dice.word() as u32, dice.word() as u32);
    tunnel.gue_port = dice.one(&[6080u16, 9886]).to_be_bytes();
    loaded.tunnel(tunnel);
    for id in 1..=8 {
        set_endpoint(loaded, id, dice);
    }
    for (upstream, ids) in [(1, 1..=4), (2, 5..=8), (3, 3..=6)] {
        loaded.upstream(upstream, &members(dice, ids));
    }
    loaded.upstream(4, &[]);
    for (index, at) in world.listeners.iter().enumerate() {
        // Of the last ones nothing but prefixes know.
        let ports = if index < 4 { &LISTENER_PORTS[..] } else { &[] };
        for port in ports {
            for _ in 0..2 {
                set_listener(loaded, *at, *port, dice);
            }
        }
        if dice.once_in(2) {
            set_prefixes(loaded, *at, dice);
        }
        // All ports of an address.
        if !ports.is_empty() && dice.once_in(6) {
            set_listener(loaded, *at, 0, dice);
        }
    }
    if dice.once_in(2) {
        let until_ns = now_ns() + HOUR_NS;
        loaded.ban(dice.one(&world.clients), until_ns, dice.one(&[0, 3, 999]));
    }
}

/// Something changes between two packets.
fn disturb(loaded: &mut Loaded, dice: &mut Dice) {
    match dice.below(5) {
        0 => set_endpoint(loaded, 1 + dice.below(8) as u16, dice),
        1 | 2 => {
            let (upstream, ids) = dice.one(&[(1, (1, 4)), (2, (5, 8)), (3, (3, 6))]);
            let dead = if dice.once_in(3) {
                vec![1 + dice.below(8) as u16]
            } else {
                vec![]
            };
            loaded.change(upstream, &members(dice, ids.0..=ids.1), &dead);
        }
        // A flow that has been idle for long, as the clock allows.
        _ => {
            let live: Vec<(u32, NatFlow)> = flows(loaded).collect();
            if live.is_empty() {
                return;
            }
            let (index, mut flow) = dice.one(&live);
            flow.seen_ns = now_ns()
                .saturating_sub(dice.one(&[30, 700]) * 1_000_000_000)
                .max(1);
            flow.seen_jiffies = flow.seen_jiffies.wrapping_sub(1_000_000);
            loaded.set_nat_flow(index, flow);
        }
    }
}

/// The NAT flows that the model knows.
fn flows(loaded: &Loaded) -> impl Iterator<Item = (u32, NatFlow)> {
    let flows = &loaded.model.state.nat_flows;
    let live = flows
        .iter()
        .enumerate()
        .filter(|(_, flow)| flow.seen_ns != 0);
    live.map(|(index, flow)| (index as u32, *flow))
}

/// What endpoints would answer to those flows, and now and then others in their name.
fn answers(loaded: &Loaded) -> Vec<(IpAddr, u16, IpAddr, u16)> {
    let state = &loaded.model.state;
    flows(loaded)
        .map(|(_, flow)| {
            let endpoint = endpoint_at(flow.endpoint as u16);
            let source = state.nat.sources[usize::from(flow.source)];
            let source = if source.is_v4() {
                IpAddr::from(source.as_v4())
            } else {
                IpAddr::from(source.0)
            };
            (
                endpoint.0,
                endpoint.1,
                source,
                u16::from_be_bytes(flow.port),
            )
        })
        .filter(|(from, _, to, _)| from.is_ipv4() == to.is_ipv4())
        .collect()
}

#[test]
fn the_kernel_half_and_the_model_agree_on_packets_that_nobody_wrote() {
    let (seed, states) = (number(SEED, 1), number(STATES, 24));
    let mut counted = [0; Verdict::COUNT];
    for seed in seed..seed + states {
        println!("{SEED}={seed}");
        let Some(mut loaded) = load() else { return };
        let mut dice = Dice::new(seed);
        let mut world = World {
            clients: both(3, 1),
            listeners: both(3, 2),
            client_ports: (40_000..40_012).collect(),
            listener_ports: [&LISTENER_PORTS[..], &[79, 101, 8080, 65_535]].concat(),
            answers: vec![],
        };
        build(&mut loaded, &world, &mut dice);
        for round in 0..PACKETS_PER_STATE {
            if round % 10 == 0 {
                world.answers = answers(&loaded);
            }
            if dice.once_in(25) {
                disturb(&mut loaded, &mut dice);
            }
            let outcome = loaded.send(&world.frame(&mut dice));
            counted[outcome.verdict as usize] += 1;
        }
    }
    // What never comes up is not compared.
    for verdict in Verdict::ALL {
        println!("{:18}{}", verdict.name(), counted[verdict as usize]);
        assert!(counted[verdict as usize] > 0, "{} never", verdict.name());
    }
}

#[test]
fn what_fuzzing_found_is_the_same_to_the_kernel_half() {
    let Some(mut loaded) = load() else { return };
    let sources = [
        IpAddr::from([10, 0, 0, 2]),
        IpAddr::from([0x2001, 0, 0, 0, 0, 0, 0, 2]),
    ];
    let at = [
        IpAddr::from([10, 0, 0, 1]),
        IpAddr::from([0x2001, 0, 0, 0, 0, 0, 0, 1]),
    ];
    loaded.nat(&sources, 312 * 64, 64);
    let mut tunnel = Tunnel::zeroed();
    (tunnel.source4, tunnel.source6) = (address(sources[0]), address(sources[1]));
    loaded.tunnel(tunnel);
    for (id, at) in [(1, endpoint_at(1)), (5, endpoint_at(5))] {
        loaded.endpoint(id, at, OTHER);
        loaded.upstream(u32::from(id), &[(id, at)]);
    }
    let modes = [mode::NAT, mode::DIRECT, mode::IPIP, mode::GUE, mode::SERVE];
    for (at, upstream) in at.into_iter().zip([1, 5]) {
        for (port, mode) in (64..).zip(modes) {
            for protocol in [TCP, UDP] {
                loaded.listener((at, port), protocol, mode, upstream);
            }
        }
    }
    let (parsed, judged) = (corpus("parse").unwrap(), corpus("judge").unwrap());
    let frames = parsed.iter().map(|(_, input)| &input[..]);
    for frame in frames.chain(judged.iter().flat_map(|(_, input)| frames_of(input))) {
        // The kernel takes no test packet shorter than an Ethernet header.
        if frame.len() >= 14 {
            loaded.send(frame);
        }
    }
}
