//! A frame read by the rules: which packet it is, or why it is none of ours.

use proxy_ebpf::abi::{Address, FlowKey};
use proxy_ebpf::verdict::Verdict;

use crate::packet::{ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP};

/// What is known of a packet's ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// The first of several fragments.
    First,
    /// A later one, which has no ports of its own.
    Later,
    /// An ICMP error. Addresses, ports and protocol are those of a packet that would answer the quoted one.
    Error {
        /// Where the quoted IP header begins, and the TCP or UDP header behind it.
        quote: usize,
        quoted: usize,
    },
    /// Headers that are not read.
    Unread,
}

/// A packet that may be ours. Ports are in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    pub v6: bool,
    pub part: Part,
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub destination_port: u16,
    /// TCP or UDP; of packets that are not read to the end the last number seen.
    pub protocol: u8,
    /// Of whole packets and first fragments of TCP, else 0.
    pub tcp_flags: u8,
    pub hop_limit: u8,
    /// The source in the IP header.
    pub sender: Address,
    /// As it stands in the header: 16 bits in host order with IPv4, 32 as they are in memory with IPv6.
    pub fragment_id: u32,
    /// Where TCP, UDP or ICMP begins.
    pub transport: usize,
    /// Where the packet ends by the length in its IP header.
    pub ip_end: usize,
}

impl Read {
    /// The flow that the packet belongs to, seen from its client.
    pub fn flow_key(&self) -> FlowKey {
        FlowKey {
            client: self.source,
            listener: self.destination,
            client_port: self.source_port.to_be_bytes(),
            listener_port: self.destination_port.to_be_bytes(),
            protocol: self.protocol,
            zero: [0; 3],
        }
    }

    /// A UDP packet with ports of its own, or a TCP packet that is a SYN and nothing else.
    pub fn opens_flow(&self) -> bool {
        match self.protocol {
            UDP => matches!(self.part, Part::Whole | Part::First),
            _ => self.tcp_flags & (SYN | ACK | FIN | RST) == SYN,
        }
    }

    /// A packet that no flow that lives can have: a SYN, or an Initial of QUIC version 1 or 2.
    pub fn begins(&self, bytes: &[u8]) -> bool {
        if self.protocol == TCP {
            return self.opens_flow();
        }
        let payload = bytes.get(self.transport + 8..self.ip_end);
        let initial = match payload {
            Some([first, 0, 0, 0, 1, ..]) => first >> 4 == 0b1100,
            Some([first, 0x6b, 0x33, 0x43, 0xcf, ..]) => first >> 4 == 0b1101,
            _ => false,
        };
        initial && self.opens_flow()
    }
}

/// Extension headers (IANA) that are stepped over, and those that are known and not read.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const STEPPED_OVER: [u8; 4] = [HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION];
const NOT_READ: [u8; 4] = [51, 135, 139, 140];

/// Reads what can be read of a frame without VLAN tags.
pub fn read(frame: &[u8], wanted: impl Fn(u16) -> bool) -> Result<Read, Verdict> {
    let ethernet = slice(frame, 0, 14)?;
    let packet = match [ethernet[12], ethernet[13]] {
        [0x08, 0x00] => read_ipv4(frame, 14)?,
        [0x86, 0xdd] => read_ipv6(frame, 14, 4)?,
        _ => return Err(Verdict::NotOurs),
    };
    match packet.part {
        Part::Later | Part::Unread => Ok(packet),
        Part::Whole if packet.protocol == ICMP || packet.protocol == ICMPV6 => {
            read_error(frame, packet, wanted)
        }
        _ => read_ports(frame, packet, wanted),
    }
}

/// So many bytes at an offset; a frame without them is malformed.
fn slice(frame: &[u8], at: usize, bytes: usize) -> Result<&[u8], Verdict> {
    frame.get(at..at + bytes).ok_or(Verdict::Malformed)
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// An IPv4 address of a header, mapped.
fn v4(bytes: &[u8]) -> Address {
    Address::v4([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn v6(bytes: &[u8]) -> Address {
    let mut address = Address([0; 16]);
    address.0.copy_from_slice(&bytes[..16]);
    address
}

fn read_ipv4(frame: &[u8], at: usize) -> Result<Read, Verdict> {
    let ip = slice(frame, at, 20)?;
    let header_bytes = usize::from(ip[0] & 15) * 4;
    let total_bytes = usize::from(word(ip, 2));
    if ip[0] >> 4 != 4 || header_bytes < 20 || total_bytes < header_bytes {
        return Err(Verdict::Malformed);
    }
    let protocol = ip[9];
    let part = match protocol {
        TCP | UDP | ICMP => fragment(word(ip, 6) & 0x1fff, ip[6] & 0x20 != 0, protocol)?,
        51 => Part::Unread,
        _ => return Err(Verdict::NotOurs),
    };
    Ok(Read {
        v6: false,
        part,
        source: v4(&ip[12..]),
        destination: v4(&ip[16..]),
        source_port: 0,
        destination_port: 0,
        protocol,
        tcp_flags: 0,
        hop_limit: ip[8],
        sender: v4(&ip[12..]),
        fragment_id: u32::from(word(ip, 4)),
        transport: at + header_bytes,
        ip_end: at + total_bytes,
    })
}

/// IPv6 with at most so many extension headers.
fn read_ipv6(frame: &[u8], at: usize, extensions_max: usize) -> Result<Read, Verdict> {
    let ip = slice(frame, at, 40)?;
    if ip[0] >> 4 != 6 {
        return Err(Verdict::Malformed);
    }
    let mut packet = Read {
        v6: true,
        part: Part::Whole,
        source: v6(&ip[8..]),
        destination: v6(&ip[24..]),
        source_port: 0,
        destination_port: 0,
        protocol: ip[6],
        tcp_flags: 0,
        hop_limit: ip[7],
        sender: v6(&ip[8..]),
        fragment_id: 0,
        transport: at + 40,
        ip_end: at + 40 + usize::from(word(ip, 4)),
    };
    for _ in 0..extensions_max {
        if !STEPPED_OVER.contains(&packet.protocol) || !step(frame, &mut packet)? {
            break;
        }
    }
    let unread = STEPPED_OVER.contains(&packet.protocol) || NOT_READ.contains(&packet.protocol);
    if packet.part == Part::Whole || packet.part == Part::First {
        match packet.protocol {
            TCP | UDP => {}
            // A part of an ICMP message is Linux's, also where its fragment header named another header first.
            ICMPV6 if packet.part == Part::First => return Err(Verdict::NotOurs),
            ICMPV6 => {}
            _ if unread => packet.part = Part::Unread,
            _ => return Err(Verdict::NotOurs),
        }
    } else if packet.part == Part::Later && packet.protocol != TCP && packet.protocol != UDP {
        if !unread {
            return Err(Verdict::NotOurs);
        }
        packet.part = Part::Unread;
    }
    if packet.transport > packet.ip_end {
        return Err(Verdict::Malformed);
    }
    Ok(packet)
}

/// Steps over one extension header; whether what is behind it may be looked at.
fn step(frame: &[u8], packet: &mut Read) -> Result<bool, Verdict> {
    let header = slice(frame, packet.transport, 8)?;
    let number = packet.protocol;
    packet.protocol = header[0];
    if number == FRAGMENT {
        let place = word(header, 2);
        packet.fragment_id = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
        packet.transport += 8;
        packet.part = fragment(place >> 3, place & 1 == 1, packet.protocol)?;
        return Ok(packet.part != Part::Later);
    }
    packet.transport += (usize::from(header[1]) + 1) * 8;
    // A route that is not at its end: the destination is another one.
    if number == ROUTING && header[3] != 0 {
        packet.part = Part::Unread;
        return Ok(false);
    }
    Ok(true)
}

/// Which part of its datagram a fragment is. A later one of TCP must not reach into the header (RFC 3128).
fn fragment(place: u16, more: bool, protocol: u8) -> Result<Part, Verdict> {
    if place == 0 && !more {
        return Ok(Part::Whole);
    }
    if protocol == ICMP || protocol == ICMPV6 {
        return Err(Verdict::NotOurs);
    }
    if place == 0 {
        return Ok(Part::First);
    }
    if protocol == TCP && place < 3 {
        return Err(Verdict::Malformed);
    }
    Ok(Part::Later)
}

fn read_ports(frame: &[u8], ip: Read, wanted: impl Fn(u16) -> bool) -> Result<Read, Verdict> {
    let mut packet = ip;
    let ports = slice(frame, packet.transport, 4)?;
    packet.source_port = word(ports, 0);
    packet.destination_port = word(ports, 2);
    if !wanted(packet.destination_port) {
        return Err(Verdict::NotOurs);
    }
    let announced = packet.ip_end - packet.transport;
    if packet.protocol == TCP {
        let tcp = slice(frame, packet.transport, 20)?;
        let header_bytes = usize::from(tcp[12] >> 4) * 4;
        if header_bytes < 20 || header_bytes > announced {
            return Err(Verdict::Malformed);
        }
        packet.tcp_flags = tcp[13];
        return Ok(packet);
    }
    let udp_bytes = usize::from(word(slice(frame, packet.transport, 8)?, 4));
    let too_long = packet.part == Part::Whole && udp_bytes > announced;
    if udp_bytes < 8 || announced < 8 || too_long {
        return Err(Verdict::Malformed);
    }
    Ok(packet)
}

/// An ICMP error is one of unreachable, too big, time exceeded, parameter problem, and sent to whoever sent what it quotes.
fn read_error(frame: &[u8], ip: Read, wanted: impl Fn(u16) -> bool) -> Result<Read, Verdict> {
    let kind = slice(frame, ip.transport, 8)?[0];
    let quote = ip.transport + 8;
    let quoted = match (ip.v6, ip.protocol, kind) {
        (false, ICMP, 3 | 11 | 12) => read_ipv4(frame, quote)?,
        (true, ICMPV6, 1..=4) => read_ipv6(frame, quote, 0)?,
        _ => return Err(Verdict::NotOurs),
    };
    if quoted.source != ip.destination {
        return Err(Verdict::NotOurs);
    }
    if matches!(quoted.part, Part::Later | Part::Unread) {
        return Ok(Read {
            part: Part::Unread,
            ..ip
        });
    }
    if quoted.protocol != TCP && quoted.protocol != UDP {
        return Err(Verdict::NotOurs);
    }
    let ports = slice(frame, quoted.transport, 8)?;
    if quoted.transport + 8 > ip.ip_end {
        return Err(Verdict::Malformed);
    }
    let (from, to) = (word(ports, 0), word(ports, 2));
    if !wanted(from) {
        return Err(Verdict::NotOurs);
    }
    Ok(Read {
        part: Part::Error {
            quote,
            quoted: quoted.transport,
        },
        source: quoted.destination,
        destination: quoted.source,
        source_port: to,
        destination_port: from,
        protocol: quoted.protocol,
        ..ip
    })
}
