//! What is believed of an endpoint, and how answers to probes change it.

use std::sync::atomic::{AtomicU32, Ordering};

/// A belief and what speaks against it. A fresh endpoint is believed healthy: traffic starts with the configuration, and a
/// dead one is found out by its probe or by the calls to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Belief {
    pub is_healthy: bool,
    /// Answers in a row that contradict it.
    pub against: u32,
}

impl Belief {
    /// After one more answer: `rise` good ones in a row bring an endpoint back, `fall` bad ones take it out (0 counts as 1).
    #[must_use]
    pub fn after(self, is_good: bool, rise: u32, fall: u32) -> Self {
        if is_good == self.is_healthy {
            return Self { against: 0, ..self };
        }
        let against = self.against.saturating_add(1).min(AGAINST_MAX);
        if against >= if is_good { rise } else { fall }.min(AGAINST_MAX) {
            return Self {
                is_healthy: is_good,
                against: 0,
            };
        }
        Self { against, ..self }
    }
}

/// What fits beside the belief in a word.
const AGAINST_MAX: u32 = u32::MAX >> 1;

/// A belief shared between whoever probes and the workers. Zero is healthy and nothing against it.
#[derive(Debug, Default)]
pub struct Health(AtomicU32);

impl Health {
    /// One relaxed load: a worker may see a change a moment late.
    pub fn is_healthy(&self) -> bool {
        self.belief().is_healthy
    }

    pub fn belief(&self) -> Belief {
        unpack(self.0.load(Ordering::Relaxed))
    }

    /// Takes an answer in; the new belief if it changed.
    pub fn record(&self, is_good: bool, rise: u32, fall: u32) -> Option<Belief> {
        let after = |word| Some(pack(unpack(word).after(is_good, rise, fall)));
        let before = match self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, after)
        {
            Ok(word) | Err(word) => unpack(word),
        };
        let belief = before.after(is_good, rise, fall);
        (belief.is_healthy != before.is_healthy).then_some(belief)
    }

    /// Back to what is believed of a fresh endpoint.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

fn pack(belief: Belief) -> u32 {
    belief.against << 1 | u32::from(!belief.is_healthy)
}

fn unpack(word: u32) -> Belief {
    Belief {
        is_healthy: word & 1 == 0,
        against: word >> 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds answers (`+` good, `-` bad) with rise 2 and fall 3; the belief after each (`H` healthy, `d` dead).
    fn believe(answers: &str) -> String {
        let health = Health::default();
        let mut seen = String::new();
        for answer in answers.chars() {
            let before = health.is_healthy();
            let change = health.record(answer == '+', 2, 3);
            assert_eq!(
                change.is_some(),
                before != health.is_healthy(),
                "a change is told once"
            );
            seen.push(if health.is_healthy() { 'H' } else { 'd' });
        }
        seen
    }

    #[test]
    fn only_answers_in_a_row_change_a_belief() {
        assert_eq!(believe("--+--+---"), "HHHHHHHHd");
        assert_eq!(believe("---+-+-++-"), "HHddddddHH");
        assert_eq!(believe("---++---"), "HHddHHHd");
    }

    #[test]
    fn no_rise_or_fall_is_one() {
        let fresh = Health::default();
        assert!(fresh.record(false, 0, 0).is_some() && !fresh.is_healthy());
        assert!(fresh.record(true, 0, 0).is_some() && fresh.is_healthy());
    }

    #[test]
    fn the_count_against_a_belief_ends_somewhere() {
        let belief = Belief {
            is_healthy: true,
            against: AGAINST_MAX - 1,
        };
        assert!(!belief.after(false, 1, u32::MAX).is_healthy);
        assert_eq!(unpack(pack(belief)), belief);
    }
}
