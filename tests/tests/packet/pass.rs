//! What is not ours, not understood or handed up: passed to Linux, every byte as it came.

use std::net::IpAddr;

use proxy_ebpf::abi::{mode, name};
use proxy_ebpf::verdict::Verdict;
use rig::packet::{self, Frame, SYN, TCP, Transport, UDP};

use crate::loaded::{Action, Loaded, load};

const PORT: u16 = 443;

fn v4(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

fn v6(last: u16) -> IpAddr {
    IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last])
}

/// The kernel half with `serve` listeners on .1 and ::1, TCP and UDP; ids 1 to 4.
fn serving() -> Option<Loaded> {
    let mut loaded = load()?;
    for address in [v4(1), v6(1)] {
        for protocol in [TCP, UDP] {
            loaded.listener((address, PORT), protocol, mode::SERVE, 0);
        }
    }
    Some(loaded)
}

fn syn(source: IpAddr, destination: IpAddr) -> Frame {
    Frame::tcp((source, 40_000), (destination, PORT), SYN)
}

#[test]
fn every_map_and_program_has_the_name_that_both_halves_use() {
    let Some(mut loaded) = load() else { return };
    let mut wanted = name::MAPS.map(str::to_owned);
    wanted.sort();
    assert_eq!(loaded.map_names(), wanted);
    loaded.load_select();
}

#[test]
fn arp_is_not_ours() {
    let Some(mut loaded) = serving() else { return };
    loaded.passes(&packet::arp([192, 0, 2, 1].into()), Verdict::NotOurs);
}

#[test]
fn an_unknown_ethertype_is_not_ours() {
    let Some(mut loaded) = serving() else { return };
    let mut frame = syn(v4(9), v4(1)).bytes();
    frame[12..14].copy_from_slice(&[0x88, 0xcc]);
    loaded.passes(&frame, Verdict::NotOurs);
}

#[test]
fn one_or_two_vlan_tags_are_stepped_over_and_stay() {
    let Some(mut loaded) = serving() else { return };
    for (vlans, verdict) in [
        (vec![7], Verdict::Serve),
        (vec![7, 0xe00c], Verdict::Serve),
        (vec![7, 8, 9], Verdict::NotOurs),
    ] {
        for (source, destination) in [(v4(9), v4(1)), (v6(9), v6(1))] {
            let frame = syn(source, destination).with(|frame| frame.vlans = vlans.clone());
            loaded.passes(&frame.bytes(), verdict);
        }
        let mut service = syn(v4(9), v4(1)).with(|frame| frame.vlans = vlans).bytes();
        service[12..14].copy_from_slice(&[0x88, 0xa8]);
        loaded.passes(&service, verdict);
        for length in 14..service.len() {
            let cut = loaded.send(&service[..length]);
            assert_eq!(cut.bytes, service[..length]);
        }
    }
}

#[test]
fn what_is_not_ip_behind_a_tag_stays_as_it_is() {
    let Some(mut loaded) = serving() else { return };
    let mut arp = packet::arp([192, 0, 2, 1].into());
    arp.splice(12..12, [0x81, 0, 0, 7]);
    loaded.passes(&arp, Verdict::NotOurs);
}

#[test]
fn another_port_is_not_ours() {
    let Some(mut loaded) = serving() else { return };
    let frame = Frame::tcp((v4(9), 40_000), (v4(1), PORT + 1), SYN);
    loaded.passes(&frame.bytes(), Verdict::NotOurs);
}

#[test]
fn another_address_is_not_ours() {
    let Some(mut loaded) = serving() else { return };
    loaded.passes(&syn(v4(9), v4(2)).bytes(), Verdict::NotOurs);
    loaded.passes(&syn(v6(9), v6(2)).bytes(), Verdict::NotOurs);
}

#[test]
fn another_protocol_on_our_port_is_not_ours() {
    let Some(mut loaded) = load() else { return };
    loaded.listener((v4(1), PORT), TCP, mode::SERVE, 0);
    let frame = Frame::udp((v4(9), 40_000), (v4(1), PORT));
    loaded.passes(&frame.bytes(), Verdict::NotOurs);
}

#[test]
fn icmp_and_other_protocols_are_not_ours() {
    let Some(mut loaded) = serving() else { return };
    let echo = Transport::Icmp { kind: 8, code: 0 };
    loaded.passes(&Frame::new(v4(9), v4(1), echo).bytes(), Verdict::NotOurs);
    let echo = Transport::Icmp { kind: 128, code: 0 };
    loaded.passes(&Frame::new(v6(9), v6(1), echo).bytes(), Verdict::NotOurs);
    let gre = Transport::Other(47);
    loaded.passes(&Frame::new(v4(9), v4(1), gre).bytes(), Verdict::NotOurs);
}

#[test]
fn without_any_listener_nothing_is_ours() {
    let Some(mut loaded) = load() else { return };
    loaded.passes(&syn(v4(9), v4(1)).bytes(), Verdict::NotOurs);
}

#[test]
fn an_unknown_mode_is_not_ours() {
    let Some(mut loaded) = load() else { return };
    loaded.listener((v4(1), PORT), TCP, 99, 0);
    loaded.passes(&syn(v4(9), v4(1)).bytes(), Verdict::NotOurs);
}

#[test]
fn a_serve_listener_gets_its_packets_and_counts_them() {
    let Some(mut loaded) = serving() else { return };
    let frames = [
        syn(v4(9), v4(1)).bytes(),
        Frame::udp((v4(9), 40_000), (v4(1), PORT)).bytes(),
        syn(v6(9), v6(1)).bytes(),
        Frame::udp((v6(9), 40_000), (v6(1), PORT)).bytes(),
    ];
    for (index, frame) in frames.iter().enumerate() {
        loaded.passes(frame, Verdict::Serve);
        loaded.passes(frame, Verdict::Serve);
        let traffic = loaded.traffic(name::LISTENER_TRAFFIC, index as u32 + 1);
        assert_eq!(
            (traffic.packets, traffic.bytes),
            (2, 2 * frame.len() as u64)
        );
    }
}

#[test]
fn ipv4_options_are_stepped_over() {
    let Some(mut loaded) = serving() else { return };
    for words in 1..=10 {
        // No-operation options: the ports stand four bytes further back with each word.
        let frame = syn(v4(9), v4(1)).with(|frame| frame.options = vec![1; words * 4]);
        loaded.passes(&frame.bytes(), Verdict::Serve);
    }
}

#[test]
fn a_first_fragment_is_known_by_its_ports() {
    let Some(mut loaded) = serving() else { return };
    let frame = syn(v4(9), v4(1)).with(|frame| frame.fragment = (0, true));
    loaded.passes(&frame.bytes(), Verdict::Serve);
    let frame = Frame::tcp((v4(9), 40_000), (v4(1), PORT + 1), SYN);
    let frame = frame.with(|frame| frame.fragment = (0, true));
    loaded.passes(&frame.bytes(), Verdict::NotOurs);
}

#[test]
fn ports_are_never_read_from_a_later_fragment() {
    let Some(mut loaded) = serving() else { return };
    for more in [true, false] {
        let frame = syn(v4(9), v4(1)).with(|frame| frame.fragment = (185, more));
        loaded.passes(&frame.bytes(), Verdict::Unsupported);
    }
}

/// An extension header of 8 or 24 bytes; as a fragment header, the first and only fragment.
fn extension(number: u8, bytes: usize) -> (u8, Vec<u8>) {
    let mut rest = vec![0; bytes - 1];
    rest[0] = (bytes / 8 - 1) as u8;
    (number, rest)
}

#[test]
fn ipv6_extension_headers_are_stepped_over() {
    let Some(mut loaded) = serving() else { return };
    for extensions in [
        vec![extension(0, 8)],
        vec![extension(60, 24)],
        vec![extension(43, 8), extension(44, 8)],
        vec![
            extension(0, 24),
            extension(60, 8),
            extension(43, 24),
            extension(60, 8),
        ],
    ] {
        let frame = syn(v6(9), v6(1)).with(|frame| frame.extensions = extensions);
        let bytes = frame.bytes();
        loaded.passes(&bytes, Verdict::Serve);
        for length in 14..bytes.len() {
            loaded.passes(&bytes[..length], Verdict::Malformed);
        }
    }
}

#[test]
fn ipv6_extension_headers_of_other_kinds_or_too_many_are_unsupported() {
    let Some(mut loaded) = serving() else { return };
    for extensions in [
        vec![extension(51, 8)],
        vec![extension(135, 8)],
        vec![extension(60, 8); 5],
    ] {
        let frame = syn(v6(9), v6(1)).with(|frame| frame.extensions = extensions);
        loaded.passes(&frame.bytes(), Verdict::Unsupported);
    }
}

#[test]
fn a_fragment_of_an_icmp_error_is_not_ours_whatever_stands_between() {
    let Some(mut loaded) = serving() else { return };
    let about = Frame::tcp((v6(1), PORT), (v6(9), 40_000), SYN);
    let mut first = extension(44, 8);
    first.1[2] = 1;
    for extensions in [vec![first.clone()], vec![first, extension(60, 8)]] {
        let error = Frame::new(v6(8), v6(1), Transport::Icmp { kind: 1, code: 0 });
        let error = error.with(|frame| {
            frame.payload = [&[0; 4], &about.bytes()[14..]].concat();
            frame.extensions = extensions;
        });
        loaded.passes(&error.bytes(), Verdict::NotOurs);
    }
}

#[test]
fn ports_are_never_read_from_a_later_ipv6_fragment() {
    let Some(mut loaded) = serving() else { return };
    let mut later = extension(44, 8);
    later.1[1..3].copy_from_slice(&(185u16 << 3).to_be_bytes());
    let frame = syn(v6(9), v6(1)).with(|frame| frame.extensions = vec![later]);
    loaded.passes(&frame.bytes(), Verdict::Unsupported);
}

#[test]
fn an_extension_header_longer_than_the_packet_is_malformed() {
    let Some(mut loaded) = serving() else { return };
    let frame = syn(v6(9), v6(1)).with(|frame| frame.extensions = vec![extension(60, 8)]);
    let mut bytes = frame.bytes();
    bytes[55] = 200;
    loaded.passes(&bytes, Verdict::Malformed);
}

#[test]
fn a_frame_cut_short_anywhere_is_passed_as_it_is() {
    let Some(mut loaded) = serving() else { return };
    let frames = [
        syn(v4(9), v4(1)).bytes(),
        syn(v4(9), v4(1)).with(|f| f.options = vec![1; 40]).bytes(),
        syn(v6(9), v6(1)).bytes(),
        Frame::udp((v4(9), 40_000), (v4(1), PORT)).bytes(),
        Frame::udp((v6(9), 40_000), (v6(1), PORT)).bytes(),
    ];
    for frame in &frames {
        // The kernel takes no test packet shorter than an Ethernet header.
        for length in 14..frame.len() {
            loaded.passes(&frame[..length], Verdict::Malformed);
        }
        loaded.passes(frame, Verdict::Serve);
    }
    let sum: u64 = loaded.verdicts().iter().sum();
    assert_eq!(sum, loaded.sent());
}

#[test]
fn lengths_that_contradict_each_other_are_malformed() {
    let Some(mut loaded) = serving() else { return };
    let tcp = syn(v4(9), v4(1)).bytes();
    let udp = Frame::udp((v4(9), 40_000), (v4(1), PORT)).bytes();
    let tcp6 = syn(v6(9), v6(1)).bytes();
    // Offset of a byte, and what is wrong with it.
    let cases: [(&[u8], usize, u8); 9] = [
        (&tcp, 14, 0x65),           // version 6 behind the IPv4 type
        (&tcp, 14, 0x44),           // a header of 16 bytes
        (&tcp, 17, 19),             // total length below the header's
        (&tcp, 16, 0xff),           // total length beyond the frame
        (&tcp, 14 + 20 + 12, 0x40), // a TCP header of 16 bytes
        (&tcp, 17, 39),             // no room for the TCP header
        (&udp, 14 + 20 + 5, 7),     // a UDP length below the header's
        (&udp, 14 + 20 + 4, 1),     // a UDP length beyond the packet
        (&tcp6, 14, 0x40),          // version 4 behind the IPv6 type
    ];
    for (frame, offset, byte) in cases {
        let mut frame = frame.to_vec();
        frame[offset] = byte;
        loaded.passes(&frame, Verdict::Malformed);
    }
}

#[test]
fn padding_behind_a_short_packet_is_no_fault() {
    let Some(mut loaded) = serving() else { return };
    let mut frame = syn(v4(9), v4(1))
        .with(|frame| frame.payload.clear())
        .bytes();
    frame.resize(60, 0);
    loaded.passes(&frame, Verdict::Serve);
}

#[test]
fn random_bytes_are_passed_untouched() {
    let Some(mut loaded) = serving() else { return };
    let mut state = 0x1234_5678_9abc_def1u64;
    for round in 0..2000 {
        let mut frame = syn(v4(9), v4(1)).bytes();
        for _ in 0..=round % 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let position = 12 + (state >> 32) as usize % (frame.len() - 12);
            frame[position] = state as u8;
        }
        let outcome = loaded.send(&frame);
        assert_eq!(outcome.bytes, frame);
        assert_eq!(outcome.action, Action::Pass);
    }
}
