//! Among some that are drawn, or among all, the one with the least to do.

use super::balance::{Schedule, step};

/// What an endpoint has to do, as a share of what it can: compared as a fraction, so that nothing is rounded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub cost: u64,
    pub weight: u32,
}

/// Most endpoints that are drawn.
const DRAWN_MAX: usize = 8;

impl Load {
    fn cross(self, other: Self) -> u128 {
        u128::from(self.cost) * u128::from(other.weight)
    }

    fn is_less(self, other: Self) -> bool {
        self.cross(other) < other.cross(self)
    }

    fn is_same(self, other: Self) -> bool {
        self.cross(other) == other.cross(self)
    }
}

/// Draws `candidates` different endpoints by weight and takes the one with the least to do; among equals the one drawn first,
/// so that idle endpoints are asked by weight (Mitzenmacher, "The Power of Two Choices", 2001).
pub(super) fn of_drawn(
    schedule: &Schedule,
    candidates: usize,
    random: u64,
    is_usable: &impl Fn(usize) -> bool,
    load: impl Fn(usize) -> Load,
) -> Option<usize> {
    let first = schedule.draw(random, is_usable)?;
    let mut drawn = [first; DRAWN_MAX];
    let (mut best, mut random) = ((first, load(first)), random);
    for count in 1..candidates.min(DRAWN_MAX) {
        random = step(random);
        let is_new = |index| !drawn[..count].contains(&index) && is_usable(index);
        let Some(next) = schedule.draw(random, is_new) else {
            break;
        };
        drawn[count] = next;
        let other = load(next);
        if other.is_less(best.1) {
            best = (next, other);
        }
    }
    Some(best.0)
}

/// Of `count` endpoints the one with the least to do, among equals any by weight.
pub(super) fn of_all(
    count: usize,
    random: u64,
    is_usable: &impl Fn(usize) -> bool,
    load: impl Fn(usize) -> Load,
) -> Option<usize> {
    let (mut best, mut equal_weight, mut random) = (None, 0u64, random);
    for index in (0..count).filter(|index| is_usable(*index)) {
        let this = load(index);
        let weight = u64::from(this.weight);
        if weight == 0 {
            continue;
        }
        match best {
            Some((_, other)) if this.is_same(other) => {
                // Reservoir sampling: each of the equals is kept with its share of their weight.
                equal_weight += weight;
                random = step(random);
                if ((u128::from(random) * u128::from(equal_weight)) >> 64) < u128::from(weight) {
                    best = Some((index, this));
                }
            }
            Some((_, other)) if !this.is_less(other) => {}
            _ => {
                best = Some((index, this));
                equal_weight = weight;
            }
        }
    }
    best.map(|(index, _)| index)
}
