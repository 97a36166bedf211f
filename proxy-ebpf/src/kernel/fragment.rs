//! Fragments by their listener's rule: later ones follow the first, or go to Linux, or are dropped.

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use proxy_ebpf::abi::{FragmentKey, FragmentPorts, option, stamp};
use proxy_ebpf::packet::{Packet, Part};
use proxy_ebpf::verdict::Verdict;

use crate::maps::FRAGMENTS;

/// How long a first fragment speaks for the later ones, in the unit of stamps: as long as Linux keeps fragments
/// (net.ipv4.ipfrag_time), for an id comes again.
const AGE_MAX: u16 = 30;

/// Whether the ports of a packet are known: a later fragment gets those of the first one.
#[inline(never)]
pub fn knows_ports(packet: &mut Packet) -> bool {
    if !matches!(packet.part, Part::Later) {
        return !matches!(packet.part, Part::Opaque);
    }
    // SAFETY: the value is one word, which is replaced as a whole.
    let Some(first) = (unsafe { FRAGMENTS.get(&key(packet)) }) else {
        return false;
    };
    if now().wrapping_sub(first.seen) > AGE_MAX {
        return false;
    }
    packet.source_port = first.source_port;
    packet.destination_port = first.destination_port;
    true
}

/// Applies the rule of a listener (bits of `option`) to a packet that it forwards, and remembers a first fragment. Where
/// that is impossible the later ones are judged by their address.
#[inline(never)]
pub fn admit(packet: &Packet, options: u32) -> Result<(), Verdict> {
    if !matches!(packet.part, Part::First | Part::Later) {
        return Ok(());
    }
    if options & option::FRAGMENTS_DROP != 0 {
        return Err(Verdict::FragmentRefused);
    }
    if options & option::FRAGMENTS_PASS != 0 {
        return Err(Verdict::Unsupported);
    }
    if matches!(packet.part, Part::First) {
        let first = FragmentPorts {
            source_port: packet.source_port,
            destination_port: packet.destination_port,
            seen: now(),
            zero: 0,
        };
        let _ = FRAGMENTS.insert(&key(packet), first, 0);
    }
    Ok(())
}

#[inline(always)]
const fn key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        protocol: packet.protocol,
        zero: [0; 3],
    }
}

#[inline(always)]
fn now() -> u16 {
    // SAFETY: the helper takes nothing.
    stamp(unsafe { bpf_ktime_get_coarse_ns() })
}
