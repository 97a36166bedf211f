//! Endpoints that stand in for each other, and the ways to choose one of them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::balance::Schedule;
use super::endpoint::Endpoint;
use super::least::{self, Load};
use super::ring::{self, Ring};
use super::{Ask, SHARE_WHOLE};
use crate::config::{self, Balance};

/// Those of every day, those that stand in for them, or all.
#[derive(Debug)]
pub(super) struct Group {
    /// By index of the endpoint: it belongs here and takes new work.
    members: Box<[bool]>,
    schedule: Schedule,
    /// Only where it is asked for.
    ring: Option<Ring>,
    /// Mean weight of those that take new work, in thousandths.
    weight_mean: f64,
    usable: Usable,
}

/// What all usable endpoints weigh together, as of a moment ago: in the low bits, above it the time in ms. To sum it up
/// at every request would cost more the more endpoints there are.
#[derive(Debug, Default)]
struct Usable(AtomicU64);

const WEIGHT_BITS: u32 = 24;
const USABLE_FOR_MS: u64 = 10;

impl Group {
    /// Those of `endpoints` that belong here and take new work; `None`: there are none.
    pub fn new(
        endpoints: &[config::Endpoint],
        belongs: impl Fn(&config::Endpoint) -> bool,
        balance: &Balance,
        workers: usize,
    ) -> Option<Self> {
        let weight = |endpoint: &config::Endpoint| match belongs(endpoint) {
            true => endpoint.weight,
            false => 0,
        };
        let weights: Vec<u32> = endpoints.iter().map(weight).collect();
        let count = weights.iter().filter(|weight| **weight > 0).count();
        if count == 0 {
            return None;
        }
        let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        let addresses = endpoints.iter().map(|endpoint| &endpoint.address);
        let ring = || Ring::new(addresses.zip(weights.iter().copied()));
        Some(Self {
            members: weights.iter().map(|weight| *weight > 0).collect(),
            ring: matches!(balance, Balance::Maglev(_)).then(ring),
            schedule: Schedule::new(&weights, workers),
            weight_mean: f64::from(SHARE_WHOLE) * total as f64 / count as f64,
            usable: Usable::default(),
        })
    }

    /// It has the endpoint of this index, and the endpoint takes new work.
    pub fn has(&self, index: usize) -> bool {
        self.members.get(index).is_some_and(|is_member| *is_member)
    }

    /// The endpoint for the next call, of those that are usable. All that `is_usable` says yes to are the group's. `weight`
    /// is what an endpoint can do now, in thousandths of a weight.
    pub fn choose(
        &self,
        balance: &Balance,
        endpoints: &[Endpoint],
        weight: impl Fn(usize) -> u32,
        active: u64,
        ask: &Ask,
        is_usable: &impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let (schedule, random) = (&self.schedule, ask.random);
        match balance {
            Balance::RoundRobin => schedule.next(ask.worker, is_usable),
            Balance::Random => schedule.draw(random, is_usable),
            Balance::LeastRequest { candidates } => {
                let load = |index: usize| Load {
                    active: endpoints[index].load(),
                    weight: weight(index),
                };
                let relieves = |one, other| load(one).relieves(load(other));
                match *candidates as usize {
                    few if few < endpoints.len() => {
                        least::of_drawn(schedule, few, random, is_usable, relieves)
                    }
                    _ => least::of_all(schedule, endpoints.len(), random, is_usable, load),
                }
            }
            Balance::Ewma => {
                let cost = |index: usize| self.expected_ns(&endpoints[index], weight(index), ask);
                let is_faster = |one, other| cost(one) < cost(other);
                least::of_drawn(schedule, 2, random, is_usable, is_faster)
            }
            Balance::Maglev(hashing) => {
                let ring = self.ring.as_ref()?;
                match hashing.load_percent_max {
                    None => ring.find(ask.wish.key, is_usable),
                    Some(percent) => {
                        let weights = self.usable_weight(endpoints, ask.now_ns, is_usable);
                        let has_room = |index: usize| {
                            let endpoint = &endpoints[index];
                            let weight = endpoint.weight;
                            endpoint.load() < ring::capacity(active + 1, weight, weights, percent)
                        };
                        ring.find(ask.wish.key, |index| is_usable(index) && has_room(index))
                            .or_else(|| ring.find(ask.wish.key, is_usable))
                    }
                }
            }
        }
    }

    /// What a call is expected to wait for: the latency, once for itself and once for each that is under way, of which an
    /// endpoint of the mean weight bears one at a time. Idle endpoints so are told apart by latency alone.
    fn expected_ns(&self, endpoint: &Endpoint, weight: u32, ask: &Ask) -> f64 {
        let active = endpoint.active_of(ask.worker);
        let latency_ns = endpoint.latency_ns(ask.worker, active, ask.now_ns);
        let share = active as f64 * self.weight_mean / f64::from(weight.max(1));
        latency_ns as f64 * (1.0 + share)
    }

    /// What all usable endpoints weigh, not more than some milliseconds ago.
    fn usable_weight(
        &self,
        endpoints: &[Endpoint],
        now_ns: u64,
        is_usable: &impl Fn(usize) -> bool,
    ) -> u64 {
        let now_ms = now_ns / 1_000_000;
        let known = self.usable.0.load(Relaxed);
        let (at_ms, weight) = (known >> WEIGHT_BITS, known & ((1 << WEIGHT_BITS) - 1));
        if weight > 0 && now_ms.wrapping_sub(at_ms) < USABLE_FOR_MS {
            return weight;
        }
        let usable = endpoints.iter().enumerate();
        let weight = usable
            .filter(|(index, _)| is_usable(*index))
            .map(|(_, endpoint)| u64::from(endpoint.weight))
            .sum::<u64>();
        let weight = weight.min((1 << WEIGHT_BITS) - 1);
        self.usable.0.store(now_ms << WEIGHT_BITS | weight, Relaxed);
        weight
    }
}
