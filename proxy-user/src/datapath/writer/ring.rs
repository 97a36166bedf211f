//! Rings in memory: slots that change owner keep the flows of the one before, until nobody has needed it for long enough.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::Duration;

use proxy_ebpf::abi::{self, Slot, stamp};

use super::Writer;
use crate::offload::now_ns;

/// Stamps begin again after 65 536; a limit well below that tells old from new.
pub(super) const IDLE_STAMPS_MAX: u16 = 60_000;

/// An idle limit in the unit of stamps, rounded up, and one more for the clock's own step.
pub(super) fn idle_stamps(limit: Duration) -> u16 {
    let stamps = (limit.as_nanos() >> 30) + 2;
    u16::try_from(stamps).map_or(IDLE_STAMPS_MAX, |stamps| stamps.min(IDLE_STAMPS_MAX))
}

impl Writer {
    /// Gives each slot its owner. A ring of twice the size has two slots for each of the ring before it.
    pub(super) fn write_ring(
        &self,
        page: u32,
        owners: &[u16],
        before: Option<abi::Upstream>,
        dead: &BTreeSet<u16>,
    ) {
        let now = stamp(now_ns());
        let first = page as usize * abi::RING_PAGE_SLOTS;
        let (slots, stamps) = (self.rings.slots(), self.stamps.stamps());
        for (index, owner) in owners.iter().enumerate() {
            let earlier = before.map_or(Slot(0), |before| {
                let at = index * before.slots as usize / owners.len();
                let at = before.page as usize * abi::RING_PAGE_SLOTS + at;
                Slot(slots.get(at).map_or(0, |slot| slot.load(Acquire)))
            });
            let slot = earlier.passed_to(*owner, |id| dead.contains(&id));
            let (Some(place), Some(stamp)) = (slots.get(first + index), stamps.get(first + index))
            else {
                return;
            };
            if place.load(Relaxed) == slot.0 {
                continue;
            }
            // The stamp first: a slot must not look as if nobody had needed its earlier owner for hours.
            stamp.store(now, Relaxed);
            place.store(slot.0, Release);
        }
    }

    /// How many slots keep their earlier owner for flows that began with it.
    pub(super) fn count_shared(&self) -> u64 {
        let slots = self.rings.slots();
        let shared = self.state.upstreams.values().map(|upstream| {
            let first = upstream.page as usize * abi::RING_PAGE_SLOTS;
            let ring = slots.iter().skip(first).take(upstream.slots as usize);
            ring.filter(|place| Slot(place.load(Relaxed)).previous() != 0)
                .count() as u64
        });
        shared.sum()
    }

    /// Forgets the earlier owner of each slot where nobody has needed it for the idle limit.
    pub(super) fn clean_slots(&self) {
        let now = stamp(now_ns());
        let (slots, stamps) = (self.rings.slots(), self.stamps.stamps());
        for upstream in self.state.upstreams.values() {
            let first = upstream.page as usize * abi::RING_PAGE_SLOTS;
            let ring = slots.iter().zip(stamps).skip(first);
            for (place, stamp) in ring.take(upstream.slots as usize) {
                let slot = Slot(place.load(Acquire));
                if slot.previous() == 0 || now.wrapping_sub(stamp.load(Relaxed)) <= self.idle_stamps
                {
                    continue;
                }
                let clean = Slot::new(slot.owner(), 0);
                // Nobody else writes slots; were it otherwise, theirs would stand.
                let _ = place.compare_exchange(slot.0, clean.0, AcqRel, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_limit_is_never_shorter_in_stamps_and_never_wraps() {
        for seconds in [1, 2, 60, 600, 86_400 * 30] {
            let limit = Duration::from_secs(seconds);
            let stamps = Duration::from_nanos(u64::from(idle_stamps(limit)) << 30);
            assert!(stamps > limit || idle_stamps(limit) == IDLE_STAMPS_MAX);
        }
    }
}
