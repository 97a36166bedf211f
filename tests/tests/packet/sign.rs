//! What NAT counts of an endpoint's flows: opened, answered, refused, each once.

use std::net::IpAddr;

use proxy_ebpf::abi::Signs;
use rig::packet::{ACK, Frame, RST, SYN, TCP, Transport};

use crate::loaded::Loaded;
use crate::nat::{UPSTREAM4, answer, endpoint, forward, forwarding, give_back, source, tcp, udp};

/// The signs of endpoint 1 of IPv4: opened, answered, refused.
fn signs(loaded: &Loaded) -> (u64, u64, u64) {
    let Signs {
        opened,
        answered,
        refused,
    } = loaded.signs(1);
    (opened, answered, refused)
}

/// NAT with endpoint 1 alone for IPv4.
fn one_endpoint() -> Option<Loaded> {
    let mut loaded = forwarding()?;
    loaded.upstream(UPSTREAM4, &[(1, endpoint(false, 1))]);
    Some(loaded)
}

#[test]
fn a_flow_is_opened_once_and_answered_once() {
    let Some(mut loaded) = one_endpoint() else {
        return;
    };
    let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    forward(&mut loaded, &tcp(false, 40_000, SYN));
    assert_eq!(signs(&loaded), (1, 0, 0));
    for flags in [SYN | ACK, SYN | ACK, ACK, RST] {
        give_back(&mut loaded, &answer(false, port, to, flags), 40_000);
        assert_eq!(signs(&loaded), (1, 1, 0));
    }
    // The next connection of the same port.
    let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    assert_eq!(signs(&loaded), (2, 1, 0));
    give_back(&mut loaded, &answer(false, port, to, RST | ACK), 40_000);
    give_back(&mut loaded, &answer(false, port, to, RST | ACK), 40_000);
    assert_eq!(signs(&loaded), (2, 1, 1));
}

#[test]
fn udp_is_answered_by_any_datagram() {
    let Some(mut loaded) = one_endpoint() else {
        return;
    };
    for _ in 0..2 {
        let (port, to) = forward(&mut loaded, &udp(false, 40_000));
        let reply = Frame::udp((to, 8080), (source(false), port));
        give_back(&mut loaded, &reply, 40_000);
        assert_eq!(signs(&loaded), (1, 1, 0));
    }
}

/// An ICMP error about what left from a NAT port for endpoint 1.
fn error(from: IpAddr, code: u8, (number, port): (u8, u16)) -> Vec<u8> {
    let ends = ((source(false), port), endpoint(false, 1));
    let about = if number == TCP {
        Frame::tcp(ends.0, ends.1, SYN)
    } else {
        Frame::udp(ends.0, ends.1)
    };
    let mut payload = vec![0; 4];
    payload.extend(&about.bytes()[14..]);
    let transport = Transport::Icmp { kind: 3, code };
    Frame::new(from, source(false), transport)
        .with(|frame| frame.payload = payload)
        .bytes()
}

#[test]
fn a_flow_is_refused_by_icmp_of_the_endpoint_alone_and_before_an_answer() {
    let Some(mut loaded) = one_endpoint() else {
        return;
    };
    let (at, router) = (endpoint(false, 1).0, IpAddr::from([10, 0, 9, 9]));
    for (number, frame) in [(TCP, tcp(false, 40_000, SYN)), (17, udp(false, 40_000))] {
        let before = signs(&loaded);
        let (port, _) = forward(&mut loaded, &frame);
        loaded.send(&error(router, 1, (number, port)));
        // It was too long, which refuses nothing.
        loaded.send(&error(at, 4, (number, port)));
        assert_eq!(signs(&loaded), (before.0 + 1, before.1, before.2));
        loaded.send(&error(at, 3, (number, port)));
        loaded.send(&error(at, 3, (number, port)));
        assert_eq!(signs(&loaded), (before.0 + 1, before.1, before.2 + 1));
    }
    let (port, to) = forward(&mut loaded, &tcp(false, 40_001, SYN));
    give_back(&mut loaded, &answer(false, port, to, SYN | ACK), 40_001);
    let before = signs(&loaded);
    loaded.send(&error(at, 3, (TCP, port)));
    assert_eq!(signs(&loaded), before);
}
