//! One address in an upstream, with what is known of it.

use super::Health;
use super::latency::{Latency, PENALTY_NS};
use super::queue::Queue;
use crate::config::{self, Balance};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

/// One address of one generation; what is known of it is shared with the generations before and after.
#[derive(Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// 0 = takes no new work.
    pub weight: u32,
    /// It came from a name, by the DNS.
    pub is_named: bool,
    /// It is asked only while no other can be.
    pub is_backup: bool,
    /// Calls under way at a time, over all workers.
    pub calls_max: Option<u32>,
    /// Calls under way are counted in one place, for whoever must know those of all workers at every choice.
    is_shared: bool,
    learns_latency: bool,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    health: Health,
    /// Left out because of how calls to it ended.
    ejected: AtomicBool,
    /// Calls of all workers that failed since the last that did not. Read at every call, written at few.
    failures: AtomicU32,
    /// CLOCK_MONOTONIC in ns.
    held_until_ns: AtomicU64,
    /// When it came, or came back; 0: long ago.
    since_ns: AtomicU64,
    /// By worker, each on a cache line of its own: nobody waits for another's counter.
    tallies: Box<[Tally]>,
    shared: Shared,
}

/// What all workers change, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Shared {
    active: AtomicU32,
}

/// What one worker counted; written by it alone.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Tally {
    begun: AtomicU64,
    ended: AtomicU64,
    failed: AtomicU64,
    latency: Latency,
}

impl Endpoint {
    pub(super) fn new(
        config: &config::Endpoint,
        upstream: &config::Upstream,
        workers: usize,
        earlier: Option<&Self>,
    ) -> Self {
        let state = earlier
            .map(|earlier| &earlier.state)
            .filter(|state| state.tallies.len() == workers);
        let state = state.cloned().unwrap_or_else(|| {
            let tallies = std::iter::repeat_with(Tally::default)
                .take(workers)
                .collect();
            Arc::new(State {
                health: Health::default(),
                ejected: AtomicBool::new(false),
                failures: AtomicU32::new(0),
                held_until_ns: AtomicU64::new(0),
                since_ns: AtomicU64::new(0),
                tallies,
                shared: Shared::default(),
            })
        });
        let calls_max = config.calls_max.or(upstream.endpoint_calls_max);
        Self {
            address: config.address,
            weight: config.weight,
            is_named: config.is_named,
            is_backup: config.is_backup,
            calls_max,
            is_shared: calls_max.is_some()
                || matches!(
                    upstream.balance,
                    Balance::LeastRequest { .. }
                        | Balance::Maglev(config::Hashing {
                            load_percent_max: Some(_),
                            ..
                        })
                ),
            learns_latency: upstream.balance == Balance::Ewma,
            state,
        }
    }

    /// Set by probes, read by workers.
    pub fn health(&self) -> &Health {
        &self.state.health
    }

    /// Neither a probe nor the calls to it speak against it.
    pub fn is_healthy(&self) -> bool {
        self.health().is_healthy() && !self.is_ejected()
    }

    /// Calls to it have failed, and it is left out for a time.
    pub fn is_ejected(&self) -> bool {
        self.state.ejected.load(Relaxed)
    }

    /// Leaves it out, or takes it in again, with nothing held against it. Control's decision.
    pub fn eject(&self, ejected: bool) {
        self.state.failures.store(0, Relaxed);
        self.state.ejected.store(ejected, Relaxed);
    }

    /// Calls that failed in a row, over all workers.
    pub fn failures(&self) -> u32 {
        self.state.failures.load(Relaxed)
    }

    /// A call brought a good answer.
    pub fn praise(&self) {
        // A store for each call would be fought over by the workers.
        if self.failures() > 0 {
            self.state.failures.store(0, Relaxed);
        }
    }

    /// A call failed by its fault.
    pub fn blame(&self) {
        self.state.failures.fetch_add(1, Relaxed);
    }

    /// It came, or came back, at this time: see [`share`].
    pub fn welcome(&self, now_ns: u64) {
        self.state.since_ns.store(now_ns, Relaxed);
    }

    /// Thousandths of its weight that it takes part with, see [`share`].
    pub fn share(&self, slow_start_ns: u64, now_ns: u64) -> u32 {
        match self.state.since_ns.load(Relaxed) {
            0 => SHARE_WHOLE,
            since_ns => share(now_ns.saturating_sub(since_ns), slow_start_ns),
        }
    }

    /// Leaves it out until then while another one is there: it could not be reached, and a client would wait for it in vain.
    pub fn hold(&self, until_ns: u64) {
        self.state.held_until_ns.store(until_ns, Relaxed);
    }

    /// It is left out for now.
    pub fn is_held(&self, now_ns: u64) -> bool {
        self.state.held_until_ns.load(Relaxed) > now_ns
    }

    /// Counts a call of this worker, from now until the guard is dropped; `None`: as many are under way as may be. A worker
    /// counts on its own thread only.
    pub fn begin(&self, worker: usize, now_ns: u64) -> Option<Active<'_>> {
        let shared = self.is_shared.then_some(&self.state.shared.active);
        if let Some(shared) = shared {
            count_below(shared, self.calls_max)?;
        }
        let tally = self.state.tallies.get(worker);
        if let Some(tally) = tally {
            add(&tally.begun);
        }
        let latency = tally
            .filter(|_| self.learns_latency)
            .map(|tally| &tally.latency);
        Some(Active {
            tally,
            shared,
            latency,
            begun_ns: now_ns,
            total: None,
        })
    }

    /// One more call may begin.
    pub(super) fn has_room(&self) -> bool {
        self.calls_max
            .is_none_or(|max| self.load() < u64::from(max))
    }

    /// Calls of all workers that are under way, where the way of balancing or a limit asks for it; one load, in one order with
    /// what the queue does, see [`count_below`].
    pub(super) fn load(&self) -> u64 {
        u64::from(self.state.shared.active.load(SeqCst))
    }

    /// Calls of this worker that are under way.
    pub(super) fn active_of(&self, worker: usize) -> u64 {
        let tally = self.state.tallies.get(worker);
        tally.map_or(0, |tally| {
            tally.begun.load(Relaxed) - tally.ended.load(Relaxed)
        })
    }

    /// How long an answer to this worker is expected to take now, in ns, while so many are awaited.
    pub(super) fn latency_ns(&self, worker: usize, active: u64, now_ns: u64) -> u64 {
        let tally = self.state.tallies.get(worker);
        let known = tally.and_then(|tally| tally.latency.expected_ns(now_ns));
        // Who has never been asked is asked, but not by all at once.
        known.unwrap_or(if active == 0 { 0 } else { PENALTY_NS })
    }

    /// Calls that have ended, however they did.
    pub fn ended(&self) -> u64 {
        self.sum(|tally| &tally.ended)
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

/// All of a weight.
pub const SHARE_WHOLE: u32 = 1000;

/// Thousandths of its weight that an endpoint takes part with when it has been there for so long: a tenth at first, and
/// more in even measure until it has all, so that what was cold is not flooded.
pub fn share(age_ns: u64, slow_start_ns: u64) -> u32 {
    if age_ns >= slow_start_ns {
        return SHARE_WHOLE;
    }
    let (least, whole) = (u128::from(SHARE_WHOLE / 10), u128::from(SHARE_WHOLE));
    let grown = (whole - least) * u128::from(age_ns) / u128::from(slow_start_ns);
    (least + grown) as u32
}

/// One call under way; dropped when it has ended, however it ended.
#[derive(Debug)]
pub struct Active<'e> {
    tally: Option<&'e Tally>,
    shared: Option<&'e AtomicU32>,
    latency: Option<&'e Latency>,
    begun_ns: u64,
    /// It counts among the calls of its upstream, too.
    pub(super) total: Option<&'e Total>,
}

/// Calls of all workers and generations to an upstream, where a limit or the way of balancing asks for them, and who waits.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Total {
    active: AtomicU32,
    pub queue: Queue,
}

impl Total {
    /// Calls under way.
    pub fn active(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// Counts one more; `None`: there are as many as may be.
    pub(super) fn begin(&self, max: Option<u32>) -> Option<()> {
        count_below(&self.active, max)
    }

    /// One call has ended, or has not begun: somebody may wait for its room.
    pub(super) fn end(&self) {
        self.active.fetch_sub(1, SeqCst);
        if !self.queue.is_empty() {
            self.queue.call_next();
        }
    }
}

impl Active<'_> {
    /// The head of the response is there.
    pub fn answered(&self, now_ns: u64) {
        if let Some(latency) = self.latency {
            latency.learn(now_ns.saturating_sub(self.begun_ns), now_ns);
        }
    }

    /// The endpoint is to blame for how this call ended.
    pub fn fail(self, now_ns: u64) {
        if let Some(tally) = self.tally {
            add(&tally.failed);
        }
        if let Some(latency) = self.latency {
            let took_ns = now_ns.saturating_sub(self.begun_ns);
            latency.learn(took_ns.max(PENALTY_NS), now_ns);
        }
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        if let Some(tally) = self.tally {
            add(&tally.ended);
        }
        if let Some(shared) = self.shared {
            shared.fetch_sub(1, SeqCst);
        }
        // Last, so that whoever waits finds the room at the endpoint, too.
        if let Some(total) = self.total {
            total.end();
        }
    }
}

/// Adds one to a counter of all workers unless it is as high as it may be. In one order with what the queue does: either
/// whoever lines up sees the room that is left, or whoever leaves it sees the line.
fn count_below(counter: &AtomicU32, max: Option<u32>) -> Option<()> {
    let Some(max) = max else {
        counter.fetch_add(1, SeqCst);
        return Some(());
    };
    let more = |count: u32| (count < max).then_some(count + 1);
    counter.fetch_update(SeqCst, SeqCst, more).ok().map(|_| ())
}

/// Adds one to a counter that nobody else writes: no locked instruction.
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}
