//! The origins' side at run time: endpoints, whom to ask next, and who is believed to live.

mod balance;
mod endpoint;
mod health;
mod key;
mod latency;
mod least;
mod ring;

use std::net::IpAddr;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::{self, Balance, Config};
use crate::message::RequestHead;
use balance::Schedule;
use least::Load;
use ring::Ring;

pub use endpoint::{Active, Endpoint};
pub use health::{Belief, Health};

/// A named set of endpoints.
#[derive(Debug)]
pub struct Upstream {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    balance: Balance,
    schedule: Schedule,
    /// Only where it is asked for.
    ring: Option<Ring>,
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
    /// See [`Upstream::key`].
    pub key: u64,
}

/// All upstreams of a configuration, in its order, for so many workers. What earlier ones learned of an address under the
/// same name (health, counters) goes on, however weights and order change.
pub fn build(
    config: &Config,
    workers: usize,
    previous: Option<&[Arc<Upstream>]>,
) -> Arc<[Arc<Upstream>]> {
    let earlier = previous.unwrap_or_default().iter();
    let earlier: HashMap<&str, &Upstream> = earlier
        .map(|earlier| (earlier.name.as_str(), earlier.as_ref()))
        .collect();
    config
        .upstreams
        .iter()
        .map(|upstream| {
            let earlier = earlier.get(upstream.name.as_str()).copied();
            Arc::new(Upstream::new(upstream, workers, earlier))
        })
        .collect()
}

impl Upstream {
    pub fn new(config: &config::Upstream, workers: usize, previous: Option<&Self>) -> Self {
        let earlier = previous.iter().flat_map(|earlier| &earlier.endpoints);
        let earlier: HashMap<SocketAddr, &Endpoint> =
            earlier.map(|known| (known.address, known)).collect();
        let endpoints = config.endpoints.iter().map(|endpoint| {
            let earlier = earlier.get(&endpoint.address).copied();
            let endpoint = Endpoint::new(endpoint, &config.balance, workers, earlier);
            if config.probe.is_none() {
                // Nobody would ever ask again.
                endpoint.health().reset();
            }
            endpoint
        });
        let weights: Vec<u32> = config
            .endpoints
            .iter()
            .map(|endpoint| endpoint.weight)
            .collect();
        Self {
            name: config.name.clone(),
            endpoints: endpoints.collect(),
            ring: matches!(config.balance, Balance::Maglev(_)).then(|| {
                let endpoints = config.endpoints.iter();
                Ring::new(endpoints.map(|endpoint| (&endpoint.address, endpoint.weight)))
            }),
            balance: config.balance.clone(),
            schedule: Schedule::new(&weights, workers),
        }
    }

    /// What of a request chooses its endpoint, as a number; 0 where nothing does.
    pub fn key(&self, head: &RequestHead, peer: IpAddr) -> u64 {
        match &self.balance {
            Balance::Maglev(hashing) => key::key(&hashing.key, head, peer),
            _ => 0,
        }
    }

    /// Index of the endpoint for the next call of a worker.
    ///
    /// One that just failed, and one that is on hold (see [`Endpoint::hold`]) because it failed not long ago, are taken
    /// only if there is no other. `None`: none is healthy, or none takes new work, and the client gets a 503 at once.
    pub fn choose(&self, ask: Ask) -> Option<usize> {
        let is = |index: usize, wanted: &dyn Fn(&Endpoint) -> bool| {
            self.endpoints.get(index).is_some_and(wanted)
        };
        let is_healthy =
            |endpoint: &Endpoint| endpoint.weight > 0 && endpoint.health().is_healthy();
        let is_free = |endpoint: &Endpoint| is_healthy(endpoint) && !endpoint.is_held(ask.now_ns);
        self.next(&ask, &|index| {
            Some(index) != ask.avoid && is(index, &is_free)
        })
        .or_else(|| {
            self.next(&ask, &|index| {
                Some(index) != ask.avoid && is(index, &is_healthy)
            })
        })
        .or_else(|| ask.avoid.filter(|index| is(*index, &is_healthy)))
    }

    fn next(&self, ask: &Ask, is_usable: &impl Fn(usize) -> bool) -> Option<usize> {
        let Ask { worker, random, .. } = *ask;
        match &self.balance {
            Balance::RoundRobin => self.schedule.next(worker, is_usable),
            Balance::Random => self.schedule.draw(random, is_usable),
            Balance::LeastRequest { candidates } => {
                let load = |index: usize| Load {
                    cost: self.endpoints[index].load(),
                    weight: self.endpoints[index].weight,
                };
                let candidates = *candidates as usize;
                if candidates < self.endpoints.len() {
                    least::of_drawn(&self.schedule, candidates, random, is_usable, load)
                } else {
                    least::of_all(self.endpoints.len(), random, is_usable, load)
                }
            }
            Balance::Ewma => {
                let load = |index: usize| Load {
                    cost: self.endpoints[index].expected_ns(worker, ask.now_ns),
                    weight: self.endpoints[index].weight,
                };
                least::of_drawn(&self.schedule, 2, random, is_usable, load)
            }
            Balance::Maglev(hashing) => {
                let ring = self.ring.as_ref()?;
                match hashing.load_percent_max {
                    None => ring.find(ask.key, is_usable),
                    Some(percent) => self.find_bounded(ring, ask.key, percent, is_usable),
                }
            }
        }
    }

    /// The first usable one from the key's slot on that one more call does not take above its bound. There is one, as all
    /// bounds together are more than all calls; only workers that choose at the same moment can go above it, by one call each.
    fn find_bounded(
        &self,
        ring: &Ring,
        key: u64,
        percent: u32,
        is_usable: &impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let usable = self.endpoints.iter().enumerate();
        let (total, weights) = usable.filter(|(index, _)| is_usable(*index)).fold(
            (1, 0),
            |(total, weights), (_, endpoint)| {
                (
                    total + endpoint.load(),
                    weights + u64::from(endpoint.weight),
                )
            },
        );
        let has_room = |index: usize| {
            let endpoint = &self.endpoints[index];
            endpoint.load() < ring::capacity(total, endpoint.weight, weights, percent)
        };
        ring.find(key, |index| is_usable(index) && has_room(index))
            .or_else(|| ring.find(key, is_usable))
    }
}

/// One of an action's upstreams, by weight; `None` if no weight is above zero.
pub fn choose_weighted(choices: &[(usize, u32)], random: u64) -> Option<usize> {
    if let [(only, 1..)] = choices {
        return Some(*only);
    }
    let total: u64 = choices.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut left = random.checked_rem(total)?;
    for (upstream, weight) in choices {
        match left.checked_sub(u64::from(*weight)) {
            Some(rest) => left = rest,
            None => return Some(*upstream),
        }
    }
    None
}

#[cfg(test)]
mod tests;
