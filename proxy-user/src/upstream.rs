//! The origins' side at run time: endpoints, whom to ask next, and who is believed to live.

mod balance;
mod endpoint;
mod health;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::{self, Balance, Config};
use balance::Schedule;

pub use endpoint::{Active, Endpoint};
pub use health::{Belief, Health};

/// A named set of endpoints.
#[derive(Debug)]
pub struct Upstream {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    balance: Balance,
    schedule: Schedule,
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
            let endpoint = Endpoint::new(endpoint, workers, earlier);
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
            balance: config.balance,
            schedule: Schedule::new(&weights, workers),
        }
    }

    /// Index of the endpoint for the next call of this worker, `random` being any number that nobody can foresee.
    ///
    /// `avoid` is one that just failed, and one that is on hold (see [`Endpoint::hold`]) failed not long ago: both are taken
    /// only if there is no other. `None`: none is healthy, or none takes new work, and the client gets a 503 at once.
    pub fn choose(
        &self,
        worker: usize,
        avoid: Option<usize>,
        random: u64,
        now_ns: u64,
    ) -> Option<usize> {
        let is = |index: usize, wanted: &dyn Fn(&Endpoint) -> bool| {
            self.endpoints.get(index).is_some_and(wanted)
        };
        let is_healthy = |endpoint: &Endpoint| endpoint.health().is_healthy();
        let is_free = |endpoint: &Endpoint| is_healthy(endpoint) && !endpoint.is_held(now_ns);
        self.next(worker, random, |index| {
            Some(index) != avoid && is(index, &is_free)
        })
        .or_else(|| {
            self.next(worker, random, |index| {
                Some(index) != avoid && is(index, &is_healthy)
            })
        })
        .or_else(|| avoid.filter(|index| is(*index, &is_healthy) && self.schedule.holds(*index)))
    }

    fn next(&self, worker: usize, random: u64, is_usable: impl Fn(usize) -> bool) -> Option<usize> {
        match self.balance {
            Balance::RoundRobin => self.schedule.next(worker, is_usable),
            Balance::Random => self.schedule.draw(random, is_usable),
        }
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
