//! What a worker asks of the kernel half: to spend from a rate cell, whether a source is banned. Plain memory stands in for it.

mod denied;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use nix::time::{ClockId, clock_gettime};
use proxy_ebpf::bucket::{Table, WAYS};

pub use denied::Denied;
pub use proxy_ebpf::bucket::{Rate, Refused};

/// The unit in which a cell counts time.
const UNIT_NS: u64 = 1024;

/// The rate cells. A worker spends from them without a system call; so does XDP, and so do the workers of a daemon
/// that comes after this one, because the memory belongs to a descriptor that outlives it.
#[derive(Debug)]
pub struct Cells {
    map: MmapRaw,
    count: usize,
}

impl Cells {
    /// The cells behind a descriptor: the `cells` map of the kernel half, or a memory file (`memfd_create(2)`) of
    /// 8 bytes per cell. `count` is a multiple of 8.
    ///
    /// # Errors
    /// What `mmap(2)` says; `InvalidInput` for a count that is not a multiple of 8.
    pub fn map(descriptor: impl AsFd, count: usize) -> io::Result<Self> {
        let options = options(count)?;
        let map = options.map_raw(descriptor.as_fd().as_raw_fd())?;
        Ok(Self { map, count })
    }

    /// Cells in memory of this process alone.
    ///
    /// # Errors
    /// What `mmap(2)` says; `InvalidInput` for a count that is not a multiple of 8.
    pub fn in_memory(count: usize) -> io::Result<Self> {
        let map = MmapRaw::from(options(count)?.map_anon()?);
        Ok(Self { map, count })
    }

    /// Spends one of `rate` for a key. `key_hash` is a keyed hash of policy and key, spread over all 64 bits;
    /// `now_ns` is CLOCK_MONOTONIC_COARSE, the clock that XDP reads.
    ///
    /// # Errors
    /// The rate is used up; says how long until a spend would be let through.
    #[inline]
    pub fn spend(&self, key_hash: u64, now_ns: u64, rate: Rate) -> Result<(), Refused> {
        // A cell counts in units of 1024 ns and rounds up: whole units on both sides, or the last of a burst is lost.
        let rate = Rate {
            interval_ns: rate.interval_ns.saturating_add(UNIT_NS - 1) & !(UNIT_NS - 1),
            ..rate
        };
        self.table().spend(key_hash, now_ns & !(UNIT_NS - 1), rate)
    }

    fn table(&self) -> Table<'_> {
        // SAFETY: the mapping is `count` * 8 bytes long, page-aligned, and lives as long as `self`. Whoever else maps
        // it (XDP, other daemons) changes it by atomic operations on whole words only.
        let cells = unsafe {
            std::slice::from_raw_parts(self.map.as_ptr().cast::<AtomicU64>(), self.count)
        };
        Table::new(cells)
    }
}

/// CLOCK_MONOTONIC_COARSE in nanoseconds, the clock of cells and bans: what `bpf_ktime_get_coarse_ns` reads.
pub fn now_ns() -> u64 {
    // The clock is there on every Linux since 2.6.32.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn options(count: usize) -> io::Result<MmapOptions> {
    if count == 0 || !count.is_multiple_of(WAYS) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the number of cells is no multiple of 8",
        ));
    }
    let mut options = MmapOptions::new();
    options.len(count * size_of::<AtomicU64>());
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        interval_ns: 1_000_000,
        burst: 3,
    };

    #[test]
    fn two_mappings_of_one_descriptor_share_every_cell() -> io::Result<()> {
        let file = tempfile::tempfile()?;
        file.set_len(1024 * 8)?;
        let ours = Cells::map(&file, 1024)?;
        let theirs = Cells::map(&file, 1024)?;
        let now_ns = 5_000_000_000;
        for cells in [&ours, &theirs, &ours] {
            assert!(cells.spend(0xfeed_f00d_dead_beef, now_ns, RATE).is_ok());
        }
        assert!(theirs.spend(0xfeed_f00d_dead_beef, now_ns, RATE).is_err());
        Ok(())
    }

    #[test]
    fn a_burst_at_one_instant_is_admitted_whole() -> io::Result<()> {
        let cells = Cells::in_memory(64)?;
        let rate = Rate {
            interval_ns: 10_000_001,
            burst: 200,
        };
        let admitted = (0..300)
            .filter(|_| cells.spend(77 << 40 | 5, 123_456_789_123, rate).is_ok())
            .count();
        assert_eq!(admitted, 200);
        Ok(())
    }

    #[test]
    fn a_count_that_leaves_a_bucket_unfinished_is_refused() {
        assert!(Cells::in_memory(12).is_err());
        assert!(Cells::in_memory(0).is_err());
        assert!(Cells::in_memory(16).is_ok());
    }
}
