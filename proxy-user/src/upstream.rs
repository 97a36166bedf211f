//! The origins' side at run time: endpoints, whom to ask next, and who is believed to live.

mod balance;
mod endpoint;
mod group;
mod health;
mod key;
mod latency;
mod least;
mod queue;
mod ring;
mod sticky;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::config::{self, Balance, Config, Hashing, PathMatch};
use crate::message::RequestHead;
use endpoint::Total;
use group::Group;
use sticky::Sticky;

pub use endpoint::{Active, Endpoint};
pub use health::{Belief, Health};
pub use queue::{Place, Queue, QueueFacts};

/// A named set of endpoints.
#[derive(Debug)]
pub struct Upstream {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    balance: Balance,
    /// Those of every day, then those that stand in for them.
    groups: [Option<Group>; 2],
    sticky: Option<Sticky>,
    /// Calls under way at a time, over all workers.
    pub calls_max: Option<u32>,
    has_limits: bool,
    /// Requests that wait, and how long; `None` = the tunables.
    pub waiting: config::Queue,
    counts_total: bool,
    total: Arc<Total>,
}

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

/// All upstreams of a configuration, in its order, for so many workers. What earlier ones learned of an address under the
/// same name (health, counters) goes on, however weights and order change. `seed` is what sticky cookies are made with where
/// the configuration has no key for them.
pub fn build(
    config: &Config,
    workers: usize,
    seed: u64,
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
            Arc::new(Upstream::new(upstream, workers, seed, earlier))
        })
        .collect()
}

impl Upstream {
    pub fn new(
        config: &config::Upstream,
        workers: usize,
        seed: u64,
        previous: Option<&Self>,
    ) -> Self {
        let earlier = previous.iter().flat_map(|earlier| &earlier.endpoints);
        let earlier: HashMap<SocketAddr, &Endpoint> =
            earlier.map(|known| (known.address, known)).collect();
        let endpoints: Vec<Endpoint> = (config.endpoints.iter().map(|endpoint| {
            let earlier = earlier.get(&endpoint.address).copied();
            let endpoint = Endpoint::new(endpoint, config, workers, earlier);
            if config.probe.is_none() {
                // Nobody would ever ask again.
                endpoint.health().reset();
            }
            endpoint
        }))
        .collect();
        let group = |is_backup| Group::new(&config.endpoints, is_backup, &config.balance, workers);
        let sticky = config.sticky.as_ref().map(|sticky| {
            let addresses = config.endpoints.iter().map(|endpoint| &endpoint.address);
            Sticky::new(sticky, &config.name, addresses, seed)
        });
        let has_limits = config.calls_max.is_some()
            || endpoints
                .iter()
                .any(|endpoint| endpoint.calls_max.is_some());
        let is_bounded = matches!(
            config.balance,
            Balance::Maglev(Hashing {
                load_percent_max: Some(_),
                ..
            })
        );
        Self {
            name: config.name.clone(),
            endpoints,
            balance: config.balance.clone(),
            groups: [group(false), group(true)],
            sticky,
            calls_max: config.calls_max,
            has_limits,
            waiting: config.queue,
            counts_total: has_limits || is_bounded,
            total: previous.map_or_else(Arc::default, |earlier| Arc::clone(&earlier.total)),
        }
    }

    /// What a request of this client on a route with this path wishes for.
    pub fn wish(&self, head: &RequestHead, peer: IpAddr, path: &PathMatch) -> Wish {
        Wish {
            key: match &self.balance {
                Balance::Maglev(hashing) => key::key(&hashing.key, head, peer, path),
                _ => 0,
            },
            endpoint: self.sticky_endpoint(head),
        }
    }

    /// The endpoint that the sticky cookie of a request names, if it is one of this upstream's.
    pub fn sticky_endpoint(&self, head: &RequestHead) -> Option<usize> {
        self.sticky.as_ref()?.find(head)
    }

    /// The `Set-Cookie` for a client, over TLS or in the clear, whose request wished this and went to that endpoint; `None`
    /// where it has the right cookie, or there are none.
    pub fn set_cookie(&self, endpoint: usize, wish: Wish, is_tls: bool) -> Option<String> {
        let sticky = self.sticky.as_ref()?;
        if wish.endpoint == Some(endpoint) {
            return None;
        }
        sticky.set_cookie(endpoint, is_tls)
    }

    /// Those who wait for room.
    pub fn queue(&self) -> &Queue {
        &self.total.queue
    }

    /// Calls to it, or to one of its endpoints, have a limit.
    pub fn has_limits(&self) -> bool {
        self.has_limits
    }

    /// Calls of all workers that are under way.
    pub fn active(&self) -> u64 {
        self.endpoints.iter().map(Endpoint::active).sum()
    }

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
    /// none, one that stands in. One that just failed, and one that is on hold (see [`Endpoint::hold`]) because it failed
    /// not long ago, are taken only if there is no other.
    pub fn choose(&self, ask: &Ask) -> Choice {
        let is_healthy = |index: usize| self.endpoints[index].health().is_healthy();
        let is_held = |index: usize| self.endpoints[index].is_held(ask.now_ns);
        let is_failed = |index: usize| Some(index) == ask.avoid;
        let has_room = |index: usize| self.endpoints[index].has_room();
        let stay = ask.wish.endpoint;
        if let Some(index) =
            stay.filter(|index| is_healthy(*index) && !is_held(*index) && !is_failed(*index))
        {
            return match has_room(index) {
                true => Choice::Endpoint(index),
                false => Choice::Full,
            };
        }
        for takes_held in [false, true] {
            for group in self.groups.iter().flatten() {
                let is_usable = |index: usize| {
                    group.has(&self.endpoints[index])
                        && is_healthy(index)
                        && !is_failed(index)
                        && (takes_held || !is_held(index))
                };
                let chosen =
                    self.choose_of(group, ask, &|index| is_usable(index) && has_room(index));
                if let Some(index) = chosen {
                    return Choice::Endpoint(index);
                }
                if self.has_limits && (0..self.endpoints.len()).any(is_usable) {
                    return Choice::Full;
                }
            }
        }
        let is_last = |index: &usize| is_healthy(*index) && self.endpoints[*index].weight > 0;
        match ask.avoid.filter(is_last) {
            Some(index) if has_room(index) => Choice::Endpoint(index),
            Some(_) => Choice::Full,
            None => Choice::Nobody,
        }
    }

    fn choose_of(
        &self,
        group: &Group,
        ask: &Ask,
        is_usable: &impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let active = u64::from(self.total.active());
        group.choose(&self.balance, &self.endpoints, active, ask, is_usable)
    }

    /// The request wishes for one endpoint and no other, as long as that lives.
    pub fn is_bound(&self, wish: Wish) -> bool {
        let endpoint = wish.endpoint.and_then(|index| self.endpoints.get(index));
        endpoint.is_some_and(|endpoint| endpoint.health().is_healthy())
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
