//! Which endpoints are left out because calls to them failed, and how they come back.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Instant;

use super::Control;
use crate::config::{Config, Eject, Listener, ListenerMode, Via};
use crate::control::ejections::{Counts, Ejections, Key};
use crate::datapath::Writer;
use crate::offload::now_ns;
use crate::snapshot::Snapshot;
use crate::upstream::{Endpoint, SHARE_WHOLE, Upstream};

/// Steps in which the rings of the kernel half follow an endpoint that starts slowly.
const STEPS: u32 = 10;

/// An endpoint, and what its upstream says of calls that fail.
struct Judged<'s> {
    upstream: &'s Upstream,
    endpoint: &'s Endpoint,
    rule: &'s Eject,
}

impl Judged<'_> {
    fn key(&self) -> Key {
        (self.upstream.name.clone(), self.endpoint.address)
    }
}

/// Endpoints whose upstream has a rule.
fn judged(snapshot: &Snapshot) -> impl Iterator<Item = Judged<'_>> {
    let with_rule = snapshot
        .upstreams
        .iter()
        .filter_map(|upstream| Some((upstream, upstream.health.eject.as_ref()?)));
    with_rule.flat_map(|(upstream, rule)| {
        let endpoints = upstream.endpoints.iter();
        endpoints.map(move |endpoint| Judged {
            upstream,
            endpoint,
            rule,
        })
    })
}

/// Names of upstreams whose flows pass by NAT both ways, so that it shows what becomes of them.
fn forwarded_by_nat(config: &Config) -> HashSet<&str> {
    let upstream_of = |listener: &Listener| match listener.mode {
        ListenerMode::Forward {
            upstream,
            via: Via::Nat,
            ..
        } => Some(upstream),
        _ => None,
    };
    let indices = config.listeners.iter().filter_map(upstream_of);
    let upstreams = indices.filter_map(|index| config.upstreams.get(index));
    upstreams.map(|upstream| upstream.name.as_str()).collect()
}

impl Control {
    /// Calls to these addresses failed: whoever has failed too often in a row is left out.
    pub(super) fn failed(&mut self, addresses: &HashSet<SocketAddr>) {
        let Some(snapshot) = self.snapshot.clone() else {
            return;
        };
        let now = Instant::now();
        let failed = judged(&snapshot).filter(|one| addresses.contains(&one.endpoint.address));
        let ejected = failed.filter(|one| self.judge(one, now)).count();
        if ejected > 0 {
            self.choose_endpoints();
        }
    }

    /// Once a second: whose time is over comes back, whoever fails too large a share of its calls is left out, and the
    /// rings follow those that start slowly.
    pub(super) fn look_after_endpoints(&mut self) {
        let Some(snapshot) = self.snapshot.clone() else {
            return;
        };
        let now = Instant::now();
        let mut changed = self.take_in_again(&snapshot, now);
        for one in judged(&snapshot) {
            let calls = Counts {
                ended: one.endpoint.ended(),
                failed: one.endpoint.failed(),
            };
            self.ejections.count_calls(&one.key(), one.rule, calls, now);
            changed |= self.judge(&one, now);
        }
        changed |= self.judge_flows(&snapshot, now);
        let steps = steps(&snapshot, now_ns());
        changed |= steps != self.steps;
        self.steps = steps;
        if changed {
            self.choose_endpoints();
        }
    }

    /// Judges endpoints by what became of the flows that NAT opened to them; whether one was left out.
    fn judge_flows(&mut self, snapshot: &Snapshot, now: Instant) -> bool {
        let signs = match self.datapath.as_ref().map(Writer::endpoint_signs) {
            Some(Ok(signs)) => signs,
            Some(Err(error)) => {
                log::error!("cannot read what became of flows: {error:#}");
                return false;
            }
            None => return false,
        };
        let mut flows = Vec::new();
        let forwarded = forwarded_by_nat(&snapshot.config);
        for one in judged(snapshot).filter(|one| forwarded.contains(&*one.upstream.name)) {
            let Some(signs) = signs.get(&one.endpoint.address) else {
                continue;
            };
            let since_ever = Counts {
                ended: signs.opened,
                failed: signs.opened.saturating_sub(signs.answered),
            };
            let lately = self
                .ejections
                .count_flows(&one.key(), one.rule, since_ever, now);
            flows.push((one, lately));
        }
        let mut all = HashMap::<&str, Counts>::new();
        for (one, lately) in &flows {
            let sum = all.entry(&one.upstream.name).or_default();
            sum.ended += lately.ended;
            sum.failed += lately.failed;
        }
        let judge = |(one, lately): &(Judged<'_>, Counts)| {
            let all = all[one.upstream.name.as_str()];
            let others = Counts {
                ended: all.ended - lately.ended,
                failed: all.failed - lately.failed,
            };
            let reason = Ejections::flows_reason(*lately, others, one.rule);
            reason.is_some_and(|reason| self.leave_out(one, &reason, now))
        };
        flows.iter().map(judge).filter(|ejected| *ejected).count() > 0
    }

    /// Leaves an endpoint out if calls to it failed in a way that its rule names; whether it did.
    fn judge(&mut self, one: &Judged<'_>, now: Instant) -> bool {
        let failures = one.endpoint.failures();
        let reason = self.ejections.reason(&one.key(), one.rule, failures);
        reason.is_some_and(|reason| self.leave_out(one, &reason, now))
    }

    /// Leaves an endpoint out for this reason if the others can spare it; whether it did.
    fn leave_out(&mut self, one: &Judged<'_>, reason: &str, now: Instant) -> bool {
        let Judged {
            upstream,
            endpoint,
            rule,
        } = one;
        if !endpoint.is_healthy() {
            return false;
        }
        let key = one.key();
        let (name, address) = (&upstream.name, endpoint.address);
        let metrics = self.registry.endpoint(name, &address.to_string());
        if !upstream.can_spare(endpoint, rule.share_percent_max) {
            endpoint.eject(false);
            metrics.spare();
            if self.ejections.spare(&key, rule, now) {
                log::warn!(
                    "not ejected, because too few would be left: upstream={name} endpoint={address} reason={reason:?}"
                );
            }
            return false;
        }
        let duration = self.ejections.eject(&key, rule, now);
        endpoint.eject(true);
        metrics.eject(true);
        log::warn!(
            "ejected: upstream={name} endpoint={address} reason={reason:?} for={duration:?}"
        );
        self.believe(upstream, endpoint);
        true
    }

    /// Endpoints whose time is over; whether there are any.
    fn take_in_again(&mut self, snapshot: &Snapshot, now: Instant) -> bool {
        let over: HashSet<Key> = self.ejections.over(now).into_iter().collect();
        if over.is_empty() {
            return false;
        }
        for one in judged(snapshot).filter(|one| over.contains(&one.key())) {
            self.readmit(one.upstream, one.endpoint);
        }
        true
    }

    /// A probe found that an endpoint lives again. Whoever died and came back needs no more time, but one whose probe was
    /// well all the while calls to it failed does.
    pub(super) fn revive(&mut self, upstream: &Upstream, endpoint: &Endpoint) {
        endpoint.welcome(now_ns());
        if self
            .ejections
            .end(&(upstream.name.clone(), endpoint.address))
        {
            self.readmit(upstream, endpoint);
        }
    }

    fn readmit(&self, upstream: &Upstream, endpoint: &Endpoint) {
        endpoint.eject(false);
        endpoint.welcome(now_ns());
        let (name, address) = (&upstream.name, endpoint.address);
        self.registry
            .endpoint(name, &address.to_string())
            .eject(false);
        log::info!("no more ejected: upstream={name} endpoint={address}");
        self.believe(upstream, endpoint);
    }

    /// What is believed of an endpoint has changed: it shows, and may change whether its upstream heeds health at all.
    pub(super) fn believe(&self, upstream: &Upstream, endpoint: &Endpoint) {
        self.registry
            .endpoint(&upstream.name, &endpoint.address.to_string())
            .believe(endpoint.is_healthy());
        if upstream.settle() {
            self.note_panic(upstream);
        }
    }

    fn note_panic(&self, upstream: &Upstream) {
        let (name, panics) = (&upstream.name, upstream.panics());
        self.registry.upstream(name).panic(panics);
        match panics {
            true => log::error!(
                "too few endpoints are healthy, so health is ignored: upstream={name} panic={}%",
                upstream.health.panic_percent
            ),
            false => log::info!("enough endpoints are healthy again: upstream={name}"),
        }
    }

    /// A snapshot comes into force after another one: what came with it begins slowly, and what is no more is forgotten.
    pub(super) fn adopt_health(&mut self, snapshot: &Snapshot) {
        for upstream in snapshot.upstreams.iter() {
            let mut before = self.snapshot.iter().flat_map(|before| &*before.upstreams);
            if let Some(before) = before.find(|before| before.name == upstream.name) {
                upstream.welcome(before, now_ns());
            }
            let has_rule = upstream.health.eject.is_some();
            for endpoint in &upstream.endpoints {
                if endpoint.is_ejected() && !has_rule {
                    self.readmit(upstream, endpoint);
                }
            }
            upstream.settle();
            if upstream.panics() != self.registry.upstream(&upstream.name).panics() {
                self.note_panic(upstream);
            }
        }
        let known: HashSet<Key> = judged(snapshot).map(|one| one.key()).collect();
        self.ejections.keep(|key| known.contains(key));
    }
}

/// How far endpoints that start slowly have come, in the order of the configuration.
fn steps(snapshot: &Snapshot, now_ns: u64) -> Vec<u32> {
    let slow = snapshot
        .upstreams
        .iter()
        .filter(|upstream| !upstream.health.slow_start.is_zero());
    let steps = slow.flat_map(|upstream| {
        let endpoints = upstream.endpoints.iter();
        endpoints.map(|endpoint| step(upstream.share(endpoint, now_ns)))
    });
    steps.collect()
}

/// A share of a weight, rounded to the steps in which rings follow it; at least one.
fn step(share: u32) -> u32 {
    (share * STEPS / SHARE_WHOLE).max(1)
}
