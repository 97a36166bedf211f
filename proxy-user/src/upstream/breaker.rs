//! The circuit breaker of an upstream: after many failures nobody is asked for a while, then one call decides.
//!
//! It is about the upstream as a whole, where asking another endpoint does not help. One endpoint among good ones is taken out
//! by its health.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::config;

/// An upstream's breaker; its state is shared by all workers and by the generations before and after.
#[derive(Debug)]
pub struct Breaker {
    rule: config::Breaker,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    /// CLOCK_MONOTONIC in ns until which nobody is asked, or the call is awaited that decides; 0 = closed.
    open_until_ns: AtomicU64,
    /// Times it was closed: what was counted before counts no more.
    closed: AtomicU64,
    opened: AtomicU64,
    /// By worker.
    tallies: Box<[Tally]>,
}

/// What one worker counted in its present window; written by it alone.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Tally {
    window: AtomicU64,
    calls: AtomicU64,
    failed: AtomicU64,
}

/// A call that the breaker let through. Dropped without a verdict it says nothing, and the next one decides.
#[derive(Debug)]
pub struct Trial<'b> {
    breaker: Option<&'b Breaker>,
    worker: usize,
    /// The state while this call decides; 0 for a call like any other.
    decides: u64,
}

/// What a call's verdict changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Nothing,
    Opened,
    Closed,
}

impl Breaker {
    pub(super) fn new(rule: config::Breaker, workers: usize, earlier: Option<&Self>) -> Self {
        let state = earlier
            .map(|earlier| &earlier.state)
            .filter(|state| state.tallies.len() == workers);
        let state = state.cloned().unwrap_or_else(|| {
            Arc::new(State {
                open_until_ns: AtomicU64::new(0),
                closed: AtomicU64::new(0),
                opened: AtomicU64::new(0),
                tallies: (0..workers).map(|_| Tally::default()).collect(),
            })
        });
        Self { rule, state }
    }

    /// Lets a call through.
    ///
    /// # Errors
    /// Nanoseconds until it may be worth asking again.
    pub fn admit(&self, worker: usize, now_ns: u64) -> Result<Trial<'_>, u64> {
        let state = &self.state.open_until_ns;
        let until_ns = state.load(Relaxed);
        let mut trial = Trial {
            breaker: Some(self),
            worker,
            decides: 0,
        };
        if until_ns == 0 {
            return Ok(trial);
        }
        if now_ns < until_ns {
            return Err(until_ns - now_ns);
        }
        // One call decides. Should nothing be heard of it, another one may after the same time.
        let lease_ns = now_ns + self.open_ns();
        match state.compare_exchange(until_ns, lease_ns, Relaxed, Relaxed) {
            Ok(_) => {
                trial.decides = lease_ns;
                Ok(trial)
            }
            Err(_) => Err(self.open_ns()),
        }
    }

    /// Nobody is asked, or one call is awaited that decides.
    pub fn is_open(&self) -> bool {
        self.state.open_until_ns.load(Relaxed) > 0
    }

    /// Times it has opened.
    pub fn opened(&self) -> u64 {
        self.state.opened.load(Relaxed)
    }

    fn open_ns(&self) -> u64 {
        u64::try_from(self.rule.open.as_nanos()).unwrap_or(u64::MAX / 4)
    }

    fn count(&self, worker: usize, is_good: bool, now_ns: u64) -> Turn {
        let window = self.window(now_ns);
        let Some(tally) = self.state.tallies.get(worker) else {
            return Turn::Nothing;
        };
        if tally.window.load(Relaxed) != window {
            tally.calls.store(0, Relaxed);
            tally.failed.store(0, Relaxed);
            tally.window.store(window, Relaxed);
        }
        add(&tally.calls);
        if is_good {
            return Turn::Nothing;
        }
        add(&tally.failed);
        let (mut calls, mut failed) = (0, 0);
        for tally in &self.state.tallies {
            if tally.window.load(Relaxed) == window {
                calls += tally.calls.load(Relaxed);
                failed += tally.failed.load(Relaxed);
            }
        }
        let is_enough = calls >= u64::from(self.rule.calls_min)
            && failed * 100 >= u64::from(self.rule.share_percent) * calls;
        if !is_enough {
            return Turn::Nothing;
        }
        self.turn(0, now_ns + self.open_ns(), Turn::Opened)
    }

    /// Which window this is, of those that still count.
    fn window(&self, now_ns: u64) -> u64 {
        let length_ns = u64::try_from(self.rule.window.as_nanos()).unwrap_or(u64::MAX);
        let closed = self.state.closed.load(Relaxed);
        (closed << 40) ^ (now_ns / length_ns.max(1)) ^ 1 << 39
    }

    /// Goes from one state to another one, if nobody else went on meanwhile.
    fn turn(&self, from: u64, to: u64, turn: Turn) -> Turn {
        let state = &self.state;
        if state
            .open_until_ns
            .compare_exchange(from, to, Relaxed, Relaxed)
            .is_err()
        {
            return Turn::Nothing;
        }
        match turn {
            Turn::Opened => state.opened.fetch_add(1, Relaxed),
            Turn::Closed => state.closed.fetch_add(1, Relaxed),
            Turn::Nothing => 0,
        };
        turn
    }
}

impl<'b> Trial<'b> {
    /// Of a call to an upstream without a breaker.
    pub const NONE: Trial<'static> = Trial {
        breaker: None,
        worker: 0,
        decides: 0,
    };

    /// The call has succeeded or failed. Said again, it says nothing.
    pub fn settle(&mut self, is_good: bool, now_ns: u64) -> Turn {
        let Some(breaker) = self.breaker.take() else {
            return Turn::Nothing;
        };
        match (self.decides, is_good) {
            (0, _) => breaker.count(self.worker, is_good, now_ns),
            (lease_ns, true) => breaker.turn(lease_ns, 0, Turn::Closed),
            (lease_ns, false) => breaker.turn(lease_ns, now_ns + breaker.open_ns(), Turn::Opened),
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if let (Some(breaker), 1..) = (self.breaker, self.decides) {
            // A moment that has passed: the next call decides.
            breaker.turn(self.decides, 1, Turn::Nothing);
        }
    }
}

/// Adds one to a counter that nobody else writes: no locked instruction.
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MS: u64 = 1_000_000;

    /// Half of at least four calls in a second open it for 100 ms.
    fn breaker(workers: usize) -> Breaker {
        let rule = config::Breaker {
            share_percent: 50,
            calls_min: 4,
            window: Duration::from_secs(1),
            open: Duration::from_millis(100),
        };
        Breaker::new(rule, workers, None)
    }

    /// Calls with these ends (`+` good, `-` bad); the last one's verdict.
    fn feed(breaker: &Breaker, worker: usize, ends: &str, now_ns: u64) -> Turn {
        let mut last = Turn::Nothing;
        for end in ends.chars() {
            let mut trial = breaker.admit(worker, now_ns).expect("closed");
            last = trial.settle(end == '+', now_ns);
        }
        last
    }

    #[test]
    fn it_opens_at_its_share_of_enough_calls_in_one_window() {
        let one = breaker(1);
        assert_eq!(feed(&one, 0, "---", 5), Turn::Nothing, "too few calls");
        assert_eq!(feed(&one, 0, "+++++-", 5), Turn::Nothing, "4 of 9");
        assert_eq!(feed(&one, 0, "-", 5), Turn::Opened, "5 of 10");
        assert_eq!(one.admit(0, 5).unwrap_err(), 100 * MS);
        let other = breaker(1);
        assert_eq!(feed(&other, 0, "---", 999 * MS), Turn::Nothing);
        assert_eq!(
            feed(&other, 0, "---", 1001 * MS),
            Turn::Nothing,
            "another window"
        );
        assert_eq!(feed(&other, 0, "-", 1002 * MS), Turn::Opened);
    }

    #[test]
    fn workers_count_together() {
        let breaker = breaker(2);
        assert_eq!(feed(&breaker, 0, "--", 5), Turn::Nothing);
        assert_eq!(feed(&breaker, 1, "--", 5), Turn::Opened);
        assert!(breaker.admit(0, 6).is_err() && breaker.admit(1, 6).is_err());
        assert_eq!(breaker.opened(), 1);
    }

    #[test]
    fn then_one_call_decides() {
        let breaker = breaker(1);
        feed(&breaker, 0, "----", 0);
        let now = 100 * MS;
        let mut first = breaker.admit(0, now).unwrap();
        assert!(breaker.admit(0, now).is_err(), "only one");
        assert_eq!(first.settle(false, now), Turn::Opened);
        drop(first);
        assert!(breaker.admit(0, now + 99 * MS).is_err(), "it failed");
        let dropped = breaker.admit(0, now + 100 * MS).unwrap();
        drop(dropped);
        let mut second = breaker.admit(0, now + 101 * MS).unwrap();
        assert_eq!(second.settle(true, now + 101 * MS), Turn::Closed);
        assert!(!breaker.is_open());
        assert_eq!(
            feed(&breaker, 0, "---", now + 102 * MS),
            Turn::Nothing,
            "what failed before is forgotten"
        );
        assert_eq!(breaker.opened(), 2);
    }

    #[test]
    fn a_call_of_which_nothing_is_heard_is_not_waited_for() {
        let breaker = breaker(1);
        feed(&breaker, 0, "----", 0);
        let mut lost = breaker.admit(0, 100 * MS).unwrap();
        assert!(breaker.admit(0, 199 * MS).is_err());
        let mut other = breaker.admit(0, 200 * MS).unwrap();
        assert_eq!(
            lost.settle(true, 201 * MS),
            Turn::Nothing,
            "it decides no more"
        );
        assert_eq!(other.settle(true, 202 * MS), Turn::Closed);
    }

    #[test]
    fn calls_that_began_before_it_opened_do_not_keep_it_open() {
        let breaker = breaker(1);
        let mut late: Vec<_> = (0..9).map(|_| breaker.admit(0, 0).unwrap()).collect();
        feed(&breaker, 0, "----", 0);
        for trial in &mut late {
            assert_eq!(trial.settle(false, 50 * MS), Turn::Nothing);
        }
        assert!(breaker.admit(0, 100 * MS).is_ok());
    }
}
