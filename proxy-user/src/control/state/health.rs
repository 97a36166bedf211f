//! Which endpoints are left out because calls to them failed, and how they come back.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Instant;

use super::Control;
use crate::config::{Config, Eject, Listener, ListenerMode, Via};
use crate::control::ejections::{Counts, Ejections, Key};
use crate::datapath::Writer;
use crate::offload::now_ns;
use crate::snapshot::Snapshot;
use crate::upstream::{Endpoint, Upstream};

/// An endpoint, and what its upstream says of calls that fail.
struct Judged<'s> {
    /// Of the upstream.
    index: usize,
    upstream: &'s Upstream,
    endpoint: &'s Endpoint,
    rule: &'s Eject,
}

impl Judged<'_> {
    fn key(&self) -> Key<'_> {
        (&self.upstream.name, self.endpoint.address)
    }
}

/// Endpoints whose upstream has a rule.
fn judged(snapshot: &Snapshot) -> impl Iterator<Item = Judged<'_>> {
    let upstreams = snapshot.upstreams.iter().enumerate();
    let with_rule = upstreams
        .filter_map(|(index, upstream)| Some((index, upstream, upstream.health.eject.as_ref()?)));
    with_rule.flat_map(|(index, upstream, rule)| {
        let endpoints = upstream.endpoints.iter();
        endpoints.map(move |endpoint| Judged {
            index,
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
        let ejected = failed.filter(|one| self.judge(one, now));
        let changed: BTreeSet<usize> = ejected.map(|one| one.index).collect();
        changed
            .into_iter()
            .for_each(|upstream| self.choose_endpoints(upstream));
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
            self.ejections.count_calls(one.key(), one.rule, calls, now);
            if self.judge(&one, now) {
                changed.insert(one.index);
            }
        }
        changed.append(&mut self.judge_flows(&snapshot, now));
        let steps = steps(&snapshot, now_ns());
        for (upstream, steps) in &steps {
            if self.steps.get(upstream) != Some(steps) {
                changed.insert(*upstream);
            }
        }
        self.steps = steps;
        changed
            .into_iter()
            .for_each(|upstream| self.choose_endpoints(upstream));
    }

    /// Judges endpoints by what became of the flows that NAT opened to them. Upstreams of which one was left out.
    fn judge_flows(&mut self, snapshot: &Snapshot, now: Instant) -> BTreeSet<usize> {
        let mut changed = BTreeSet::new();
        let signs = match self.datapath.as_ref().map(Writer::endpoint_signs) {
            Some(Ok(signs)) => signs,
            Some(Err(error)) => {
                log::error!("cannot read what became of flows: {error:#}");
                return changed;
            }
            None => return changed,
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
                .count_flows(one.key(), one.rule, since_ever, now);
            flows.push((one, lately));
        }
        let mut all = HashMap::<usize, Counts>::new();
        for (one, lately) in &flows {
            let sum = all.entry(one.index).or_default();
            sum.ended += lately.ended;
            sum.failed += lately.failed;
        }
        for (one, lately) in &flows {
            let all = all[&one.index];
            let others = Counts {
                ended: all.ended - lately.ended,
                failed: all.failed - lately.failed,
            };
            let reason = Ejections::flows_reason(*lately, others, one.rule);
            if reason.is_some_and(|reason| self.leave_out(one, &reason, now)) {
                changed.insert(one.index);
            }
        }
        changed
    }

    /// Leaves an endpoint out if calls to it failed in a way that its rule names; whether it did.
    fn judge(&mut self, one: &Judged<'_>, now: Instant) -> bool {
        let failures = one.endpoint.failures();
        let reason = self.ejections.reason(one.key(), one.rule, failures);
        reason.is_some_and(|reason| self.leave_out(one, &reason, now))
    }

    /// Leaves an endpoint out for this reason if the others can spare it; whether it did.
    fn leave_out(&mut self, one: &Judged<'_>, reason: &str, now: Instant) -> bool {
        let Judged {
            upstream,
            endpoint,
            rule,
            ..
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
            if self.ejections.spare(key, rule, now) {
                log::warn!(
                    "not ejected, because too few would be left: upstream={name} endpoint={address} reason={reason:?}"
                );
            }
            return false;
        }
        let duration = self.ejections.eject(key, rule, now);
        endpoint.eject(true);
        metrics.eject(true);
        log::warn!(
            "ejected: upstream={name} endpoint={address} reason={reason:?} for={duration:?}"
        );
        self.believe(upstream, endpoint);
        true
    }

    /// Takes in again whose time is over. Their upstreams.
    fn take_in_again(&mut self, snapshot: &Snapshot, now: Instant) -> BTreeSet<usize> {
        let over: HashSet<(String, SocketAddr)> = self.ejections.over(now).into_iter().collect();
        let mut changed = BTreeSet::new();
        if over.is_empty() {
            return changed;
        }
        for one in judged(snapshot) {
            if over.contains(&(one.upstream.name.clone(), one.endpoint.address)) {
                self.readmit(one.upstream, one.endpoint);
                changed.insert(one.index);
            }
        }
        changed
    }

    /// A probe found that an endpoint lives again: nothing is held against it that was before, for whoever died and came
    /// back is another. (One whose probe was well all the while calls to it failed stays out for its time.)
    pub(super) fn revive(&mut self, upstream: &Upstream, endpoint: &Endpoint) {
        endpoint.welcome(now_ns());
        match self.ejections.end((&upstream.name, endpoint.address)) {
            true => self.readmit(upstream, endpoint),
            false => endpoint.eject(false),
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

    /// A snapshot is about to come into force: what the one in force did not have begins slowly.
    pub(super) fn welcome(&self, snapshot: &Snapshot) {
        let before = self.snapshot.iter();
        let before: HashMap<&str, &Upstream> = before
            .flat_map(|before| before.upstreams.iter())
            .map(|upstream| (upstream.name.as_str(), upstream.as_ref()))
            .collect();
        for upstream in snapshot.upstreams.iter() {
            if let Some(before) = before.get(upstream.name.as_str()) {
                upstream.welcome(before, now_ns());
            }
        }
    }

    /// It comes into force: what is no more is forgotten.
    pub(super) fn adopt_all(&mut self, snapshot: &Snapshot) {
        let upstreams = snapshot.upstreams.iter();
        let names: HashSet<&str> = upstreams.map(|upstream| upstream.name.as_str()).collect();
        self.ejections.keep_upstreams(|name| names.contains(name));
        for upstream in snapshot.upstreams.iter() {
            self.adopt(upstream);
        }
    }

    /// The same for one upstream.
    pub(super) fn adopt(&mut self, upstream: &Upstream) {
        let endpoints = upstream.endpoints.iter();
        let known: HashSet<SocketAddr> = endpoints.map(|endpoint| endpoint.address).collect();
        self.ejections.keep(&upstream.name, &known);
        if upstream.health.eject.is_none() {
            let mut endpoints = upstream.endpoints.iter();
            while let Some(out) = endpoints.find(|endpoint| endpoint.is_ejected()) {
                self.readmit(upstream, out);
            }
            self.ejections.keep(&upstream.name, &HashSet::new());
        }
        upstream.settle();
        if upstream.panics() != self.registry.upstream(&upstream.name).panics() {
            self.note_panic(upstream);
        }
    }
}

/// How far endpoints have come, of each upstream where they start slowly.
fn steps(snapshot: &Snapshot, now_ns: u64) -> BTreeMap<usize, Vec<u32>> {
    let slow = snapshot
        .upstreams
        .iter()
        .enumerate()
        .filter(|(_, upstream)| !upstream.health.slow_start.is_zero());
    let steps = slow.map(|(index, upstream)| {
        let endpoints = upstream.endpoints.iter();
        let steps = endpoints.map(|endpoint| upstream.step(endpoint, now_ns));
        (index, steps.collect())
    });
    steps.collect()
}
