//! Whose turn it is: a schedule in which every endpoint stands as often as its weight says, evenly spread.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Turns of endpoints, walked round by each worker on its own.
#[derive(Debug)]
pub(super) struct Schedule {
    order: Box<[u32]>,
    cursors: Box<[Cursor]>,
}

/// The next turn of one worker, on a cache line of its own: a shared one would be fought over at every request.
#[derive(Debug)]
#[repr(align(64))]
struct Cursor(AtomicU32);

/// About as many turns; weights beyond are scaled down, to shares of a thousandth.
const TURNS_MAX: u64 = 1024;

/// Draws before a random choice among many dead ones walks on instead.
const DRAWS: u32 = 16;

impl Schedule {
    pub fn new(weights: &[u32], workers: usize) -> Self {
        let order: Box<[u32]> = spread(&scale(weights)).into();
        // Workers start apart from each other, else they would all ask the first endpoint first.
        let cursors = (0..workers)
            .map(|worker| Cursor(AtomicU32::new((worker * order.len() / workers) as u32)));
        Self {
            cursors: cursors.collect(),
            order,
        }
    }

    /// The next usable one for this worker. The turn goes on behind it, not behind where the search began, so that the
    /// share of a dead endpoint falls to all others and not to the one behind it.
    pub fn next(&self, worker: usize, is_usable: impl Fn(usize) -> bool) -> Option<usize> {
        let cursor = self.cursors.get(worker).map(|cursor| &cursor.0);
        let start = cursor.map_or(0, |cursor| cursor.load(Relaxed) as usize);
        let (turn, endpoint) = self.walk(start, |_, endpoint| is_usable(endpoint))?;
        if let Some(cursor) = cursor {
            cursor.store(turn as u32 + 1, Relaxed);
        }
        Some(endpoint)
    }

    /// Any usable one, by weight.
    pub fn draw(&self, random: u64, is_usable: impl Fn(usize) -> bool) -> Option<usize> {
        self.draw_turn(random, |_, endpoint| is_usable(endpoint))
            .map(|(_, endpoint)| endpoint)
    }

    /// Any usable turn, and whose it is; all are as likely.
    pub fn draw_turn(
        &self,
        random: u64,
        is_usable: impl Fn(usize, usize) -> bool,
    ) -> Option<(usize, usize)> {
        let mut drawn = random;
        for _ in 0..DRAWS {
            // Multiply and shift: the high bits choose, without a division.
            let turn = ((u128::from(drawn) * self.order.len() as u128) >> 64) as usize;
            let endpoint = *self.order.get(turn)? as usize;
            if is_usable(turn, endpoint) {
                return Some((turn, endpoint));
            }
            drawn = step(drawn);
        }
        self.walk((drawn % self.order.len() as u64) as usize, is_usable)
    }

    /// The first usable one from this turn on, once round.
    fn walk(
        &self,
        start: usize,
        is_usable: impl Fn(usize, usize) -> bool,
    ) -> Option<(usize, usize)> {
        let start = if start < self.order.len() { start } else { 0 };
        let turns = (start..self.order.len()).chain(0..start);
        turns
            .map(|turn| (turn, self.order[turn] as usize))
            .find(|(turn, endpoint)| is_usable(*turn, *endpoint))
    }
}

/// Another random number of this one: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), so that both are
/// independent in the bits that choose.
pub(super) fn step(random: u64) -> u64 {
    let mixed = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The same shares in small numbers.
fn scale(weights: &[u32]) -> Vec<u64> {
    let divisor = weights
        .iter()
        .fold(0, |divisor, weight| gcd(divisor, u64::from(*weight)))
        .max(1);
    let total: u64 = weights
        .iter()
        .map(|weight| u64::from(*weight) / divisor)
        .sum();
    let shrink = |weight: u64| {
        if total <= TURNS_MAX || weight == 0 {
            weight
        } else {
            (weight * TURNS_MAX / total).max(1)
        }
    };
    weights
        .iter()
        .map(|weight| shrink(u64::from(*weight) / divisor))
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Each index as often as its weight, as far from itself as can be: smooth weighted round robin, as nginx does it, written
/// down once instead of reckoned at every request. Those of the same weight take turns in their order, so that only one of
/// each weight has to be compared: thousands of endpoints seldom have many.
fn spread(weights: &[u64]) -> Vec<u32> {
    struct Class {
        weight: u64,
        members: Vec<u32>,
        /// Turns that its members had.
        had: u64,
    }
    let mut classes: BTreeMap<u64, Class> = BTreeMap::new();
    for (index, weight) in (0..).zip(weights).filter(|(_, weight)| **weight > 0) {
        let class = classes.entry(*weight).or_insert(Class {
            weight: *weight,
            members: Vec::new(),
            had: 0,
        });
        class.members.push(index);
    }
    let mut classes: Vec<Class> = classes.into_values().collect();
    let total: u64 = weights.iter().sum();
    let mut order = Vec::new();
    for turn in 1..=total {
        let richest = classes.iter_mut().max_by_key(|class| {
            let count = class.members.len() as u64;
            let credit = turn * class.weight;
            let next = class.members[(class.had % count) as usize];
            let spent = class.had / count * total;
            (credit as i64 - spent as i64, Reverse(next))
        });
        if let Some(class) = richest {
            order.push(class.members[(class.had % class.members.len() as u64) as usize]);
            class.had += 1;
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_spread_evenly() {
        assert_eq!(spread(&scale(&[1, 1, 1])), [0, 1, 2]);
        assert_eq!(spread(&scale(&[5, 1, 1])), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(spread(&scale(&[200, 100])), [0, 1, 0]);
        assert!(spread(&scale(&[0, 0])).is_empty());
        assert_eq!(spread(&scale(&[0, 7])), [1]);
        assert!(spread(&scale(&[])).is_empty());
    }

    /// As it was told first: everybody's credit grows by its weight each turn, and the richest pays for all.
    fn told(weights: &[u64]) -> Vec<u32> {
        let total = weights.iter().sum::<u64>() as i64;
        let mut credit = vec![0; weights.len()];
        let turn = |_| {
            for (credit, weight) in credit.iter_mut().zip(weights) {
                *credit += *weight as i64;
            }
            let richest = (0..credit.len()).max_by_key(|index| (credit[*index], Reverse(*index)));
            let richest = richest.unwrap_or(0);
            credit[richest] -= total;
            richest as u32
        };
        (0..total).map(turn).collect()
    }

    #[test]
    fn comparing_one_of_each_weight_changes_no_turn() {
        let mut number = 1u64;
        for _ in 0..300 {
            let mut weights = Vec::new();
            for _ in 0..number % 9 {
                number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                weights.push((number >> 33) % 6);
            }
            number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            assert_eq!(spread(&weights), told(&weights), "{weights:?}");
        }
    }

    #[test]
    fn long_schedules_are_cut_to_a_thousandth() {
        let order = spread(&scale(&[1000, 999, 1]));
        assert!(order.len() <= TURNS_MAX as usize + 3);
        let count = |index| order.iter().filter(|turn| **turn == index).count();
        assert_eq!((count(0), count(1), count(2)), (512, 511, 1));
    }
}
