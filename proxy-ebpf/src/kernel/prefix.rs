//! Listeners of prefixes: asked only for ports that one of them has, when no listener of one address has the packet.

use aya_ebpf::maps::lpm_trie::Key;
use proxy_ebpf::abi::{Listener, PrefixKey};
use proxy_ebpf::packet::{Family, Packet};

use crate::maps::PREFIXES;

/// The listener of the longest prefix that holds a packet's destination, if it has the port (network order). Protocol 0:
/// the address as such.
#[inline(always)]
pub fn find(packet: &Packet, port: [u8; 2], protocol: u8) -> Option<&'static Listener> {
    let [high, low] = bytemuck::must_cast(packet.destination);
    let v4 = matches!(packet.family, Family::V4) as u64;
    let port = u16::from_be_bytes(port) as u64;
    look_up(high, low, port << 16 | v4 << 8 | protocol as u64)
}

/// A function of its own, so that the way of other packets has neither its code nor its stack; and with words alone: a
/// packet whose address is passed on has to stand in memory from its beginning.
#[inline(never)]
fn look_up(high: u64, low: u64, place: u64) -> Option<&'static Listener> {
    let key = PrefixKey::whole([high, low], place >> 8 & 1 != 0, place as u8);
    // SAFETY: both are 24 bytes without padding, and the other type asks for no alignment.
    let key = unsafe { &*(&raw const key).cast::<Key<[u8; 20]>>() };
    PREFIXES.get(key)?.find((place >> 16) as u16)
}
