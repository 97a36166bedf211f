//! The origins' side at run time: endpoints, whom to ask next, and who is believed to live.

mod balance;
mod breaker;
mod budget;
mod choose;
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
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::config::{self, Balance, Config, Hashing, PathMatch};
use crate::message::RequestHead;
use budget::Budget;
use endpoint::Total;
use group::Group;
use sticky::Sticky;

pub use breaker::{Breaker, Trial, Turn};
pub use choose::{Ask, Choice, Entry, Wish};
pub use endpoint::{Active, Endpoint, SHARE_WHOLE};
pub use health::{Belief, Health};
pub use queue::{Place, Queue, QueueFacts};

/// Steps in which rings follow a slow start.
const STEPS: u32 = 10;

/// What an upstream needs when few of its endpoints are healthy.
const NO_NEED: u8 = 0;
const IS_HELPED: u8 = 1;
const IGNORES_HEALTH: u8 = 2;

/// A named set of endpoints.
#[derive(Debug)]
pub struct Upstream {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    balance: Balance,
    /// Those of every day, those that stand in for them, and where there are such, all together.
    groups: [Option<Group>; 3],
    sticky: Option<Sticky>,
    pub health: config::Health,
    /// What [`Upstream::settle`] found.
    need: AtomicU8,
    slow_start_ns: u64,
    /// Calls under way at a time, over all workers.
    pub calls_max: Option<u32>,
    has_limits: bool,
    /// Requests that wait, and how long; `None` = the tunables.
    pub waiting: config::Queue,
    counts_total: bool,
    total: Arc<Total>,
    breaker: Option<Breaker>,
    /// By worker.
    budgets: Arc<[Budget]>,
}

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
        let has_backups = config.endpoints.iter().any(|endpoint| endpoint.is_backup);
        let group = |has: fn(&config::Endpoint) -> bool| {
            Group::new(&config.endpoints, has, &config.balance, workers)
        };
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
        let slow_start_ns = u64::try_from(config.health.slow_start.as_nanos());
        let upstream = Self {
            name: config.name.clone(),
            endpoints,
            balance: config.balance.clone(),
            groups: [
                group(|endpoint| !endpoint.is_backup),
                group(|endpoint| endpoint.is_backup),
                has_backups.then(|| group(|_| true)).flatten(),
            ],
            sticky,
            health: config.health.clone(),
            need: AtomicU8::new(0),
            slow_start_ns: slow_start_ns.unwrap_or(u64::MAX),
            calls_max: config.calls_max,
            has_limits,
            waiting: config.queue,
            counts_total: has_limits || is_bounded,
            total: previous.map_or_else(Arc::default, |earlier| Arc::clone(&earlier.total)),
            breaker: config.breaker.map(|rule| {
                let earlier = previous.and_then(|earlier| earlier.breaker.as_ref());
                Breaker::new(rule, workers, earlier)
            }),
            budgets: previous
                .map(|earlier| &earlier.budgets)
                .filter(|budgets| budgets.len() == workers)
                .cloned()
                .unwrap_or_else(|| (0..workers).map(|_| Budget::default()).collect()),
        };
        upstream.settle();
        upstream
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

    /// Lets a call of this worker through, unless the upstream is left alone for now.
    ///
    /// # Errors
    /// Nanoseconds until it may be worth asking again.
    pub fn admit(&self, worker: usize, now_ns: u64) -> Result<Trial<'_>, u64> {
        match &self.breaker {
            Some(breaker) => breaker.admit(worker, now_ns),
            None => Ok(Trial::NONE),
        }
    }

    /// None where none was asked for.
    pub fn breaker(&self) -> Option<&Breaker> {
        self.breaker.as_ref()
    }

    /// A request goes to it: what is earned for retries.
    pub fn earn_retry(&self, worker: usize, percent: u32) {
        if let Some(budget) = self.budgets.get(worker) {
            budget.earn(percent);
        }
    }

    /// Takes a retry out of what was earned, or of those that are there each second in any case; false when there is none.
    pub fn spend_retry(&self, worker: usize, now_ns: u64, per_second: u32) -> bool {
        let budget = self.budgets.get(worker);
        budget.is_some_and(|budget| budget.spend(now_ns, per_second))
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

    /// The endpoint of this address.
    pub fn find(&self, address: SocketAddr) -> Option<&Endpoint> {
        self.endpoints
            .iter()
            .find(|endpoint| endpoint.address == address)
    }

    /// Looks whether so few endpoints of every day are healthy that all the work would take these down too: then those that
    /// stand in help, and where there are none of these that are healthy, health is ignored. Whether the latter has changed;
    /// to be asked after each change of a belief.
    ///
    /// Where none is healthy there is nobody left to relieve, and a quick refusal serves clients better.
    pub fn settle(&self) -> bool {
        let working = |is_backup| {
            let endpoints = self.endpoints.iter();
            endpoints.filter(move |endpoint| endpoint.weight > 0 && endpoint.is_backup == is_backup)
        };
        let healthy = |is_backup| working(is_backup).filter(|one| one.is_healthy()).count() as u64;
        let wanted = working(false).count() as u64 * u64::from(self.health.panic_percent);
        let is_short = healthy(false) > 0 && healthy(false) * 100 < wanted;
        let need = match (is_short, healthy(true)) {
            (false, _) => NO_NEED,
            (true, 0) => IGNORES_HEALTH,
            (true, _) => IS_HELPED,
        };
        let before = self.need.swap(need, Relaxed);
        (before == IGNORES_HEALTH) != (need == IGNORES_HEALTH)
    }

    /// Health is ignored, because too few endpoints have it.
    pub fn panics(&self) -> bool {
        self.need.load(Relaxed) == IGNORES_HEALTH
    }

    /// Those that stand in take part, because too few others are healthy.
    pub fn is_helped(&self) -> bool {
        self.need.load(Relaxed) == IS_HELPED
    }

    /// An endpoint can be ejected: at most this share of all is out by that, and a healthy one is left.
    pub fn can_spare(&self, endpoint: &Endpoint, share_percent_max: u32) -> bool {
        let working = || self.endpoints.iter().filter(|endpoint| endpoint.weight > 0);
        let out = working().filter(|endpoint| endpoint.is_ejected()).count() as u64 + 1;
        let is_other = |other: &&Endpoint| other.address != endpoint.address && other.is_healthy();
        out * 100 <= working().count() as u64 * u64::from(share_percent_max)
            && working().any(|other| is_other(&other))
    }

    /// This endpoint of it may be given work, as far as beliefs go.
    pub fn believes_in(&self, endpoint: &Endpoint) -> bool {
        endpoint.is_healthy() || (!endpoint.is_backup && self.panics())
    }

    /// An answer of this status speaks against the endpoint that gave it.
    pub fn blames(&self, status: u16) -> bool {
        let eject = self.health.eject.as_ref();
        eject.is_some_and(|eject| eject.status.has(status))
    }

    /// Endpoints that the generation before did not have begin slowly; those of a first generation have no others to lean on.
    pub fn welcome(&self, previous: &Self, now_ns: u64) {
        for endpoint in &self.endpoints {
            let known = |earlier: &Endpoint| earlier.address == endpoint.address;
            if !previous.endpoints.iter().any(known) {
                endpoint.welcome(now_ns);
            }
        }
    }

    /// Thousandths of its weight that an endpoint of it takes part with now: less than all for a while after it came back.
    pub fn share(&self, endpoint: &Endpoint, now_ns: u64) -> u32 {
        match self.slow_start_ns {
            0 => SHARE_WHOLE,
            slow_start_ns => endpoint.share(slow_start_ns, now_ns),
        }
    }

    /// Its weight in a ring of the kernel half, where only the relation to the others counts: in tenths, as far as it has
    /// come in its slow start.
    pub fn weight_in_ring(&self, endpoint: &Endpoint, now_ns: u64) -> u32 {
        endpoint.weight * self.step(endpoint, now_ns)
    }

    /// How far an endpoint has come in its slow start: 1 to 10.
    pub fn step(&self, endpoint: &Endpoint, now_ns: u64) -> u32 {
        (self.share(endpoint, now_ns) * STEPS / SHARE_WHOLE).max(1)
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
