//! A packet read from its bytes, and its addresses written anew: the same code in the kernel, in tests and in fuzzing.
//!
//! Positions are raw pointers, never slices: the verifier follows `start + constant > end` and little else.
//! Nothing is written before everything that can fail has been checked.

use core::marker::PhantomData;

use crate::abi::{Address, FlowKey, protocol};
use crate::checksum::Delta;
use crate::verdict::Verdict;

/// Bytes of an Ethernet header without VLAN tags.
pub const ETHERNET_BYTES: usize = 14;

/// Ethernet types (IEEE 802 numbers, IANA) that are read.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: [u8; 2] = [0x08, 0x00];
    /// IPv6.
    pub const IPV6: [u8; 2] = [0x86, 0xdd];
}

/// Bits of byte 13 of a TCP header (RFC 9293 section 3.1).
pub mod tcp_flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// The bytes of a frame that can be reached directly: all of it, or the first buffer of a long one.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    start: *mut u8,
    end: *mut u8,
    bytes: PhantomData<&'a mut [u8]>,
}

impl<'a> Frame<'a> {
    /// A frame in memory.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let bytes = bytes.as_mut_ptr_range();
        Self {
            start: bytes.start,
            end: bytes.end,
            bytes: PhantomData,
        }
    }

    /// A frame between two pointers.
    ///
    /// # Safety
    ///
    /// The bytes from `start` to `end` must be readable and writable during `'a`.
    #[inline(always)]
    pub const unsafe fn from_pointers(start: *mut u8, end: *mut u8) -> Self {
        Self {
            start,
            end,
            bytes: PhantomData,
        }
    }

    /// `N` bytes from `offset` on, or `Malformed` where they do not all exist.
    #[inline(always)]
    fn at<const N: usize>(&self, offset: usize) -> Result<*mut [u8; N], Verdict> {
        let first = self.start.wrapping_add(offset);
        if first.wrapping_add(N) as usize > self.end as usize {
            return Err(Verdict::Malformed);
        }
        Ok(first.cast())
    }

    /// A copy of `N` bytes from `offset` on.
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Verdict> {
        let bytes = self.at::<N>(offset)?;
        // SAFETY: `at` saw that the bytes lie within the frame; bytes have no alignment.
        Ok(unsafe { *bytes })
    }

    /// Destination and source MAC.
    #[inline(always)]
    pub fn macs(&self) -> Result<([u8; 6], [u8; 6]), Verdict> {
        Ok((self.read(0)?, self.read(6)?))
    }
}

/// Which IP header a packet has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// A TCP or UDP packet, or the first fragment of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub family: Family,
    pub source: Address,
    pub destination: Address,
    /// Network order, as all ports here.
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// One of `abi::protocol`.
    pub protocol: u8,
    /// Bits of `tcp_flag`; 0 for UDP and for fragments.
    pub tcp_flags: u8,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// The first of several fragments: its ports are known, the rest of its datagram is elsewhere.
    pub fragment: bool,
    /// Where the TCP or UDP header begins.
    pub transport_offset: usize,
    /// What the frame must hold at least, by the length in its IP header.
    pub frame_bytes_min: u32,
}

impl Packet {
    /// Reads the headers of a frame.
    ///
    /// # Errors
    ///
    /// `NotOurs`: neither TCP nor UDP over IPv4 or IPv6, so no listener can be meant. `Malformed`: cut short,
    /// or lengths that contradict each other. `Unsupported`: no ports where we read them
    /// (a later fragment, an IPv6 extension header).
    #[inline(always)]
    pub fn parse(frame: &Frame) -> Result<Self, Verdict> {
        let ethertype = frame.read::<2>(ETHERNET_BYTES - 2)?;
        if ethertype == ethertype::IPV4 {
            let (ip, payload_bytes) = parse_ipv4(frame)?;
            parse_transport(frame, ip, payload_bytes)
        } else if ethertype == ethertype::IPV6 {
            let (ip, payload_bytes) = parse_ipv6(frame)?;
            parse_transport(frame, ip, payload_bytes)
        } else {
            Err(Verdict::NotOurs)
        }
    }

    /// The key of its flow, seen as a packet from client to listener.
    #[inline(always)]
    pub const fn flow_key(&self) -> FlowKey {
        FlowKey {
            client: self.source,
            listener: self.destination,
            client_port: self.source_port,
            listener_port: self.destination_port,
            protocol: self.protocol,
            zero: [0; 3],
        }
    }

    /// Whether it may start a flow: any UDP packet, or a TCP packet that is a SYN and nothing else.
    #[inline(always)]
    pub const fn opens_flow(&self) -> bool {
        const DECISIVE: u8 = tcp_flag::FIN | tcp_flag::SYN | tcp_flag::RST | tcp_flag::ACK;
        self.protocol == protocol::UDP || self.tcp_flags & DECISIVE == tcp_flag::SYN
    }
}

/// IPv4 (RFC 791), options included. The ports are filled in later. Returns the bytes after the header, too.
#[inline(always)]
fn parse_ipv4(frame: &Frame) -> Result<(Packet, u32), Verdict> {
    let ip = frame.read::<20>(ETHERNET_BYTES)?;
    let protocol = known_protocol(ip[9])?;
    let header_bytes = (ip[0] & 0x0f) as usize * 4;
    let total_bytes = u16::from_be_bytes([ip[2], ip[3]]) as u32;
    if ip[0] >> 4 != 4 || header_bytes < 20 || total_bytes < header_bytes as u32 {
        return Err(Verdict::Malformed);
    }
    if u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff != 0 {
        return Err(Verdict::Unsupported);
    }
    let packet = Packet {
        family: Family::V4,
        source: Address::v4([ip[12], ip[13], ip[14], ip[15]]),
        destination: Address::v4([ip[16], ip[17], ip[18], ip[19]]),
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol,
        tcp_flags: 0,
        hop_limit: ip[8],
        fragment: ip[6] & 0x20 != 0,
        transport_offset: ETHERNET_BYTES + header_bytes,
        frame_bytes_min: ETHERNET_BYTES as u32 + total_bytes,
    };
    Ok((packet, total_bytes - header_bytes as u32))
}

/// IPv6 (RFC 8200) without extension headers.
#[inline(always)]
fn parse_ipv6(frame: &Frame) -> Result<(Packet, u32), Verdict> {
    let ip = frame.read::<40>(ETHERNET_BYTES)?;
    if ip[0] >> 4 != 6 {
        return Err(Verdict::Malformed);
    }
    let protocol = known_protocol(ip[6])?;
    let payload_bytes = u16::from_be_bytes([ip[4], ip[5]]) as u32;
    let packet = Packet {
        family: Family::V6,
        source: address(&ip, 8),
        destination: address(&ip, 24),
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol,
        tcp_flags: 0,
        hop_limit: ip[7],
        fragment: false,
        transport_offset: ETHERNET_BYTES + 40,
        frame_bytes_min: (ETHERNET_BYTES + 40) as u32 + payload_bytes,
    };
    Ok((packet, payload_bytes))
}

/// The protocols with ports that we read. ICMP is nobody's listener: an error about a flow of
/// ours is not translated yet, and goes to Linux like every other protocol.
#[inline(always)]
const fn known_protocol(number: u8) -> Result<u8, Verdict> {
    match number {
        protocol::TCP | protocol::UDP => Ok(number),
        // Hop-by-hop, routing, fragment, authentication, destination options, mobility (IANA).
        0 | 43 | 44 | 51 | 60 | 135 => Err(Verdict::Unsupported),
        _ => Err(Verdict::NotOurs),
    }
}

/// The 16 bytes of an IPv6 header from `offset` on, as an aligned address.
#[inline(always)]
fn address(ip: &[u8; 40], offset: usize) -> Address {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&ip[offset..offset + 16]);
    Address(bytes)
}

/// TCP (RFC 9293) or UDP (RFC 768) after `payload_bytes` were announced for them.
#[inline(always)]
fn parse_transport(frame: &Frame, ip: Packet, payload_bytes: u32) -> Result<Packet, Verdict> {
    let mut packet = ip;
    let ports = frame.read::<4>(packet.transport_offset)?;
    packet.source_port = [ports[0], ports[1]];
    packet.destination_port = [ports[2], ports[3]];
    if packet.fragment {
        return Ok(packet);
    }
    if packet.protocol == protocol::TCP {
        let tcp = frame.read::<20>(packet.transport_offset)?;
        let header_bytes = (tcp[12] >> 4) as u32 * 4;
        if header_bytes < 20 || header_bytes > payload_bytes {
            return Err(Verdict::Malformed);
        }
        packet.tcp_flags = tcp[13];
    } else {
        let udp = frame.read::<8>(packet.transport_offset)?;
        let udp_bytes = u16::from_be_bytes([udp[4], udp[5]]) as u32;
        if udp_bytes < 8 || udp_bytes > payload_bytes {
            return Err(Verdict::Malformed);
        }
    }
    Ok(packet)
}

/// What a packet becomes on its way on. Both addresses have the packet's own family.
#[derive(Clone, Copy, Debug)]
pub struct Rewrite {
    pub source: Address,
    pub destination: Address,
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
}

/// Writes addresses, ports and MACs, takes one off the hop limit (which must be above 1) and updates the checksums.
///
/// # Errors
///
/// `Malformed` when the frame is shorter than what `packet` was read from; then no byte has changed.
#[inline(always)]
pub fn rewrite(frame: &Frame, packet: &Packet, to: &Rewrite) -> Result<(), Verdict> {
    let transport_offset = packet.transport_offset;
    let checksum_offset = if packet.protocol == protocol::TCP {
        16
    } else {
        6
    };
    let ethernet = frame.at::<12>(0)?;
    let ports = frame.at::<4>(transport_offset)?;
    let checksum = frame.at::<2>(transport_offset + checksum_offset)?;

    let addresses = Delta::NONE
        .address(&packet.source, &to.source)
        .address(&packet.destination, &to.destination);
    match packet.family {
        Family::V4 => {
            let ip = frame.at::<20>(ETHERNET_BYTES)?;
            // SAFETY: `at` saw that the header lies within the frame; bytes have no alignment, and nobody else holds them.
            unsafe { write_ipv4(&mut *ip, addresses, to) };
        }
        Family::V6 => {
            let ip = frame.at::<40>(ETHERNET_BYTES)?;
            // SAFETY: as above.
            unsafe { write_ipv6(&mut *ip, to) };
        }
    }

    let delta = addresses
        .word(packet.source_port, to.source_port)
        .word(packet.destination_port, to.destination_port);
    // SAFETY: `at` saw that each of the three lies within the frame; they do not overlap, for
    // the checksum lies behind the ports and the transport header behind the IP header.
    unsafe {
        let (d, s) = (to.destination_mac, to.source_mac);
        *ethernet = [
            d[0], d[1], d[2], d[3], d[4], d[5], s[0], s[1], s[2], s[3], s[4], s[5],
        ];
        let (s, d) = (to.source_port, to.destination_port);
        *ports = [s[0], s[1], d[0], d[1]];
        *checksum = if packet.protocol == protocol::TCP {
            delta.apply(*checksum)
        } else {
            delta.apply_udp(*checksum)
        };
    }
    Ok(())
}

/// The time to live, the checksum and both addresses of an IPv4 header.
#[inline(always)]
fn write_ipv4(ip: &mut [u8; 20], addresses: Delta, to: &Rewrite) {
    let before = [ip[8], ip[9]];
    ip[8] = ip[8].wrapping_sub(1);
    let checksum = addresses
        .word(before, [ip[8], ip[9]])
        .apply([ip[10], ip[11]]);
    ip[10..12].copy_from_slice(&checksum);
    ip[12..16].copy_from_slice(&to.source.as_v4());
    ip[16..20].copy_from_slice(&to.destination.as_v4());
}

/// The hop limit and both addresses of an IPv6 header, which has no checksum.
#[inline(always)]
fn write_ipv6(ip: &mut [u8; 40], to: &Rewrite) {
    ip[7] = ip[7].wrapping_sub(1);
    ip[8..24].copy_from_slice(&to.source.0);
    ip[24..40].copy_from_slice(&to.destination.0);
}

#[cfg(test)]
mod tests {}
