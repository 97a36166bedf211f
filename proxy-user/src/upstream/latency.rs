//! How long an endpoint takes to answer: an average that believes the worst at once and the better by and by.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// After so long an answer counts 1/e as much as a new one.
const DECAY_NS: f64 = 10e9;

/// What a failed call counts at least as having taken, and an endpoint that has not answered anything yet: whoever
/// fails at once is not fast.
pub(super) const PENALTY_NS: u64 = 1_000_000_000;

/// Peak EWMA, as Finagle has it: one worker writes and reads it.
#[derive(Debug, Default)]
pub(super) struct Latency {
    /// As of the time of the last answer; 0: nothing is known.
    average_ns: AtomicU64,
    at_ns: AtomicU64,
}

impl Latency {
    /// Takes in one answer.
    pub fn learn(&self, took_ns: u64, now_ns: u64) {
        let took_ns = took_ns.max(1);
        let (old_ns, keep) = (self.average_ns.load(Relaxed), self.keep(now_ns));
        let average_ns = if took_ns >= old_ns {
            took_ns
        } else {
            (old_ns as f64 * keep + took_ns as f64 * (1.0 - keep)) as u64
        };
        self.average_ns.store(average_ns, Relaxed);
        self.at_ns.store(now_ns, Relaxed);
    }

    /// What is expected now, if anything is known. Time works for those that are not asked: one day they are again.
    pub fn expected_ns(&self, now_ns: u64) -> Option<u64> {
        match self.average_ns.load(Relaxed) {
            0 => None,
            average_ns => Some(((average_ns as f64 * self.keep(now_ns)) as u64).max(1)),
        }
    }

    fn keep(&self, now_ns: u64) -> f64 {
        let age_ns = now_ns.saturating_sub(self.at_ns.load(Relaxed));
        (-(age_ns as f64) / DECAY_NS).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_peak_is_believed_at_once_and_forgotten_by_and_by() {
        let latency = Latency::default();
        assert_eq!(latency.expected_ns(0), None);
        latency.learn(1000, 0);
        latency.learn(90_000, 1);
        assert_eq!(latency.expected_ns(1), Some(90_000), "not a mean of both");
        let later = 1 + 10 * S;
        let expected = latency.expected_ns(later).expect("known");
        assert!(expected.abs_diff(33_109) < 5, "90000/e, not {expected}");
        latency.learn(1000, later);
        let average = latency.expected_ns(later).expect("known");
        assert!(average.abs_diff(33_109 + 632) < 5, "{average}");
    }
}
