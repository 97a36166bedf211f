//! Sent on as it is, to the endpoint that the ring says, or that had the slot before.

use proxy_ebpf::abi::{
    Endpoint, INSERTS_PER_SECOND, Inserts, LOCAL, Listener, Slot, mode, option, stamp,
};
use proxy_ebpf::maglev;
use proxy_ebpf::verdict::Verdict;

use super::read::{Part, Read};
use super::write::{self, Outer, QUOTE_BYTES};
use super::{Entry, Model, Passage, Sent};
use crate::packet::UDP;

/// Slots in a page of a ring.
const PAGE_SLOTS: usize = 8192;

/// Where a flow stands in a ring.
pub(super) struct Place {
    pub hash: u32,
    pub slot: Slot,
    page: u32,
    index: usize,
}

impl Model {
    /// `via` direct, IPIP or GUE.
    pub(super) fn send_on(
        &mut self,
        passage: &Passage,
        listener: &Listener,
    ) -> Result<Sent, Verdict> {
        let packet = &passage.packet;
        let place = self.place(packet, listener.target)?;
        let id = self.settle(passage, &place, listener.options)?;
        let endpoint = self.reach(id)?;
        let (bytes, mtu_bytes, room_bytes) = if listener.mode == mode::DIRECT {
            let bytes = write::with_macs(&passage.bytes, endpoint.source_mac, endpoint.mac);
            (bytes, endpoint.plain_mtu_bytes, 0)
        } else {
            let outer = self.outer(&endpoint, listener.mode == mode::GUE, place.hash)?;
            let ip_bytes = if endpoint.address.is_v4() { 20 } else { 40 };
            let room_bytes = ip_bytes + if outer.gue_port.is_some() { 8 } else { 0 };
            let bytes = write::encapsulated(&passage.bytes, packet, &endpoint, &outer);
            (bytes, endpoint.mtu_bytes, room_bytes)
        };
        if let Some(longest) = exceeded(packet, mtu_bytes, room_bytes) {
            return tell_too_big(passage, longest);
        }
        self.state.count_endpoint(id, passage.packet.ip_end as u64);
        self.touched.push(Entry::EndpointTraffic(id));
        Ok(Sent {
            verdict: Verdict::Forward,
            ifindex: endpoint.ifindex,
            bytes,
            tags: write::vlan_tag(endpoint.vlan),
        })
    }

    /// The slot of a packet's flow in the ring of an upstream.
    pub(super) fn place(&self, packet: &Read, upstream: u32) -> Result<Place, Verdict> {
        let upstream = self.state.upstreams.get(upstream as usize);
        let upstream = upstream.ok_or(Verdict::Inconsistent)?;
        if upstream.slots == 0 {
            return Err(Verdict::NoEndpoint);
        }
        let hash = maglev::hash(&self.state.hash_keys, &packet.flow_key());
        let slot = maglev::slot(hash, upstream.slots) as usize;
        let page = upstream.page + (slot / PAGE_SLOTS) as u32;
        let index = slot % PAGE_SLOTS;
        let slots = self
            .state
            .rings
            .get(page as usize)
            .ok_or(Verdict::Inconsistent)?;
        let slot = slots.get(index).copied().unwrap_or(Slot(0));
        Ok(Place {
            hash,
            slot,
            page,
            index,
        })
    }

    /// Whose the flow is: the owner's where the slot is clean; else of whom it is remembered to be; the owner's if it
    /// begins and can be remembered; else the previous owner's, and the slot is stamped.
    fn settle(&mut self, passage: &Passage, place: &Place, options: u32) -> Result<u32, Verdict> {
        let (owner, previous) = (
            u32::from(place.slot.owner()),
            u32::from(place.slot.previous()),
        );
        let packet = &passage.packet;
        if owner == 0 {
            return Err(Verdict::NoEndpoint);
        }
        let moves_at_once = packet.protocol == UDP && options & option::UDP_MOVE != 0;
        if previous == 0 || moves_at_once {
            return Ok(owner);
        }
        let key = packet.flow_key();
        let id = match self.state.moved.get(&key).copied() {
            Some(id) => id as u32,
            None if packet.begins(&passage.bytes) && self.may_insert(passage) => {
                self.state.moved.insert(key, u64::from(owner));
                self.touched.push(Entry::Moved(key));
                owner
            }
            None => previous,
        };
        if id != owner {
            let now = stamp(passage.arrival.now_ns);
            self.state.put_stamp(place.page, place.index, now);
            self.touched.push(Entry::Stamp(place.page, place.index));
        }
        Ok(id)
    }

    /// Whether this CPU may remember one more flow in this second.
    fn may_insert(&mut self, passage: &Passage) -> bool {
        let window = u32::from(stamp(passage.arrival.now_ns));
        let cpu = passage.arrival.cpu;
        let inserts = self
            .state
            .inserts
            .entry(cpu)
            .or_insert(Inserts { window, count: 0 });
        if inserts.window != window {
            *inserts = Inserts { window, count: 0 };
        }
        self.touched.push(Entry::Inserts(cpu));
        if inserts.count >= INSERTS_PER_SECOND {
            return false;
        }
        inserts.count += 1;
        true
    }

    /// The endpoint of an id, if its neighbour is known.
    pub(super) fn reach(&self, id: u32) -> Result<Endpoint, Verdict> {
        let endpoint = self
            .state
            .endpoints
            .get(id as usize)
            .ok_or(Verdict::Inconsistent)?;
        if endpoint.ifindex == 0 {
            return Err(Verdict::NoNeighbour);
        }
        if endpoint.ifindex == LOCAL {
            return Err(Verdict::Local);
        }
        Ok(*endpoint)
    }

    fn outer(&self, endpoint: &Endpoint, gue: bool, hash: u32) -> Result<Outer, Verdict> {
        let tunnel = &self.state.tunnel;
        let (mut source, spread) = if endpoint.address.is_v4() {
            (tunnel.source4, tunnel.entropy4)
        } else {
            (tunnel.source6, tunnel.entropy6)
        };
        if source.0 == [0; 16] {
            return Err(Verdict::Inconsistent);
        }
        if !gue {
            let spread = spread.to_ne_bytes();
            for (index, bits) in hash.to_be_bytes().into_iter().enumerate() {
                source.0[12 + index] |= bits & spread[index];
            }
        }
        Ok(Outer {
            source,
            gue_port: gue.then_some(tunnel.gue_port),
            entropy: hash,
        })
    }
}

/// What would have fitted, where a packet with so many bytes more around it does not.
pub(super) fn exceeded(packet: &Read, mtu_bytes: u16, room_bytes: usize) -> Option<u16> {
    // Without a known limit that of the outer header's own length counts.
    let mtu_bytes = if mtu_bytes == 0 { u16::MAX } else { mtu_bytes };
    let longest = usize::from(mtu_bytes).saturating_sub(room_bytes);
    (packet.ip_end - 14 > longest).then_some(longest as u16)
}

/// The sender is told, unless what it sent is an error, or a part of an IPv4 packet that is not its first
/// (RFC 1122 section 3.2.2), or too short to be quoted.
pub(super) fn tell_too_big(passage: &Passage, mtu_bytes: u16) -> Result<Sent, Verdict> {
    let packet = &passage.packet;
    let silent = match packet.part {
        Part::Error { .. } => true,
        Part::Later => !packet.v6,
        _ => false,
    };
    if silent || passage.bytes.len() < 14 + QUOTE_BYTES {
        return Err(Verdict::Unsupported);
    }
    Ok(Sent {
        verdict: Verdict::TooBig,
        ifindex: passage.arrival.ifindex,
        bytes: write::too_big(&passage.bytes, packet, mtu_bytes),
        tags: passage.tags,
    })
}
