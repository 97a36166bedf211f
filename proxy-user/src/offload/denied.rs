//! Banned sources in plain memory: what a worker asks at accept, for connections that no XDP program has seen.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};

use proxy_ebpf::abi::{Address, guard_bit};

/// The bans, shared by control, which writes them, and all workers. The same two steps as in the kernel half: a count
/// and a filter that say no at once, then the table.
#[derive(Debug)]
pub struct Denied {
    count: AtomicU64,
    filter: Box<[AtomicU64]>,
    /// Until when, in nanoseconds of CLOCK_MONOTONIC_COARSE.
    table: RwLock<HashMap<Address, u64>>,
}

impl Default for Denied {
    fn default() -> Self {
        let filter = (0..1024).map(|_| AtomicU64::new(0)).collect();
        Self {
            count: AtomicU64::new(0),
            filter,
            table: RwLock::default(),
        }
    }
}

impl Denied {
    /// Whether a connection of `source` is to be closed at once. Costs one load while nobody is banned.
    #[inline]
    pub fn denies(&self, source: IpAddr, now_ns: u64) -> bool {
        self.count.load(Relaxed) > 0 && self.find(source, now_ns)
    }

    fn find(&self, source: IpAddr, now_ns: u64) -> bool {
        let key = key(source);
        let bit = guard_bit(&key) as usize;
        if self.filter[bit / 64].load(Relaxed) >> (bit % 64) & 1 == 0 {
            return false;
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(&key).is_some_and(|until_ns| *until_ns > now_ns)
    }

    /// One ban more, or the same until another time. Costs the same however many there are.
    pub fn insert(&self, source: IpAddr, until_ns: u64) {
        let key = key(source);
        let bit = guard_bit(&key) as usize;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.insert(key, until_ns);
        self.filter[bit / 64].fetch_or(1 << (bit % 64), Relaxed);
        self.count.store(table.len() as u64, Relaxed);
    }

    /// Makes these the bans, and no others.
    pub fn replace(&self, bans: impl Iterator<Item = (IpAddr, u64)>) {
        let bans: HashMap<Address, u64> = bans
            .map(|(source, until_ns)| (key(source), until_ns))
            .collect();
        let mut filter = vec![0u64; 1024];
        for key in bans.keys() {
            let bit = guard_bit(key) as usize;
            filter[bit / 64] |= 1 << (bit % 64);
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        // The new filter holds the bits of all bans that stay, so none is missed meanwhile.
        for (word, value) in self.filter.iter().zip(filter) {
            word.store(value, Relaxed);
        }
        self.count.store(bans.len() as u64, Relaxed);
        *table = bans;
    }
}

/// The ban key of an address (see `Address::ban_key`): an IPv6 address stands for its /64.
fn key(source: IpAddr) -> Address {
    match source.to_canonical() {
        IpAddr::V4(v4) => Address::v4(v4.octets()),
        IpAddr::V6(v6) => Address(v6.octets()).ban_key(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_denied_until_its_ban_ends_or_is_lifted() {
        let denied = Denied::default();
        let (bad, good) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let network = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, last]);
        denied.replace([(bad, 100), (network(1), 100)].into_iter());
        assert!(denied.denies(bad, 99) && !denied.denies(bad, 100) && !denied.denies(good, 99));
        assert!(denied.denies(network(77), 99));
        denied.replace([(good, 100)].into_iter());
        assert!(!denied.denies(bad, 99) && denied.denies(good, 99));
        denied.replace(std::iter::empty());
        assert!(!denied.denies(good, 99));
        denied.insert(bad, 100);
        denied.insert(good, 100);
        denied.insert(good, 50);
        assert!(denied.denies(bad, 99) && denied.denies(good, 49) && !denied.denies(good, 50));
    }
}
