//! Listeners of prefixes: which one has a packet, and that all kinds of packets find it as they find any other.

use std::net::IpAddr;

use proxy_ebpf::abi::{mode, name, option};
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, Frame, SYN, TCP, UDP};

use crate::loaded::{Action, INGRESS, Loaded, load, now_ns};
use crate::nat::{PORT_FIRST, PORTS, UPSTREAM4, client, endpoint, source};
use crate::rare::{error, fragments};

fn v4(a: u8, b: u8) -> IpAddr {
    IpAddr::from([203, 0, a, b])
}

fn v6(a: u16, b: u16) -> IpAddr {
    IpAddr::from([0x2001, 0xdb8, 0, a, 7, 7, 7, b])
}

/// Upstream 1 of an IPv4 endpoint and 2 of an IPv6 one, both where packets come from.
fn upstreams() -> Option<Loaded> {
    let mut loaded = load()?;
    loaded.nat(&[source(false), source(true)], PORT_FIRST, PORTS);
    for (upstream, v6) in [(UPSTREAM4, false), (2, true)] {
        let id = upstream as u16;
        loaded.endpoint(id, endpoint(v6, 1), INGRESS);
        loaded.upstream(upstream, &[(id, endpoint(v6, 1))]);
    }
    Some(loaded)
}

fn to(at: IpAddr, port: u16) -> Vec<u8> {
    let from = (client(at.is_ipv6()), 40_000);
    Frame::tcp(from, (at, port), SYN).bytes()
}

/// Sends a SYN that a listener must have; which one, its counter says.
#[track_caller]
fn belongs_to(loaded: &mut Loaded, at: IpAddr, port: u16, id: u32) {
    let before = loaded.traffic(name::LISTENER_TRAFFIC, id).packets;
    assert_eq!(loaded.send(&to(at, port)).verdict, Verdict::Serve);
    let after = loaded.traffic(name::LISTENER_TRAFFIC, id).packets;
    assert_eq!(after, before + 1, "listener {id}");
}

#[test]
fn every_address_of_a_prefix_and_every_port_of_a_range_is_a_listener_s() {
    let Some(mut loaded) = load() else { return };
    let ranges = [((443, 443), mode::SERVE, 0), ((8000, 8099), mode::SERVE, 0)];
    let first = loaded.prefix((v4(112, 0), 20), TCP, &ranges);
    let first6 = loaded.prefix(
        (IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, 0]), 64),
        TCP,
        &ranges,
    );
    for at in [v4(112, 0), v4(113, 9), v4(127, 255)] {
        belongs_to(&mut loaded, at, 443, first);
        belongs_to(&mut loaded, at, 8000, first + 1);
        belongs_to(&mut loaded, at, 8099, first + 1);
        for port in [442, 444, 7999, 8100] {
            loaded.passes(&to(at, port), Verdict::NotOurs);
        }
    }
    belongs_to(&mut loaded, v6(1, 0xffff), 443, first6);
    for at in [v4(111, 255), v4(128, 0), v6(0, 1), v6(2, 0)] {
        loaded.passes(&to(at, 443), Verdict::NotOurs);
    }
    let udp = Frame::udp((client(false), 1), (v4(112, 1), 443)).bytes();
    loaded.passes(&udp, Verdict::NotOurs);
}

#[test]
fn an_ipv6_prefix_that_holds_mapped_addresses_has_no_ipv4_packet() {
    let Some(mut loaded) = load() else { return };
    let all = IpAddr::from([0u16; 8]);
    loaded.prefix((all, 0), TCP, &[((443, 443), mode::SERVE, 0)]);
    loaded.passes(&to(v4(112, 1), 443), Verdict::NotOurs);
    assert_eq!(loaded.send(&to(v6(1, 1), 443)).verdict, Verdict::Serve);
}

#[test]
fn the_longest_prefix_answers_for_all_ports_and_one_address_before_it() {
    let Some(mut loaded) = load() else { return };
    let short = loaded.prefix((v4(112, 0), 20), TCP, &[((1, 65_535), mode::SERVE, 0)]);
    let long = loaded.prefix((v4(113, 0), 24), TCP, &[((443, 443), mode::SERVE, 0)]);
    let exact = loaded.listener((v4(113, 7), 443), TCP, mode::SERVE, 0);
    let open = loaded.listener((v4(114, 1), 0), TCP, mode::SERVE, 0);
    belongs_to(&mut loaded, v4(113, 7), 443, exact);
    belongs_to(&mut loaded, v4(113, 8), 443, long);
    // What a shorter prefix has there as well, the user half would have written into the longer one.
    loaded.passes(&to(v4(113, 8), 444), Verdict::NotOurs);
    belongs_to(&mut loaded, v4(112, 8), 444, short);
    belongs_to(&mut loaded, v4(114, 1), 444, open);
}

#[test]
fn all_sixteen_ranges_are_found() {
    let Some(mut loaded) = load() else { return };
    let ranges: Vec<_> = (0..16u16)
        .map(|n| ((n * 4000 + 10, n * 4000 + 12), mode::SERVE, 0))
        .collect();
    let first = loaded.prefix((v4(112, 0), 20), TCP, &ranges);
    // Somebody has all ports, so that none is known not to be ours before a prefix is asked.
    loaded.prefix((v4(0, 0), 24), TCP, &[((1, 65_535), mode::SERVE, 0)]);
    for number in 0..16u16 {
        for port in number * 4000 + 10..=number * 4000 + 12 {
            belongs_to(&mut loaded, v4(112, 1), port, first + u32::from(number));
        }
        loaded.passes(&to(v4(112, 1), number * 4000 + 9), Verdict::NotOurs);
        loaded.passes(&to(v4(112, 1), number * 4000 + 13), Verdict::NotOurs);
    }
}

#[test]
fn flows_of_a_prefix_go_there_and_back_and_errors_about_them_find_their_owner() {
    let Some(mut loaded) = upstreams() else {
        return;
    };
    for (at, bits, upstream) in [
        (v4(112, 0), 20, UPSTREAM4),
        (IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, 0]), 64, 2),
    ] {
        loaded.prefix((at, bits), TCP, &[((80, 80), mode::NAT, upstream)]);
        loaded.prefix((at, bits), UDP, &[((53, 53), mode::DIRECT, upstream)]);
    }
    for (at, v6) in [(v4(113, 77), false), (v6(1, 77), true)] {
        let sent = loaded.send(&to(at, 80));
        assert_eq!((sent.verdict, sent.action), (Verdict::Forward, Action::Tx));
        let port = crate::nat::path(&sent.bytes).0;
        let answer = Frame::tcp(endpoint(v6, 1), (source(v6), port), SYN | ACK);
        let back = loaded.send(&answer.bytes());
        assert_eq!(back.verdict, Verdict::Return);
        let from = Frame::tcp((at, 80), (client(v6), 40_000), SYN | ACK);
        let source_at = if v6 { 22..38 } else { 26..30 };
        assert_eq!(back.bytes[source_at.clone()], from.bytes()[source_at]);
        // A router on the way to the client answers the listener's address about what came from there.
        let kind = if v6 { 1 } else { 3 };
        let told = loaded.send(&error(client(v6), at, kind, &from, 1000).bytes());
        assert_eq!(told.verdict, Verdict::Forward);
        let datagram = Frame::udp((client(v6), 40_000), (at, 53));
        let long = datagram.with(|frame| frame.payload = vec![7; 64]);
        for fragment in fragments(v6, &long) {
            assert_eq!(loaded.send(&fragment.bytes()).verdict, Verdict::Forward);
        }
    }
}

#[test]
fn bans_and_the_rule_for_fragments_hold_for_all_addresses_of_a_prefix() {
    let Some(mut loaded) = upstreams() else {
        return;
    };
    loaded.options = option::FRAGMENTS_DROP;
    loaded.prefix(
        (v4(112, 0), 20),
        UDP,
        &[((53, 53), mode::DIRECT, UPSTREAM4)],
    );
    let datagram = Frame::udp((client(false), 40_000), (v4(113, 9), 53));
    let long = datagram.clone().with(|frame| frame.payload = vec![7; 64]);
    for fragment in fragments(false, &long) {
        assert_eq!(
            loaded.send(&fragment.bytes()).verdict,
            Verdict::FragmentRefused
        );
    }
    assert_eq!(loaded.send(&datagram.bytes()).verdict, Verdict::Forward);
    loaded.ban(client(false), now_ns() + 3_600_000_000_000, 0);
    assert_eq!(loaded.send(&datagram.bytes()).verdict, Verdict::Banned);
    let [_, later] = fragments(false, &long);
    assert_eq!(loaded.send(&later.bytes()).verdict, Verdict::Banned);
}

#[test]
fn a_port_that_no_prefix_has_is_not_ours_wherever_it_comes_to() {
    let Some(mut loaded) = load() else { return };
    loaded.prefix((v4(112, 0), 20), TCP, &[((443, 443), mode::SERVE, 0)]);
    loaded.listener((v4(112, 1), 80), TCP, mode::SERVE, 0);
    // The prefix has the address, the other listener the port.
    loaded.passes(&to(v4(112, 2), 80), Verdict::NotOurs);
    loaded.passes(&to(v4(112, 2), 22), Verdict::NotOurs);
}
