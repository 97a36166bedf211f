//! The parser and the rewrite on the host: known packets, and every way to cut or garble them.

use super::*;

const TCP4: [u8; 54] = [
    0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
    0x45, 0, 0, 40, 0xab, 0xcd, 0x40, 0, 64, 6, 0x84, 0x66, 10, 0, 0, 2, 192, 0, 2, 1, // IPv4
    0x9c, 0x40, 0x01, 0xbb, 1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x02, 0xfa, 0xf0, 0, 0, 0, 0, // TCP
];

fn udp6() -> Vec<u8> {
    let mut frame = TCP4[..12].to_vec();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 12, 17, 64]);
    frame.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    frame.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    frame.extend([
        0x9c, 0x40, 0x01, 0xbb, 0, 12, 0x12, 0x34, 0xde, 0xad, 0xbe, 0xef,
    ]);
    frame
}

fn parse(bytes: &mut [u8]) -> Result<Packet, Verdict> {
    Packet::parse::<true>(&Frame::new(bytes), |_| true)
}

/// xorshift64*: enough variety for a test, and the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[test]
fn a_tcp_packet_over_ipv4_is_read() {
    let wanted = Packet {
        family: Family::V4,
        source: Address::v4([10, 0, 0, 2]),
        destination: Address::v4([192, 0, 2, 1]),
        source_port: 40_000u16.to_be_bytes(),
        destination_port: 443u16.to_be_bytes(),
        protocol: protocol::TCP,
        tcp_flags: tcp_flag::SYN,
        hop_limit: 64,
        part: Part::Whole,
        sender: Address::v4([10, 0, 0, 2]),
        fragment_id: 0xabcd,
        quote_offset: 0,
        quoted_offset: 0,
        transport_offset: 34,
        frame_bytes_min: 54,
    };
    assert_eq!(parse(&mut TCP4.clone()), Ok(wanted));
    assert!(wanted.opens_flow());
}

#[test]
fn a_udp_packet_over_ipv6_is_read() {
    let packet = parse(&mut udp6()).unwrap();
    let address = |last| Address([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    assert_eq!(packet.family, Family::V6);
    assert_eq!(
        (packet.source, packet.destination),
        (address(9), address(1))
    );
    assert_eq!(packet.destination_port, 443u16.to_be_bytes());
    assert_eq!((packet.transport_offset, packet.frame_bytes_min), (54, 66));
    assert_eq!(packet.flow_key().client, address(9));
}

#[test]
fn a_port_that_is_not_wanted_is_not_ours_whatever_follows() {
    let mut frame = TCP4;
    frame[34 + 12] = 0;
    let refuse = |port| port != 443u16.to_be_bytes();
    assert_eq!(
        Packet::parse::<true>(&Frame::new(&mut frame), refuse),
        Err(Verdict::NotOurs)
    );
    assert_eq!(parse(&mut frame), Err(Verdict::Malformed));
}

#[test]
fn every_truncation_is_malformed() {
    for frame in [TCP4.to_vec(), udp6()] {
        // Headers only: what the IP header promises beyond them is checked where the frame's length is known.
        let headers = if frame[12] == 8 { 54 } else { 62 };
        for length in 0..headers {
            let mut cut = frame[..length].to_vec();
            assert_eq!(parse(&mut cut), Err(Verdict::Malformed), "{length} bytes");
        }
        assert!(parse(&mut frame[..headers].to_vec()).is_ok());
    }
}

#[test]
fn no_byte_behind_the_end_has_a_say() {
    let mut random = Random(1);
    for round in 0..200_000u32 {
        let mut frame = if round % 2 == 0 {
            TCP4.to_vec()
        } else {
            udp6()
        };
        for _ in 0..round % 5 {
            let position = 12 + random.next() as usize % (frame.len() - 12);
            frame[position] = random.next() as u8;
        }
        let length = random.next() as usize % (frame.len() + 1);
        // The same bytes up to the end, other ones behind it: the answer must be the same.
        let mut answers = [0x00, 0xff].map(|rest| {
            let mut bytes = frame.clone();
            bytes[length..].fill(rest);
            let (start, end) = (bytes.as_mut_ptr(), bytes.as_mut_ptr().wrapping_add(length));
            // SAFETY: both lie in `bytes`, which lives until the end of the block.
            let cut = unsafe { Frame::from_pointers(start, end) };
            let answer = Packet::parse::<true>(&cut, |_| true);
            let sent = answer.and_then(|packet| rewrite_rare(&cut, &packet, &elsewhere()));
            assert!(bytes[length..].iter().all(|byte| *byte == rest));
            if sent.is_err() {
                assert_eq!(bytes[..length], frame[..length], "changed, though not sent");
            }
            (answer, bytes[..length].to_vec())
        });
        let [one, other] = &mut answers;
        assert_eq!(one, other);
    }
}

fn elsewhere() -> Rewrite {
    Rewrite {
        source: Address::v4([10, 9, 9, 9]),
        destination: Address::v4([10, 8, 8, 8]),
        source_port: [0x12, 0x34],
        destination_port: [0x56, 0x78],
        source_mac: [3; 6],
        destination_mac: [4; 6],
    }
}

#[test]
fn a_rewrite_changes_what_it_names_and_nothing_else() {
    let mut frame = TCP4;
    let packet = parse(&mut frame).unwrap();
    rewrite(&Frame::new(&mut frame), &packet, &elsewhere()).unwrap();
    let after = parse(&mut frame).unwrap();
    let wanted = Packet {
        source: elsewhere().source,
        sender: elsewhere().source,
        destination: elsewhere().destination,
        source_port: [0x12, 0x34],
        destination_port: [0x56, 0x78],
        hop_limit: 63,
        ..packet
    };
    assert_eq!(after, wanted);
    assert_eq!(frame[..12], [4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3]);
    // Type and class, length, id, fragment; sequence numbers, flags, window.
    assert_eq!(frame[12..22], TCP4[12..22]);
    assert_eq!(frame[38..50], TCP4[38..50]);
    assert_eq!(frame[52..], TCP4[52..]);
}

#[test]
fn only_udp_and_a_bare_syn_open_a_flow() {
    let mut packet = parse(&mut TCP4.clone()).unwrap();
    // ECN's two bits may accompany a SYN (RFC 3168 section 6.1.1).
    for flags in [0x02, 0x02 | 0x40 | 0x80] {
        packet.tcp_flags = flags;
        assert!(packet.opens_flow());
    }
    for flags in [0, 0x10, 0x12, 0x04, 0x06, 0x03, 0x01] {
        packet.tcp_flags = flags;
        assert!(!packet.opens_flow());
    }
    assert!(parse(&mut udp6()).unwrap().opens_flow());
}
