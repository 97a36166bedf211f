//! How long calls take, as a percentile of them that is learned one call at a time and forgets slowly.

/// Calls before it is known.
const CALLS_MIN: u32 = 30;
/// The estimate moves by such a part of itself, at first and later.
const STEP_FIRST: u64 = 8;
const STEP: u64 = 32;
const CALLS_FIRST: u32 = 200;

/// A percentile in two words: each sample above moves it up, each below down, and it rests where as many lie below as it
/// says (frugal streaming: Ma, Muthukrishnan, Sandler 2013; steps in proportion, since times span decades).
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantile {
    estimate_ns: u64,
    calls: u32,
}

impl Quantile {
    /// One call took so long, or at least so long where it lies above the percentile.
    pub fn add(&mut self, took_ns: u64, percent: u32) {
        let percent = u64::from(percent.min(100));
        let took_ns = took_ns.max(1);
        if self.calls == 0 {
            self.estimate_ns = took_ns;
        }
        let part = if self.calls < CALLS_FIRST {
            STEP_FIRST
        } else {
            STEP
        };
        let step = self.estimate_ns / part;
        // At least a nanosecond, else a small estimate would stay where it is.
        self.estimate_ns = if took_ns > self.estimate_ns {
            self.estimate_ns
                .saturating_add((step * percent / 100).max(1))
        } else {
            let down = (step * (100 - percent) / 100).max(1);
            self.estimate_ns.saturating_sub(down).max(1)
        };
        self.calls = self.calls.saturating_add(1);
    }

    /// In nanoseconds; None while there were too few calls to know.
    pub fn estimate_ns(self) -> Option<u64> {
        (self.calls >= CALLS_MIN).then_some(self.estimate_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence that is the same each time (xorshift64*).
    fn numbers() -> impl Iterator<Item = u64> {
        let mut x = 88_172_645_463_325_252_u64;
        std::iter::repeat_with(move || {
            x ^= x >> 12;
            x ^= x << 25;
            x ^= x >> 27;
            x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
        })
    }

    #[test]
    fn it_settles_near_the_percentile_and_follows_a_change() {
        for (percent, expected) in [(50, 5_000_000), (95, 9_500_000), (99, 9_900_000)] {
            let (mut quantile, mut numbers) = (Quantile::default(), numbers());
            for scale in [1, 30, 1] {
                (0..20_000).for_each(|_| {
                    let took = numbers.next().expect("endless") % 10_000_000;
                    quantile.add(took * scale, percent);
                });
                // A walk around the value: its mean counts.
                let mut sum = 0;
                for _ in 0..4_000 {
                    let took = numbers.next().expect("endless") % 10_000_000;
                    quantile.add(took * scale, percent);
                    sum += quantile.estimate_ns().expect("known");
                }
                let (mean, expected) = (sum / 4_000, expected * scale);
                assert!(
                    mean.abs_diff(expected) < expected / 8,
                    "p{percent}: {mean} in place of {expected}"
                );
            }
        }
    }

    #[test]
    fn a_few_calls_say_nothing() {
        let mut quantile = Quantile::default();
        (1..CALLS_MIN).for_each(|_| quantile.add(1000, 95));
        assert_eq!(quantile.estimate_ns(), None);
        quantile.add(0, 95);
        assert!(quantile.estimate_ns().is_some());
    }
}
