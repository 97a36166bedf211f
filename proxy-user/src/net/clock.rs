//! Time on the data path: nanoseconds of CLOCK_MONOTONIC, read once per turn of the loop.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// A moment of CLOCK_MONOTONIC in nanoseconds; it never goes back, and a changed wall clock does not move it.
///
/// It is a number of our own and not `std::time::Instant`, because the rate cells that both halves spend from
/// hold the same number, and because tests and simulations must be able to make one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The moment that does not come: a deadline for what has none.
    pub const NEVER: Self = Self(u64::MAX);

    /// Reads the clock (about 25 ns); on a worker, prefer [`super::now`], which costs nothing.
    pub fn read() -> Self {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` is a valid timespec that the call fills in; CLOCK_MONOTONIC exists on every Linux, so the call cannot fail.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
        Self(
            seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds),
        )
    }

    /// The moment `ns` nanoseconds after the clock's zero, which is about the machine's boot.
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since the clock's zero.
    pub const fn as_ns(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this moment is; zero if it is not after it.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    /// Saturates: a deadline that lies beyond the clock's range never comes.
    fn add(self, duration: Duration) -> Self {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(ns))
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_beyond_the_range_saturates_instead_of_wrapping() {
        let far = Instant::from_ns(5) + Duration::MAX;
        assert_eq!(far.as_ns(), u64::MAX);
        assert_eq!(
            Instant::from_ns(5) - Instant::from_ns(9),
            Duration::ZERO,
            "an earlier moment is no time after a later one"
        );
    }

    #[test]
    fn the_clock_does_not_go_back() {
        let first = Instant::read();
        assert!(Instant::read() >= first);
        assert!(first.as_ns() > 0);
    }
}
