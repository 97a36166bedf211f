//! The rate cell: one word, spent by compare-and-swap, so that XDP and every worker share one limit and lose no count.
//!
//! A cell is the GCRA (ITU-T I.371 annex A) theoretical arrival time of the next packet or request. Cells
//! stand in a fixed table of buckets of `WAYS`; a new key takes the place of the cell whose time is oldest,
//! for a cell that has refilled says no more than an empty one.
//!
//! A word is 48 bits of time in units of 1024 ns (8.9 years of CLOCK_MONOTONIC_COARSE) above a tag of 16 bits that
//! names its key. Two keys that share bucket and tag share the cell: with 65 536 buckets and every way of
//! them taken, that befalls one key in 8192. The hash is keyed, so nobody can choose whose cell to share.
//! In the table an interval counts to the nearest 1024 ns: 0.05 % at 1000 a second, 5 % at 100 000. A burst is exact.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Cells in a bucket: 64 bytes, one cache line.
pub const WAYS: usize = 8;

const TAG_BITS: u32 = 16;
const TAG_MASK: u64 = (1 << TAG_BITS) - 1;
const UNIT_NS: u64 = 1024;

/// A rate and how much of it may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds between two spends in the long run.
    pub interval_ns: u64,
    /// Spends that may come at once, at least 1.
    pub burst: u32,
}

impl Rate {
    /// How far ahead of now a theoretical arrival time may lie.
    const fn window_ns(self) -> u64 {
        self.interval_ns.saturating_mul(if self.burst == 0 {
            1
        } else {
            self.burst as u64
        })
    }

    /// The nearest rate whose interval is a whole number of units, so that no rounding adds up from spend to spend.
    const fn in_whole_units(self) -> Self {
        let units = self.interval_ns.saturating_add(UNIT_NS / 2) / UNIT_NS;
        Self {
            interval_ns: (if units == 0 { 1 } else { units }) * UNIT_NS,
            burst: self.burst,
        }
    }
}

/// Refused: nanoseconds after which a spend will be admitted, if no other comes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Counted from the `now_ns` that was asked with.
    pub retry_after_ns: u64,
}

/// Spends one from a cell with this theoretical arrival time (0 for a fresh cell); returns the new one.
///
/// A time further ahead than the rate can bring about is from another configuration, or from before the machine
/// started anew: it counts as the furthest possible.
#[inline(always)]
pub const fn spend(arrival_ns: u64, now_ns: u64, rate: Rate) -> Result<u64, Refused> {
    let latest_ns = now_ns.saturating_add(rate.window_ns());
    let arrival_ns = if arrival_ns < now_ns {
        now_ns
    } else if arrival_ns > latest_ns {
        latest_ns
    } else {
        arrival_ns
    };
    let next_ns = arrival_ns.saturating_add(rate.interval_ns);
    if next_ns > latest_ns {
        return Err(Refused {
            retry_after_ns: next_ns - latest_ns,
        });
    }
    Ok(next_ns)
}

/// The table that workers map: a pinned array, a file, or plain memory.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    buckets: &'a [[AtomicU64; WAYS]],
}

impl<'a> Table<'a> {
    /// A table over these cells, all zero at first; what is left after a multiple of `WAYS` is not used.
    pub const fn new(cells: &'a [AtomicU64]) -> Self {
        Self {
            buckets: cells.as_chunks::<WAYS>().0,
        }
    }

    /// Spends one of the key with this hash, which should be keyed and spread over all 64 bits.
    /// A table without cells admits everything: a limit that cannot be kept refuses nobody.
    pub fn spend(&self, hash: u64, now_ns: u64, rate: Rate) -> Result<(), Refused> {
        let index = ((hash as u128 * self.buckets.len() as u128) >> 64) as usize;
        let Some(bucket) = self.buckets.get(index) else {
            return Ok(());
        };
        let tag = tag(hash);
        let now_ns = now_ns - now_ns % UNIT_NS;
        let rate = rate.in_whole_units();
        loop {
            let (cell, word) = find(bucket, tag);
            let arrival_ns = if tag == word & TAG_MASK {
                time_ns(word)
            } else {
                0
            };
            let next_ns = spend(arrival_ns, now_ns, rate)?;
            let next = pack(next_ns, tag);
            // The word holds key and time, so one exchange takes over, refills and spends; nothing else is guarded by it.
            if cell.compare_exchange(word, next, Relaxed, Relaxed).is_ok() {
                return Ok(());
            }
        }
    }
}

/// The cell of the tag, or the one to take over for it: the first unused one, else the oldest.
fn find(bucket: &[AtomicU64; WAYS], tag: u64) -> (&AtomicU64, u64) {
    let mut oldest = (&bucket[0], bucket[0].load(Relaxed));
    for cell in bucket {
        let word = cell.load(Relaxed);
        if word & TAG_MASK == tag {
            return (cell, word);
        }
        if word >> TAG_BITS < oldest.1 >> TAG_BITS {
            oldest = (cell, word);
        }
    }
    oldest
}

/// The low bits of the hash, which the choice of the bucket hardly touches; never 0, which marks an unused cell.
const fn tag(hash: u64) -> u64 {
    match hash & TAG_MASK {
        0 => 1,
        tag => tag,
    }
}

/// Time and tag as one word; the time stays at its end after 8.9 years.
const fn pack(arrival_ns: u64, tag: u64) -> u64 {
    const UNITS_MAX: u64 = u64::MAX >> TAG_BITS;
    let units = arrival_ns / UNIT_NS;
    let units = if units > UNITS_MAX { UNITS_MAX } else { units };
    units << TAG_BITS | tag
}

/// The time of a word.
const fn time_ns(word: u64) -> u64 {
    (word >> TAG_BITS) * UNIT_NS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    const MS: u64 = 1_000_000;
    const START_NS: u64 = 5_000 * MS;
    const RATE: Rate = Rate {
        interval_ns: 10 * MS,
        burst: 5,
    };

    fn cells(count: usize) -> Vec<AtomicU64> {
        (0..count).map(|_| AtomicU64::new(0)).collect()
    }

    /// A hash of bucket 0 with this tag, in tables of any size below 2^32.
    fn hash_in_first_bucket(tag: u64) -> u64 {
        tag
    }

    #[test]
    fn a_burst_is_admitted_and_then_the_rate() {
        let mut arrival_ns = 0;
        for _ in 0..5 {
            arrival_ns = spend(arrival_ns, START_NS, RATE).unwrap();
        }
        let refused = spend(arrival_ns, START_NS, RATE).unwrap_err();
        assert_eq!(refused.retry_after_ns, 10 * MS);
        let later_ns = START_NS + refused.retry_after_ns;
        assert!(spend(arrival_ns, later_ns - 1, RATE).is_err());
        assert!(spend(arrival_ns, later_ns, RATE).is_ok());
    }

    #[test]
    fn a_time_from_before_a_restart_refuses_for_one_window_at_most() {
        let stale_ns = START_NS * 1000;
        let refused = spend(stale_ns, START_NS, RATE).unwrap_err();
        assert_eq!(refused.retry_after_ns, RATE.interval_ns);
    }

    #[test]
    fn extremes_neither_overflow_nor_panic() {
        for now_ns in [0, 1, u64::MAX] {
            for interval_ns in [0, 1, u64::MAX] {
                for burst in [0, 1, u32::MAX] {
                    let rate = Rate { interval_ns, burst };
                    for arrival_ns in [0, 1, u64::MAX] {
                        let _ = spend(arrival_ns, now_ns, rate);
                        let cells = cells(WAYS);
                        let _ = Table::new(&cells).spend(arrival_ns, now_ns, rate);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_together_are_admitted_exactly_what_one_would_be() {
        let cells = cells(WAYS * 4);
        let table = Table::new(&cells);
        let admitted = AtomicU32::new(0);
        // The clock stands on 100 instants 1.024 ms apart; each thread tries 50 times at each of them.
        let rate = Rate {
            interval_ns: 1 << 20,
            burst: 10,
        };
        let clock = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for attempt in 0..5000u64 {
                        let now_ns = START_NS + (attempt / 50) * (1 << 20);
                        // No thread's clock may run back behind another's: then the count is exact.
                        let now_ns = clock.fetch_max(now_ns, Relaxed).max(now_ns);
                        if table.spend(0x1234_5678_9abc_def0, now_ns, rate).is_ok() {
                            admitted.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(admitted.into_inner(), 10 + 99);
    }

    #[test]
    fn keys_of_one_bucket_have_cells_of_their_own() {
        let cells = cells(WAYS);
        let table = Table::new(&cells);
        for tag in 1..=WAYS as u64 {
            for _ in 0..5 {
                assert!(
                    table
                        .spend(hash_in_first_bucket(tag), START_NS, RATE)
                        .is_ok()
                );
            }
        }
        for tag in 1..=WAYS as u64 {
            assert!(
                table
                    .spend(hash_in_first_bucket(tag), START_NS, RATE)
                    .is_err()
            );
        }
    }

    #[test]
    fn a_ninth_key_takes_the_place_of_the_oldest() {
        let cells = cells(WAYS);
        let table = Table::new(&cells);
        for tag in 1..=WAYS as u64 {
            let spends = if tag == 3 { 1 } else { 5 };
            for _ in 0..spends {
                assert!(
                    table
                        .spend(hash_in_first_bucket(tag), START_NS, RATE)
                        .is_ok()
                );
            }
        }
        assert!(
            table
                .spend(hash_in_first_bucket(99), START_NS, RATE)
                .is_ok()
        );
        let tags: Vec<u64> = cells
            .iter()
            .map(|cell| cell.load(Relaxed) & TAG_MASK)
            .collect();
        assert_eq!(tags, [1, 2, 99, 4, 5, 6, 7, 8]);
        // The others keep their state.
        assert!(
            table
                .spend(hash_in_first_bucket(4), START_NS, RATE)
                .is_err()
        );
    }

    #[test]
    fn hashes_reach_every_bucket() {
        let cells = cells(WAYS * 16);
        let table = Table::new(&cells);
        for index in 0..16u64 {
            assert!(table.spend(index << 60 | 7, START_NS, RATE).is_ok());
        }
        let used = cells.iter().filter(|cell| cell.load(Relaxed) != 0).count();
        assert_eq!(used, 16);
    }

    #[test]
    fn a_table_without_cells_admits() {
        assert!(Table::new(&[]).spend(1, START_NS, RATE).is_ok());
    }
}
