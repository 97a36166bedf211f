//! A histogram of nanoseconds: any value, at most one percent off.

/// Buckets per power of two.
const PER_OCTAVE: u64 = 128;
const OCTAVE_BITS: u32 = PER_OCTAVE.trailing_zeros();
/// Values of 64 bits need so many buckets.
const BUCKETS: usize = ((64 - OCTAVE_BITS + 1) as usize) << OCTAVE_BITS;

/// Counts values in buckets whose width grows with the value.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    pub fn new() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
        }
    }

    /// Counts one value.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
    }

    /// The value below or at which `share` (0 to 1) of all values lie; None without values.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(middle(found))
    }
}

fn bucket(ns: u64) -> usize {
    if ns < PER_OCTAVE {
        return ns as usize;
    }
    let shift = 63 - ns.leading_zeros() - OCTAVE_BITS;
    (u64::from(shift) * PER_OCTAVE + (ns >> shift)) as usize
}

/// The middle of a bucket.
fn middle(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * PER_OCTAVE {
        return bucket;
    }
    let shift = bucket / PER_OCTAVE - 1;
    let lowest = (bucket - shift * PER_OCTAVE) << shift;
    lowest + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_one_percent_over_nine_orders_of_magnitude() {
        for scale in [1, 1_000, 1_000_000, 1_000_000_000] {
            let mut histogram = Histogram::new();
            (1..=1000).for_each(|value| histogram.record(value * scale));
            for (share, expected) in [(0.5, 500), (0.99, 990), (1.0, 1000)] {
                let found = histogram.quantile(share).unwrap() as f64;
                let expected = (expected * scale) as f64;
                assert!(
                    (found - expected).abs() <= expected * 0.01,
                    "{found} {expected}"
                );
            }
        }
    }

    #[test]
    fn without_values_there_is_no_quantile() {
        assert_eq!(Histogram::new().quantile(0.5), None);
    }

    #[test]
    fn the_greatest_value_has_a_bucket() {
        let mut histogram = Histogram::new();
        histogram.record(u64::MAX);
        assert!(histogram.quantile(1.0).unwrap() > u64::MAX / 100 * 99);
    }
}
