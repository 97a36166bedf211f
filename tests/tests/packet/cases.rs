//! What every way of forwarding must do with every kind of packet: one row per kind, each through each way, to the byte.

use std::net::IpAddr;

use proxy_ebpf::abi::mode;
use proxy_ebpf::verdict::Verdict;
use rig::packet::{self, ACK, FIN, Frame, ICMP, RST, SYN, TCP, Transport, UDP};

use crate::loaded::{Action, EDGE_MAC, ENDPOINT_MAC, INGRESS, Loaded, load};
use crate::nat::{PORT, PORT_FIRST, client, endpoint, forwarded, listener, source, tcp, udp};
use crate::rare::{error, fragments};
use crate::sent::{flow_hash, tunnel, wrapped};

/// A way of forwarding: its mode, and whether its endpoint is an IPv6 one. NAT and direct keep the family.
#[derive(Clone, Copy, Debug)]
struct Via {
    mode: u32,
    to_v6: bool,
}

const VIAS: [Via; 8] = [
    Via {
        mode: mode::NAT,
        to_v6: false,
    },
    Via {
        mode: mode::NAT,
        to_v6: true,
    },
    Via {
        mode: mode::DIRECT,
        to_v6: false,
    },
    Via {
        mode: mode::DIRECT,
        to_v6: true,
    },
    Via {
        mode: mode::IPIP,
        to_v6: false,
    },
    Via {
        mode: mode::IPIP,
        to_v6: true,
    },
    Via {
        mode: mode::GUE,
        to_v6: false,
    },
    Via {
        mode: mode::GUE,
        to_v6: true,
    },
];

impl Via {
    fn takes(self, v6: bool) -> bool {
        matches!(self.mode, mode::IPIP | mode::GUE) || v6 == self.to_v6
    }

    /// One endpoint, so that the ring is forced.
    fn load(self) -> Option<Loaded> {
        let mut loaded = load()?;
        loaded.tunnel(tunnel(self.mode));
        loaded.nat(&[source(false), source(true)], PORT_FIRST, 64);
        let at = endpoint(self.to_v6, 1);
        loaded.endpoint(1, at, INGRESS);
        loaded.upstream(1, &[(1, at)]);
        for v6 in [false, true] {
            for protocol in [TCP, UDP] {
                loaded.listener((listener(v6), PORT), protocol, self.mode, 1);
            }
        }
        Some(loaded)
    }

    /// What a frame of the flow of `flow` must become.
    fn wanted(self, loaded: &mut Loaded, flow: &Frame, frame: &Frame) -> Vec<u8> {
        let v6 = frame.source.is_ipv6();
        let to = endpoint(self.to_v6, 1).0;
        let frame = frame.clone().with(|frame| frame.vlans.clear());
        match self.mode {
            mode::NAT => forwarded(&frame, v6, PORT_FIRST, to),
            mode::DIRECT => frame
                .with(|frame| {
                    frame.source_mac = EDGE_MAC;
                    frame.destination_mac = ENDPOINT_MAC;
                })
                .bytes(),
            _ => wrapped(&frame, flow_hash(loaded, flow), to, self.mode == mode::GUE),
        }
    }
}

/// Runs rows through all ways of forwarding, of both families; returns how many cases that were.
fn through_all(rows: impl Fn(bool) -> Vec<(&'static str, Frame, Frame)>) -> usize {
    let mut cases = 0;
    for via in VIAS {
        for v6 in [false, true].into_iter().filter(|v6| via.takes(*v6)) {
            let Some(mut loaded) = via.load() else {
                return 0;
            };
            for (name, flow, frame) in rows(v6) {
                let protocol = matches!(flow.transport, Transport::Tcp { .. });
                // The flow begins as flows do, and NAT gives it its first port.
                let first = if protocol {
                    tcp(v6, 40_000, SYN)
                } else {
                    udp(v6, 40_000)
                };
                assert_eq!(loaded.send(&first.bytes()).verdict, Verdict::Forward);
                let wanted = via.wanted(&mut loaded, &flow, &frame);
                let outcome = loaded.send(&frame.bytes());
                let what = format!("{name} via {via:?}, IPv{}", if v6 { 6 } else { 4 });
                assert_eq!(outcome.verdict, Verdict::Forward, "{what}");
                assert_eq!(outcome.action, Action::Tx, "{what}");
                assert_eq!(outcome.bytes, wanted, "{what}");
                cases += 1;
            }
        }
    }
    cases
}

/// A row whose frame tells its flow itself.
fn row(name: &'static str, frame: Frame) -> (&'static str, Frame, Frame) {
    (name, frame.clone(), frame)
}

#[test]
fn tcp_of_every_kind_is_forwarded_every_way() {
    let cases = through_all(|v6| {
        let flags = [
            ("a SYN of a known flow", SYN),
            ("an ACK", ACK),
            ("a FIN", FIN | ACK),
            ("a RST", RST),
            ("a SYN with ECN bits", SYN | 0xc0),
        ];
        let mut rows: Vec<_> = flags
            .map(|(name, flags)| row(name, tcp(v6, 40_000, flags)))
            .into();
        let data = tcp(v6, 40_000, ACK);
        rows.push(row(
            "no payload",
            data.clone().with(|frame| frame.payload.clear()),
        ));
        rows.push(row(
            "a full segment",
            data.clone().with(|frame| frame.payload = vec![3; 1400]),
        ));
        rows.push(row(
            "class and congestion bits",
            data.clone().with(|frame| frame.class = 0x2f),
        ));
        rows.push(row(
            "a VLAN",
            data.clone().with(|frame| frame.vlans = vec![7]),
        ));
        rows.push(row(
            "QinQ",
            data.clone().with(|frame| frame.vlans = vec![7, 8]),
        ));
        rows.push(row(
            "two hops left",
            data.clone().with(|frame| frame.hop_limit = 2),
        ));
        if v6 {
            let options =
                data.with(|frame| frame.extensions = vec![(0, vec![0; 7]), (60, vec![0; 7])]);
            rows.push(row("extension headers", options));
        } else {
            rows.push(row(
                "options",
                data.with(|frame| frame.options = vec![1; 40]),
            ));
        }
        rows
    });
    assert!(cases == 0 || cases == 12 * 12, "{cases}");
}

#[test]
fn udp_of_every_kind_is_forwarded_every_way() {
    let cases = through_all(|v6| {
        let data = udp(v6, 40_000);
        let mut rows = vec![
            row("a datagram", data.clone()),
            row(
                "an empty one",
                data.clone().with(|frame| frame.payload.clear()),
            ),
            row(
                "two tags",
                data.clone().with(|frame| frame.vlans = vec![9, 10]),
            ),
        ];
        // Long headers of QUIC (RFC 9000 section 17.2), and short ones with and without a connection id.
        for (name, first) in [
            ("QUIC Initial", 0xc3),
            ("QUIC 0-RTT", 0xd3),
            ("QUIC Handshake", 0xe3),
            ("QUIC Retry", 0xf3),
        ] {
            let mut payload = vec![first, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0];
            payload.resize(1200, 0x5a);
            rows.push(row(
                name,
                data.clone().with(|frame| frame.payload = payload),
            ));
        }
        for (name, length) in [
            ("QUIC short, connection id", 40),
            ("QUIC short without", 21),
        ] {
            let mut payload = vec![0x43; length];
            payload[1..].fill(0x77);
            rows.push(row(
                name,
                data.clone().with(|frame| frame.payload = payload),
            ));
        }
        rows
    });
    assert!(cases == 0 || cases == 12 * 9, "{cases}");
}

#[test]
fn fragments_follow_their_first_every_way() {
    for via in VIAS {
        for v6 in [false, true].into_iter().filter(|v6| via.takes(*v6)) {
            let Some(mut loaded) = via.load() else { return };
            let datagram = udp(v6, 40_000).with(|frame| frame.payload = (0..100).collect());
            let parts = fragments(v6, &datagram);
            let out: Vec<Vec<u8>> = if via.mode == mode::NAT {
                let to = (endpoint(via.to_v6, 1).0, 8080);
                let out = crate::nat::readdressed(&datagram, (source(v6), PORT_FIRST), to);
                let out = out.with(|frame| {
                    frame.source_mac = EDGE_MAC;
                    frame.destination_mac = ENDPOINT_MAC;
                });
                fragments(v6, &out).map(|part| part.bytes()).into()
            } else {
                let wanted = |part: &Frame| via.wanted(&mut loaded, &datagram, part);
                parts.iter().map(wanted).collect()
            };
            for (part, wanted) in parts.iter().zip(out) {
                let outcome = loaded.send(&part.bytes());
                assert_eq!(
                    (outcome.verdict, &outcome.bytes),
                    (Verdict::Forward, &wanted),
                    "{via:?}"
                );
            }
        }
    }
}

#[test]
fn errors_reach_the_endpoint_of_the_inner_flow_every_way() {
    for via in VIAS {
        for v6 in [false, true].into_iter().filter(|v6| via.takes(*v6)) {
            let Some(mut loaded) = via.load() else { return };
            // Frag-needed and unreachable, time exceeded, parameter problem; too big and the others of IPv6.
            let kinds: &[u8] = if v6 { &[1, 2, 3, 4] } else { &[3, 11, 12] };
            for kind in kinds {
                for quoted in [28, 60, 1000] {
                    let quoted = if v6 { quoted + 20 } else { quoted };
                    let flow = tcp(v6, 40_000, SYN);
                    loaded.send(&flow.bytes());
                    let router = client(v6);
                    let about = Frame::tcp((listener(v6), PORT), (client(v6), 40_000), ACK);
                    let sent = error(router, listener(v6), *kind, &about, quoted);
                    let wanted = if via.mode == mode::NAT {
                        let to = endpoint(v6, 1);
                        let told = Frame::tcp(to, (source(v6), PORT_FIRST), ACK);
                        let told = error(source(v6), to.0, *kind, &told, quoted);
                        told.with(|frame| {
                            frame.hop_limit -= 1;
                            frame.source_mac = EDGE_MAC;
                            frame.destination_mac = ENDPOINT_MAC;
                        })
                        .bytes()
                    } else {
                        via.wanted(&mut loaded, &flow, &sent)
                    };
                    let outcome = loaded.send(&sent.bytes());
                    assert_eq!(outcome.verdict, Verdict::Forward, "{via:?} {kind} {quoted}");
                    assert_eq!(outcome.bytes, wanted, "{via:?} {kind} {quoted}");
                }
            }
        }
    }
}

/// Frames that no listener wants, of one family.
fn others(v6: bool) -> Vec<(&'static str, Vec<u8>)> {
    let to = |transport| Frame::new(client(v6), listener(v6), transport);
    let elsewhere = if v6 {
        IpAddr::from([0x2001, 0xdb8, 2, 0, 0, 0, 0, 99])
    } else {
        IpAddr::from([192, 0, 2, 99])
    };
    let inside = |of_v6: bool| tcp(of_v6, 40_000, SYN).bytes().split_off(14);
    let gue = Frame::udp((client(v6), 50_000), (listener(v6), 6080));
    let kind = if v6 { 128 } else { 8 };
    vec![
        ("ICMP echo", to(Transport::Icmp { kind, code: 0 }).bytes()),
        (
            "IPv4 in IP",
            to(Transport::Other(4))
                .with(|f| f.payload = inside(false))
                .bytes(),
        ),
        (
            "IPv6 in IP",
            to(Transport::Other(41))
                .with(|f| f.payload = inside(true))
                .bytes(),
        ),
        ("GUE", gue.with(|frame| frame.payload = inside(v6)).bytes()),
        ("GRE", to(Transport::Other(47)).bytes()),
        ("SCTP", to(Transport::Other(132)).bytes()),
        ("no next header", to(Transport::Other(59)).bytes()),
        (
            "another port",
            Frame::tcp((client(v6), 1), (listener(v6), 22), SYN).bytes(),
        ),
        (
            "another address",
            Frame::tcp((client(v6), 1), (elsewhere, PORT), SYN).bytes(),
        ),
        (
            "our own answer",
            Frame::tcp((listener(v6), PORT), (client(v6), 1), ACK).bytes(),
        ),
    ]
}

#[test]
fn what_is_not_ours_stays_as_it_is_every_way() {
    for via in VIAS {
        let Some(mut loaded) = via.load() else { return };
        for v6 in [false, true] {
            for (name, frame) in others(v6) {
                println!("{name} via {via:?}");
                loaded.passes(&frame, Verdict::NotOurs);
                // And tagged.
                let tagged = [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat();
                loaded.passes(&tagged, Verdict::NotOurs);
            }
        }
        loaded.passes(&packet::arp([192, 0, 2, 1].into()), Verdict::NotOurs);
        for kind in [[0x88, 0xcc], [0x88, 0x47], [0x00, 0x26]] {
            let mut frame = tcp(false, 40_000, SYN).bytes();
            frame[12..14].copy_from_slice(&kind);
            loaded.passes(&frame, Verdict::NotOurs);
        }
        let fragment = Frame::new(client(false), listener(false), Transport::Other(ICMP));
        loaded.passes(
            &fragment.with(|f| f.fragment = (5, false)).bytes(),
            Verdict::NotOurs,
        );
    }
}

#[test]
fn a_listener_without_endpoints_leaves_every_packet_to_linux() {
    for via in VIAS {
        let Some(mut loaded) = via.load() else { return };
        loaded.upstream(1, &[]);
        for v6 in [false, true] {
            loaded.passes(&tcp(v6, 40_000, SYN).bytes(), Verdict::NoEndpoint);
            loaded.passes(&udp(v6, 40_000).bytes(), Verdict::NoEndpoint);
            let established = if via.mode == mode::NAT {
                Verdict::NoFlow
            } else {
                Verdict::NoEndpoint
            };
            loaded.passes(&tcp(v6, 40_000, ACK).bytes(), established);
        }
    }
}
