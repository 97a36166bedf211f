//! The timer wheel: insert, remove and fire in constant time, for a worker with a deadline on every connection.
//!
//! Hierarchical, after Varghese and Lauck (1987): eight levels of 64 slots of 2^20 ns (about a millisecond), so that
//! the 48 bits of the levels cover every tick a u64 of nanoseconds can name and nothing has to be capped. An entry
//! lies on the level of the highest digit in which its tick differs from the wheel's own; so all entries of a level
//! come before all entries of the next one, and the next deadline is one look at eight bit masks.

use super::Instant;

/// A timer fires up to one tick, 2^20 ns, after its deadline and never before it.
const TICK_BITS: u32 = 20;
const DIGIT_BITS: u32 = 6;
const SLOTS: usize = 1 << DIGIT_BITS;
const LEVELS: usize = 8;
const NONE: u32 = u32::MAX;

/// Timers, each with a value that comes back when it fires.
pub struct Wheel<T> {
    /// Every timer up to and including this tick has fired.
    tick: u64,
    levels: [Level; LEVELS],
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

/// Names one timer; a key whose timer has fired or was removed names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    index: u32,
    generation: u32,
}

struct Level {
    /// Bit n is set when slot n has entries.
    occupied: u64,
    heads: [u32; SLOTS],
}

struct Entry<T> {
    tick: u64,
    previous: u32,
    next: u32,
    generation: u32,
    level: u8,
    slot: u8,
    /// None while the entry is free.
    value: Option<T>,
}

impl<T> Wheel<T> {
    /// A wheel that starts at `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            tick: now.as_ns() >> TICK_BITS,
            levels: std::array::from_fn(|_| Level {
                occupied: 0,
                heads: [NONE; SLOTS],
            }),
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Arms a timer; a deadline that has passed fires at the next tick.
    pub fn insert(&mut self, deadline: Instant, value: T) -> Key {
        let tick = deadline.as_ns().div_ceil(1 << TICK_BITS).max(self.tick + 1);
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry {
                tick: 0,
                previous: NONE,
                next: NONE,
                generation: 0,
                level: 0,
                slot: 0,
                value: None,
            });
            (self.entries.len() - 1) as u32
        });
        let entry = &mut self.entries[index as usize];
        entry.tick = tick;
        entry.value = Some(value);
        let generation = entry.generation;
        self.link(index);
        Key { index, generation }
    }

    /// Disarms a timer and returns its value; None if it has fired already.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let entry = self.entries.get(key.index as usize)?;
        if entry.generation != key.generation || entry.value.is_none() {
            return None;
        }
        self.unlink(key.index);
        self.release(key.index)
    }

    /// Replaces the value of a timer that has not fired yet; false if it has.
    pub fn replace(&mut self, key: Key, value: T) -> bool {
        match self.entries.get_mut(key.index as usize) {
            Some(entry) if entry.generation == key.generation && entry.value.is_some() => {
                entry.value = Some(value);
                true
            }
            _ => false,
        }
    }

    /// When [`Self::expire`] next has work to do: never after the earliest deadline's tick, sometimes before it.
    pub fn next(&self) -> Option<Instant> {
        self.next_slot()
            .map(|(_, _, start)| Instant::from_ns(start.saturating_mul(1 << TICK_BITS)))
    }

    /// Moves the values of all timers due at `now` into `fired`, earliest tick first.
    pub fn expire(&mut self, now: Instant, fired: &mut Vec<T>) {
        let now = now.as_ns() >> TICK_BITS;
        while let Some((level, slot, start)) = self.next_slot() {
            if start > now {
                break;
            }
            self.tick = start;
            let mut index = std::mem::replace(&mut self.levels[level].heads[slot], NONE);
            self.levels[level].occupied &= !(1 << slot);
            while index != NONE {
                let next = self.entries[index as usize].next;
                if self.entries[index as usize].tick <= start {
                    fired.extend(self.release(index));
                } else {
                    self.link(index);
                }
                index = next;
            }
        }
        self.tick = self.tick.max(now);
    }

    /// The slot that begins first: level, slot and its first tick.
    fn next_slot(&self) -> Option<(usize, usize, u64)> {
        self.levels
            .iter()
            .enumerate()
            .find(|(_, level)| level.occupied != 0)
            .map(|(number, level)| {
                let slot = level.occupied.trailing_zeros();
                let shift = DIGIT_BITS * number as u32;
                let above = self.tick >> (shift + DIGIT_BITS) << DIGIT_BITS;
                (number, slot as usize, (above | u64::from(slot)) << shift)
            })
    }

    fn link(&mut self, index: u32) {
        let tick = self.entries[index as usize].tick;
        let highest_bit = 63 - ((tick ^ self.tick) | 1).leading_zeros();
        let level = (highest_bit / DIGIT_BITS) as usize;
        let slot = (tick >> (DIGIT_BITS * level as u32)) as usize % SLOTS;
        let head = std::mem::replace(&mut self.levels[level].heads[slot], index);
        self.levels[level].occupied |= 1 << slot;
        if head != NONE {
            self.entries[head as usize].previous = index;
        }
        let entry = &mut self.entries[index as usize];
        entry.previous = NONE;
        entry.next = head;
        entry.level = level as u8;
        entry.slot = slot as u8;
    }

    fn unlink(&mut self, index: u32) {
        let entry = &self.entries[index as usize];
        let (previous, next) = (entry.previous, entry.next);
        let (level, slot) = (usize::from(entry.level), usize::from(entry.slot));
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
        if previous != NONE {
            self.entries[previous as usize].next = next;
            return;
        }
        self.levels[level].heads[slot] = next;
        if next == NONE {
            self.levels[level].occupied &= !(1 << slot);
        }
    }

    fn release(&mut self, index: u32) -> Option<T> {
        let entry = &mut self.entries[index as usize];
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(index);
        entry.value.take()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn ticks(count: u64) -> Instant {
        Instant::from_ns(count << TICK_BITS)
    }

    #[test]
    fn a_timer_fires_at_its_tick_and_not_before() {
        let mut wheel = Wheel::new(ticks(1000));
        let mut fired = Vec::new();
        wheel.insert(ticks(1070), "later");
        wheel.expire(ticks(1069), &mut fired);
        assert!(fired.is_empty());
        wheel.expire(ticks(1070), &mut fired);
        assert_eq!(fired, ["later"]);
        assert_eq!(wheel.next(), None);
    }

    #[test]
    fn a_removed_timer_does_not_fire_and_its_key_dies() {
        let mut wheel = Wheel::new(ticks(0));
        let key = wheel.insert(ticks(5), 1);
        assert_eq!(wheel.remove(key), Some(1));
        assert_eq!(wheel.remove(key), None);
        let newer = wheel.insert(ticks(5), 2);
        assert_eq!(
            wheel.remove(key),
            None,
            "an old key must not remove the timer that has its place"
        );
        assert!(wheel.replace(newer, 3));
        let mut fired = Vec::new();
        wheel.expire(ticks(9), &mut fired);
        assert_eq!(fired, [3]);
        assert!(!wheel.replace(newer, 4));
    }

    #[test]
    fn the_farthest_deadline_neither_overflows_nor_fires() {
        let mut wheel = Wheel::new(ticks(77));
        wheel.insert(Instant::from_ns(u64::MAX), ());
        let mut fired = Vec::new();
        wheel.expire(ticks(1 << 40), &mut fired);
        assert!(fired.is_empty());
        assert!(wheel.next().is_some_and(|next| next > ticks(1 << 40)));
    }

    /// Many random inserts, removals and jumps of the clock, against an ordered map that does the same.
    #[test]
    fn it_agrees_with_an_ordered_map() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut draw = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut now = 123_456;
        let mut wheel = Wheel::new(ticks(now));
        let mut model: BTreeMap<(u64, u32), Key> = BTreeMap::new();
        for serial in 0..60_000_u32 {
            match draw(4) {
                0 | 1 => {
                    let reach = 1 << draw(30);
                    let due = now + 1 + draw(reach);
                    model.insert((due, serial), wheel.insert(ticks(due), (due, serial)));
                }
                2 => {
                    let start = (now + draw(1 << 20), 0);
                    if let Some((&name, &key)) = model.range(start..).next() {
                        assert_eq!(wheel.remove(key), Some(name));
                        model.remove(&name);
                    }
                }
                _ => {
                    let reach = 1 << draw(20);
                    now += draw(reach);
                    let mut fired = Vec::new();
                    wheel.expire(ticks(now), &mut fired);
                    fired.sort_unstable();
                    let rest = model.split_off(&(now + 1, 0));
                    let due: Vec<_> = std::mem::replace(&mut model, rest).into_keys().collect();
                    assert_eq!(fired, due);
                }
            }
            let first = model.keys().next().map(|&(due, _)| ticks(due));
            assert_eq!(wheel.next().is_some(), first.is_some());
            assert!(wheel.next() <= first || first.is_none());
        }
    }
}
