//! Ids of endpoints that nobody wants any more: another may have one when no slot and no flow names it.

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Result;
use proxy_ebpf::abi::{self, Slot};

use super::Writer;
use super::entry::{change, traffic};
use crate::datapath::map::Value;
use crate::offload::now_ns;

/// How often it is looked for ids, once they are scarce. Each look costs a system call for each of them.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// An endpoint that no ring wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retired {
    /// Packets that were sent to it, and since when no other was.
    packets: u64,
    since: Instant,
}

impl Writer {
    /// Gives ids back, where three of four are used; to be called now and then. A flow that was remembered, or kept by a slot
    /// before it was clean, shows in what is sent to the endpoint, and one of NAT's in its entry.
    pub(super) fn retire(&mut self) -> Result<()> {
        let now = Instant::now();
        let is_scarce =
            self.state.endpoints.len() * 4 >= self.state.capacity.endpoints as usize * 3;
        if !is_scarce || now < self.retire_at {
            return Ok(());
        }
        self.retire_at = now + LOOK_EVERY;
        let quiet = self.look_at_retired(now)?;
        let named = self.named_by_slots();
        let quiet: BTreeSet<u16> = quiet.difference(&named).copied().collect();
        if quiet.is_empty() {
            return Ok(());
        }
        let living = self.forget_flows_of(&quiet)?;
        for id in quiet.difference(&living) {
            self.retired.remove(id);
            self.state.endpoints.spare(*id);
        }
        Ok(())
    }

    /// Which of the endpoints that no ring wants got no packet for the idle limit.
    fn look_at_retired(&mut self, now: Instant) -> Result<BTreeSet<u16>> {
        let rings = self.in_force.iter().flat_map(|one| &one.wanted.upstreams);
        let wanted: HashSet<SocketAddr> = rings
            .flat_map(|ring| &ring.endpoints)
            .map(|endpoint| endpoint.address)
            .collect();
        let endpoints = &self.state.endpoints;
        let unwanted = endpoints
            .iter()
            .filter(|(id, at)| !wanted.contains(at) && !endpoints.is_spare(*id));
        let unwanted: BTreeSet<u16> = unwanted.map(|(id, _)| id).collect();
        self.retired.retain(|id, _| unwanted.contains(id));
        let mut quiet = BTreeSet::new();
        for id in unwanted {
            let packets = traffic(&self.endpoint_traffic, u32::from(id))?.packets;
            let fresh = Retired {
                packets,
                since: now,
            };
            let known = self.retired.entry(id).or_insert(fresh);
            if known.packets != packets {
                *known = fresh;
            } else if now.duration_since(known.since) > self.idle {
                quiet.insert(id);
            }
        }
        Ok(quiet)
    }

    fn named_by_slots(&self) -> BTreeSet<u16> {
        let mut named = HashSet::new();
        let slots = self.rings.slots();
        for upstream in self.state.upstreams.values() {
            let first = upstream.page as usize * abi::RING_PAGE_SLOTS;
            for place in slots.iter().skip(first).take(upstream.slots as usize) {
                let slot = Slot(place.load(Relaxed));
                named.extend([slot.owner(), slot.previous()]);
            }
        }
        named.into_iter().collect()
    }

    /// Forgets what names one of these endpoints and is over; answers which of them a living flow of NAT's names, or may.
    fn forget_flows_of(&mut self, ids: &BTreeSet<u16>) -> Result<BTreeSet<u16>> {
        let named = |id: u64| u16::try_from(id).is_ok_and(|id| ids.contains(&id));
        let is_old = |entry: &(Value<abi::FlowKey>, Value<u64>)| named(entry.1.0);
        // A walk begins anew where the key that it stands on was deleted: under churn only a bound ends it.
        let moved = self.moved.iter().take(abi::size::MOVED as usize * 2);
        let moved: Vec<_> = moved.filter_map(Result::ok).filter(is_old).collect();
        for (Value(key), _) in moved {
            change(&mut self.moved, key, None)?;
        }
        let (now_ns, mut over, mut living) = (now_ns(), Vec::new(), BTreeSet::new());
        let bound = self.nat_flows.len() as usize;
        for (count, entry) in self.flows.iter().enumerate() {
            if count > bound {
                return Ok(ids.clone());
            }
            let Ok((Value(key), Value(index))) = entry else {
                continue;
            };
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let Some(flow) = self.flow_of(&key, index) else {
                continue;
            };
            if !named(u64::from(flow.endpoint)) {
                continue;
            }
            if flow.lives(&self.state.nat, now_ns) {
                living.insert(flow.endpoint as u16);
            } else {
                over.push((key, index));
            }
        }
        let unused: abi::NatFlow = bytemuck::Zeroable::zeroed();
        for (key, index) in over {
            // The walk took its time: the port may be another flow's by now, or the flow have gone on.
            let Some(flow) = self.flow_of(&key, index) else {
                continue;
            };
            if flow.lives(&self.state.nat, now_ns) {
                living.insert(flow.endpoint as u16);
                continue;
            }
            change(&mut self.flows, key, None)?;
            self.nat_flows.set(index, Value(unused), 0)?;
        }
        Ok(living)
    }

    /// The flow of NAT's that a key and its index lead to, if they still do.
    fn flow_of(&self, key: &abi::FlowKey, index: u32) -> Option<abi::NatFlow> {
        let Value(flow) = self.nat_flows.get(&index, 0).ok()?;
        (flow.key == *key).then_some(flow)
    }
}
