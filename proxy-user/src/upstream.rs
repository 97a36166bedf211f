//! The origins' side at run time: endpoints, whom to ask next, and who is believed to live.

mod balance;
mod endpoint;
mod health;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::config::{self, Balance, Config};
use balance::Schedule;

pub use endpoint::{Active, Endpoint, SHARE_WHOLE};
pub use health::{Belief, Health};

/// Steps in which rings follow a slow start.
const STEPS: u32 = 10;

/// A named set of endpoints.
#[derive(Debug)]
pub struct Upstream {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    balance: Balance,
    schedule: Schedule,
    pub health: config::Health,
    /// So few endpoints are healthy that health is ignored.
    panics: AtomicBool,
    slow_start_ns: u64,
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
        let slow_start_ns = u64::try_from(config.health.slow_start.as_nanos());
        let upstream = Self {
            name: config.name.clone(),
            endpoints: endpoints.collect(),
            balance: config.balance,
            schedule: Schedule::new(&weights, workers),
            health: config.health.clone(),
            panics: AtomicBool::new(false),
            slow_start_ns: slow_start_ns.unwrap_or(u64::MAX),
        };
        upstream.settle();
        upstream
    }

    /// The endpoint of this address.
    pub fn find(&self, address: SocketAddr) -> Option<&Endpoint> {
        self.endpoints
            .iter()
            .find(|endpoint| endpoint.address == address)
    }

    /// Looks whether so few endpoints are healthy that health is to be ignored: all the work on a few of many would take
    /// these down too. Whether that has changed; to be asked after each change of a belief.
    ///
    /// Where none is healthy there is nobody left to relieve, and a quick refusal serves clients better.
    pub fn settle(&self) -> bool {
        let working = || self.endpoints.iter().filter(|endpoint| endpoint.weight > 0);
        let healthy = working().filter(|endpoint| endpoint.is_healthy()).count() as u64;
        let wanted = working().count() as u64 * u64::from(self.health.panic_percent);
        let panics = healthy > 0 && healthy * 100 < wanted;
        self.panics.swap(panics, Relaxed) != panics
    }

    /// Health is ignored, because too few endpoints have it.
    pub fn panics(&self) -> bool {
        self.panics.load(Relaxed)
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
        endpoint.is_healthy() || self.panics()
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
        let is_healthy = |endpoint: &Endpoint| self.believes_in(endpoint);
        let is_free = |endpoint: &Endpoint| is_healthy(endpoint) && !endpoint.is_held(now_ns);
        // One that starts slowly lets a part of its turns go by.
        let takes_its_turn = |index: usize| {
            let share = self.share(&self.endpoints[index], now_ns);
            share == SHARE_WHOLE || drawn(random, index) < share
        };
        self.next(worker, random, |index| {
            Some(index) != avoid && is(index, &is_free) && takes_its_turn(index)
        })
        .or_else(|| {
            self.next(worker, random, |index| {
                Some(index) != avoid && is(index, &is_free)
            })
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

/// A number below `SHARE_WHOLE`, another one for each endpoint.
fn drawn(random: u64, index: usize) -> u32 {
    let mixed = (random ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((u128::from(mixed ^ mixed >> 32) * u128::from(SHARE_WHOLE)) >> 64) as u32
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
