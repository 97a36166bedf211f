//! How many tries beyond the first an upstream is given: a share of its traffic and a few per second, so that retries end
//! where everything fails, as in Finagle's `RetryBudget`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What one retry costs. A call earns so many of it as the share has percent.
const PRICE: u64 = 100;

/// The most that is saved: retries at once after a long time in which none was needed.
const SAVED_MAX: u64 = 100 * PRICE;

const SECOND_NS: u128 = 1_000_000_000;

/// One worker's budget; written by it alone.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Budget {
    saved: AtomicU64,
    /// CLOCK_MONOTONIC in ns up to which the retries per second were added.
    added_ns: AtomicU64,
}

impl Budget {
    /// A call was begun that is no retry: `percent` of a retry is earned.
    pub fn earn(&self, percent: u32) {
        let saved = self.saved.load(Relaxed) + u64::from(percent);
        self.saved.store(saved.min(SAVED_MAX), Relaxed);
    }

    /// Takes one retry, if there is one: out of what was earned, or of `per_second` that are there in any case.
    pub fn spend(&self, now_ns: u64, per_second: u32) -> bool {
        let mut saved = self.saved.load(Relaxed);
        let rate = u64::from(per_second) * PRICE;
        // In any case there is no more than the rate of one second; what was earned beyond it stays.
        let added_ns = self.added_ns.load(Relaxed);
        let passed_ns = u128::from(now_ns.saturating_sub(added_ns));
        let added = passed_ns * u128::from(rate) / SECOND_NS;
        if u128::from(saved) + added >= u128::from(rate) {
            saved = saved.max(rate);
            self.added_ns.store(now_ns, Relaxed);
        } else {
            saved += added as u64;
            // What is less than a hundredth of a retry waits for the next time.
            let counted_ns = (added * SECOND_NS).div_ceil(u128::from(rate)) as u64;
            self.added_ns.store(added_ns + counted_ns, Relaxed);
        }
        let left = saved.checked_sub(PRICE);
        self.saved.store(left.unwrap_or(saved), Relaxed);
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = super::SECOND_NS as u64;

    fn spend_all(budget: &Budget, now_ns: u64, per_second: u32) -> usize {
        (0..1000)
            .take_while(|_| budget.spend(now_ns, per_second))
            .count()
    }

    #[test]
    fn retries_are_a_share_of_the_calls_and_savings_have_an_end() {
        let budget = Budget::default();
        assert_eq!(spend_all(&budget, 0, 0), 0);
        (0..50).for_each(|_| budget.earn(20));
        assert_eq!(spend_all(&budget, SECOND_NS, 0), 10);
        (0..1_000_000).for_each(|_| budget.earn(20));
        assert_eq!(spend_all(&budget, 2 * SECOND_NS, 0), 100);
    }

    #[test]
    fn a_few_per_second_are_there_in_any_case_and_are_not_saved() {
        let budget = Budget::default();
        assert_eq!(spend_all(&budget, 9 * SECOND_NS, 3), 3);
        assert_eq!(spend_all(&budget, 9 * SECOND_NS, 3), 0);
        assert_eq!(spend_all(&budget, 9 * SECOND_NS + SECOND_NS / 2, 3), 1);
        assert_eq!(spend_all(&budget, 99 * SECOND_NS, 3), 3);
    }

    #[test]
    fn spending_often_does_not_lose_what_time_brings() {
        let budget = Budget::default();
        let spent = (0..10_000)
            .filter(|n| budget.spend(SECOND_NS + n * SECOND_NS / 1000, 5))
            .count();
        assert!((50..=55).contains(&spent), "{spent} in ten seconds");
    }
}
