//! Rings and the endpoints in them: a plan of its own, for endpoints and their health change more often than all else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use proxy_ebpf::abi;
use proxy_ebpf::maglev::{self, Member};

use super::{Full, State, WantedUpstream, Write};
use crate::datapath::{address, port};

/// Which id each endpoint has. One that nothing names any more keeps its id until another needs it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Endpoints {
    by_id: BTreeMap<u16, SocketAddr>,
    by_address: HashMap<SocketAddr, u16>,
    /// Ids that no slot and no flow names, and that another address may have.
    spare: BTreeSet<u16>,
}

impl Endpoints {
    /// The id of an address.
    pub fn find(&self, address: SocketAddr) -> Option<u16> {
        self.by_address.get(&address).copied()
    }

    /// Every id that an address has or had last, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u16, SocketAddr)> {
        self.by_id.iter().map(|(id, address)| (*id, *address))
    }

    /// How many ids were ever given.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// From now on the id means this address, and what had it before has none.
    pub fn insert(&mut self, id: u16, address: SocketAddr) {
        if let Some(before) = self.by_id.insert(id, address) {
            self.by_address.remove(&before);
        }
        self.by_address.insert(address, id);
        self.spare.remove(&id);
    }

    /// Another address may have this id.
    pub fn spare(&mut self, id: u16) {
        self.spare.insert(id);
    }

    /// Whether another address may have this id.
    pub fn is_spare(&self, id: u16) -> bool {
        self.spare.contains(&id)
    }

    /// An address that is wanted again keeps its id.
    fn keep(&mut self, id: u16) {
        self.spare.remove(&id);
    }

    /// The first id below `capacity` that was never given, else one that is spare, but for those in `but`. Ids are given in
    /// order and stay in the maps, so that whoever reads these knows where they end.
    fn free(&self, capacity: u32, but: &HashMap<SocketAddr, u16>) -> Option<u16> {
        let given = but.values().copied().max();
        let last = self.by_id.last_key_value().map_or(0, |(id, _)| *id);
        let fresh = u32::from(given.map_or(last, |given| given.max(last))) + 1;
        match u16::try_from(fresh) {
            Ok(fresh) if u32::from(fresh) < capacity => Some(fresh),
            _ => {
                let named: BTreeSet<u16> = but.values().copied().collect();
                self.spare.difference(&named).next().copied()
            }
        }
    }
}

/// What a change of rings writes, and what the maps hold after it that they did not before.
#[derive(Debug, Default)]
pub struct Change {
    pub writes: Vec<Write>,
    named: Vec<(u16, SocketAddr)>,
    upstreams: Vec<(u32, abi::Upstream)>,
}

impl State {
    /// The maps hold what a change wrote.
    pub fn take(&mut self, change: Change) {
        for (id, address) in change.named {
            if self.endpoints.find(address) == Some(id) {
                self.endpoints.keep(id);
            } else {
                self.endpoints.insert(id, address);
            }
        }
        self.upstreams.extend(change.upstreams);
    }
}

/// Computes the writes by which these rings become as wanted; their names have ids.
///
/// # Errors
/// Something does not fit; then nothing is to be written.
pub fn change<'w>(
    state: &State,
    wanted: impl Iterator<Item = &'w WantedUpstream>,
) -> Result<Change, Full> {
    let mut rings = Rings {
        state,
        given: HashMap::new(),
        pointers: Vec::new(),
        change: Change::default(),
    };
    for upstream in wanted {
        rings.ring(upstream)?;
    }
    rings.change.writes.append(&mut rings.pointers);
    Ok(rings.change)
}

struct Rings<'s> {
    state: &'s State,
    /// Ids of endpoints that have none in `state`.
    given: HashMap<SocketAddr, u16>,
    /// Endpoints, then rings, then what points at rings: each before what leads to it.
    pointers: Vec<Write>,
    change: Change,
}

impl Rings<'_> {
    fn ring(&mut self, upstream: &WantedUpstream) -> Result<(), Full> {
        let Some(id) = self.state.names.upstreams.get(&upstream.name).copied() else {
            return Err(Full::new("upstreams", self.state.capacity.upstreams));
        };
        let present = self.state.upstreams.get(&id).copied();
        let (slots, dead) = self.owners(upstream, present)?;
        let count = slots.len() as u32;
        let page = match present {
            // The same size: changed in place, slot by slot, each the old or the new endpoint.
            Some(old) if old.slots == count => old.page,
            _ => self.free_run(maglev::ring_pages(count))?,
        };
        self.change.writes.push(Write::Ring {
            page,
            slots,
            before: present,
            dead,
        });
        let entry = abi::Upstream { page, slots: count };
        if present != Some(entry) {
            self.change.upstreams.push((id, entry));
            self.pointers.push(Write::Upstream(id, entry));
        }
        Ok(())
    }

    /// The owners of an upstream's slots, and who of its endpoints is dead; they get ids. A ring grows by doubling and
    /// never shrinks, so that each of its slots knows whose flows it has.
    fn owners(
        &mut self,
        upstream: &WantedUpstream,
        present: Option<abi::Upstream>,
    ) -> Result<(Vec<u16>, BTreeSet<u16>), Full> {
        // Where none is healthy all are tried: whichever comes back first then serves at once.
        let none = !upstream
            .endpoints
            .iter()
            .any(|endpoint| endpoint.healthy && endpoint.weight > 0);
        let (mut members, mut dead) = (Vec::new(), BTreeSet::new());
        for endpoint in &upstream.endpoints {
            let id = self.endpoint(endpoint.address)?;
            if endpoint.healthy || none {
                members.push(Member::new(
                    id,
                    address(endpoint.address.ip()),
                    port(endpoint.address.port()),
                    endpoint.weight,
                ));
            } else {
                dead.insert(id);
            }
        }
        // The size follows from what is configured, not from what is healthy: health must not move other slots.
        let count = maglev::ring_slots(upstream.endpoints.len());
        let count = count.max(present.map_or(0, |present| present.slots));
        let mut slots = vec![0; count as usize];
        maglev::fill(&mut members, &mut slots);
        Ok((slots, dead))
    }

    /// The id of an endpoint.
    fn endpoint(&mut self, address: SocketAddr) -> Result<u16, Full> {
        if let Some(id) = self.state.endpoints.find(address) {
            if self.state.endpoints.is_spare(id) {
                self.given.insert(address, id);
                self.change.named.push((id, address));
            }
            return Ok(id);
        }
        if let Some(id) = self.given.get(&address) {
            return Ok(*id);
        }
        let capacity = self.state.capacity.endpoints;
        let free = self.state.endpoints.free(capacity, &self.given);
        let id = free.ok_or(Full::new("endpoints", capacity))?;
        self.given.insert(address, id);
        self.change.named.push((id, address));
        self.change.writes.push(Write::Endpoint(id, address));
        Ok(id)
    }

    /// The first run of so many pages that no ring holds, nor held when this plan began: a packet may still read those
    /// until all is written.
    fn free_run(&self, pages: u32) -> Result<u32, Full> {
        let capacity = self.state.capacity.ring_pages;
        let added = self.change.upstreams.iter().map(|(_, upstream)| upstream);
        let mut taken: Vec<(u32, u32)> = self
            .state
            .upstreams
            .values()
            .chain(added)
            .filter(|upstream| upstream.slots > 0)
            .map(|upstream| (upstream.page, maglev::ring_pages(upstream.slots)))
            .collect();
        taken.sort_unstable();
        let mut first = 0;
        for (page, count) in taken {
            if page >= first + pages {
                break;
            }
            first = first.max(page + count);
        }
        if first + pages > capacity {
            Err(Full::new("ring_pages", capacity))
        } else {
            Ok(first)
        }
    }
}
