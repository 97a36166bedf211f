//! Among some that are drawn, or among all, the one with the least to do.

use super::balance::{Schedule, step};

/// What an endpoint has to do, and how much it can: compared as fractions, so that nothing is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    pub active: u64,
    pub weight: u32,
}

/// Most endpoints that are drawn.
const DRAWN_MAX: usize = 8;

impl Load {
    /// Even with this call it would have no more to do, for its weight, than the other has without.
    ///
    /// Among equal weights that is "fewer", as usual. Among unequal ones it is what keeps both promises: idle endpoints are
    /// asked by weight (compared by what they would have *with* the call, the heaviest would take all), and a light one that
    /// is idle does not take all calls of a heavy one that has but a few.
    pub fn relieves(self, other: Self) -> bool {
        let with_it = u128::from(self.active) + 1;
        with_it * u128::from(other.weight) <= u128::from(other.active) * u128::from(self.weight)
    }

    /// It has less to do for its weight, counting the call.
    fn is_less(self, other: Self) -> bool {
        let (this, that) = (u128::from(self.active) + 1, u128::from(other.active) + 1);
        this * u128::from(other.weight) < that * u128::from(self.weight)
    }
}

/// Draws `candidates` turns of the schedule and takes the endpoint that `is_better` than those before it (Mitzenmacher, "The
/// Power of Two Choices in Randomized Load Balancing", 2001; drawn by weight as in Wieder, "Balanced Allocations with
/// Heterogeneous Bins", 2007).
pub(super) fn of_drawn(
    schedule: &Schedule,
    candidates: usize,
    random: u64,
    is_usable: &impl Fn(usize) -> bool,
    is_better: impl Fn(usize, usize) -> bool,
) -> Option<usize> {
    let (turn, mut best) = schedule.draw_turn(random, |_, endpoint| is_usable(endpoint))?;
    let (mut drawn, mut random) = ([turn; DRAWN_MAX], random);
    for count in 1..candidates.min(DRAWN_MAX) {
        random = step(random);
        let is_new = |turn, endpoint| !drawn[..count].contains(&turn) && is_usable(endpoint);
        let Some((turn, next)) = schedule.draw_turn(random, is_new) else {
            break;
        };
        drawn[count] = turn;
        if next != best && is_better(next, best) {
            best = next;
        }
    }
    Some(best)
}

/// Of `count` endpoints the one with the least to do, if that relieves one that is drawn by weight.
pub(super) fn of_all(
    schedule: &Schedule,
    count: usize,
    random: u64,
    is_usable: &impl Fn(usize) -> bool,
    load: impl Fn(usize) -> Load,
) -> Option<usize> {
    let drawn = schedule.draw(random, is_usable)?;
    let (before, mut least) = (load(drawn), (drawn, load(drawn)));
    // From the drawn one on, so that not always the same comes first among equals.
    for index in (drawn + 1..count).chain(0..drawn) {
        if is_usable(index) {
            let this = load(index);
            if this.is_less(least.1) {
                least = (index, this);
            }
        }
    }
    Some(if least.1.relieves(before) {
        least.0
    } else {
        drawn
    })
}
