//! The ring of a worker's side: what is hashed names a slot, and the slot an endpoint, on every node alike.

use std::net::SocketAddr;

use proxy_ebpf::abi::Address;
use proxy_ebpf::maglev::{self, Member};

use super::balance::step;

/// Which endpoint each slot belongs to. Endpoints that are dead or at their bound keep their slots: what hashes there jumps
/// to another slot that follows from the hash alone, so that nobody else's requests move, and theirs are spread over all
/// by weight (the neighbour in a Maglev ring is not: Chen, Coleman, Shrivastava, "Revisiting Consistent Hashing with
/// Bounded Loads", AAAI 2021, has the same remedy for other rings).
#[derive(Debug)]
pub(super) struct Ring {
    /// 1 + index of the endpoint; 0: nobody takes new work.
    slots: Box<[u16]>,
    endpoints: usize,
}

/// Slots that are looked at before all endpoints are gone through in their order.
const JUMPS: usize = 64;

impl Ring {
    /// Of addresses and weights. Endpoints that do not fit into 16 bits get no slot; the configuration has fewer.
    pub fn new<'e>(endpoints: impl Iterator<Item = (&'e SocketAddr, u32)>) -> Self {
        let members = endpoints
            .enumerate()
            .filter_map(|(index, (address, weight))| {
                let id = u16::try_from(index + 1).ok()?;
                let ip = match address.ip() {
                    std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    std::net::IpAddr::V6(v6) => v6,
                };
                let (ip, port) = (Address(ip.octets()), address.port().to_be_bytes());
                Some(Member::new(id, ip, port, weight))
            });
        let mut members: Vec<Member> = members.collect();
        let endpoints = members.len();
        let mut slots = vec![0; maglev::ring_slots(endpoints) as usize];
        maglev::fill(&mut members, &mut slots);
        Self {
            slots: slots.into(),
            endpoints,
        }
    }

    /// The first usable one of the slots that this hash names one after the other.
    pub fn find(&self, hash: u64, is_usable: impl Fn(usize) -> bool) -> Option<usize> {
        let mut next = hash;
        for _ in 0..JUMPS {
            let slot = maglev::slot((next >> 32) as u32, self.slots.len() as u32);
            let id = *self.slots.get(slot as usize)?;
            let index = usize::from(id).checked_sub(1)?;
            if is_usable(index) {
                return Some(index);
            }
            next = step(next);
        }
        let start = (hash % self.endpoints.max(1) as u64) as usize;
        let mut all = (start..self.endpoints).chain(0..start);
        all.find(|index| is_usable(*index))
    }
}

/// Calls that one endpoint may have under way when `total` of all, with the one that is to begin, are: its share of them by
/// weight, times the bound, rounded up (Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2016).
pub(super) fn capacity(total: u64, weight: u32, weights: u64, percent: u32) -> u64 {
    let share = u128::from(total) * u128::from(weight) * u128::from(percent);
    let whole = u128::from(weights.max(1)) * 100;
    u64::try_from(share.div_ceil(whole)).unwrap_or(u64::MAX)
}
