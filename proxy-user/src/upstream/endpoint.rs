//! One address in an upstream, with what is known of it.

use super::Health;
use crate::config;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One address of one generation; what is known of it is shared with the generations before and after.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// 0 = takes no new work.
    pub weight: u32,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    health: Health,
    /// CLOCK_MONOTONIC in ns.
    held_until_ns: AtomicU64,
    /// By worker, each on a cache line of its own: nobody waits for another's counter.
    tallies: Box<[Tally]>,
}

/// What one worker counted; written by it alone.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Tally {
    begun: AtomicU64,
    ended: AtomicU64,
    failed: AtomicU64,
}

impl Endpoint {
    pub(super) fn new(config: &config::Endpoint, workers: usize, earlier: Option<&Self>) -> Self {
        let state = earlier
            .map(|earlier| &earlier.state)
            .filter(|state| state.tallies.len() == workers);
        let state = state.cloned().unwrap_or_else(|| {
            let tallies = std::iter::repeat_with(Tally::default)
                .take(workers)
                .collect();
            Arc::new(State {
                health: Health::default(),
                held_until_ns: AtomicU64::new(0),
                tallies,
            })
        });
        Self {
            address: config.address,
            weight: config.weight,
            state,
        }
    }

    /// Set by probes, read by workers.
    pub fn health(&self) -> &Health {
        &self.state.health
    }

    /// Leaves it out until then while another one is there: it could not be reached, and a client would wait for it in vain.
    pub fn hold(&self, until_ns: u64) {
        self.state.held_until_ns.store(until_ns, Relaxed);
    }

    /// It is left out for now.
    pub fn is_held(&self, now_ns: u64) -> bool {
        self.state.held_until_ns.load(Relaxed) > now_ns
    }

    /// Counts a call of this worker, from now until the guard is dropped. A worker counts on its own thread only.
    pub fn begin(&self, worker: usize) -> Active<'_> {
        let tally = self.state.tallies.get(worker);
        if let Some(tally) = tally {
            add(&tally.begun);
        }
        Active { tally }
    }

    /// Calls that are under way.
    pub fn active(&self) -> u64 {
        // Ended first: a call that ends in between is counted as active still, never as less than none.
        let ended = self.sum(|tally| &tally.ended);
        self.sum(|tally| &tally.begun).saturating_sub(ended)
    }

    /// Calls begun since this address came into the configuration.
    pub fn calls(&self) -> u64 {
        self.sum(|tally| &tally.begun)
    }

    /// Calls that the endpoint failed.
    pub fn failed(&self) -> u64 {
        self.sum(|tally| &tally.failed)
    }

    fn sum(&self, counter: impl Fn(&Tally) -> &AtomicU64) -> u64 {
        self.state
            .tallies
            .iter()
            .map(|tally| counter(tally).load(Relaxed))
            .sum()
    }
}

/// One call under way; dropped when it has ended, however it ended.
#[derive(Debug)]
pub struct Active<'e> {
    tally: Option<&'e Tally>,
}

impl Active<'_> {
    /// The endpoint is to blame for how this call ended.
    pub fn fail(self) {
        if let Some(tally) = self.tally {
            add(&tally.failed);
        }
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        if let Some(tally) = self.tally {
            add(&tally.ended);
        }
    }
}

/// Adds one to a counter that nobody else writes: no locked instruction.
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}
