//! The headers of a frame, read: Ethernet, IP with options and extension headers, TCP or UDP, or what an ICMP error quotes.

use super::{ETHERNET_BYTES, Family, Frame, Packet, Part, ethertype};
use crate::abi::{Address, protocol};
use crate::verdict::Verdict;

/// Extension headers that are stepped over; four is more than any real packet has. Behind more of them
/// a packet is opaque, and a banned source is refused all the same.
const EXTENSIONS_MAX: usize = 4;

/// Bytes of an ICMP header before the packet that an error quotes.
const ICMP_BYTES: usize = 8;

/// IP header, and the bytes that it announces behind itself and its extensions.
type Payload = (Packet, u32);

#[inline(always)]
pub(super) fn parse<const RARE: bool>(
    frame: &Frame,
    wanted: impl Fn([u8; 2]) -> bool,
) -> Result<Packet, Verdict> {
    let ethernet = frame.header::<ETHERNET_BYTES>(0)?;
    // One call for both families, and for both parts that have ports: of two, LLVM merges the ends and computes a
    // pointer anew behind its bounds check, which the verifier then takes for an unchecked one.
    let (packet, payload_bytes) = match ethernet.pair::<12>() {
        ethertype::IPV4 => parse_ipv4(frame, ETHERNET_BYTES)?,
        ethertype::IPV6 => parse_ipv6::<EXTENSIONS_MAX>(frame, ETHERNET_BYTES)?,
        _ => return Err(Verdict::NotOurs),
    };
    match packet.part {
        Part::Later | Part::Opaque => Ok(packet),
        Part::First | Part::Error if !RARE => Ok(packet),
        Part::Error => parse_error(frame, packet, payload_bytes, wanted),
        Part::Whole | Part::First => parse_transport(frame, packet, payload_bytes, wanted),
    }
}

/// IPv4 (RFC 791), options included, at an offset. The ports are filled in later.
#[inline(always)]
fn parse_ipv4(frame: &Frame, at: usize) -> Result<Payload, Verdict> {
    const AUTHENTICATION: u8 = 51;
    let ip = frame.header::<20>(at)?;
    let number = ip.byte::<9>();
    let header_bytes = (ip.byte::<0>() & 0x0f) as u32 * 4;
    let total_bytes = ip.number::<2>() as u32;
    let fragment = ip.number::<6>();
    if ip.byte::<0>() >> 4 != 4 || header_bytes < 20 || total_bytes < header_bytes {
        return Err(Verdict::Malformed);
    }
    let source = Address::v4_word(ip.load::<u32, 12>());
    let part = match number {
        protocol::TCP | protocol::UDP | protocol::ICMP => {
            part(fragment & 0x1fff, fragment & 0x2000 != 0, number)?
        }
        AUTHENTICATION => Part::Opaque,
        _ => return Err(Verdict::NotOurs),
    };
    let packet = Packet {
        family: Family::V4,
        part,
        source,
        destination: Address::v4_word(ip.load::<u32, 16>()),
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol: number,
        tcp_flags: 0,
        hop_limit: ip.byte::<8>(),
        sender: source,
        fragment_id: ip.number::<4>() as u32,
        transport_offset: at + header_bytes as usize,
        quote_offset: 0,
        quoted_offset: 0,
        frame_bytes_min: at as u32 + total_bytes,
    };
    Ok((packet, total_bytes - header_bytes))
}

/// IPv6 (RFC 8200) and up to so many extension headers, at an offset.
#[inline(always)]
fn parse_ipv6<const EXTENSIONS: usize>(frame: &Frame, at: usize) -> Result<Payload, Verdict> {
    let ip = frame.header::<40>(at)?;
    let payload_bytes = ip.number::<4>() as u32;
    if ip.byte::<0>() >> 4 != 6 {
        return Err(Verdict::Malformed);
    }
    let payload = at + 40;
    let behind = skip_extensions::<EXTENSIONS>(frame, ip.byte::<6>(), payload)?;
    let extension_bytes = (behind.offset - payload) as u32;
    if extension_bytes > payload_bytes {
        return Err(Verdict::Malformed);
    }
    let source = Address(bytemuck::must_cast(ip.load::<[u32; 4], 8>()));
    let packet = Packet {
        family: Family::V6,
        part: behind.part,
        source,
        destination: Address(bytemuck::must_cast(ip.load::<[u32; 4], 24>())),
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol: behind.protocol,
        tcp_flags: 0,
        hop_limit: ip.byte::<7>(),
        sender: source,
        fragment_id: behind.fragment_id,
        transport_offset: behind.offset,
        quote_offset: 0,
        quoted_offset: 0,
        frame_bytes_min: payload as u32 + payload_bytes,
    };
    Ok((packet, payload_bytes - extension_bytes))
}

/// What stands behind the extension headers.
struct Behind {
    protocol: u8,
    offset: usize,
    part: Part,
    fragment_id: u32,
}

/// Steps over the extension headers of RFC 8200 section 4. A routing header that is not used up makes the packet opaque:
/// the destination is another one then, and so is what checksums cover.
#[inline(always)]
fn skip_extensions<const EXTENSIONS: usize>(
    frame: &Frame,
    first: u8,
    at: usize,
) -> Result<Behind, Verdict> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let mut behind = Behind {
        protocol: first,
        offset: at,
        part: Part::Whole,
        fragment_id: 0,
    };
    for _ in 0..EXTENSIONS {
        let number = behind.protocol;
        if !matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            break;
        }
        let header = frame.header::<8>(behind.offset)?;
        behind.protocol = header.byte::<0>();
        if number == FRAGMENT {
            let place = header.number::<2>();
            behind.offset += 8;
            behind.fragment_id = header.load::<u32, 4>();
            behind.part = part(place >> 3, place & 1 != 0, behind.protocol)?;
            if matches!(behind.part, Part::Later) {
                break;
            }
        } else {
            behind.offset += (header.byte::<1>() as usize + 1) * 8;
            if number == ROUTING && header.byte::<3>() != 0 {
                behind.part = Part::Opaque;
                return Ok(behind);
            }
        }
    }
    match behind.protocol {
        // A fragment all the same, whose header named another extension header first.
        protocol::ICMPV6 if matches!(behind.part, Part::First) => Err(Verdict::NotOurs),
        protocol::ICMPV6 => {
            behind.part = Part::Error;
            Ok(behind)
        }
        protocol::TCP | protocol::UDP => Ok(behind),
        // Extension headers (IANA): one too many, or authentication, mobility, host identity, shim6.
        HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION | 51 | 135 | 139 | 140 => {
            behind.part = Part::Opaque;
            Ok(behind)
        }
        _ => Err(Verdict::NotOurs),
    }
}

/// Which part of its datagram a fragment is: its place in units of 8 bytes, and whether more follow.
#[inline(always)]
const fn part(place: u16, more: bool, number: u8) -> Result<Part, Verdict> {
    match (place, more) {
        (0, false) if is_icmp(number) => Ok(Part::Error),
        (0, false) => Ok(Part::Whole),
        // Fragments of ICMP are Linux's: an error is never so long.
        _ if is_icmp(number) => Err(Verdict::NotOurs),
        (0, true) => Ok(Part::First),
        (1 | 2, _) if number == protocol::TCP => Err(Verdict::Malformed),
        _ => Ok(Part::Later),
    }
}

/// Whether this is the number of ICMP or ICMPv6.
#[inline(always)]
const fn is_icmp(number: u8) -> bool {
    matches!(number, protocol::ICMP | protocol::ICMPV6)
}

/// TCP (RFC 9293) or UDP (RFC 768) after `payload_bytes` were announced for them. A first fragment must hold the
/// whole header (RFC 1858), and announces less than the datagram has.
#[inline(always)]
fn parse_transport(
    frame: &Frame,
    ip: Packet,
    payload_bytes: u32,
    wanted: impl Fn([u8; 2]) -> bool,
) -> Result<Packet, Verdict> {
    let mut packet = ip;
    let ports = frame.header::<4>(packet.transport_offset)?;
    if !wanted(ports.pair::<2>()) {
        return Err(Verdict::NotOurs);
    }
    packet.source_port = ports.pair::<0>();
    packet.destination_port = ports.pair::<2>();
    if packet.protocol == protocol::TCP {
        let tcp = frame.header::<20>(packet.transport_offset)?;
        let header_bytes = (tcp.byte::<12>() >> 4) as u32 * 4;
        if header_bytes < 20 || header_bytes > payload_bytes {
            return Err(Verdict::Malformed);
        }
        packet.tcp_flags = tcp.byte::<13>();
    } else {
        let udp = frame.header::<8>(packet.transport_offset)?;
        let udp_bytes = udp.number::<4>() as u32;
        let whole = matches!(packet.part, Part::Whole);
        if udp_bytes < 8 || payload_bytes < 8 || (whole && udp_bytes > payload_bytes) {
            return Err(Verdict::Malformed);
        }
    }
    Ok(packet)
}

/// An ICMP error (RFC 792, RFC 4443 section 2.4) and the packet of TCP or UDP that it quotes: at least its IP header and
/// eight bytes more. It counts only when it is sent to whoever sent the quoted packet.
#[inline(always)]
fn parse_error(
    frame: &Frame,
    ip: Packet,
    payload_bytes: u32,
    wanted: impl Fn([u8; 2]) -> bool,
) -> Result<Packet, Verdict> {
    let icmp = frame.header::<ICMP_BYTES>(ip.transport_offset)?;
    let quote = ip.transport_offset + ICMP_BYTES;
    let kind = icmp.byte::<0>();
    let (quoted, _) = match (ip.family, ip.protocol) {
        // Unreachable, time exceeded, parameter problem.
        (Family::V4, protocol::ICMP) if matches!(kind, 3 | 11 | 12) => parse_ipv4(frame, quote)?,
        // Unreachable, too big, time exceeded, parameter problem. Extension headers in a quote are not read.
        (Family::V6, protocol::ICMPV6) if matches!(kind, 1..=4) => parse_ipv6::<0>(frame, quote)?,
        _ => return Err(Verdict::NotOurs),
    };
    if !quoted.source.is(&ip.destination) {
        return Err(Verdict::NotOurs);
    }
    match quoted.part {
        Part::Whole | Part::First => {}
        Part::Error => return Err(Verdict::NotOurs),
        Part::Later | Part::Opaque => {
            return Ok(Packet {
                part: Part::Opaque,
                ..ip
            });
        }
    }
    let ports = frame.header::<8>(quoted.transport_offset)?;
    if ((quoted.transport_offset - ip.transport_offset) as u32) + 8 > payload_bytes {
        return Err(Verdict::Malformed);
    }
    if !wanted(ports.pair::<0>()) {
        return Err(Verdict::NotOurs);
    }
    Ok(Packet {
        part: Part::Error,
        source: quoted.destination,
        destination: quoted.source,
        source_port: ports.pair::<2>(),
        destination_port: ports.pair::<0>(),
        protocol: quoted.protocol,
        quote_offset: quote,
        quoted_offset: quoted.transport_offset,
        ..ip
    })
}
