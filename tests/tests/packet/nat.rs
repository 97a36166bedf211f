//! Forwarding by NAT: both ways, both families, both protocols, and every way in which it may decline.

use std::collections::HashSet;
use std::net::IpAddr;

use proxy_ebpf::abi::{mode, name};
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, Frame, SYN, TCP, Transport, UDP, verify_checksums};

use crate::loaded::{Action, EDGE_MAC, ENDPOINT_MAC, INGRESS, Loaded, OTHER, load};

pub const PORT: u16 = 80;
pub const PORT_FIRST: u16 = 20_000;
pub const PORTS: u16 = 64;
/// The upstream of IPv4 endpoints 1 to 3, and that of IPv6 endpoints 11 to 13.
pub const UPSTREAM4: u32 = 1;
const UPSTREAM6: u32 = 2;

pub fn client(v6: bool) -> IpAddr {
    if v6 {
        IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, 9])
    } else {
        IpAddr::from([198, 51, 100, 9])
    }
}

pub fn listener(v6: bool) -> IpAddr {
    if v6 {
        IpAddr::from([0x2001, 0xdb8, 2, 0, 0, 0, 0, 1])
    } else {
        IpAddr::from([192, 0, 2, 1])
    }
}

pub fn source(v6: bool) -> IpAddr {
    if v6 {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1])
    } else {
        IpAddr::from([10, 0, 0, 1])
    }
}

pub fn endpoint(v6: bool, number: u16) -> (IpAddr, u16) {
    let address = if v6 {
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 1, number])
    } else {
        IpAddr::from([10, 0, 1, number as u8])
    };
    (address, 8080)
}

/// Listeners of both families and protocols; endpoint 1 of each family is where packets come from, 2 and 3 elsewhere.
pub fn forwarding() -> Option<Loaded> {
    let mut loaded = load()?;
    loaded.nat(&[source(false), source(true)], PORT_FIRST, PORTS);
    for (v6, upstream) in [(false, UPSTREAM4), (true, UPSTREAM6)] {
        let id = |number| if v6 { 10 + number } else { number };
        let endpoints = [1, 2, 3].map(|number| (id(number), endpoint(v6, number)));
        for (index, (id, at)) in endpoints.iter().enumerate() {
            loaded.endpoint(*id, *at, if index == 0 { INGRESS } else { OTHER });
        }
        loaded.upstream(upstream, &endpoints);
        for protocol in [TCP, UDP] {
            loaded.listener((listener(v6), PORT), protocol, mode::NAT, upstream);
        }
    }
    Some(loaded)
}

pub fn tcp(v6: bool, port: u16, flags: u8) -> Frame {
    Frame::tcp((client(v6), port), (listener(v6), PORT), flags)
}

pub fn udp(v6: bool, port: u16) -> Frame {
    Frame::udp((client(v6), port), (listener(v6), PORT))
}

/// Where a forwarded frame went: NAT port and endpoint, read at fixed offsets, for the tests send no options here.
pub fn path(frame: &[u8]) -> (u16, IpAddr) {
    let v6 = frame[12] == 0x86;
    let transport = if v6 { 54 } else { 34 };
    let port = u16::from_be_bytes([frame[transport], frame[transport + 1]]);
    let destination = if v6 {
        let octets: [u8; 16] = frame[38..54].try_into().unwrap();
        IpAddr::from(octets)
    } else {
        let octets: [u8; 4] = frame[30..34].try_into().unwrap();
        IpAddr::from(octets)
    };
    (port, destination)
}

/// What a client's frame must look like when it leaves for an endpoint from a NAT port.
pub fn forwarded(frame: &Frame, v6: bool, port: u16, to: IpAddr) -> Vec<u8> {
    readdressed(frame, (source(v6), port), (to, 8080))
        .with(|frame| {
            frame.source_mac = EDGE_MAC;
            frame.destination_mac = ENDPOINT_MAC;
        })
        .bytes()
}

pub fn readdressed(frame: &Frame, from: (IpAddr, u16), to: (IpAddr, u16)) -> Frame {
    frame.clone().with(|frame| {
        frame.source = from.0;
        frame.destination = to.0;
        frame.hop_limit -= 1;
        match &mut frame.transport {
            Transport::Tcp { ports, .. } | Transport::Udp { ports, .. } => {
                *ports = (from.1, to.1);
            }
            other => panic!("{other:?} has no ports"),
        }
    })
}

/// Sends a client's frame that must be forwarded, to the byte; returns NAT port and endpoint.
#[track_caller]
pub fn forward(loaded: &mut Loaded, frame: &Frame) -> (u16, IpAddr) {
    let v6 = frame.source.is_ipv6();
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.verdict, Verdict::Forward);
    let (port, to) = path(&outcome.bytes);
    assert_eq!(outcome.bytes, forwarded(frame, v6, port, to));
    assert_eq!(verify_checksums(&outcome.bytes), Ok(()));
    let back = to == endpoint(v6, 1).0;
    let action = if back { Action::Tx } else { Action::Redirect };
    assert_eq!(outcome.action, action);
    assert!((PORT_FIRST..PORT_FIRST + PORTS).contains(&port));
    (port, to)
}

/// The endpoint's answer to what was forwarded.
pub fn answer(v6: bool, port: u16, from: IpAddr, flags: u8) -> Frame {
    Frame::tcp((from, 8080), (source(v6), port), flags)
}

/// Sends an answer that must come back to the client, to the byte.
#[track_caller]
pub fn give_back(loaded: &mut Loaded, frame: &Frame, client_port: u16) {
    let v6 = frame.source.is_ipv6();
    let wanted = readdressed(frame, (listener(v6), PORT), (client(v6), client_port))
        .with(|frame| {
            // What the client's first packet had, the other way round.
            frame.source_mac = [0x02, 0, 0, 0, 0, 0x01];
            frame.destination_mac = [0x02, 0, 0, 0, 0, 0x02];
        })
        .bytes();
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(
        (outcome.verdict, outcome.action),
        (Verdict::Return, Action::Tx)
    );
    assert_eq!(outcome.bytes, wanted);
    assert_eq!(verify_checksums(&outcome.bytes), Ok(()));
}

#[test]
fn tcp_is_forwarded_and_returned_over_ipv4_and_ipv6() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for v6 in [false, true] {
        for client_port in 40_000..40_020 {
            let (port, to) = forward(&mut loaded, &tcp(v6, client_port, SYN));
            give_back(&mut loaded, &answer(v6, port, to, SYN | ACK), client_port);
            assert_eq!(forward(&mut loaded, &tcp(v6, client_port, ACK)), (port, to));
        }
    }
}

#[test]
fn udp_is_forwarded_and_returned_over_ipv4_and_ipv6() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for v6 in [false, true] {
        for client_port in 40_000..40_020 {
            let (port, to) = forward(&mut loaded, &udp(v6, client_port));
            let reply = Frame::udp((to, 8080), (source(v6), port));
            give_back(&mut loaded, &reply, client_port);
        }
    }
}

#[test]
fn flows_of_all_clients_reach_all_endpoints() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for v6 in [false, true] {
        let reached: HashSet<IpAddr> = (40_000..40_030)
            .map(|port| forward(&mut loaded, &tcp(v6, port, SYN)).1)
            .collect();
        assert_eq!(reached.len(), 3);
    }
}

#[test]
fn traffic_is_counted_for_listener_and_endpoint() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let frame = tcp(false, 40_000, SYN);
    let (_, to) = forward(&mut loaded, &frame);
    let IpAddr::V4(to) = to else { panic!("{to}") };
    let id = u32::from(to.octets()[3]);
    let bytes = frame.bytes().len() as u64;
    for (map, id) in [(name::ENDPOINT_TRAFFIC, id), (name::LISTENER_TRAFFIC, 1)] {
        let traffic = loaded.traffic(map, id);
        assert_eq!((traffic.packets, traffic.bytes), (1, bytes), "{map}");
    }
}

#[test]
fn class_and_payload_and_options_stay_as_they_are() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for v6 in [false, true] {
        for length in [0, 1, 2, 1400] {
            let frame = tcp(v6, 40_000, SYN).with(|frame| {
                frame.class = 0x2e << 2 | 1;
                frame.payload = (0..length).map(|byte| byte as u8).collect();
            });
            forward(&mut loaded, &frame);
        }
    }
    let frame = tcp(false, 40_000, SYN).with(|frame| frame.options = vec![1; 8]);
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.verdict, Verdict::Forward);
    assert_eq!(outcome.bytes[34..42], [1; 8]);
    assert_eq!(verify_checksums(&outcome.bytes), Ok(()));
}

#[test]
fn a_udp_packet_without_checksum_stays_without() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let frame = udp(false, 40_000).with(|frame| {
        frame.transport = Transport::Udp {
            ports: (40_000, PORT),
            checksum: false,
        };
    });
    forward(&mut loaded, &frame);
}

#[test]
fn a_udp_checksum_that_becomes_zero_is_sent_as_all_ones() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    // The first payload word is chosen so that the sum after the rewrite is zero.
    let frame = udp(false, 40_000).with(|frame| frame.payload = vec![0, 0]);
    let (port, to) = forward(&mut loaded, &frame);
    let after = forwarded(&frame, false, port, to);
    let frame = frame.with(|frame| frame.payload = after[40..42].to_vec());
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.bytes[40..42], [0xff, 0xff]);
    assert_eq!(verify_checksums(&outcome.bytes), Ok(()));
}

#[test]
fn a_long_frame_pads_nothing_and_loses_nothing() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    // Ethernet padding behind the packet is no part of it, and stays.
    let frame = tcp(false, 40_000, SYN).with(|frame| frame.payload.clear());
    let mut bytes = frame.bytes();
    bytes.resize(60, 0xaa);
    let outcome = loaded.send(&bytes);
    let (port, to) = path(&outcome.bytes);
    let mut wanted = forwarded(&frame, false, port, to);
    wanted.resize(60, 0xaa);
    assert_eq!(outcome.bytes, wanted);
}

#[test]
fn a_frame_of_several_buffers_is_forwarded_and_counted_whole() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let frame = tcp(true, 40_000, SYN).with(|frame| frame.payload = vec![0x5a; 8000]);
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.verdict, Verdict::Forward);
    let (port, to) = path(&outcome.bytes);
    assert_eq!(outcome.bytes, forwarded(&frame, true, port, to));
    let total = loaded.traffic(name::LISTENER_TRAFFIC, 3).bytes;
    assert_eq!(total, frame.bytes().len() as u64);
}

#[test]
fn an_upstream_without_a_ring_or_an_endpoint_is_no_endpoint() {
    let Some(mut loaded) = load() else { return };
    loaded.nat(&[source(false)], PORT_FIRST, PORTS);
    loaded.listener((listener(false), PORT), TCP, mode::NAT, 5);
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::NoEndpoint);
    loaded.upstream(5, &[]);
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::NoEndpoint);
    assert_eq!(loaded.flow_count(), 0);
}

#[test]
fn an_endpoint_whose_neighbour_is_unknown_opens_no_flow() {
    let Some(mut loaded) = load() else { return };
    loaded.nat(&[source(false)], PORT_FIRST, PORTS);
    loaded.listener((listener(false), PORT), TCP, mode::NAT, UPSTREAM4);
    loaded.endpoint(1, endpoint(false, 1), 0);
    loaded.upstream(UPSTREAM4, &[(1, endpoint(false, 1))]);
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::NoNeighbour);
    assert_eq!(loaded.flow_count(), 0);
    // Resolved, the flow opens; lost again, its packets pass until the neighbour is back.
    loaded.endpoint(1, endpoint(false, 1), INGRESS);
    forward(&mut loaded, &tcp(false, 40_000, SYN));
    loaded.endpoint(1, endpoint(false, 1), 0);
    loaded.passes(&tcp(false, 40_000, ACK).bytes(), Verdict::NoNeighbour);
}

#[test]
fn an_endpoint_of_the_other_family_is_inconsistent() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    loaded.listener((listener(false), 81), TCP, mode::NAT, UPSTREAM6);
    let frame = Frame::tcp((client(false), 40_000), (listener(false), 81), SYN);
    loaded.passes(&frame.bytes(), Verdict::Inconsistent);
}

#[test]
fn a_listener_whose_upstream_or_nat_is_missing_is_inconsistent() {
    let Some(mut loaded) = load() else { return };
    loaded.listener((listener(false), PORT), TCP, mode::NAT, 9999);
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::Inconsistent);
    loaded.listener((listener(false), PORT), TCP, mode::NAT, UPSTREAM4);
    loaded.endpoint(1, endpoint(false, 1), INGRESS);
    loaded.upstream(UPSTREAM4, &[(1, endpoint(false, 1))]);
    loaded.passes(&tcp(false, 40_000, SYN).bytes(), Verdict::Inconsistent);
}

#[test]
fn a_packet_at_the_end_of_its_way_is_left_to_linux() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for v6 in [false, true] {
        for hop_limit in [0, 1] {
            let frame = tcp(v6, 40_000, SYN).with(|frame| frame.hop_limit = hop_limit);
            loaded.passes(&frame.bytes(), Verdict::HopLimit);
        }
        forward(
            &mut loaded,
            &tcp(v6, 40_000, SYN).with(|frame| frame.hop_limit = 2),
        );
    }
    let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    let reply = answer(false, port, to, SYN | ACK).with(|frame| frame.hop_limit = 1);
    loaded.passes(&reply.bytes(), Verdict::HopLimit);
}

#[test]
fn a_frame_cut_short_is_neither_forwarded_nor_changed() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for frame in [
        tcp(false, 40_000, SYN),
        udp(false, 40_000),
        tcp(true, 40_000, SYN),
        udp(true, 40_000),
    ] {
        let bytes = frame.bytes();
        for length in 14..bytes.len() {
            loaded.passes(&bytes[..length], Verdict::Malformed);
        }
    }
    assert_eq!(loaded.flow_count(), 0);
}

#[test]
fn only_the_endpoint_of_the_flow_may_answer() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    let stranger = IpAddr::from([10, 0, 1, 200]);
    loaded.passes(
        &answer(false, port, stranger, ACK).bytes(),
        Verdict::NotOurs,
    );
    let wrong_port = Frame::tcp((to, 8081), (source(false), port), ACK);
    loaded.passes(&wrong_port.bytes(), Verdict::NotOurs);
    let unused = answer(false, port + 1, to, ACK);
    loaded.passes(&unused.bytes(), Verdict::NotOurs);
    let beyond = answer(false, PORT_FIRST + PORTS, to, ACK);
    loaded.passes(&beyond.bytes(), Verdict::NotOurs);
    let other_protocol = Frame::udp((to, 8080), (source(false), port));
    loaded.passes(&other_protocol.bytes(), Verdict::NotOurs);
    give_back(&mut loaded, &answer(false, port, to, SYN | ACK), 40_000);
}

#[test]
fn the_way_back_follows_a_client_whose_gateway_changes() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    let moved = [0x02, 0, 0, 0, 0, 0x55];
    let frame = tcp(false, 40_000, ACK).with(|frame| frame.source_mac = moved);
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.verdict, Verdict::Forward);
    let outcome = loaded.send(&answer(false, port, to, ACK).bytes());
    assert_eq!(outcome.bytes[..6], moved);
}

#[test]
fn every_packet_has_exactly_one_verdict() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for round in 0..50u16 {
        for v6 in [false, true] {
            loaded.send(&tcp(v6, 40_000 + round, SYN).bytes());
            loaded.send(&tcp(v6, 41_000 + round, ACK).bytes());
            loaded.send(&udp(v6, 40_000 + round).bytes());
            loaded.send(&udp(v6, 40_000).with(|frame| frame.hop_limit = 1).bytes());
        }
    }
    let sum: u64 = loaded.verdicts().iter().sum();
    assert_eq!(sum, loaded.sent());
}
