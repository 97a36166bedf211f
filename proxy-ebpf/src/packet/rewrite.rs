//! Addresses and ports written anew, and every checksum that covers them: of a packet, of a fragment, of an error and what it quotes.

use super::{ETHERNET_BYTES, Family, Frame, Header, Packet, Part};
use crate::abi::{Address, protocol};
use crate::checksum::Delta;
use crate::verdict::Verdict;

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

impl Rewrite {
    /// To nowhere: what stands there until the way is known.
    pub const NOWHERE: Self = Self {
        source: Address([0; 16]),
        destination: Address([0; 16]),
        source_port: [0; 2],
        destination_port: [0; 2],
        source_mac: [0; 6],
        destination_mac: [0; 6],
    };
}

/// Writes addresses, ports and MACs of a packet that has its ports, takes one off the hop limit (which must be above 1)
/// and updates the checksums.
///
/// # Errors
///
/// `Malformed` when the frame is shorter than what `packet` was read from; then no byte has changed.
#[inline(always)]
pub fn rewrite(frame: &Frame, packet: &Packet, to: &Rewrite) -> Result<(), Verdict> {
    let ports = frame.header::<4>(packet.transport_offset)?;
    let checksum = frame.header::<2>(packet.transport_offset + checksum_offset(packet.protocol))?;
    rewrite_addresses(frame, packet, to)?;
    ports.store_pair::<0>(to.source_port);
    ports.store_pair::<2>(to.destination_port);
    let delta = addresses(packet, to)
        .word(packet.source_port, to.source_port)
        .word(packet.destination_port, to.destination_port);
    checksum.store_pair::<0>(apply(delta, packet.protocol, checksum.pair::<0>()));
    send_on(frame, to.source_mac, to.destination_mac)
}

/// The same of any part. In an error the quoted packet is the one that went the other way, and both headers change.
///
/// # Errors
///
/// As `rewrite`.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn rewrite_rare(frame: &Frame, packet: &Packet, to: &Rewrite) -> Result<(), Verdict> {
    match packet.part {
        Part::Error => rewrite_error(frame, packet, to)?,
        Part::Later => rewrite_addresses(frame, packet, to)?,
        _ => return rewrite(frame, packet, to),
    }
    send_on(frame, to.source_mac, to.destination_mac)
}

/// Writes the MACs of the way on.
///
/// # Errors
///
/// `Malformed` when the frame has no Ethernet header.
#[inline(always)]
pub fn send_on(frame: &Frame, source: [u8; 6], destination: [u8; 6]) -> Result<(), Verdict> {
    let ethernet = frame.header::<12>(0)?;
    ethernet.store_mac::<0>(destination);
    ethernet.store_mac::<6>(source);
    Ok(())
}

/// What changes of addresses do to a checksum that covers them.
#[inline(always)]
fn addresses(packet: &Packet, to: &Rewrite) -> Delta {
    Delta::NONE
        .address(&packet.source, &to.source)
        .address(&packet.destination, &to.destination)
}

/// The IP header alone: all there is to change in a later fragment.
#[inline(always)]
fn rewrite_addresses(frame: &Frame, packet: &Packet, to: &Rewrite) -> Result<(), Verdict> {
    match packet.family {
        Family::V4 => {
            let ip = frame.header::<20>(ETHERNET_BYTES)?;
            write_ipv4(ip, addresses(packet, to), to);
        }
        Family::V6 => write_ipv6(frame.header::<40>(ETHERNET_BYTES)?, to),
    }
    Ok(())
}

/// Of an error: the outer header as of any packet of the flow; the quoted one with source and destination exchanged, for
/// that packet went the other way; and ICMP's checksum over all that changed inside.
#[inline(always)]
fn rewrite_error(frame: &Frame, packet: &Packet, to: &Rewrite) -> Result<(), Verdict> {
    let icmp = frame.header::<4>(packet.transport_offset)?;
    let ports = frame.header::<4>(packet.quoted_offset)?;
    let checksum_offset = packet.quoted_offset + checksum_offset(packet.protocol);
    // Eight bytes of the quoted TCP header are enough for an error, and its checksum stands behind them. Without it
    // the ports take its place, so that there is one pointer, which the verifier sees checked.
    let is_quoted = checksum_offset + 2 <= packet.frame_bytes_min as usize;
    let checksum = frame.header::<2>(if is_quoted {
        checksum_offset
    } else {
        packet.quoted_offset
    })?;
    let outer = Delta::NONE
        .address(&packet.sender, &to.source)
        .address(&packet.destination, &to.destination);
    let mut inner = addresses(packet, to);
    let covered = match packet.family {
        Family::V4 => {
            let quoted = frame.header::<20>(packet.quote_offset)?;
            let ip = frame.header::<20>(ETHERNET_BYTES)?;
            let before = quoted.pair::<10>();
            let after = inner.apply(before);
            quoted.store_pair::<10>(after);
            quoted.store::<u32, 12>(to.destination.as_v4_word());
            quoted.store::<u32, 16>(to.source.as_v4_word());
            write_ipv4(ip, outer, to);
            inner.word(before, after)
        }
        Family::V6 => {
            let quoted = frame.header::<40>(packet.quote_offset)?;
            let ip = frame.header::<40>(ETHERNET_BYTES)?;
            quoted.store::<[u32; 4], 8>(bytemuck::must_cast(to.destination.0));
            quoted.store::<[u32; 4], 24>(bytemuck::must_cast(to.source.0));
            write_ipv6(ip, to);
            // ICMPv6 covers the outer addresses, too (RFC 4443 section 2.3).
            inner.and(outer)
        }
    };
    ports.store_pair::<0>(to.destination_port);
    ports.store_pair::<2>(to.source_port);
    let changed_ports = Delta::NONE
        .word(packet.source_port, to.source_port)
        .word(packet.destination_port, to.destination_port);
    inner = inner.and(changed_ports);
    let mut covered = covered.and(changed_ports);
    if is_quoted {
        let before = checksum.pair::<0>();
        let after = apply(inner, packet.protocol, before);
        checksum.store_pair::<0>(after);
        covered = covered.word(before, after);
    }
    icmp.store_pair::<2>(covered.apply(icmp.pair::<2>()));
    Ok(())
}

/// Where the checksum stands in a TCP or UDP header.
#[inline(always)]
const fn checksum_offset(number: u8) -> usize {
    if number == protocol::TCP { 16 } else { 6 }
}

/// A TCP or UDP checksum after a change.
#[inline(always)]
fn apply(delta: Delta, number: u8, checksum: [u8; 2]) -> [u8; 2] {
    if number == protocol::TCP {
        delta.apply(checksum)
    } else {
        delta.apply_udp(checksum)
    }
}

/// The time to live, the checksum and both addresses of an IPv4 header.
#[inline(always)]
fn write_ipv4(ip: Header<20>, addresses: Delta, to: &Rewrite) {
    let before = ip.pair::<8>();
    let after = [before[0].wrapping_sub(1), before[1]];
    ip.store_pair::<8>(after);
    ip.store_pair::<10>(addresses.word(before, after).apply(ip.pair::<10>()));
    ip.store::<u32, 12>(to.source.as_v4_word());
    ip.store::<u32, 16>(to.destination.as_v4_word());
}

/// The hop limit and both addresses of an IPv6 header, which has no checksum.
#[inline(always)]
fn write_ipv6(ip: Header<40>, to: &Rewrite) {
    ip.store::<u8, 7>(ip.byte::<7>().wrapping_sub(1));
    ip.store::<[u32; 4], 8>(bytemuck::must_cast(to.source.0));
    ip.store::<[u32; 4], 24>(bytemuck::must_cast(to.destination.0));
}
