//! L4 without state: choose an endpoint by the ring, and send the packet there as it is, in one of three ways.
//!
//! The hash alone says where a flow belongs, as long as its slot is clean. Only after the endpoints of an upstream have
//! changed, and only in the slots that moved, flows are looked up, so that those that live stay where they are.

use aya_ebpf::helpers::{bpf_ktime_get_coarse_ns, bpf_xdp_adjust_head, bpf_xdp_adjust_tail};
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::abi::{
    Address, Endpoint, FlowKey, INSERTS_PER_SECOND, LOCAL, Listener, RING_PAGE_SLOTS, Slot, mode,
    option, protocol, stamp,
};
use proxy_ebpf::maglev;
use proxy_ebpf::packet::{
    ETHERNET_BYTES, Family, Frame, Outer, Packet, Part, QUOTE_BYTES, encapsulate, outer_bytes,
    send_on, too_big, too_big_bytes,
};
use proxy_ebpf::verdict::Verdict;

use crate::ingress::{Arrival, Decision, frame, frame_bytes};
use crate::link::Tags;
use crate::maps::{
    ENDPOINT_TRAFFIC, ENDPOINTS, HASH_KEYS, INSERTS, MOVED, RINGS, STAMPS, TUNNEL, UPSTREAMS,
    count_traffic,
};

/// Sends a client's packet on to an endpoint of the listener's upstream. `TooBig`: it is as it came, and up to
/// `longest` bytes would fit.
#[inline(always)]
pub fn forward(
    ctx: &XdpContext,
    arrival: &Arrival,
    listener: &Listener,
    longest: &mut u16,
) -> Result<Decision, Verdict> {
    let packet = arrival.packet;
    let key = packet.flow_key();
    let place = Place::of(&key, listener.target)?;
    let id = place.endpoint(&key, arrival, listener.options)?;
    let endpoint = reach(id)?;
    let decision = Decision {
        verdict: Verdict::Forward,
        ifindex: endpoint.ifindex,
        tags: Tags::vlan(endpoint.vlan),
    };
    if listener.mode == mode::DIRECT {
        if let Some(mtu) = exceeds(packet, endpoint.plain_mtu_bytes, 0) {
            *longest = mtu;
            return Err(Verdict::TooBig);
        }
        send_on(&arrival.frame, endpoint.source_mac, endpoint.mac)?;
    } else {
        let outer = outer(endpoint, listener.mode == mode::GUE, place.hash)?;
        let room = outer_bytes(endpoint.address.is_v4(), outer.gue_port.is_some());
        if let Some(mtu) = exceeds(packet, endpoint.mtu_bytes, room) {
            *longest = mtu;
            return Err(Verdict::TooBig);
        }
        encapsulate(&grow(ctx, room)?, packet, &outer)?;
    }
    count_traffic(&ENDPOINT_TRAFFIC, id, packet);
    Ok(decision)
}

/// Where a flow stands in a ring.
pub struct Place {
    pub slot: Slot,
    hash: u32,
    page: u32,
    index: usize,
}

impl Place {
    /// The place of a flow in the ring of an upstream.
    #[inline(always)]
    pub fn of(key: &FlowKey, upstream: u32) -> Result<Self, Verdict> {
        let upstream = UPSTREAMS.get(upstream).ok_or(Verdict::Inconsistent)?;
        let keys = HASH_KEYS.get(0).ok_or(Verdict::Inconsistent)?;
        if upstream.slots == 0 {
            return Err(Verdict::NoEndpoint);
        }
        let hash = maglev::hash(keys, key);
        let slot = maglev::slot(hash, upstream.slots) as usize;
        let number = upstream.page.wrapping_add((slot / RING_PAGE_SLOTS) as u32);
        let page = RINGS.get(number).ok_or(Verdict::Inconsistent)?;
        let index = slot % RING_PAGE_SLOTS;
        Ok(Self {
            slot: page.slots[index],
            hash,
            page: number,
            index,
        })
    }

    /// The endpoint id of a flow: the owner of its slot, or who had it before when the flow began.
    #[inline(always)]
    fn endpoint(&self, key: &FlowKey, arrival: &Arrival, options: u32) -> Result<u32, Verdict> {
        let (owner, previous) = (self.slot.owner() as u32, self.slot.previous() as u32);
        if owner == 0 {
            return Err(Verdict::NoEndpoint);
        }
        if previous == 0 {
            return Ok(owner);
        }
        let id = settle(key, arrival, options, owner, previous);
        if id != owner {
            self.stamp();
        }
        Ok(id)
    }

    /// Notes that somebody needs the slot's earlier owner; writes only what is new.
    #[inline(always)]
    fn stamp(&self) {
        let Some(page) = STAMPS.get_ptr_mut(self.page) else {
            return;
        };
        // SAFETY: map values outlive the program's run, and the index is one of a page; whoever else writes it
        // writes the same time.
        unsafe {
            let now = stamp(bpf_ktime_get_coarse_ns());
            let place = (&raw mut (*page).stamps)
                .cast::<u16>()
                .add(self.index % RING_PAGE_SLOTS);
            if *place != now {
                *place = now;
            }
        }
    }
}

/// Where a flow of a slot belongs that is not clean: where it is remembered to be; to the owner and remembered, when it
/// begins now; else to the previous owner, where it has been all along or nobody can tell.
#[inline(always)]
fn settle(key: &FlowKey, arrival: &Arrival, options: u32, owner: u32, previous: u32) -> u32 {
    let packet = arrival.packet;
    let udp = packet.protocol == protocol::UDP;
    if udp && options & option::UDP_MOVE != 0 {
        return owner;
    }
    // SAFETY: the value is one word, which is replaced as a whole.
    if let Some(id) = unsafe { MOVED.get(key) } {
        return *id as u32;
    }
    let begins = match udp {
        true => packet.is_quic_initial(&arrival.frame),
        false => packet.opens_flow(),
    };
    if begins && remember(key, owner) {
        return owner;
    }
    previous
}

/// Remembers where a flow belongs, unless this CPU has remembered enough of them in this second.
#[inline(always)]
fn remember(key: &FlowKey, id: u32) -> bool {
    let Some(inserts) = INSERTS.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the value belongs to this CPU, and XDP is not interrupted by itself.
    unsafe {
        let window = stamp(bpf_ktime_get_coarse_ns()) as u32;
        if (*inserts).window != window {
            (*inserts).window = window;
            (*inserts).count = 0;
        }
        if (*inserts).count >= INSERTS_PER_SECOND {
            return false;
        }
        (*inserts).count += 1;
    }
    MOVED.insert(key, id as u64, 0).is_ok()
}

/// The endpoint of an id, when packets can be sent there now.
#[inline(always)]
pub fn reach(id: u32) -> Result<&'static Endpoint, Verdict> {
    let endpoint = ENDPOINTS.get(id).ok_or(Verdict::Inconsistent)?;
    if endpoint.ifindex == 0 {
        return Err(Verdict::NoNeighbour);
    }
    if endpoint.ifindex == LOCAL {
        return Err(Verdict::Local);
    }
    Ok(endpoint)
}

/// The outer header towards an endpoint.
#[inline(always)]
fn outer(endpoint: &Endpoint, gue: bool, hash: u32) -> Result<Outer, Verdict> {
    let tunnel = TUNNEL.get(0).ok_or(Verdict::Inconsistent)?;
    let (source, spread) = if endpoint.address.is_v4() {
        (tunnel.source4, tunnel.entropy4)
    } else {
        (tunnel.source6, tunnel.entropy6)
    };
    let mut words: [u32; 4] = bytemuck::must_cast(source);
    // Not the last word alone: it may be left to the entropy.
    if words[0] | words[1] | words[2] | words[3] == 0 {
        return Err(Verdict::Inconsistent);
    }
    if !gue {
        words[3] |= hash.to_be() & spread;
    }
    Ok(Outer {
        source: Address(bytemuck::must_cast(words)),
        destination: endpoint.address,
        gue_port: if gue { Some(tunnel.gue_port) } else { None },
        entropy: hash,
        source_mac: endpoint.source_mac,
        destination_mac: endpoint.mac,
    })
}

/// The longest packet that would have fitted, where one with so many bytes more around it does not.
#[inline(always)]
pub const fn exceeds(packet: &Packet, mtu_bytes: u16, room: usize) -> Option<u16> {
    // Where nothing is known of the way, what the length in an outer header can say is the limit.
    let mtu_bytes = if mtu_bytes == 0 { u16::MAX } else { mtu_bytes };
    let longest = (mtu_bytes as u32).saturating_sub(room as u32);
    if packet.frame_bytes_min - ETHERNET_BYTES as u32 <= longest {
        return None;
    }
    Some(longest as u16)
}

/// Makes room in front of a frame. What the pointers of the old frame led to is read no more.
#[inline(always)]
fn grow<'a>(ctx: &'a XdpContext, room: usize) -> Result<Frame<'a>, Verdict> {
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(room as i32)) } != 0 {
        return Err(Verdict::Unsupported);
    }
    Ok(frame(ctx))
}

/// Answers a packet that is too long: its beginning goes back to the sender inside an ICMP error. Never an answer to an
/// error, nor to a later fragment of IPv4 (RFC 1122 section 3.2.2).
#[inline(never)]
pub fn tell_too_big(
    ctx: &XdpContext,
    arrival: &Arrival,
    mtu_bytes: u16,
) -> Result<Decision, Verdict> {
    let packet = arrival.packet;
    let kept = (ETHERNET_BYTES + QUOTE_BYTES) as u64;
    let silent = match packet.part {
        Part::Error => true,
        Part::Later => matches!(packet.family, Family::V4),
        _ => false,
    };
    let bytes = frame_bytes(ctx);
    if silent || bytes < kept {
        return Err(Verdict::Unsupported);
    }
    // Made anew: on some way here the frame was grown, and the verifier does not tell such a way from this one.
    let macs = frame(ctx).macs()?;
    // SAFETY: the context is the kernel's; every pointer into the frame is made anew afterwards.
    if unsafe { bpf_xdp_adjust_tail(ctx.ctx, kept as i32 - bytes as i32) } != 0 {
        return Err(Verdict::Unsupported);
    }
    let grown = grow(ctx, too_big_bytes(packet.family))?;
    too_big(&grown, packet, macs, mtu_bytes)?;
    Ok(Decision {
        verdict: Verdict::TooBig,
        ifindex: arrival.ifindex,
        tags: arrival.tags,
    })
}
