//! A packet inside another one: IP in IP (RFC 2003, RFC 2473, RFC 4213) or generic UDP encapsulation (GUE, variant 1: the packet follows UDP).

use super::{ETHERNET_BYTES, Family, Frame, Packet, ethertype};
use crate::abi::{Address, protocol};
use crate::checksum::Delta;
use crate::verdict::Verdict;

/// The port of GUE (IANA).
pub const GUE_PORT: u16 = 6080;

/// Hop limit of outer headers.
const HOP_LIMIT: u8 = 64;

/// IP protocol numbers of a packet inside a packet.
const IPV4: u8 = 4;
const IPV6: u8 = 41;

/// First of the UDP source ports that carry entropy (RFC 6335 section 6: dynamic ports).
const ENTROPY_PORT: u16 = 0xc000;

/// What stands around the packet.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Both of the same family, which need not be that of the packet inside.
    pub source: Address,
    pub destination: Address,
    /// With GUE its destination port, network order.
    pub gue_port: Option<[u8; 2]>,
    /// The same for all packets of a flow: routers between spread flows by it.
    pub entropy: u32,
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
}

/// How many bytes an outer header to that family takes.
#[inline(always)]
pub const fn outer_bytes(v4: bool, gue: bool) -> usize {
    let ip = if v4 { 20 } else { 40 };
    if gue { ip + 8 } else { ip }
}

/// Writes Ethernet and outer headers into the room in front of a packet: `frame` begins `outer_bytes` before where it began
/// when `packet` was read. The class, with its congestion bits, is copied (RFC 6040); the packet inside stays as it is.
///
/// # Errors
///
/// `Malformed` when the frame is shorter than that; then no byte has changed.
#[inline(always)]
pub fn encapsulate(frame: &Frame, packet: &Packet, outer: &Outer) -> Result<(), Verdict> {
    let ip_bytes = packet.frame_bytes_min as u16 - ETHERNET_BYTES as u16;
    if outer.destination.is_v4() {
        write_ipv4(frame, packet.family, ip_bytes, outer)
    } else {
        write_ipv6(frame, packet.family, ip_bytes, outer)
    }
}

/// An IPv4 header that may not be fragmented: its id means nothing then (RFC 6864), and the packet was seen to fit.
#[inline(always)]
fn write_ipv4(frame: &Frame, inside: Family, ip_bytes: u16, outer: &Outer) -> Result<(), Verdict> {
    const DO_NOT_FRAGMENT: u16 = 0x4000;
    let gue = outer.gue_port.is_some();
    let class = class(frame, inside, ETHERNET_BYTES + outer_bytes(true, gue))?;
    let ethernet = frame.header::<ETHERNET_BYTES>(0)?;
    let ip = frame.header::<20>(ETHERNET_BYTES)?;
    if let Some(port) = outer.gue_port {
        write_udp(frame, ETHERNET_BYTES + 20, ip_bytes, outer, port)?;
    }
    ethernet.store_pair::<12>(ethertype::IPV4);
    ethernet.store_mac::<0>(outer.destination_mac);
    ethernet.store_mac::<6>(outer.source_mac);
    let version = [0x45, class];
    let total = (ip_bytes + outer_bytes(true, gue) as u16).to_be_bytes();
    let hops = [HOP_LIMIT, number(inside, gue)];
    let flags = DO_NOT_FRAGMENT.to_be_bytes();
    let checksum = Delta::NONE
        .add(version)
        .add(total)
        .add(flags)
        .add(hops)
        .add_v4(&outer.source)
        .add_v4(&outer.destination);
    ip.store_pair::<0>(version);
    ip.store_pair::<2>(total);
    ip.store_pair::<4>([0; 2]);
    ip.store_pair::<6>(flags);
    ip.store_pair::<8>(hops);
    ip.store_pair::<10>(checksum.complete());
    ip.store::<u32, 12>(outer.source.as_v4_word());
    ip.store::<u32, 16>(outer.destination.as_v4_word());
    Ok(())
}

/// An IPv6 header, its flow label the flow's entropy (RFC 6438).
#[inline(always)]
fn write_ipv6(frame: &Frame, inside: Family, ip_bytes: u16, outer: &Outer) -> Result<(), Verdict> {
    let gue = outer.gue_port.is_some();
    let class = class(frame, inside, ETHERNET_BYTES + outer_bytes(false, gue))?;
    let ethernet = frame.header::<ETHERNET_BYTES>(0)?;
    let ip = frame.header::<40>(ETHERNET_BYTES)?;
    if let Some(port) = outer.gue_port {
        write_udp(frame, ETHERNET_BYTES + 40, ip_bytes, outer, port)?;
    }
    ethernet.store_pair::<12>(ethertype::IPV6);
    ethernet.store_mac::<0>(outer.destination_mac);
    ethernet.store_mac::<6>(outer.source_mac);
    let label = outer.entropy & 0x000f_ffff;
    ip.store::<u32, 0>((0x6000_0000 | (class as u32) << 20 | label).to_be());
    let payload = if gue { ip_bytes + 8 } else { ip_bytes };
    ip.store_pair::<4>(payload.to_be_bytes());
    ip.store_pair::<6>([number(inside, gue), HOP_LIMIT]);
    ip.store::<[u32; 4], 8>(bytemuck::must_cast(outer.source.0));
    ip.store::<[u32; 4], 24>(bytemuck::must_cast(outer.destination.0));
    Ok(())
}

/// UDP without a checksum: what is inside has its own. RFC 6935 allows that of tunnels over IPv6, too, and
/// endpoints must accept it, as Linux's do.
#[inline(always)]
fn write_udp(
    frame: &Frame,
    at: usize,
    ip_bytes: u16,
    outer: &Outer,
    port: [u8; 2],
) -> Result<(), Verdict> {
    let udp = frame.header::<8>(at)?;
    udp.store_pair::<0>((ENTROPY_PORT | (outer.entropy as u16 & !ENTROPY_PORT)).to_be_bytes());
    udp.store_pair::<2>(port);
    udp.store_pair::<4>((ip_bytes + 8).to_be_bytes());
    udp.store_pair::<6>([0; 2]);
    Ok(())
}

/// The protocol number of an outer header.
#[inline(always)]
const fn number(inside: Family, gue: bool) -> u8 {
    match inside {
        _ if gue => protocol::UDP,
        Family::V4 => IPV4,
        Family::V6 => IPV6,
    }
}

/// Type of service or traffic class of the packet inside.
#[inline(always)]
fn class(frame: &Frame, inside: Family, at: usize) -> Result<u8, Verdict> {
    let first = frame.header::<2>(at)?.number::<0>();
    Ok(match inside {
        Family::V4 => first as u8,
        Family::V6 => (first >> 4) as u8,
    })
}
