//! Bans: a banned source reaches no listener of ours, and everything else as before.

use std::net::IpAddr;

use proxy_ebpf::abi::mode;
use proxy_ebpf::verdict::Verdict;
use rig::packet::{Frame, SYN, TCP, UDP};

use crate::loaded::{Action, Loaded, load, now_ns};

const PORT: u16 = 443;
const HOUR_NS: u64 = 3_600_000_000_000;
const LISTENER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const BANNED: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 7));
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 8));

fn serving() -> Option<Loaded> {
    let mut loaded = load()?;
    loaded.listener((LISTENER, PORT), TCP, mode::SERVE, 0);
    loaded.listener((LISTENER, PORT), UDP, mode::SERVE, 0);
    Some(loaded)
}

fn syn(source: IpAddr) -> Vec<u8> {
    Frame::tcp((source, 40_000), (LISTENER, PORT), SYN).bytes()
}

#[track_caller]
fn is_banned(loaded: &mut Loaded, frame: &[u8]) {
    let outcome = loaded.send(frame);
    assert_eq!(
        (outcome.verdict, outcome.action),
        (Verdict::Banned, Action::Drop)
    );
    assert_eq!(outcome.bytes, frame);
}

#[test]
fn a_banned_source_is_dropped_and_counted_under_its_rule() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns() + HOUR_NS, 5);
    is_banned(&mut loaded, &syn(BANNED));
    let udp = Frame::udp((BANNED, 40_000), (LISTENER, PORT)).bytes();
    is_banned(&mut loaded, &udp);
    assert_eq!(loaded.find_ban(BANNED).dropped, 2);
    assert_eq!(loaded.rule_drops(5), 2);
    assert_eq!(loaded.rule_drops(0), 0);
}

#[test]
fn a_ban_touches_nobody_else() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns() + HOUR_NS, 1);
    loaded.passes(&syn(OTHER), Verdict::Serve);
    for last in 9..=255u8 {
        let source = IpAddr::from([198, 51, 100, last]);
        loaded.passes(&syn(source), Verdict::Serve);
    }
}

#[test]
fn a_ban_touches_nothing_that_is_not_ours() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns() + HOUR_NS, 1);
    let ssh = Frame::tcp((BANNED, 40_000), (LISTENER, 22), SYN).bytes();
    loaded.passes(&ssh, Verdict::NotOurs);
    let elsewhere = IpAddr::from([192, 0, 2, 99]);
    let routed = Frame::tcp((BANNED, 40_000), (elsewhere, PORT), SYN).bytes();
    loaded.passes(&routed, Verdict::NotOurs);
}

#[test]
fn a_ban_touches_no_port_of_nat_at_the_address_of_a_listener() {
    let Some(mut loaded) = serving() else { return };
    loaded.nat(&[IpAddr::from([10, 0, 0, 1])], 20_000, 64);
    loaded.ban(BANNED, now_ns() + HOUR_NS, 1);
    let frame = Frame::tcp((BANNED, 40_000), (LISTENER, 20_001), SYN).bytes();
    loaded.passes(&frame, Verdict::NotOurs);
}

#[test]
fn a_ban_ends_by_the_clock_alone() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns(), 1);
    loaded.passes(&syn(BANNED), Verdict::Serve);
    assert_eq!(loaded.find_ban(BANNED).dropped, 0);
}

#[test]
fn a_source_that_shares_its_filter_bit_with_a_banned_one_is_served() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns() + HOUR_NS, 1);
    loaded.set_whole_filter();
    loaded.passes(&syn(OTHER), Verdict::Serve);
    is_banned(&mut loaded, &syn(BANNED));
}

#[test]
fn an_ipv6_ban_covers_its_64_and_no_more() {
    let Some(mut loaded) = load() else { return };
    let listener = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]);
    loaded.listener((listener, PORT), TCP, mode::SERVE, 0);
    let source = |subnet, host| IpAddr::from([0x2001, 0xdb8, 7, subnet, 0, 0, 0, host]);
    loaded.ban(source(1, 1), now_ns() + HOUR_NS, 1);
    let syn = |from| Frame::tcp((from, 40_000), (listener, PORT), SYN).bytes();
    is_banned(&mut loaded, &syn(source(1, 1)));
    is_banned(&mut loaded, &syn(source(1, 0xffff)));
    loaded.passes(&syn(source(2, 1)), Verdict::Serve);
}

#[test]
fn neither_ip_options_nor_a_first_fragment_get_around_a_ban() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns() + HOUR_NS, 1);
    let frame = Frame::tcp((BANNED, 40_000), (LISTENER, PORT), SYN);
    let optional = frame.clone().with(|frame| frame.options = vec![1; 12]);
    is_banned(&mut loaded, &optional.bytes());
    let fragment = frame.with(|frame| frame.fragment = (0, true));
    is_banned(&mut loaded, &fragment.bytes());
}

#[test]
fn a_ban_of_a_rule_beyond_the_table_still_drops() {
    let Some(mut loaded) = serving() else { return };
    loaded.ban(BANNED, now_ns() + HOUR_NS, u32::MAX);
    is_banned(&mut loaded, &syn(BANNED));
    assert_eq!(loaded.find_ban(BANNED).dropped, 1);
}

#[test]
fn a_banned_source_cannot_open_a_forwarded_flow() {
    let Some(mut loaded) = load() else { return };
    loaded.listener((LISTENER, PORT), TCP, mode::NAT, 1);
    loaded.ban(BANNED, now_ns() + HOUR_NS, 1);
    is_banned(&mut loaded, &syn(BANNED));
    assert_eq!(loaded.flow_count(), 0);
}

#[test]
fn an_ipv6_extension_header_does_not_get_around_a_ban() {
    let Some(mut loaded) = load() else { return };
    let listener = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]);
    let source = IpAddr::from([0x2001, 0xdb8, 7, 0, 0, 0, 0, 1]);
    loaded.listener((listener, PORT), TCP, mode::SERVE, 0);
    loaded.ban(source, now_ns() + HOUR_NS, 1);
    for number in [0, 43, 44, 60] {
        let frame = Frame::tcp((source, 40_000), (listener, PORT), SYN)
            .with(|frame| frame.extensions = vec![(number, vec![0; 7])]);
        is_banned(&mut loaded, &frame.bytes());
    }
}
