//! The ring of a worker's side: what is hashed names a slot, and the slot an endpoint, on every node alike.

use std::net::SocketAddr;

use proxy_ebpf::abi::Address;
use proxy_ebpf::maglev::{self, Member};

/// Which endpoint each slot belongs to. Dead endpoints keep their slots: what hashes there goes to the owner of the
/// next slot, whose place is as good as random, so that nobody else's requests move, and theirs are spread over all.
#[derive(Debug)]
pub(super) struct Ring {
    /// 1 + index of the endpoint; 0: nobody takes new work.
    slots: Box<[u16]>,
    endpoints: usize,
}

/// Slots per endpoint that are looked through, before all endpoints are gone through in their order.
const STEPS: usize = 4;

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

    /// The first usable one from the slot of this hash on.
    pub fn find(&self, hash: u64, is_usable: impl Fn(usize) -> bool) -> Option<usize> {
        let count = self.slots.len();
        let start = maglev::slot((hash >> 32) as u32, count as u32) as usize;
        let steps = (STEPS * self.endpoints + STEPS).min(count);
        let near = (start..start + steps).filter_map(|slot| {
            let id = *self
                .slots
                .get(if slot < count { slot } else { slot - count })?;
            usize::from(id).checked_sub(1)
        });
        let all = (0..self.endpoints).map(|step| (start + step) % self.endpoints);
        near.chain(all).find(|index| is_usable(*index))
    }
}

/// Calls that one endpoint may have under way when `total` of all, with the one that is to begin, are: its share of them by
/// weight, times the bound, rounded up (Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018).
pub(super) fn capacity(total: u64, weight: u32, weights: u64, percent: u32) -> u64 {
    let share = u128::from(total) * u128::from(weight) * u128::from(percent);
    let whole = u128::from(weights.max(1)) * 100;
    u64::try_from(share.div_ceil(whole)).unwrap_or(u64::MAX)
}
