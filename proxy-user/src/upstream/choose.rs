//! Whom a request is for, and whether there is room for it.

use super::balance::step;
use super::group::Group;
use super::{Active, SHARE_WHOLE, Upstream};

/// What of a request has a say in whom it is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// What is hashed, as a number; 0 where nothing is.
    pub key: u64,
    /// The endpoint that its sticky cookie names.
    pub endpoint: Option<usize>,
}

/// What a choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub worker: usize,
    /// One that just failed.
    pub avoid: Option<usize>,
    /// Any number that nobody can foresee.
    pub random: u64,
    /// CLOCK_MONOTONIC.
    pub now_ns: u64,
    pub wish: Wish,
}

/// Whom a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The index of an endpoint.
    Endpoint(usize),
    /// There are endpoints for it, and none may have one more call now.
    Full,
    /// No endpoint is healthy, or none takes new work.
    Nobody,
}

/// What came of asking for room.
#[derive(Debug)]
pub enum Entry<'u> {
    /// A call to the endpoint of this index has begun.
    Begun(usize, Active<'u>),
    Full,
    Nobody,
}

/// How often the last room at an endpoint may be lost to another worker before it is called full.
const RACES_MAX: usize = 8;

impl Upstream {
    /// Begins a call to the endpoint that is chosen, if there is room for it.
    pub fn enter(&self, ask: &Ask) -> Entry<'_> {
        for _ in 0..RACES_MAX {
            let index = match self.choose(ask) {
                Choice::Endpoint(index) => index,
                Choice::Full => return Entry::Full,
                Choice::Nobody => return Entry::Nobody,
            };
            let total = self.counts_total.then_some(&*self.total);
            if total.is_some_and(|total| total.begin(self.calls_max).is_none()) {
                return Entry::Full;
            }
            if let Some(mut active) = self.endpoints[index].begin(ask.worker, ask.now_ns) {
                active.total = total;
                return Entry::Begun(index, active);
            }
            // Another worker took the last room in between.
            total.iter().for_each(|total| total.end());
        }
        Entry::Full
    }

    /// The endpoint for the next call of a worker.
    ///
    /// The one of the sticky cookie, as long as it lives. Else one of every day by the way of balancing, and while there is
    /// none, one that stands in. One that just failed, and one that is on hold (see [`super::Endpoint::hold`]) because it
    /// failed not long ago, are taken only if there is no other.
    pub fn choose(&self, ask: &Ask) -> Choice {
        let is_believed = |index: usize| self.believes_in(&self.endpoints[index]);
        let is_fit =
            |index: usize| !self.endpoints[index].is_held(ask.now_ns) && Some(index) != ask.avoid;
        let has_room = |index: usize| self.endpoints[index].has_room();
        let stay = ask
            .wish
            .endpoint
            .filter(|index| is_believed(*index) && is_fit(*index));
        if let Some(index) = stay {
            return found(index, has_room);
        }
        let groups = match self.is_helped() {
            true => &self.groups[2..],
            false => &self.groups[..2],
        };
        for group in groups.iter().flatten() {
            let is_usable = |index: usize| group.has(index) && is_believed(index) && is_fit(index);
            let choice = self.choose_of(group, ask, &is_usable);
            if choice != Choice::Nobody {
                return choice;
            }
        }
        for group in groups.iter().flatten() {
            let is_usable =
                |index: usize| group.has(index) && is_believed(index) && Some(index) != ask.avoid;
            let choice = self.choose_of(group, ask, &is_usable);
            if choice != Choice::Nobody {
                return choice;
            }
        }
        let is_last = |index: &usize| is_believed(*index) && self.endpoints[*index].weight > 0;
        match ask.avoid.filter(is_last) {
            Some(index) => found(index, has_room),
            None => Choice::Nobody,
        }
    }

    /// One of those that are usable. All that `is_usable` says yes to are the group's.
    fn choose_of(&self, group: &Group, ask: &Ask, is_usable: &impl Fn(usize) -> bool) -> Choice {
        let is_open = |index: usize| is_usable(index) && self.endpoints[index].has_room();
        let chosen = match self.slow_start_ns {
            0 => self.choose_by(group, ask, &is_open),
            // One that starts slowly lets a part of its turns, or of its keys, go by.
            _ => {
                let takes_its_turn = |index: usize| {
                    let share = self.share(&self.endpoints[index], ask.now_ns);
                    share == SHARE_WHOLE || drawn(ask, index) < share
                };
                let is_ready = |index: usize| is_open(index) && takes_its_turn(index);
                self.choose_by(group, ask, &is_ready)
                    .or_else(|| self.choose_by(group, ask, &is_open))
            }
        };
        match chosen {
            Some(index) => Choice::Endpoint(index),
            None if self.has_limits && (0..self.endpoints.len()).any(is_usable) => Choice::Full,
            None => Choice::Nobody,
        }
    }

    fn choose_by(
        &self,
        group: &Group,
        ask: &Ask,
        is_usable: &impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let weight = |index: usize| {
            let endpoint = &self.endpoints[index];
            endpoint.weight * self.share(endpoint, ask.now_ns)
        };
        let active = u64::from(self.total.active());
        group.choose(
            &self.balance,
            &self.endpoints,
            weight,
            active,
            ask,
            is_usable,
        )
    }

    /// The request wishes for one endpoint and no other, as long as that lives.
    pub fn is_bound(&self, wish: Wish) -> bool {
        let endpoint = wish.endpoint.and_then(|index| self.endpoints.get(index));
        endpoint.is_some_and(|endpoint| self.believes_in(endpoint))
    }
}

fn found(index: usize, has_room: impl Fn(usize) -> bool) -> Choice {
    match has_room(index) {
        true => Choice::Endpoint(index),
        false => Choice::Full,
    }
}

/// A number below `SHARE_WHOLE`, another one for each endpoint, and the same for the same key where there is one.
fn drawn(ask: &Ask, index: usize) -> u32 {
    let seed = match ask.wish.key {
        0 => ask.random,
        key => key,
    };
    let mixed = step(step(seed) ^ index as u64);
    ((u128::from(mixed) * u128::from(SHARE_WHOLE)) >> 64) as u32
}
