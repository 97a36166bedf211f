//! What a sender is told whose packet does not fit: "fragmentation needed" (RFC 1191) or "packet too big" (RFC 4443 section 3.2).

use super::{ETHERNET_BYTES, Family, Frame, Header, Packet, ethertype};
use crate::abi::protocol;
use crate::checksum::Delta;
use crate::verdict::Verdict;

/// How much of the packet is quoted, from its IP header on: enough for every header, and far less than does not fit.
pub const QUOTE_BYTES: usize = 128;

const HOP_LIMIT: u8 = 64;
const ICMP_BYTES: usize = 8;

/// How many bytes are written in front of the packet.
#[inline(always)]
pub const fn too_big_bytes(family: Family) -> usize {
    match family {
        Family::V4 => 20 + ICMP_BYTES,
        Family::V6 => 40 + ICMP_BYTES,
    }
}

/// Writes the answer in front of the packet: `frame` begins `too_big_bytes` before where it began when `packet` was read,
/// and ends behind `QUOTE_BYTES` of it. It comes from the address that the packet was sent to. `macs` are destination
/// and source of the packet.
///
/// # Errors
///
/// `Malformed` when the frame is shorter than that; then no byte has changed.
#[inline(always)]
pub fn too_big(
    frame: &Frame,
    packet: &Packet,
    macs: ([u8; 6], [u8; 6]),
    mtu_bytes: u16,
) -> Result<(), Verdict> {
    let ethernet = frame.header::<ETHERNET_BYTES>(0)?;
    match packet.family {
        Family::V4 => write_ipv4(frame, packet, mtu_bytes)?,
        Family::V6 => write_ipv6(frame, packet, mtu_bytes)?,
    }
    ethernet.store_mac::<0>(macs.1);
    ethernet.store_mac::<6>(macs.0);
    ethernet.store_pair::<12>(match packet.family {
        Family::V4 => ethertype::IPV4,
        Family::V6 => ethertype::IPV6,
    });
    Ok(())
}

#[inline(always)]
fn write_ipv4(frame: &Frame, packet: &Packet, mtu_bytes: u16) -> Result<(), Verdict> {
    const TOTAL_BYTES: usize = 20 + ICMP_BYTES + QUOTE_BYTES;
    let ip = frame.header::<20>(ETHERNET_BYTES)?;
    let icmp = frame.header::<{ ICMP_BYTES + QUOTE_BYTES }>(ETHERNET_BYTES + 20)?;
    let (version, total) = ([0x45, 0], (TOTAL_BYTES as u16).to_be_bytes());
    let hops = [HOP_LIMIT, protocol::ICMP];
    let checksum = Delta::NONE
        .add(version)
        .add(total)
        .add(hops)
        .add_v4(&packet.destination)
        .add_v4(&packet.source);
    ip.store_pair::<0>(version);
    ip.store_pair::<2>(total);
    ip.store::<u32, 4>(0);
    ip.store_pair::<8>(hops);
    ip.store_pair::<10>(checksum.complete());
    ip.store::<u32, 12>(packet.destination.as_v4_word());
    ip.store::<u32, 16>(packet.source.as_v4_word());
    // Destination unreachable, fragmentation needed.
    icmp.store::<u32, 0>(u32::from_be(0x0304_0000));
    icmp.store_pair::<4>([0; 2]);
    icmp.store_pair::<6>(mtu_bytes.to_be_bytes());
    icmp.store_pair::<2>(sum(&icmp, Delta::NONE).complete());
    Ok(())
}

#[inline(always)]
fn write_ipv6(frame: &Frame, packet: &Packet, mtu_bytes: u16) -> Result<(), Verdict> {
    const PAYLOAD_BYTES: usize = ICMP_BYTES + QUOTE_BYTES;
    let ip = frame.header::<40>(ETHERNET_BYTES)?;
    let icmp = frame.header::<PAYLOAD_BYTES>(ETHERNET_BYTES + 40)?;
    let payload = (PAYLOAD_BYTES as u16).to_be_bytes();
    ip.store::<u32, 0>(u32::from_be(0x6000_0000));
    ip.store_pair::<4>(payload);
    ip.store_pair::<6>([protocol::ICMPV6, HOP_LIMIT]);
    ip.store::<[u32; 4], 8>(bytemuck::must_cast(packet.destination.0));
    ip.store::<[u32; 4], 24>(bytemuck::must_cast(packet.source.0));
    // Packet too big.
    icmp.store::<u32, 0>(u32::from_be(0x0200_0000));
    icmp.store_pair::<4>([0; 2]);
    icmp.store_pair::<6>(mtu_bytes.to_be_bytes());
    let pseudo = Delta::NONE
        .add(payload)
        .add([0, protocol::ICMPV6])
        .add_whole(&packet.destination)
        .add_whole(&packet.source);
    icmp.store_pair::<2>(sum(&icmp, pseudo).complete());
    Ok(())
}

/// Adds the ICMP header, whose checksum must be zero, and the quote.
#[inline(always)]
fn sum(icmp: &Header<{ ICMP_BYTES + QUOTE_BYTES }>, pseudo: Delta) -> Delta {
    let mut sum = pseudo;
    for index in 0..(ICMP_BYTES + QUOTE_BYTES) / 4 {
        sum = sum.add_word(icmp.word(index));
    }
    sum
}
