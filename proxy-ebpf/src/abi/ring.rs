//! A ring as both halves see it: slots with their owner and the one before, and when that one was last needed.

use bytemuck::{Pod, Zeroable};

/// Slots in one page of a ring.
pub const RING_PAGE_SLOTS: usize = 8192;

/// A slot of a ring: one word, so that owner and previous owner change in one step.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Slot(pub u32);

impl Slot {
    /// Endpoint ids of the owner (0 = no endpoint) and of the previous owner (0 = the slot is clean: no flow
    /// of it is anywhere else than with its owner).
    #[inline(always)]
    pub const fn new(owner: u16, previous: u16) -> Self {
        Self(owner as u32 | (previous as u32) << 16)
    }

    /// Who gets new flows.
    #[inline(always)]
    pub const fn owner(self) -> u16 {
        self.0 as u16
    }

    /// Who keeps the flows that nobody remembers. The owner itself: nobody else does, but flows that are remembered
    /// may still be elsewhere.
    #[inline(always)]
    pub const fn previous(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The slot when `owner` gets it. A second change keeps the previous owner, for most flows of unknown age are still
    /// there; one that is dead keeps nothing.
    pub fn passed_to(self, owner: u16, is_dead: impl Fn(u16) -> bool) -> Self {
        let dirty = self.previous() != 0;
        let keeper = if dirty { self.previous() } else { self.owner() };
        if owner == 0 || keeper == 0 || (self.owner() == owner && !dirty) {
            return Self::new(owner, 0);
        }
        match (is_dead(keeper), dirty) {
            (false, _) => Self::new(owner, keeper),
            (true, true) => Self::new(owner, owner),
            (true, false) => Self::new(owner, 0),
        }
    }
}

/// A page of a ring. Pages and not one map per ring, so that a daemon without capabilities can lay out
/// a new ring by itself: it may write a map, but never create one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct RingPage {
    pub slots: [Slot; RING_PAGE_SLOTS],
}
const _: () = assert!(size_of::<RingPage>() == 32_768);

/// When a packet last left a slot for anyone but its present owner, in `stamp` units, slot by slot as in the
/// `RingPage` of the same index. Beside the slots and not in them, for only slots that are not clean have use of it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct StampPage {
    pub stamps: [u16; RING_PAGE_SLOTS],
}
const _: () = assert!(size_of::<StampPage>() == 16_384);

/// Time in the unit of stamps: 2^30 ns of CLOCK_MONOTONIC_COARSE, about a second; it begins again after 19 hours.
#[inline(always)]
pub const fn stamp(now_ns: u64) -> u16 {
    (now_ns >> 30) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_changes_keeps_its_first_owner_until_it_is_clean() {
        let alive = |_| false;
        let clean = Slot::new(1, 0);
        assert_eq!(clean.passed_to(1, alive), clean);
        let moved = clean.passed_to(2, alive);
        assert_eq!(moved, Slot::new(2, 1));
        assert_eq!(moved.passed_to(3, alive), Slot::new(3, 1));
        assert_eq!(moved.passed_to(2, alive), moved);
        // Back where it was: what is remembered of the second owner still counts.
        assert_eq!(moved.passed_to(1, alive), Slot::new(1, 1));
        assert_eq!(moved.passed_to(0, alive), Slot::new(0, 0));
        assert_eq!(Slot::new(0, 0).passed_to(4, alive), Slot::new(4, 0));
    }

    #[test]
    fn a_dead_owner_keeps_no_flow() {
        let first_is_dead = |id| id == 1;
        assert_eq!(Slot::new(1, 0).passed_to(2, first_is_dead), Slot::new(2, 0));
        // Flows that are remembered may be with the second owner.
        assert_eq!(Slot::new(2, 1).passed_to(3, first_is_dead), Slot::new(3, 3));
        assert_eq!(Slot::new(2, 1).passed_to(2, first_is_dead), Slot::new(2, 2));
    }
}
