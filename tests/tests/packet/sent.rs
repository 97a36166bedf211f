//! Packets sent on as they are: to the endpoint's MAC, inside IP, inside UDP; too long ones; and who keeps which flow when endpoints change.

use std::collections::HashMap;
use std::net::IpAddr;

use aya::maps::{PerCpuArray, PerCpuValues};
use bytemuck::Zeroable;
use proxy_ebpf::abi::{FlowKey, INSERTS_PER_SECOND, Inserts, Tunnel, mode, name, option, stamp};
use proxy_ebpf::maglev;
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, FIN, Frame, SYN, TCP, Transport, UDP, checksum};

use crate::loaded::{
    Action, EDGE_MAC, ENDPOINT_MAC, INGRESS, Loaded, OTHER, Value, address, load_sized, now_ns,
};
use crate::nat::{PORT, client, endpoint, listener, tcp, udp};

/// Upstream 1: IPv4 endpoints 1 to 3; upstream 2: IPv6 endpoints 11 to 13.
fn sending(via: u32) -> Option<Loaded> {
    sending_sized(via, &[])
}

fn sending_sized(via: u32, sizes: &[(&'static str, u32)]) -> Option<Loaded> {
    let mut loaded = load_sized(sizes)?;
    loaded.tunnel(tunnel(via));
    for (upstream, v6) in [(1, false), (2, true)] {
        let endpoints = members(v6, &[1, 2, 3]);
        for (id, at) in &endpoints {
            loaded.endpoint_entry(
                *id,
                *at,
                if id % 10 == 1 { INGRESS } else { OTHER },
                |endpoint| {
                    endpoint.mtu_bytes = 1500;
                },
            );
        }
        loaded.upstream(upstream, &endpoints);
        for listener_v6 in [false, true] {
            for protocol in [TCP, UDP] {
                let port = PORT + upstream as u16 - 1;
                loaded.listener((listener(listener_v6), port), protocol, via, upstream);
            }
        }
    }
    Some(loaded)
}

/// The outer addresses that `wrapped` expects.
pub fn tunnel(via: u32) -> Tunnel {
    let mut tunnel = Tunnel::zeroed();
    tunnel.source4 = address(IpAddr::from([172, 16, 0, 0]));
    tunnel.source6 = address(IpAddr::from([0x100, 0, 0, 0, 0, 0, 0, 1]));
    if via == mode::GUE {
        tunnel.source4 = address(IpAddr::from([172, 16, 0, 1]));
    }
    tunnel.entropy4 = 0xffffu32.to_be();
    tunnel.gue_port = 6080u16.to_be_bytes();
    tunnel
}

fn members(v6: bool, numbers: &[u16]) -> Vec<(u16, (IpAddr, u16))> {
    let id = |number| if v6 { 10 + number } else { number };
    numbers
        .iter()
        .map(|number| (id(*number), endpoint(v6, *number)))
        .collect()
}

/// The frames of a client of either family to the upstream of either family.
fn frames(v6: bool, to_v6: bool) -> Vec<Frame> {
    let port = PORT + u16::from(to_v6);
    let mut frames = vec![];
    for number in 40_000..40_010 {
        frames.push(Frame::tcp((client(v6), number), (listener(v6), port), SYN));
        frames.push(Frame::tcp((client(v6), number), (listener(v6), port), ACK));
        frames.push(Frame::udp((client(v6), number), (listener(v6), port)));
    }
    frames.push(frames[0].clone().with(|frame| frame.payload = vec![]));
    frames.push(
        frames[0]
            .clone()
            .with(|frame| frame.payload = vec![7; 1380]),
    );
    if !v6 {
        frames.push(frames[0].clone().with(|frame| frame.options = vec![1; 12]));
    }
    frames
}

pub fn flow_hash(loaded: &mut Loaded, frame: &Frame) -> u32 {
    let (ports, protocol) = match frame.transport {
        Transport::Tcp { ports, .. } => (ports, TCP),
        Transport::Udp { ports, .. } => (ports, UDP),
        _ => panic!("no ports"),
    };
    let key = FlowKey {
        client: address(frame.source),
        listener: address(frame.destination),
        client_port: ports.0.to_be_bytes(),
        listener_port: ports.1.to_be_bytes(),
        protocol,
        zero: [0; 3],
    };
    maglev::hash(&loaded.hash_keys(), &key)
}

/// The outer headers, built apart from the product.
pub fn wrapped(frame: &Frame, hash: u32, to: IpAddr, gue: bool) -> Vec<u8> {
    let inside = frame.bytes().split_off(14);
    let v6_inside = frame.source.is_ipv6();
    let mut payload = vec![];
    if gue {
        payload.extend((0xc000 | (hash & 0x3fff) as u16).to_be_bytes());
        payload.extend(6080u16.to_be_bytes());
        payload.extend((8 + inside.len() as u16).to_be_bytes());
        payload.extend([0, 0]);
    }
    payload.extend(&inside);
    let number = match (gue, v6_inside) {
        (true, _) => 17,
        (false, false) => 4,
        (false, true) => 41,
    };
    let mut bytes = [ENDPOINT_MAC, EDGE_MAC].concat();
    match to {
        IpAddr::V4(to) => {
            bytes.extend([0x08, 0]);
            let mut ip = vec![0x45, frame.class];
            ip.extend((20 + payload.len() as u16).to_be_bytes());
            ip.extend([0, 0, 0x40, 0, 64, number, 0, 0]);
            let low = if gue { 1u16 } else { hash as u16 };
            ip.extend([172, 16]);
            ip.extend(low.to_be_bytes());
            ip.extend(to.octets());
            let sum = checksum(&ip);
            ip[10..12].copy_from_slice(&sum);
            bytes.extend(ip);
        }
        IpAddr::V6(to) => {
            bytes.extend([0x86, 0xdd]);
            let first = 6 << 28 | u32::from(frame.class) << 20 | (hash & 0xf_ffff);
            bytes.extend(first.to_be_bytes());
            bytes.extend((payload.len() as u16).to_be_bytes());
            bytes.extend([number, 64]);
            bytes.extend(std::net::Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1).octets());
            bytes.extend(to.octets());
        }
    }
    bytes.extend(payload);
    bytes
}

/// The outer destination of a frame that left encapsulated.
fn reached(frame: &[u8]) -> IpAddr {
    if frame[12] == 0x86 {
        let octets: [u8; 16] = frame[38..54].try_into().unwrap();
        return IpAddr::from(octets);
    }
    let octets: [u8; 4] = frame[30..34].try_into().unwrap();
    IpAddr::from(octets)
}

#[test]
fn ipip_and_gue_wrap_either_family_in_either() {
    for (via, gue) in [(mode::IPIP, false), (mode::GUE, true)] {
        let Some(mut loaded) = sending(via) else {
            return;
        };
        for (v6, to_v6) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut owners: HashMap<u32, IpAddr> = HashMap::new();
            for frame in frames(v6, to_v6) {
                let hash = flow_hash(&mut loaded, &frame);
                let outcome = loaded.send(&frame.bytes());
                assert_eq!(outcome.verdict, Verdict::Forward, "{frame:?}");
                let to = reached(&outcome.bytes);
                assert_eq!(outcome.bytes, wrapped(&frame, hash, to, gue));
                let back = to == endpoint(to_v6, 1).0;
                assert_eq!(
                    outcome.action,
                    if back { Action::Tx } else { Action::Redirect }
                );
                assert_eq!(*owners.entry(hash).or_insert(to), to);
            }
            owners
                .values()
                .for_each(|to| assert!((1..4).any(|n| endpoint(to_v6, n).0 == *to)));
        }
        assert_eq!(loaded.entries::<FlowKey, u64>(name::MOVED).len(), 0);
    }
}

#[test]
fn direct_changes_the_macs_and_nothing_else() {
    let Some(mut loaded) = sending(mode::DIRECT) else {
        return;
    };
    for (v6, to_v6) in [(false, false), (true, true)] {
        for frame in frames(v6, to_v6) {
            let outcome = loaded.send(&frame.bytes());
            assert_eq!(outcome.verdict, Verdict::Forward);
            let wanted = frame.with(|frame| {
                frame.source_mac = EDGE_MAC;
                frame.destination_mac = ENDPOINT_MAC;
            });
            assert_eq!(outcome.bytes, wanted.bytes());
        }
    }
}

#[test]
fn a_packet_that_does_not_fit_is_answered_with_the_size_that_does() {
    for (via, overhead) in [(mode::IPIP, 20), (mode::GUE, 28)] {
        let Some(mut loaded) = sending(via) else {
            return;
        };
        for v6 in [false, true] {
            let longest = 1500 - overhead - if v6 { 60 } else { 40 };
            let fits = tcp(v6, 40_000, ACK).with(|frame| frame.payload = vec![1; longest]);
            assert_eq!(loaded.send(&fits.bytes()).verdict, Verdict::Forward);
            let long = fits.with(|frame| frame.payload.push(1));
            let outcome = loaded.send(&long.bytes());
            assert_eq!(
                (outcome.verdict, outcome.action),
                (Verdict::TooBig, Action::Tx)
            );
            let mut payload = vec![0, 0];
            payload.extend((1500 - overhead as u16).to_be_bytes());
            payload.extend(&long.bytes()[14..14 + 128]);
            let (kind, code) = if v6 { (2, 0) } else { (3, 4) };
            let answer = Frame::new(listener(v6), client(v6), Transport::Icmp { kind, code });
            let answer = answer.with(|frame| {
                frame.payload = payload;
                frame.class = 0;
                (frame.source_mac, frame.destination_mac) = (long.destination_mac, long.source_mac);
            });
            let mut wanted = answer.bytes();
            if v6 {
                wanted[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
            } else {
                // The builder gives each packet an id.
                wanted[18..20].fill(0);
                wanted[24..26].fill(0);
                let sum = checksum(&wanted[14..34]);
                wanted[24..26].copy_from_slice(&sum);
            }
            assert_eq!(outcome.bytes, wanted);
        }
    }
}

#[test]
fn tagged_packets_and_fragments_and_errors_are_wrapped_too() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    let plain = udp(false, 40_000);
    let hash = flow_hash(&mut loaded, &plain);
    let to = reached(&loaded.send(&plain.bytes()).bytes);
    let tagged = plain.clone().with(|frame| frame.vlans = vec![3]);
    let outcome = loaded.send(&tagged.bytes());
    assert_eq!(outcome.bytes, wrapped(&plain, hash, to, false));
    for fragment in [(0, true), (9, false)] {
        let part = plain.clone().with(|frame| frame.fragment = fragment);
        let outcome = loaded.send(&part.bytes());
        assert_eq!(outcome.bytes, wrapped(&part, hash, to, false));
    }
    let answer = Frame::udp((listener(false), PORT), (client(false), 40_000));
    let mut payload = vec![0; 4];
    payload.extend(&answer.bytes()[14..]);
    let router = IpAddr::from([203, 0, 113, 1]);
    let error = Frame::new(
        router,
        listener(false),
        Transport::Icmp { kind: 3, code: 1 },
    );
    let error = error.with(|frame| frame.payload = payload);
    let outcome = loaded.send(&error.bytes());
    assert_eq!(outcome.verdict, Verdict::Forward);
    assert_eq!(outcome.bytes, wrapped(&error, hash, to, false));
}

fn owner(loaded: &mut Loaded, frame: &Frame) -> IpAddr {
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.verdict, Verdict::Forward);
    reached(&outcome.bytes)
}

#[test]
fn a_change_moves_no_established_flow_and_new_ones_at_once() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    let ports = 30_000..30_300;
    let before: Vec<IpAddr> = ports
        .clone()
        .map(|port| owner(&mut loaded, &tcp(false, port, SYN)))
        .collect();
    loaded.change(1, &members(false, &[2, 3]), &[]);
    let gone = endpoint(false, 1).0;
    for (port, to) in ports.clone().zip(&before) {
        assert_eq!(owner(&mut loaded, &tcp(false, port, ACK)), *to);
        assert_eq!(owner(&mut loaded, &tcp(false, port, FIN | ACK)), *to);
    }
    // New flows from other ports: nobody reaches who is gone, and each stays where it began.
    for port in 50_000..50_300 {
        let to = owner(&mut loaded, &tcp(false, port, SYN));
        assert_ne!(to, gone);
        assert_eq!(owner(&mut loaded, &tcp(false, port, ACK)), to);
    }
    // And over a second change, those of the first and of the time between.
    let between: Vec<IpAddr> = (50_000..50_300)
        .map(|port| owner(&mut loaded, &tcp(false, port, ACK)))
        .collect();
    loaded.change(1, &members(false, &[3]), &[]);
    for (port, to) in ports
        .clone()
        .zip(&before)
        .chain((50_000..50_300).zip(&between))
    {
        let slot_moved_clean = *to == endpoint(false, 2).0;
        let now = owner(&mut loaded, &tcp(false, port, ACK));
        assert!(now == *to || !slot_moved_clean, "{port}: {to} became {now}");
        assert_eq!(now, *to);
    }
    // A SYN of an old flow's ports is a new flow.
    let reused = ports.zip(&before).find(|(_, to)| **to == gone).unwrap().0;
    assert_eq!(
        owner(&mut loaded, &tcp(false, reused, SYN)),
        endpoint(false, 3).0
    );
    assert_eq!(
        owner(&mut loaded, &tcp(false, reused, ACK)),
        endpoint(false, 3).0
    );
}

#[test]
fn flows_of_a_dead_endpoint_move_at_once() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    loaded.change(1, &members(false, &[2, 3]), &[1]);
    for port in 30_000..30_100 {
        assert_ne!(
            owner(&mut loaded, &tcp(false, port, ACK)),
            endpoint(false, 1).0
        );
    }
    assert!(loaded.ring(1).slots.iter().all(|slot| slot.previous() != 1));
}

#[test]
fn udp_stays_or_moves_by_the_listener() {
    for (options, moves) in [(0, false), (option::UDP_MOVE, true)] {
        let Some(mut loaded) = sending(mode::IPIP) else {
            return;
        };
        loaded.options = options;
        loaded.listener((listener(false), PORT), UDP, mode::IPIP, 1);
        let gone = endpoint(false, 1).0;
        let before: Vec<IpAddr> = (30_000..30_100)
            .map(|port| owner(&mut loaded, &udp(false, port)))
            .collect();
        loaded.change(1, &members(false, &[2, 3]), &[]);
        for (port, before) in (30_000..30_100).zip(before) {
            let now = owner(&mut loaded, &udp(false, port));
            assert_eq!(now == before, !moves || before != gone, "{port}");
        }
    }
}

#[test]
fn a_listener_of_all_ports_has_those_that_no_other_has() {
    for v6 in [false, true] {
        let Some(mut loaded) = sending(mode::IPIP) else {
            return;
        };
        let to = |port, protocol: u8| {
            let ports = (40_000, port);
            let transport = match protocol {
                TCP => return Frame::tcp((client(v6), 40_000), (listener(v6), port), SYN),
                _ => Transport::Udp {
                    ports,
                    checksum: true,
                },
            };
            Frame::new(client(v6), listener(v6), transport)
        };
        loaded.passes(&to(1, TCP).bytes(), Verdict::NotOurs);
        let upstream = if v6 { 2 } else { 1 };
        loaded.listener((listener(v6), 0), TCP, mode::IPIP, upstream);
        loaded.listener((listener(v6), 443), TCP, mode::SERVE, 0);
        for port in [1, 22, 8080, 65_535] {
            assert_eq!(
                loaded.send(&to(port, TCP).bytes()).verdict,
                Verdict::Forward
            );
            loaded.passes(&to(port, UDP).bytes(), Verdict::NotOurs);
        }
        loaded.passes(&to(443, TCP).bytes(), Verdict::Serve);
        let elsewhere = Frame::tcp((client(v6), 40_000), (client(v6), 8080), SYN);
        loaded.passes(&elsewhere.bytes(), Verdict::NotOurs);
    }
}

#[test]
fn a_quic_initial_begins_a_flow_at_the_new_owner_and_the_rest_follows() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    loaded.listener((listener(false), PORT), UDP, mode::IPIP, 1);
    loaded.change(1, &members(false, &[2]), &[]);
    let with = |port, head: &[u8]| {
        let head = head.to_vec();
        udp(false, port).with(|frame| frame.payload = [head, vec![7; 30]].concat())
    };
    let (mut stayed, new) = (0, endpoint(false, 2).0);
    for port in 30_000..30_100 {
        let [one, two, short, other] = [
            &[0xc3, 0, 0, 0, 1][..],
            &[0xd3, 0x6b, 0x33, 0x43, 0xcf],
            &[0x43, 0, 0, 0, 1],
            &[0xe3, 0, 0, 0, 1],
        ]
        .map(|head| with(port, head));
        // A flow of unknown age, whose packets only look alike.
        let before = owner(&mut loaded, &short);
        assert_eq!(owner(&mut loaded, &other), before);
        stayed += usize::from(before != new);
        let initial = if port % 2 == 0 { &one } else { &two };
        assert_eq!(owner(&mut loaded, initial), new);
        assert_eq!(owner(&mut loaded, &short), new);
    }
    assert!(stayed > 20, "{stayed}");
}

#[test]
fn whoever_needs_an_earlier_owner_stamps_the_slot_and_nobody_else() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    loaded.change(1, &members(false, &[2, 3]), &[]);
    let mut old = *loaded.stamps(1);
    old.stamps = [1; 8192];
    for (frame, stamps) in [
        (tcp(false, 30_000, SYN), false),
        (tcp(false, 30_001, ACK), true),
    ] {
        for port in 0..50 {
            loaded.set_stamps(1, &old);
            let frame = frame.clone().with(|frame| {
                if let Transport::Tcp { ports, .. } = &mut frame.transport {
                    ports.0 += port * 2;
                }
            });
            let slot = maglev::slot(flow_hash(&mut loaded, &frame), 4096) as usize;
            let dirty = loaded.ring(1).slots[slot].previous() != 0;
            owner(&mut loaded, &frame);
            let after = loaded.stamps(1);
            let changed = after.stamps.iter().filter(|stamp| **stamp != 1).count();
            assert_eq!(changed, usize::from(dirty && stamps));
            assert_eq!(after.stamps[slot] != 1, dirty && stamps);
        }
    }
}

#[test]
fn a_flood_of_new_flows_is_remembered_only_up_to_the_cap_and_then_stays() {
    const ROUNDS: u32 = 10;
    let Some(mut loaded) = sending_sized(mode::IPIP, &[(name::MOVED, 65_536)]) else {
        return;
    };
    loaded.change(1, &members(false, &[2]), &[]);
    // A second may end while the flood lasts, and then there is room again: the model knows, and another round is due.
    for round in 1..=ROUNDS {
        let mut stayed = vec![];
        remember_nearly_enough(&mut loaded);
        for port in 10_000..10_000 + 8 * LEFT as u16 {
            let frame = Frame::tcp((flooder(round), port), (listener(false), PORT), SYN);
            let (hash, to) = (flow_hash(&mut loaded, &frame), owner(&mut loaded, &frame));
            let slot = maglev::slot(hash, 4096) as usize;
            let slot = loaded.model.state.rings[loaded.page_of(1) as usize][slot];
            if slot.previous() != 0 && to != endpoint(false, 2).0 {
                assert_eq!(to, endpoint(false, slot.previous()).0);
                stayed.push((frame, to));
            }
        }
        let full = |inserts: &Inserts| inserts.count == INSERTS_PER_SECOND;
        if stayed.is_empty() || !loaded.model.state.inserts.values().any(full) {
            continue;
        }
        // Whoever was not remembered is known all the same: by the slot, where it began.
        for (frame, to) in stayed.into_iter().take(200) {
            let next = frame.with(|frame| {
                if let Transport::Tcp { flags, .. } = &mut frame.transport {
                    *flags = ACK;
                }
            });
            assert_eq!(owner(&mut loaded, &next), to);
        }
        return;
    }
    panic!("the cap was not reached in {ROUNDS} floods of eight times as many flows");
}

/// So many inserts are left to each CPU in this second after `remember_nearly_enough`.
const LEFT: u32 = 50;

/// As if each CPU had remembered nearly as many flows in this second as it may: a flood of all takes a busy machine too long.
fn remember_nearly_enough(loaded: &mut Loaded) {
    let inserts = Inserts {
        window: u32::from(stamp(now_ns())),
        count: INSERTS_PER_SECOND - LEFT,
    };
    loaded.stale.insert(name::INSERTS);
    let map = loaded.map_mut(name::INSERTS);
    let mut map: PerCpuArray<_, Value<Inserts>> = PerCpuArray::try_from(map).unwrap();
    let cpus = map.get(&0, 0).unwrap().len();
    let values = PerCpuValues::try_from(vec![Value(inserts); cpus]).unwrap();
    map.set(0, values, 0).unwrap();
}

fn flooder(round: u32) -> IpAddr {
    IpAddr::from([198, 51, 101, round as u8])
}

#[test]
fn a_source_whose_last_word_is_left_to_the_entropy_is_one() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    let mut tunnel = Tunnel::zeroed();
    tunnel.source6 = address(IpAddr::from([0x100, 0, 0, 0, 0, 0, 0, 0]));
    for entropy6 in [u32::MAX, 0] {
        tunnel.entropy6 = entropy6;
        loaded.tunnel(tunnel);
        for frame in frames(true, true) {
            let hash = flow_hash(&mut loaded, &frame);
            let outcome = loaded.send(&frame.bytes());
            assert_eq!(outcome.verdict, Verdict::Forward);
            let spread = (hash & entropy6).to_be_bytes();
            assert_eq!(outcome.bytes[34..38], spread);
        }
    }
}

#[test]
fn a_packet_that_no_outer_header_can_count_is_told_so() {
    for (via, room) in [(mode::IPIP, 20), (mode::GUE, 28)] {
        let Some(mut loaded) = sending(via) else {
            return;
        };
        for (id, at) in members(false, &[1, 2, 3]) {
            loaded.endpoint(id, at, INGRESS);
        }
        let longest = 65_535 - room;
        for (bytes, verdict) in [(longest, Verdict::Forward), (longest + 1, Verdict::TooBig)] {
            let frame = tcp(false, 40_000, ACK).with(|frame| frame.payload = vec![1; bytes - 40]);
            assert_eq!(loaded.send(&frame.bytes()).verdict, verdict);
        }
    }
}

#[test]
fn a_later_fragment_that_does_not_fit_is_answered_only_over_ipv6() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    let first = udp(false, 40_000).with(|frame| frame.fragment = (0, true));
    assert_eq!(loaded.send(&first.bytes()).verdict, Verdict::Forward);
    let later = first.with(|frame| {
        frame.fragment = (9, false);
        frame.payload = vec![1; 1480];
    });
    loaded.passes(&later.bytes(), Verdict::Unsupported);
    let place = |place: u16, more: u16| {
        let [a, b] = (place << 3 | more).to_be_bytes();
        vec![(44, vec![0, a, b, 1, 2, 3, 4])]
    };
    let first = udp(true, 40_000).with(|frame| frame.extensions = place(0, 1));
    assert_eq!(loaded.send(&first.bytes()).verdict, Verdict::Forward);
    let later = first.with(|frame| {
        frame.extensions = place(9, 0);
        frame.payload = vec![1; 1480];
    });
    assert_eq!(loaded.send(&later.bytes()).verdict, Verdict::TooBig);
}

#[test]
fn without_a_tunnel_source_or_an_endpoint_nothing_is_sent() {
    let Some(mut loaded) = sending(mode::IPIP) else {
        return;
    };
    loaded.tunnel(Tunnel::zeroed());
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::Inconsistent);
    loaded.change(1, &[], &[]);
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::NoEndpoint);
}
