//! What is rare and must be right all the same: tags, fragments, extension headers, and ICMP errors to whom they concern.

use std::net::IpAddr;

use proxy_ebpf::abi::{mode, name, option};
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, Frame, SYN, TCP, Transport, UDP};

use crate::loaded::{Action, EDGE_MAC, ENDPOINT_MAC, INGRESS, Loaded, load, now_ns};
use crate::nat::{
    PORT, UPSTREAM4, client, endpoint, forward, forwarded, forwarding, give_back, listener, path,
    readdressed, source, tcp, udp,
};

const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 1));
const ROUTER6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 1));

/// An ICMP error of a router about a packet, of which so many bytes from the IP header on are quoted.
pub fn error(from: IpAddr, to: IpAddr, kind: u8, about: &Frame, quoted: usize) -> Frame {
    let packet = about.bytes().split_off(14);
    let mut payload = vec![0, 0, 0x05, 0x78];
    payload.extend(&packet[..quoted.min(packet.len())]);
    let transport = Transport::Icmp { kind, code: 4 };
    Frame::new(from, to, transport).with(|frame| frame.payload = payload)
}

#[track_caller]
fn becomes(loaded: &mut Loaded, frame: &Frame, verdict: Verdict, wanted: &[u8]) {
    let outcome = loaded.send(&frame.bytes());
    assert_eq!(outcome.verdict, verdict);
    assert_eq!(outcome.bytes, wanted);
    assert_ne!(outcome.action, Action::Pass);
}

#[test]
fn an_error_about_an_answer_goes_to_the_endpoint_rewritten_inside_and_outside() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for (v6, router, kind) in [(false, ROUTER, 3), (true, ROUTER6, 2)] {
        for (udp_too, quoted) in [(false, 1000), (false, 28), (true, 1000), (true, 28)] {
            // IPv6 routers quote more than a header; 48 bytes are the least.
            let quoted = if v6 { quoted + 20 } else { quoted };
            let first = if udp_too {
                udp(v6, 40_000)
            } else {
                tcp(v6, 40_000, SYN)
            };
            let (port, to) = forward(&mut loaded, &first);
            let answer = |from, to| {
                if udp_too {
                    Frame::udp(from, to)
                } else {
                    Frame::tcp(from, to, ACK)
                }
            };
            let about = answer((listener(v6), PORT), (client(v6), 40_000));
            let told = answer((to, 8080), (source(v6), port));
            let sent = error(router, listener(v6), kind, &about, quoted);
            let wanted = error(source(v6), to, kind, &told, quoted).with(|frame| {
                frame.hop_limit -= 1;
                frame.source_mac = EDGE_MAC;
                frame.destination_mac = ENDPOINT_MAC;
            });
            becomes(&mut loaded, &sent, Verdict::Forward, &wanted.bytes());
        }
    }
}

#[test]
fn an_error_about_a_request_goes_to_the_client_as_from_the_listener() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for (v6, router, kind) in [(false, ROUTER, 11), (true, ROUTER6, 1)] {
        for quoted in [1000, 48] {
            let request = tcp(v6, 40_000, SYN);
            let (port, to) = forward(&mut loaded, &request);
            let about = readdressed(&request, (source(v6), port), (to, 8080));
            let told = request.clone().with(|frame| frame.hop_limit -= 1);
            let sent = error(router, source(v6), kind, &about, quoted);
            let wanted = error(listener(v6), client(v6), kind, &told, quoted).with(|frame| {
                frame.hop_limit -= 1;
                frame.source_mac = [0x02, 0, 0, 0, 0, 0x01];
                frame.destination_mac = [0x02, 0, 0, 0, 0, 0x02];
            });
            becomes(&mut loaded, &sent, Verdict::Return, &wanted.bytes());
        }
    }
}

#[test]
fn errors_that_concern_no_flow_and_echoes_stay_as_they_are() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let about = Frame::tcp((listener(false), PORT), (client(false), 40_000), ACK);
    let unknown = error(ROUTER, listener(false), 3, &about, 1000);
    loaded.passes(&unknown.bytes(), Verdict::NoFlow);
    forward(&mut loaded, &tcp(false, 40_000, SYN));
    // Sent to another than who sent what it quotes; of another kind; cut off; about a later fragment.
    let elsewhere = error(ROUTER, IpAddr::from([192, 0, 2, 2]), 3, &about, 1000);
    loaded.passes(&elsewhere.bytes(), Verdict::NotOurs);
    let redirect = error(ROUTER, listener(false), 5, &about, 1000);
    loaded.passes(&redirect.bytes(), Verdict::NotOurs);
    let short = error(ROUTER, listener(false), 3, &about, 24);
    loaded.passes(&short.bytes(), Verdict::Malformed);
    let later = about.clone().with(|frame| frame.fragment = (9, false));
    let later = error(ROUTER, listener(false), 3, &later, 1000);
    loaded.passes(&later.bytes(), Verdict::Unsupported);
    for v6 in [false, true] {
        let kind = if v6 { 128 } else { 8 };
        let echo = Frame::new(client(v6), listener(v6), Transport::Icmp { kind, code: 0 });
        loaded.passes(&echo.bytes(), Verdict::NotOurs);
    }
    let last_hop = error(ROUTER, listener(false), 3, &about, 1000).with(|f| f.hop_limit = 1);
    loaded.passes(&last_hop.bytes(), Verdict::HopLimit);
}

#[test]
fn an_error_keeps_no_flow_alive_and_moves_no_client() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let (port, _) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    let index = u32::from(port - crate::nat::PORT_FIRST);
    let before = loaded.nat_flow(index);
    let about = Frame::tcp((listener(false), PORT), (client(false), 40_000), ACK);
    let sent = error(ROUTER, listener(false), 3, &about, 1000);
    let sent = sent.with(|frame| frame.source_mac = [0x02, 0, 0, 0, 0, 0x77]);
    assert_eq!(loaded.send(&sent.bytes()).verdict, Verdict::Forward);
    assert_eq!(loaded.nat_flow(index), before);
}

/// Two fragments of a UDP datagram, from 24 bytes of data on.
pub fn fragments(v6: bool, datagram: &Frame) -> [Frame; 2] {
    let whole = datagram.bytes();
    let transport = if v6 { 54 } else { 34 };
    let body = whole[transport..].to_vec();
    let part = |from: usize, bytes: &[u8], more: bool| {
        datagram.clone().with(|frame| {
            frame.payload = bytes.to_vec();
            frame.transport = Transport::Other(UDP);
            if v6 {
                let place = ((from as u16) | u16::from(more)).to_be_bytes();
                frame.extensions = vec![(44, vec![0, place[0], place[1], 1, 2, 3, 4])];
            } else {
                frame.fragment = (from as u16 / 8, more);
            }
        })
    };
    [part(0, &body[..24], true), part(24, &body[24..], false)]
}

#[test]
fn later_fragments_follow_the_first_both_ways() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for v6 in [false, true] {
        let datagram = udp(v6, 40_000).with(|frame| frame.payload = (0..100).collect());
        let (port, to) = forward(&mut loaded, &datagram);
        let out = readdressed(&datagram, (source(v6), port), (to, 8080)).with(|frame| {
            frame.source_mac = EDGE_MAC;
            frame.destination_mac = ENDPOINT_MAC;
        });
        let [first, later] = fragments(v6, &datagram);
        let [first_out, later_out] = fragments(v6, &out);
        loaded.passes(&later.bytes(), Verdict::Unsupported);
        for (sent, wanted) in [(&first, &first_out), (&later, &later_out)] {
            let outcome = loaded.send(&sent.bytes());
            assert_eq!(outcome.verdict, Verdict::Forward);
            assert_eq!(outcome.bytes, wanted.bytes());
        }
        let reply = Frame::udp((to, 8080), (source(v6), port))
            .with(|frame| frame.payload = (0..90).collect());
        let back = readdressed(&reply, (listener(v6), PORT), (client(v6), 40_000)).with(|frame| {
            frame.source_mac = [0x02, 0, 0, 0, 0, 0x01];
            frame.destination_mac = [0x02, 0, 0, 0, 0, 0x02];
        });
        for (sent, wanted) in fragments(v6, &reply).iter().zip(fragments(v6, &back)) {
            let outcome = loaded.send(&sent.bytes());
            assert_eq!(outcome.verdict, Verdict::Return);
            assert_eq!(outcome.bytes, wanted.bytes());
        }
    }
}

#[test]
fn fragments_pass_or_drop_where_the_listener_says_so() {
    for (options, first_verdict, later_verdict) in [
        (
            option::FRAGMENTS_PASS,
            Verdict::Unsupported,
            Verdict::Unsupported,
        ),
        (
            option::FRAGMENTS_DROP,
            Verdict::FragmentRefused,
            Verdict::FragmentRefused,
        ),
    ] {
        let Some(mut loaded) = forwarding() else {
            return;
        };
        loaded.options = options;
        loaded.listener((listener(false), PORT), UDP, mode::NAT, UPSTREAM4);
        let datagram = udp(false, 40_000).with(|frame| frame.payload = (0..100).collect());
        forward(&mut loaded, &datagram);
        let [first, later] = fragments(false, &datagram);
        for (frame, verdict) in [(first, first_verdict), (later, later_verdict)] {
            let outcome = loaded.send(&frame.bytes());
            assert_eq!(outcome.verdict, verdict);
            assert_eq!(outcome.bytes, frame.bytes());
        }
    }
}

#[test]
fn a_later_fragment_that_reaches_into_the_header_is_left_to_linux() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for place in [1, 2] {
        let frame = tcp(false, 40_000, SYN).with(|frame| frame.fragment = (place, false));
        loaded.passes(&frame.bytes(), Verdict::Malformed);
    }
    let tiny = tcp(false, 40_000, SYN).with(|frame| frame.fragment = (0, true));
    let mut tiny = tiny.bytes()[..14 + 20 + 16].to_vec();
    tiny[16..18].copy_from_slice(&36u16.to_be_bytes());
    loaded.passes(&tiny, Verdict::Malformed);
}

#[test]
fn a_banned_source_hides_behind_no_header() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let hour_ns = 3_600_000_000_000;
    for v6 in [false, true] {
        loaded.ban(client(v6), now_ns() + hour_ns, 1);
    }
    let destination = (60, vec![0; 7]);
    let mut hidden = vec![
        udp(false, 1).with(|frame| frame.fragment = (100, false)),
        udp(false, 1).with(|frame| frame.vlans = vec![5, 6]),
        Frame::new(client(false), listener(false), Transport::Other(51)),
    ];
    for count in 1..8 {
        hidden.push(udp(true, 1).with(|frame| frame.extensions = vec![destination.clone(); count]));
    }
    hidden
        .push(udp(true, 1).with(|frame| frame.extensions = vec![(43, vec![0, 0, 1, 0, 0, 0, 0])]));
    for frame in hidden {
        let outcome = loaded.send(&frame.bytes());
        assert_eq!(
            (outcome.verdict, outcome.action),
            (Verdict::Banned, Action::Drop),
            "{frame:?}"
        );
        // Elsewhere than to an address of ours it is nobody's business.
        let elsewhere = frame.with(|frame| {
            frame.destination = if frame.destination.is_ipv4() {
                IpAddr::from([192, 0, 2, 77])
            } else {
                ROUTER6
            };
        });
        assert_eq!(loaded.send(&elsewhere.bytes()).verdict, Verdict::NotOurs);
    }
}

#[test]
fn extension_headers_are_forwarded_with_what_follows() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for extensions in [
        vec![(60, vec![0; 7])],
        vec![(0, vec![0; 7]), (43, vec![0; 7])],
        vec![(44, vec![0, 0, 0, 1, 2, 3, 4])],
    ] {
        let frame = udp(true, 40_000).with(|frame| frame.extensions = extensions.clone());
        let outcome = loaded.send(&frame.bytes());
        assert_eq!(outcome.verdict, Verdict::Forward);
        let plain = loaded.send(&udp(true, 40_000).bytes());
        let (port, to) = path(&plain.bytes);
        assert_eq!(outcome.bytes, forwarded(&frame, true, port, to));
    }
    let routed =
        udp(true, 40_000).with(|frame| frame.extensions = vec![(43, vec![0, 0, 1, 0, 0, 0, 0])]);
    loaded.passes(&routed.bytes(), Verdict::Unsupported);
}

#[test]
fn tags_of_the_client_come_back_and_those_of_the_endpoint_are_put_on() {
    let Some(mut loaded) = load() else { return };
    loaded.nat(&[source(false)], 20_000, 64);
    loaded.endpoint_entry(1, endpoint(false, 1), INGRESS, |endpoint| {
        endpoint.vlan = 12u16.to_be_bytes();
    });
    loaded.upstream(UPSTREAM4, &[(1, endpoint(false, 1))]);
    loaded.listener((listener(false), PORT), TCP, mode::NAT, UPSTREAM4);
    for vlans in [vec![], vec![7], vec![7, 8]] {
        let frame = tcp(false, 40_000, SYN).with(|frame| frame.vlans = vlans.clone());
        let outcome = loaded.send(&frame.bytes());
        assert_eq!(
            (outcome.verdict, outcome.action),
            (Verdict::Forward, Action::Tx)
        );
        let port = u16::from_be_bytes([outcome.bytes[38], outcome.bytes[39]]);
        let to = endpoint(false, 1);
        let wanted = readdressed(&frame, (source(false), port), to).with(|frame| {
            frame.vlans = vec![12];
            frame.source_mac = EDGE_MAC;
            frame.destination_mac = ENDPOINT_MAC;
        });
        assert_eq!(outcome.bytes, wanted.bytes());
        let reply = Frame::tcp(to, (source(false), port), SYN | ACK);
        let tagged = reply.clone().with(|frame| frame.vlans = vec![12]);
        let back = readdressed(&reply, (listener(false), PORT), (client(false), 40_000));
        let back = back.with(|frame| {
            frame.vlans = vlans.clone();
            frame.source_mac = [0x02, 0, 0, 0, 0, 0x01];
            frame.destination_mac = [0x02, 0, 0, 0, 0, 0x02];
        });
        becomes(&mut loaded, &tagged, Verdict::Return, &back.bytes());
        becomes(&mut loaded, &reply, Verdict::Return, &back.bytes());
    }
    let traffic = loaded.traffic(name::LISTENER_TRAFFIC, 1);
    assert_eq!(traffic.packets, 3);
}

#[test]
fn options_of_ipv4_are_kept_and_the_header_checksum_covers_them() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for words in 1..=10 {
        let frame = tcp(false, 40_000, SYN).with(|frame| frame.options = vec![1; words * 4]);
        let (port, to) = {
            let outcome = loaded.send(&tcp(false, 40_000, ACK.min(SYN)).bytes());
            path(&outcome.bytes)
        };
        let outcome = loaded.send(&frame.bytes());
        assert_eq!(outcome.bytes, forwarded(&frame, false, port, to));
        give_back(
            &mut loaded,
            &Frame::tcp((to, 8080), (source(false), port), ACK),
            40_000,
        );
    }
}
