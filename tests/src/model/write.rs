//! Packets written anew: tags off and on, addresses and ports changed, headers put in front.

use proxy_ebpf::abi::{Address, Endpoint};

use super::read::{Part, Read};
use super::sum::{carried, checksum};
use crate::packet::{ICMP, ICMPV6, SYN, TCP, UDP};

/// Hop limit of headers that we make.
const HOP_LIMIT: u8 = 64;

/// How much of a packet an answer quotes.
pub const QUOTE_BYTES: usize = 128;

/// What a packet becomes.
pub struct Change {
    pub source: (Address, u16),
    pub destination: (Address, u16),
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
}

/// The frame without its one or two VLAN tags, and these. Behind anything but tags and IP there are none.
pub fn untagged(frame: &[u8]) -> (Vec<u8>, [u8; 8]) {
    let kind = |at: usize| frame.get(at..at + 2);
    let is_tag = |at| matches!(kind(at), Some([0x81, 0x00] | [0x88, 0xa8]));
    let is_ip = |at| matches!(kind(at), Some([0x08, 0x00] | [0x86, 0xdd]));
    let mut tags = [0; 8];
    let bytes = match (is_tag(12), is_tag(16)) {
        (true, false) if is_ip(16) => 4,
        (true, true) if is_ip(20) => 8,
        _ => return (frame.to_vec(), tags),
    };
    tags[..bytes].copy_from_slice(&frame[12..12 + bytes]);
    ([&frame[..12], &frame[12 + bytes..]].concat(), tags)
}

/// The frame with tags.
pub fn tagged(frame: &[u8], tags: &[u8; 8]) -> Vec<u8> {
    let bytes = tags.chunks(4).take_while(|tag| **tag != [0; 4]).count() * 4;
    if bytes == 0 {
        return frame.to_vec();
    }
    [&frame[..12], &tags[..bytes], &frame[12..]].concat()
}

/// The tag of a VLAN, if it has one.
pub fn vlan_tag(vlan: [u8; 2]) -> [u8; 8] {
    match vlan {
        [0, 0] => [0; 8],
        [a, b] => [0x81, 0x00, a, b, 0, 0, 0, 0],
    }
}

/// The same packet between other MACs.
pub fn with_macs(frame: &[u8], source: [u8; 6], destination: [u8; 6]) -> Vec<u8> {
    [&destination, &source, &frame[12..]].concat()
}

/// The packet with other addresses and ports, one hop older, and every checksum carried over. A SYN announces segments of no
/// more than `mss_bytes`, unless these are 0.
pub fn readdressed(frame: &[u8], packet: &Read, change: &Change, mss_bytes: u16) -> Vec<u8> {
    let mut after = with_macs(frame, change.source_mac, change.destination_mac);
    after[if packet.v6 { 21 } else { 22 }] -= 1;
    put_addresses(
        &mut after,
        packet.v6,
        14,
        change.source.0,
        change.destination.0,
    );
    if !packet.v6 {
        let header = 14..14 + usize::from(frame[14] & 15) * 4;
        carry(frame, &mut after, &header, 24, &[]);
    }
    let pseudo = [
        (packet.source, change.source.0),
        (packet.destination, change.destination.0),
    ];
    match packet.part {
        Part::Error { quote, quoted } => {
            readdress_error(frame, &mut after, packet, change, (quote, quoted));
        }
        Part::Later => {}
        _ => {
            put(&mut after, packet.transport, &change.source.1.to_be_bytes());
            put(
                &mut after,
                packet.transport + 2,
                &change.destination.1.to_be_bytes(),
            );
            if packet.tcp_flags & SYN != 0 && mss_bytes != 0 {
                lower_segment_size(&mut after, packet.transport, mss_bytes);
            }
            carry_transport(frame, &mut after, packet, packet.transport, &pseudo);
        }
    }
    after
}

/// Of a TCP header: the first option of kind 2 among the first ten options.
fn lower_segment_size(bytes: &mut [u8], transport: usize, limit: u16) {
    let header_bytes = usize::from(bytes[transport + 12] >> 4) * 4;
    let Some(mut options) = bytes.get_mut(transport + 20..transport + header_bytes) else {
        return;
    };
    for _ in 0..10 {
        let skipped = match options {
            [2, 4, high, low, ..] => {
                let lowered = u16::from_be_bytes([*high, *low]).min(limit);
                [*high, *low] = lowered.to_be_bytes();
                return;
            }
            [] | [0, ..] => return,
            [1, ..] => 1,
            [_, bytes, ..] if *bytes >= 2 => usize::from(*bytes),
            _ => return,
        };
        let Some(rest) = options.get_mut(skipped..) else {
            return;
        };
        options = rest;
    }
}

/// In an error the quoted packet went the other way: its source is who is told.
fn readdress_error(
    frame: &[u8],
    after: &mut [u8],
    packet: &Read,
    change: &Change,
    (quote, quoted): (usize, usize),
) {
    put_addresses(
        after,
        packet.v6,
        quote,
        change.destination.0,
        change.source.0,
    );
    put(after, quoted, &change.destination.1.to_be_bytes());
    put(after, quoted + 2, &change.source.1.to_be_bytes());
    if !packet.v6 {
        carry(frame, after, &(quote..quoted), quote + 10, &[]);
    }
    let pseudo = [
        (packet.destination, change.destination.0),
        (packet.source, change.source.0),
    ];
    carry_transport(frame, after, packet, quoted, &pseudo);
    // ICMPv6 covers the outer addresses, ICMP none.
    let outer = [
        (packet.sender, change.source.0),
        (packet.destination, change.destination.0),
    ];
    let outer = if packet.v6 { &outer[..] } else { &[] };
    let message = packet.transport..packet.ip_end;
    carry(frame, after, &message, packet.transport + 2, outer);
}

/// The checksum of TCP or UDP, where the packet has one: UDP need not, and errors seldom quote that of TCP.
fn carry_transport(
    frame: &[u8],
    after: &mut [u8],
    packet: &Read,
    transport: usize,
    pseudo: &[(Address, Address)],
) {
    let at = transport + if packet.protocol == TCP { 16 } else { 6 };
    let is_udp = packet.protocol == UDP;
    if at + 2 > packet.ip_end || (is_udp && frame[at..at + 2] == [0, 0]) {
        return;
    }
    carry(frame, after, &(transport..packet.ip_end), at, pseudo);
    if is_udp && after[at..at + 2] == [0, 0] {
        put(after, at, &[0xff, 0xff]);
    }
}

/// Carries the checksum at an offset over from one frame to the other: over a range, and pairs of addresses before and after.
fn carry(
    frame: &[u8],
    after: &mut [u8],
    range: &std::ops::Range<usize>,
    at: usize,
    pseudo: &[(Address, Address)],
) {
    let olds: Vec<u8> = pseudo.iter().flat_map(|(old, _)| covered(old)).collect();
    let news: Vec<u8> = pseudo.iter().flat_map(|(_, new)| covered(new)).collect();
    let old = [frame[at], frame[at + 1]];
    let sum = carried(
        &[&olds, &frame[range.clone()]],
        &[&news, &after[range.clone()]],
        old,
    );
    put(after, at, &sum);
}

/// The bytes of an address that stand in a header.
fn covered(address: &Address) -> Vec<u8> {
    if address.is_v4() {
        address.0[12..].to_vec()
    } else {
        address.0.to_vec()
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Writes both addresses of the IP header at an offset.
fn put_addresses(bytes: &mut [u8], v6: bool, at: usize, source: Address, destination: Address) {
    let (first, second) = if v6 { (8, 24) } else { (12, 16) };
    put(bytes, at + first, &covered(&source));
    put(bytes, at + second, &covered(&destination));
}

/// The outer header of a packet sent inside another one.
pub struct Outer {
    pub source: Address,
    /// With GUE: its port.
    pub gue_port: Option<[u8; 2]>,
    /// The flow's hash.
    pub entropy: u32,
}

/// The frame inside an outer header to an endpoint.
pub fn encapsulated(frame: &[u8], packet: &Read, endpoint: &Endpoint, outer: &Outer) -> Vec<u8> {
    let inside_bytes = packet.ip_end - 14;
    let class = if packet.v6 {
        frame[14] << 4 | frame[15] >> 4
    } else {
        frame[15]
    };
    let mut number = if packet.v6 { 41 } else { 4 };
    let mut udp = vec![];
    if let Some(port) = outer.gue_port {
        number = UDP;
        udp.extend((0xc000 | outer.entropy as u16 & 0x3fff).to_be_bytes());
        udp.extend(port);
        udp.extend(((inside_bytes + 8) as u16).to_be_bytes());
        udp.extend([0, 0]);
    }
    let payload_bytes = inside_bytes + udp.len();
    let to = endpoint.address;
    let ip = if to.is_v4() {
        // Not to be fragmented: it was seen to fit.
        ipv4(class, [0x40, 0], number, payload_bytes, (outer.source, to))
    } else {
        let label = outer.entropy & 0xf_ffff;
        ipv6(
            u32::from(class) << 20 | label,
            number,
            payload_bytes,
            (outer.source, to),
        )
    };
    let kind = if to.is_v4() {
        [0x08, 0x00]
    } else {
        [0x86, 0xdd]
    };
    [
        &endpoint.mac,
        &endpoint.source_mac,
        &kind[..],
        &ip,
        &udp,
        &frame[14..],
    ]
    .concat()
}

fn ipv4(
    class: u8,
    flags: [u8; 2],
    number: u8,
    payload_bytes: usize,
    (source, destination): (Address, Address),
) -> Vec<u8> {
    let [high, low] = ((20 + payload_bytes) as u16).to_be_bytes();
    let mut ip = vec![
        0x45, class, high, low, 0, 0, flags[0], flags[1], HOP_LIMIT, number, 0, 0,
    ];
    ip.extend(covered(&source));
    ip.extend(covered(&destination));
    let sum = checksum(&[&ip]);
    put(&mut ip, 10, &sum);
    ip
}

fn ipv6(
    class_and_label: u32,
    number: u8,
    payload_bytes: usize,
    (source, destination): (Address, Address),
) -> Vec<u8> {
    let mut ip = (6 << 28 | class_and_label).to_be_bytes().to_vec();
    ip.extend((payload_bytes as u16).to_be_bytes());
    ip.extend([number, HOP_LIMIT]);
    ip.extend(source.0);
    ip.extend(destination.0);
    ip
}

/// The answer to a packet that is too long: from the address that it was sent to, back to where it came from.
pub fn too_big(frame: &[u8], packet: &Read, mtu_bytes: u16) -> Vec<u8> {
    let ends = (packet.destination, packet.source);
    let bytes = 8 + QUOTE_BYTES;
    let (ip, kind, code, pseudo) = if packet.v6 {
        let pseudo = [
            &ends.0.0[..],
            &ends.1.0,
            &(bytes as u32).to_be_bytes(),
            &[0, 0, 0, ICMPV6],
        ];
        (ipv6(0, ICMPV6, bytes, ends), 2, 0, pseudo.concat())
    } else {
        (ipv4(0, [0, 0], ICMP, bytes, ends), 3, 4, vec![])
    };
    let mut icmp = vec![kind, code, 0, 0, 0, 0];
    icmp.extend(mtu_bytes.to_be_bytes());
    icmp.extend(&frame[14..14 + QUOTE_BYTES]);
    let sum = checksum(&[&pseudo, &icmp]);
    put(&mut icmp, 2, &sum);
    [&frame[6..12], &frame[..6], &frame[12..14], &ip, &icmp].concat()
}
