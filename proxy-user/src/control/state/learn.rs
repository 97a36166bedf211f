//! What control learns from workers, from probes and as time passes.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::Control;
use crate::config::PolicyKind;
use crate::control::WorkerThread;
use crate::control::offences::Judgement;
use crate::control::probes::Answer;
use crate::datapath::Writer;
use crate::report::Report;

impl Control {
    /// What workers told.
    pub fn learn(&mut self, reports: Vec<Report>) {
        let now = Instant::now();
        let mut failed = HashSet::new();
        for report in reports {
            match report {
                Report::Offence {
                    source,
                    generation,
                    policy,
                } => self.offence(source, generation, policy, now),
                Report::Identity { source, consumer } => {
                    self.offences.identity(source, consumer, now)
                }
                Report::EndpointFailed { address } => drop(failed.insert(address)),
            }
        }
        if !failed.is_empty() {
            self.failed(&failed);
        }
    }

    fn offence(&mut self, source: IpAddr, generation: u64, policy: usize, now: Instant) {
        let Some(snapshot) = self
            .snapshot
            .as_ref()
            .filter(|snapshot| snapshot.generation == generation)
        else {
            return;
        };
        let Some(policy) = snapshot.config.policies.get(policy) else {
            return;
        };
        let PolicyKind::RateLimit(limit) = &policy.kind else {
            return;
        };
        let Some(ban) = limit.ban else { return };
        let rule = policy.name.clone();
        let rule_id = snapshot
            .config
            .policies
            .iter()
            .position(|one| one.name == rule)
            .unwrap_or(0) as u32;
        let identities = snapshot.tunables.guard.ban_identities as usize;
        match self.offences.offence(source, rule_id, ban, identities, now) {
            Judgement::Wait => {}
            Judgement::Spare => {
                self.registry.control.bans_spared.fetch_add(1, Relaxed);
                log::info!(
                    "not banned, because many users stand behind it: source={source} rule={rule}"
                );
            }
            Judgement::Ban => {
                match self
                    .bans
                    .add(self.datapath.as_mut(), source, &rule, ban.duration)
                {
                    Ok(()) => {
                        self.registry.control.bans_issued.fetch_add(1, Relaxed);
                        log::info!("banned: source={source} rule={rule} for={:?}", ban.duration);
                        self.close_denied();
                    }
                    Err(error) => log::warn!("cannot ban: source={source} rule={rule}: {error:#}"),
                }
            }
        }
    }

    /// Open connections of a banned source would hang: their packets do not come any more.
    pub(super) fn close_denied(&self) {
        self.workers.iter().for_each(WorkerThread::close_denied);
    }

    /// An endpoint answered, or did not.
    pub fn probed(&mut self, answer: &Answer) {
        let Some(snapshot) = self.snapshot.clone() else {
            return;
        };
        let Some(index) = snapshot
            .config
            .upstreams
            .iter()
            .position(|upstream| upstream.name == answer.upstream)
        else {
            return;
        };
        let Some(probe) = &snapshot.config.upstreams[index].probe else {
            return;
        };
        let upstream = &snapshot.upstreams[index];
        let Some(endpoint) = upstream.find(answer.address) else {
            return;
        };
        let Some(belief) = endpoint
            .health()
            .record(answer.good, probe.rise, probe.fall)
        else {
            return;
        };
        if belief.is_healthy {
            self.revive(upstream, endpoint);
        }
        self.believe(upstream, endpoint);
        let (upstream, address) = (&answer.upstream, answer.address);
        match belief.is_healthy {
            true => log::info!("healthy again: upstream={upstream} endpoint={address}"),
            false => log::warn!(
                "unhealthy: upstream={upstream} endpoint={address} reason={:?}",
                answer.reason
            ),
        }
        self.choose_endpoints(index);
    }

    /// Lets the kernel half forward to the endpoints of an upstream, by its index, that are healthy and reached now.
    pub(super) fn choose_endpoints(&mut self, upstream: usize) {
        let (Some(datapath), Some(snapshot)) = (&mut self.datapath, &self.snapshot) else {
            return;
        };
        if let Err(error) = datapath.change(snapshot, upstream) {
            log::error!("a ring keeps its endpoints: {error:#}");
        }
    }

    /// The same of all upstreams that have an endpoint of one of these addresses.
    pub(super) fn choose_where_moved(&mut self, moved: &HashSet<IpAddr>) {
        let Some(snapshot) = self.snapshot.clone().filter(|_| !moved.is_empty()) else {
            return;
        };
        for (index, upstream) in snapshot.upstreams.iter().enumerate() {
            let mut endpoints = upstream.endpoints.iter();
            if endpoints.any(|endpoint| moved.contains(&endpoint.address.ip())) {
                self.choose_endpoints(index);
            }
        }
    }

    /// Tells once when an interface is lost, and once when it is back.
    fn look_for_lost(&mut self) {
        let Some(datapath) = &mut self.datapath else {
            return;
        };
        match datapath.lost(&self.start.interfaces) {
            Ok(lost) if lost == self.lost => {}
            Ok(lost) => {
                for name in lost.iter().filter(|name| !self.lost.contains(name)) {
                    log::error!(
                        "the kernel half is not attached any more: interface={name}; if the interface went, it is attached again when \
                         it comes back, and if somebody took the program away, after a restart"
                    );
                }
                self.lost = lost;
            }
            Err(error) => log::error!("cannot look after the interfaces: {error:#}"),
        }
    }

    /// Once a second.
    pub fn housekeeping(&mut self) {
        if let Err(error) = self.bans.sweep(self.datapath.as_mut()) {
            log::error!("cannot end bans that are over: {error:#}");
        }
        self.remember();
        self.look_for_lost();
        self.look_after_endpoints();
        match self.datapath.as_mut().map(Writer::refresh_neighbours) {
            Some(Ok(moved)) => self.choose_where_moved(&moved),
            Some(Err(error)) => log::error!("cannot refresh neighbours: {error:#}"),
            None => {}
        }
    }
}
