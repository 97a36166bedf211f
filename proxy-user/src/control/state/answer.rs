//! Answers to what the admin socket asks, and the changes that are asked for there.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::Control;
use crate::config::Diagnostic;
use crate::control::bans::OPERATOR;
use crate::control::message::ToKeeper;
use crate::control::names::Names;
use crate::control::request::{Request, SysctlRequest};
use crate::control::status::{Facts, Status};
use crate::datapath::Writer;
use crate::metric::{Outside, Waiting};
use crate::tunable::{self, Answer, Origin, Tunables};
use crate::upstream::Upstream;
use crate::worker;

impl Control {
    /// Answers one question, or does so as soon as the generation is in force that is about to be: a change to the one before
    /// would be lost.
    pub fn take(&mut self, request: Request) {
        match self.is_applying() && request.changes_snapshot() {
            true => self.deferred.push(request),
            false => self.answer(request),
        }
    }

    /// Answers one question. Whoever asked may be gone; that is no fault.
    pub(super) fn answer(&mut self, request: Request) {
        match request {
            Request::Status(way_back) => drop(way_back.send(self.status())),
            Request::Metrics(way_back) => drop(way_back.send(self.metrics())),
            Request::Sysctl(request, way_back) => drop(way_back.send(self.sysctl(&request))),
            Request::Bans(way_back) => drop(way_back.send(self.bans.list(self.datapath.as_ref()))),
            Request::Ban(source, duration, way_back) => {
                let banned = self
                    .bans
                    .add(self.datapath.as_mut(), source, OPERATOR, duration);
                if banned.is_ok() {
                    log::info!("banned: source={source} rule={OPERATOR} for={duration:?}");
                    self.close_denied();
                    self.remember();
                }
                let _ = way_back.send(banned.map_err(|error| format!("{error:#}")));
            }
            Request::Unban(source, way_back) => {
                let lifted = self.bans.remove(self.datapath.as_mut(), source);
                let _ = way_back.send(lifted.map_err(|error| format!("{error:#}")));
            }
            Request::Reload(way_back) => {
                let asked = self.reloads.add(way_back);
                if let Err(error) = self.say(&ToKeeper::Reload { asked }) {
                    let diagnostic = Diagnostic::error(format!("{error:#}"));
                    self.reloads.answer(asked, &Err(vec![diagnostic]));
                }
            }
            Request::Endpoint(request, arrived, way_back) => {
                let _ = way_back.send(self.change_endpoint(&request, arrived));
            }
            Request::Limits(way_back) => {
                let tunables = self.tunables();
                let limits = (
                    tunables.admin.request_bytes_max,
                    tunables.admin.request_timeout,
                );
                let _ = way_back.send(limits);
            }
        }
    }

    pub(super) fn tunables(&self) -> Arc<Tunables> {
        self.snapshot
            .as_ref()
            .map_or_else(Arc::default, |snapshot| Arc::clone(&snapshot.tunables))
    }

    fn sysctl(&mut self, request: &SysctlRequest) -> Answer {
        let (assignments, form) = match request {
            SysctlRequest::Query(query) => return tunable::render(&self.tunables(), query),
            SysctlRequest::Write { assignments, form } => (assignments, *form),
        };
        let mut tunables = (*self.tunables()).clone();
        let mut parsed = Vec::new();
        let mut errors = Vec::new();
        for text in assignments {
            match tunable::parse_assignment(text, Origin::Runtime) {
                Ok(assignment) => parsed.push(assignment),
                Err(error) => errors.push(error),
            }
        }
        let mut answer = tunable::write(&mut tunables, &parsed, form);
        errors.append(&mut answer.errors);
        answer.errors = errors;
        self.change_tunables(tunables);
        answer
    }

    /// The same generation with other values.
    fn change_tunables(&mut self, tunables: Tunables) {
        let Some(snapshot) = &self.snapshot else {
            return;
        };
        if *snapshot.tunables == tunables {
            return;
        }
        for line in changed_lines(&snapshot.tunables, &tunables) {
            log::info!("tunable set at run time: {line}");
        }
        let snapshot = Arc::new(snapshot.with_tunables(Arc::new(tunables)));
        for worker in &self.workers {
            let snapshot = Arc::clone(&snapshot);
            worker.tell(worker::Command::Apply {
                snapshot,
                listeners: Vec::new(),
                close: Vec::new(),
            });
        }
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.apply(&snapshot)
        {
            log::error!("the kernel half keeps its limits: {error:#}");
        }
        if let Some(names) = &mut self.names {
            names.behave(&snapshot.config.resolver, &snapshot.tunables);
        }
        self.snapshot = Some(snapshot);
        self.remember();
    }

    fn metrics(&mut self) -> String {
        let mut outside = Outside {
            backend: self.net.backend.name(),
            bans: Some(self.bans.count()),
            certificates: self.certificates.clone(),
            names: self.names.as_ref().map(Names::facts).unwrap_or_default(),
            start_time_seconds: self
                .started
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            ..Outside::default()
        };
        for upstream in self
            .snapshot
            .iter()
            .flat_map(|snapshot| &*snapshot.upstreams)
        {
            let active = upstream.endpoints.iter().map(|endpoint| {
                let labels = [upstream.name.clone(), endpoint.address.to_string()];
                (labels, endpoint.active())
            });
            outside.calls_active.extend(active);
            outside.queues.extend(waiting(upstream));
        }
        let interfaces = self.start.interfaces.iter();
        outside.attached = interfaces
            .map(|interface| (interface.name.clone(), !self.lost.contains(&interface.name)))
            .collect();
        let upstreams = self
            .snapshot
            .iter()
            .flat_map(|snapshot| &*snapshot.upstreams);
        outside.breakers = upstreams
            .filter_map(|upstream| Some((upstream, upstream.breaker()?)))
            .map(|(upstream, breaker)| (upstream.name.clone(), breaker.is_open(), breaker.opened()))
            .collect();
        if let Some(datapath) = &mut self.datapath {
            match datapath.counts() {
                Ok(counts) => {
                    outside.verdicts = counts.verdicts;
                    outside.listener_traffic = counts.listeners;
                    outside.flow_entries = Some(counts.flows);
                    outside.slots_shared = Some(counts.slots_shared);
                    outside.rule_drops = counts.rule_drops;
                    let upstreams = self
                        .snapshot
                        .iter()
                        .flat_map(|snapshot| snapshot.upstreams.iter());
                    for upstream in upstreams {
                        for endpoint in &upstream.endpoints {
                            let Some((packets, bytes)) = counts.endpoints.get(&endpoint.address)
                            else {
                                continue;
                            };
                            let labels = [upstream.name.clone(), endpoint.address.to_string()];
                            outside.endpoint_traffic.push((labels, *packets, *bytes));
                        }
                    }
                }
                Err(error) => log::error!("cannot read the kernel half's counters: {error:#}"),
            }
        }
        self.registry.text(outside)
    }

    fn status(&mut self) -> Status {
        let flows = self
            .datapath
            .as_mut()
            .and_then(|datapath| datapath.counts().ok())
            .map(|counts| counts.flows);
        let resolved = self.datapath.as_ref().map(Writer::resolved);
        let facts = Facts {
            start: &self.start,
            net: &self.net,
            snapshot: self.snapshot.as_deref(),
            changes: &self.changes,
            registry: &self.registry,
            uptime: self.started.elapsed().unwrap_or_default(),
            bans: self.bans.count(),
            flows,
            lost: &self.lost,
            resolved,
            ejections: &self.ejections,
            names: self.names.as_ref(),
        };
        facts.status()
    }
}

/// What is told of an upstream's queue, where it has one.
fn waiting(upstream: &Upstream) -> Option<Waiting> {
    let facts = upstream.has_limits().then(|| upstream.queue().facts())?;
    Some(Waiting {
        upstream: upstream.name.clone(),
        pending: facts.pending.into(),
        queued: facts.queued,
        full: facts.full,
        late: facts.late,
        waited_us: facts.waited_us,
    })
}

fn changed_lines(before: &Tunables, after: &Tunables) -> Vec<String> {
    let pairs = before.iter().zip(after.iter());
    let changed = pairs.filter(|((_, before, _), (_, after, _))| before != after);
    changed
        .map(|((tunable, before, _), (_, after, _))| {
            format!("{}={after} (it was {before})", tunable.key)
        })
        .collect()
}
