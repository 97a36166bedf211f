//! The segment size that a SYN announces, lowered to what fits on the way.

use super::{Family, Frame, Packet};
use crate::checksum::Delta;

/// Options that are looked at. Every stack in use announces its segment size first; one behind more than these stays as it is.
const OPTIONS_MAX: usize = 10;

/// Bytes of IP and TCP headers without options: what a packet of a full segment is longer by (RFC 6691).
#[inline(always)]
pub const fn headers_bytes(family: Family) -> u16 {
    match family {
        Family::V4 => 20 + 20,
        Family::V6 => 40 + 20,
    }
}

/// Lowers the maximum segment size (RFC 9293 section 3.7.1) that a TCP packet announces to `limit` bytes, and the checksum
/// with it. What is not larger, is not announced, or is not where options are, stays as it is.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub fn clamp_mss(frame: &Frame, packet: &Packet, limit: u16) {
    const FIXED_BYTES: usize = 20;
    const END: u8 = 0;
    const NONE: u8 = 1;
    const SEGMENT: u8 = 2;
    let Ok(tcp) = frame.header::<FIXED_BYTES>(packet.transport_offset) else {
        return;
    };
    let end = (tcp.byte::<12>() >> 4) as usize * 4;
    let mut at = FIXED_BYTES;
    for _ in 0..OPTIONS_MAX {
        if at + 4 > end {
            return;
        }
        // At least four bytes are left, which are all that are needed of any option.
        let Ok(option) = frame.header::<4>(packet.transport_offset + at) else {
            return;
        };
        match (option.byte::<0>(), option.byte::<1>()) {
            (END, _) => return,
            (NONE, _) => at += 1,
            (SEGMENT, 4) => {
                let before = option.pair::<2>();
                if u16::from_be_bytes(before) > limit {
                    let after = limit.to_be_bytes();
                    option.store_pair::<2>(after);
                    tcp.store_pair::<16>(changed(at, before, after).apply(tcp.pair::<16>()));
                }
                return;
            }
            (_, bytes) if bytes >= 2 => at += bytes as usize,
            _ => return,
        }
    }
}

/// What the change does to the checksum: behind a single byte of padding the number stands across two of its words, and
/// counts as if its bytes were exchanged (RFC 1071 section 2(B)).
#[inline(always)]
const fn changed(at: usize, before: [u8; 2], after: [u8; 2]) -> Delta {
    let ([a, b], [c, d]) = (before, after);
    if at & 1 == 0 {
        Delta::NONE.word([a, b], [c, d])
    } else {
        Delta::NONE.word([b, a], [d, c])
    }
}
