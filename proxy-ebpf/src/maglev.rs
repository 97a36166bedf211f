//! The Maglev ring: user space fills it, the kernel half reads it, and all nodes with the same endpoints choose alike.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4.
//! Members are sorted by identity before the ring is filled, so the order they are given in does not matter;
//! the id in a slot is local to the node and takes no part in the choice.

use crate::abi::{Address, FlowKey, HashKeys, RING_PAGE_SLOTS};

/// Sizes that a ring can have: powers of two, where any odd step is a permutation, and not primes as in the paper. The
/// flows of one slot then are those of two neighbouring slots in a ring of twice the size, so that a ring
/// grows without losing whose flows were whose.
const SIZES: [u32; 5] = [4096, 8192, 16_384, 32_768, 65_536];

/// Slots that each endpoint should have at least, so that shares are even within a few per cent.
const SLOTS_PER_ENDPOINT: usize = 100;

/// An endpoint in a ring, with what the filling remembers of it.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    id: u16,
    address: Address,
    port: [u8; 2],
    weight: u32,
    credit: u64,
    position: u32,
    skip: u32,
}

impl Member {
    /// An endpoint of this id (not 0), address and port (network order). A weight is a share relative to the others; 0 takes no slot.
    pub const fn new(id: u16, address: Address, port: [u8; 2], weight: u32) -> Self {
        Self {
            id,
            address,
            port,
            weight,
            credit: 0,
            position: 0,
            skip: 0,
        }
    }

    /// Starts the member's permutation of the slots from its identity.
    fn start(&mut self, slots: u32) {
        let [high, low]: [u64; 2] = bytemuck::must_cast(self.address);
        let words = [
            u64::from_be(high),
            u64::from_be(low),
            u16::from_be_bytes(self.port) as u64,
        ];
        let mut hash = 0;
        for word in words {
            hash = mix(hash ^ word);
        }
        self.position = (hash % slots as u64) as u32;
        self.skip = (mix(hash) % slots as u64) as u32 | 1;
        self.credit = 0;
    }
}

/// How many slots a ring of so many endpoints has: at least 100 each up to 655 endpoints.
/// The ring takes `slots.div_ceil(RING_PAGE_SLOTS)` pages, a run of them.
pub const fn ring_slots(endpoints: usize) -> u32 {
    let mut index = 0;
    while index < SIZES.len() - 1 {
        if SIZES[index] as usize >= endpoints.saturating_mul(SLOTS_PER_ENDPOINT) {
            return SIZES[index];
        }
        index += 1;
    }
    SIZES[SIZES.len() - 1]
}

/// How many pages of `RINGS` a ring of so many slots takes.
pub const fn ring_pages(slots: u32) -> u32 {
    slots.div_ceil(RING_PAGE_SLOTS as u32)
}

/// Fills `slots`, whose length must be one that `ring_slots` gives, with the ids of `members`, each
/// according to its weight. Without a member that has a weight every slot is 0: no endpoint.
/// `members` is also the scratch space, and is left sorted by address and port.
pub fn fill(members: &mut [Member], slots: &mut [u16]) {
    let size = slots.len() as u32;
    slots.fill(0);
    let heaviest = members.iter().map(|m| m.weight).max().unwrap_or(0) as u64;
    if heaviest == 0 || size < 2 {
        return;
    }
    members.sort_unstable_by_key(|m| (m.address, m.port));
    for member in members.iter_mut() {
        member.start(size);
    }
    let mut free = size;
    loop {
        for member in members.iter_mut() {
            // The heaviest takes one slot each round, the others one whenever their share has added up to it.
            member.credit += member.weight as u64;
            if member.credit < heaviest {
                continue;
            }
            member.credit -= heaviest;
            let slot = next_free(member, slots);
            slots[slot] = member.id;
            free -= 1;
            if free == 0 {
                return;
            }
        }
    }
}

/// The first free slot in the member's order of preference; there is one.
fn next_free(member: &mut Member, slots: &[u16]) -> usize {
    let size = slots.len() as u32;
    loop {
        let slot = member.position as usize;
        // Both are below the size; a division for each slot would cost more than all else here.
        member.position += member.skip;
        if member.position >= size {
            member.position -= size;
        }
        if slots[slot] == 0 {
            return slot;
        }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): spreads every input bit over all output bits.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The slot of a flow in a ring of so many slots (0 gives 0).
#[inline(always)]
pub const fn slot(hash: u32, slots: u32) -> u32 {
    ((hash as u64 * slots as u64) >> 32) as u32
}

/// The hash of a flow.
///
/// Pair-multiply-shift with random keys (Thorup, "High Speed Hashing for Integers and Strings", 2015):
/// strongly universal, so nobody who does not know the keys can aim at one endpoint.
#[inline(always)]
pub fn hash(keys: &HashKeys, flow: &FlowKey) -> u32 {
    let k = &keys.keys;
    let words: [u32; 10] = bytemuck::must_cast(*flow);
    let mut sum = k[10];
    sum = sum.wrapping_add(pair(k[0], words[0], k[1], words[1]));
    sum = sum.wrapping_add(pair(k[2], words[2], k[3], words[3]));
    sum = sum.wrapping_add(pair(k[4], words[4], k[5], words[5]));
    sum = sum.wrapping_add(pair(k[6], words[6], k[7], words[7]));
    sum = sum.wrapping_add(pair(k[8], words[8], k[9], words[9]));
    (sum >> 32) as u32
}

#[inline(always)]
const fn pair(key_a: u64, word_a: u32, key_b: u64, word_b: u32) -> u64 {
    key_a
        .wrapping_add(word_b as u64)
        .wrapping_mul(key_b.wrapping_add(word_a as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;

    fn members(weights: &[u32]) -> Vec<Member> {
        let member = |(index, weight): (usize, &u32)| {
            let id = index as u16 + 1;
            let address = Address::v4([10, 0, (index / 250) as u8, (index % 250) as u8 + 1]);
            Member::new(id, address, 8080u16.to_be_bytes(), *weight)
        };
        weights.iter().enumerate().map(member).collect()
    }

    fn ring(mut members: Vec<Member>, size: u32) -> Vec<u16> {
        let mut slots = vec![0; size as usize];
        fill(&mut members, &mut slots);
        slots
    }

    fn share(ring: &[u16], id: u16) -> f64 {
        ring.iter().filter(|slot| **slot == id).count() as f64 / ring.len() as f64
    }

    #[test]
    fn each_size_is_a_power_of_two_and_holds_a_hundred_slots_per_endpoint() {
        for endpoints in 0..=655 {
            let slots = ring_slots(endpoints);
            assert!(slots.is_power_of_two(), "{slots}");
            assert!(slots as usize >= endpoints * SLOTS_PER_ENDPOINT);
        }
        assert_eq!(ring_slots(1), 4096);
        assert_eq!(ring_slots(usize::MAX), 65_536);
        assert_eq!(SIZES.map(ring_pages), [1, 1, 2, 4, 8]);
    }

    #[test]
    fn equal_weights_get_equal_shares() {
        for count in [1, 2, 3, 10, 40] {
            let ring = ring(members(&vec![1; count]), ring_slots(count));
            for id in 1..=count as u16 {
                let ratio = share(&ring, id) * count as f64;
                assert!((0.98..1.02).contains(&ratio), "{count} endpoints: {ratio}");
            }
        }
    }

    #[test]
    fn shares_follow_the_weights() {
        let weights = [1, 2, 3, 10, 100, 0];
        let ring = ring(members(&weights), 65_521);
        let total: u32 = weights.iter().sum();
        for (index, weight) in weights.iter().enumerate() {
            let wanted = *weight as f64 / total as f64;
            let got = share(&ring, index as u16 + 1);
            assert!((got - wanted).abs() <= wanted * 0.02, "{got} for {wanted}");
        }
    }

    #[test]
    fn a_removed_endpoint_moves_hardly_any_slot_of_the_others() {
        let all = members(&[1; 10]);
        let before = ring(all.clone(), 4096);
        let after = ring(
            all.into_iter().filter(|member| member.id != 4).collect(),
            4096,
        );
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(old, new)| **old != 4 && old != new)
            .count();
        // The paper's figure 12 shows a few per cent of such changes at this size.
        assert!(moved * 100 < 4096 * 8, "{moved} of 4096 moved");
        assert!(!after.contains(&4) && !after.contains(&0));
    }

    #[test]
    fn the_order_in_which_members_are_given_does_not_matter() {
        let forward = members(&[3, 1, 4, 1, 5, 9, 2, 6]);
        let backward = forward.iter().rev().copied().collect();
        assert_eq!(ring(forward, 4096), ring(backward, 4096));
    }

    #[test]
    fn the_ring_is_the_same_on_every_node_and_in_every_release() {
        let ring = ring(members(&[1, 1, 1]), 4096);
        let mut digest = 0u64;
        for slot in &ring {
            digest = mix(digest ^ *slot as u64);
        }
        // A change of this number sends flows of a fleet in the middle of an upgrade to other endpoints.
        assert_eq!(digest, 14_290_708_115_680_850_718);
    }

    #[test]
    fn without_an_endpoint_no_slot_has_an_owner() {
        assert!(ring(vec![], 4096).iter().all(|slot| *slot == 0));
        assert!(ring(members(&[0, 0]), 4096).iter().all(|slot| *slot == 0));
    }

    #[test]
    fn the_flows_of_a_slot_stay_together_when_the_ring_doubles() {
        let mut number = 1;
        for _ in 0..10_000 {
            number = mix(number);
            let hash = number as u32;
            assert_eq!(slot(hash, 8192) / 2, slot(hash, 4096));
        }
    }

    #[test]
    fn flows_spread_evenly_over_the_slots() {
        let mut keys = HashKeys::zeroed();
        for (index, key) in keys.keys.iter_mut().enumerate() {
            *key = mix(index as u64 + 1);
        }
        let mut flow = FlowKey::zeroed();
        flow.listener = Address::v4([192, 0, 2, 1]);
        flow.protocol = 6;
        let mut counts = [0u32; 16];
        for port in 0..64_000u32 {
            flow.client = Address::v4([10, 0, 0, (port / 1000) as u8]);
            flow.client_port = ((port % 1000) as u16 + 30_000).to_be_bytes();
            counts[slot(hash(&keys, &flow), 16) as usize] += 1;
        }
        for count in counts {
            assert!((3700..4300).contains(&count), "{counts:?}");
        }
        assert_eq!(slot(hash(&keys, &flow), 0), 0);
    }
}
