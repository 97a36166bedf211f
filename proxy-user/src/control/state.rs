//! What control holds, and each thing that can happen to it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc as sync_mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot};

use super::bans::{Bans, OPERATOR};
use super::configuration::load;
use super::message::{Apply, Memory, Start, ToKeeper};
use super::offences::{Judgement, Offences};
use super::probes::{Answer as Probed, Probes};
use super::request::{Request, SysctlRequest};
use super::{WorkerThread, channel, net_settings};
use crate::config::{Config, Diagnostic, ListenerMode, Loaded, PolicyKind};
use crate::datapath::Writer;
use crate::metric::{Outside, Registry};
use crate::offload::{Cells, Denied};
use crate::report::{self, Report};
use crate::snapshot::Snapshot;
use crate::tunable::{self, Answer, Origin, Tunables};
use crate::{net, tls, worker};

/// How long workers may take to close everything when told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// The daemon's state.
pub struct Control {
    channel: Arc<UnixStream>,
    start: Start,
    started: SystemTime,
    registry: Arc<Registry>,
    cells: Arc<Cells>,
    denied: Arc<Denied>,
    reports: report::Queue,
    datapath: Option<Writer>,
    bans: Bans,
    offences: Offences,
    workers: Vec<WorkerThread>,
    probes: Option<Probes>,
    /// The generation in force.
    snapshot: Option<Arc<Snapshot>>,
    certificates: Vec<([String; 2], i64)>,
    remembered: Memory,
    reloads: Vec<oneshot::Sender<Result<u64, Vec<Diagnostic>>>>,
    /// When workers must have ended, once they were told to.
    ending: Option<Instant>,
}

impl Control {
    /// # Errors
    /// The bans in the kernel cannot be read.
    pub fn new(
        channel: Arc<UnixStream>,
        start: Start,
        registry: Arc<Registry>,
        cells: Arc<Cells>,
        denied: Arc<Denied>,
        reports: report::Queue,
        datapath: Option<Writer>,
    ) -> Result<Self> {
        registry.control.daemon_restarts.store(start.restarts, Relaxed);
        Ok(Self {
            bans: Bans::adopt(Arc::clone(&denied), datapath.as_ref()).context("read the bans")?,
            channel,
            remembered: start.memory.clone(),
            start,
            started: SystemTime::now(),
            registry,
            cells,
            denied,
            reports,
            datapath,
            offences: Offences::default(),
            workers: Vec::new(),
            probes: None,
            snapshot: None,
            certificates: Vec::new(),
            reloads: Vec::new(),
            ending: None,
        })
    }

    /// The channel to the keeper.
    pub fn channel(&self) -> Arc<UnixStream> {
        Arc::clone(&self.channel)
    }

    /// Where answers to probes shall go.
    pub fn start_probes(&mut self, answers: mpsc::Sender<Probed>) {
        self.probes = Some(Probes::new(answers, Arc::clone(&self.registry)));
    }

    /// Makes a generation the one in force, or says why not: nothing is half-applied.
    ///
    /// # Errors
    /// The keeper cannot be told, or a worker cannot be started.
    pub fn apply(&mut self, apply: Apply, sockets: Vec<OwnedFd>) -> Result<()> {
        let generation = apply.generation;
        match self.prepare(&apply) {
            Ok(snapshot) => {
                self.enforce(snapshot, &apply, sockets)?;
                self.registry.control.generation.store(generation, Relaxed);
                self.registry.control.last_reload_success.store(true, Relaxed);
                self.remember();
                self.say(&ToKeeper::Applied { generation })?;
                for reload in self.reloads.drain(..) {
                    let _ = reload.send(Ok(generation));
                }
            }
            Err(diagnostics) => {
                self.say(&ToKeeper::Refused { generation, diagnostics: diagnostics.clone() })?;
                self.not_applied(diagnostics);
            }
        }
        Ok(())
    }

    /// Everything that can be refused, without a change to anything that is seen from outside but the maps, last.
    fn prepare(&mut self, apply: &Apply) -> Result<Arc<Snapshot>, Vec<Diagnostic>> {
        let loaded = load(&apply.bundle, &apply.main, &apply.flags)?;
        let Loaded { config, mut tunables, .. } = loaded;
        match &self.snapshot {
            Some(running) => {
                tunables.keep_runtime(&running.tunables);
                for key in tunables.keep_until_restart(&running.tunables) {
                    log::warn!("{key} has a new value that waits for the next start");
                }
            }
            None => restore_runtime(&mut tunables, &self.start.memory.runtime),
        }
        let certificates = certificates(&config);
        let loaded = Loaded { config, tunables: tunables.clone(), warnings: Vec::new() };
        let workers = self.start.cpus.len();
        let previous = self.snapshot.as_deref();
        let snapshot =
            Snapshot::build(apply.generation, loaded, Arc::new(tunables), previous, workers, &self.registry)?;
        if let Some(datapath) = &mut self.datapath {
            let healthy = |upstream, address| is_healthy(&snapshot, upstream, address);
            datapath
                .apply(&snapshot.config, &snapshot.tunables, healthy)
                .map_err(|error| vec![Diagnostic::error(format!("{error:#}")).at(&snapshot.config.datapath.at)])?;
        }
        self.certificates = certificates;
        Ok(Arc::new(snapshot))
    }

    /// Workers and probes go over to a snapshot; the first one starts the workers.
    fn enforce(&mut self, snapshot: Arc<Snapshot>, apply: &Apply, sockets: Vec<OwnedFd>) -> Result<()> {
        while self.workers.len() < self.start.cpus.len() {
            let worker = self.start_worker(self.workers.len(), &snapshot.tunables)?;
            self.workers.push(worker);
        }
        let mut given: Vec<Vec<(usize, OwnedFd)>> = self.workers.iter().map(|_| Vec::new()).collect();
        for (socket, descriptor) in apply.sockets.iter().zip(sockets) {
            let listener = listener_at(&snapshot.config, socket.address);
            if let (Some(listener), Some(of_worker)) = (listener, given.get_mut(socket.worker)) {
                of_worker.push((listener, descriptor));
            }
        }
        for (worker, listeners) in self.workers.iter().zip(given) {
            let snapshot = Arc::clone(&snapshot);
            worker.tell(worker::Command::Apply { snapshot, listeners, close: apply.closed.clone() });
        }
        if let Some(probes) = &mut self.probes {
            let upstreams = snapshot.config.upstreams.iter();
            let wanted = upstreams.filter_map(|upstream| Some((upstream, upstream.probe.clone()?))).flat_map(
                |(upstream, probe)| {
                    let endpoints = upstream.endpoints.iter();
                    endpoints.map(move |endpoint| (upstream.name.clone(), endpoint.address, probe.clone()))
                },
            );
            probes.set(wanted);
        }
        self.snapshot = Some(snapshot);
        Ok(())
    }

    fn start_worker(&self, index: usize, tunables: &Tunables) -> Result<WorkerThread> {
        let (commands, receiver) = sync_mpsc::channel();
        let doorbell = net::Doorbell::new().context("make a doorbell")?;
        let metrics = self.registry.worker(index);
        let thread = worker::start(
            index,
            self.start.cpus[index],
            net_settings(tunables),
            worker::Shared {
                commands: receiver,
                doorbell: doorbell.clone(),
                reports: self.reports.sender(Arc::clone(&metrics)),
                cells: Arc::clone(&self.cells),
                denied: Arc::clone(&self.denied),
                metrics,
            },
        )
        .with_context(|| format!("start worker {index}"))?;
        Ok(WorkerThread { commands, doorbell, thread })
    }

    /// A reload came to nothing; the generation in force goes on.
    pub fn not_applied(&mut self, diagnostics: Vec<Diagnostic>) {
        self.registry.control.last_reload_success.store(false, Relaxed);
        self.registry.control.reloads_refused.fetch_add(1, Relaxed);
        for reload in self.reloads.drain(..) {
            let _ = reload.send(Err(diagnostics.clone()));
        }
    }

    /// Exchanges may end, nothing new begins.
    pub fn drain(&mut self) {
        let timeout = self.snapshot.as_ref().map_or(Duration::ZERO, |snapshot| snapshot.tunables.worker.drain_timeout);
        let deadline = Instant::now() + timeout;
        for worker in &self.workers {
            worker.tell(worker::Command::Drain { deadline });
        }
        self.ending = Some(deadline + STOP_TIMEOUT);
    }

    /// Everything ends now.
    pub fn stop(&mut self) {
        for worker in &self.workers {
            worker.tell(worker::Command::Stop);
        }
        self.ending = Some(Instant::now() + STOP_TIMEOUT);
    }

    /// Whether it is time to go: all workers have ended, or one has that should not.
    ///
    /// # Errors
    /// A worker is dead: a daemon with a dead worker leaves a part of its connections unanswered, the next one does not.
    pub fn look_after_workers(&mut self) -> Result<Option<ExitCode>> {
        let ended = self.workers.iter().filter(|worker| worker.thread.is_finished()).count();
        match self.ending {
            Some(_) if ended == self.workers.len() => Ok(Some(ExitCode::SUCCESS)),
            Some(deadline) if Instant::now() >= deadline => {
                log::warn!("workers did not end in time; what they served is cut off");
                Ok(Some(ExitCode::SUCCESS))
            }
            None if ended > 0 => anyhow::bail!("{ended} of {} workers died", self.workers.len()),
            _ => Ok(None),
        }
    }

    /// What workers told since the last time.
    pub fn read_reports(&mut self, reports: &sync_mpsc::Receiver<Report>) {
        let now = Instant::now();
        // As many as the queue holds; the rest waits, so that a flood does not keep us here.
        for report in reports.try_iter().take(report::QUEUE_MAX) {
            match report {
                Report::Offence { source, generation, policy } => self.offence(source, generation, policy, now),
                Report::Identity { source, consumer } => self.offences.identity(source, consumer, now),
                // Workers themselves leave such an endpoint out for a while; belief is the probes' matter.
                Report::EndpointFailed { .. } => {}
            }
        }
    }

    fn offence(&mut self, source: std::net::IpAddr, generation: u64, policy: usize, now: Instant) {
        let Some(snapshot) = self.snapshot.as_ref().filter(|snapshot| snapshot.generation == generation) else { return };
        let Some(policy) = snapshot.config.policies.get(policy) else { return };
        let PolicyKind::RateLimit(limit) = &policy.kind else { return };
        let Some(ban) = limit.ban else { return };
        let rule = policy.name.clone();
        let rule_id = snapshot.config.policies.iter().position(|one| one.name == rule).unwrap_or(0) as u32;
        let identities = snapshot.tunables.guard.ban_identities as usize;
        match self.offences.offence(source, rule_id, ban, identities, now) {
            Judgement::Wait => {}
            Judgement::Spare => {
                self.registry.control.bans_spared.fetch_add(1, Relaxed);
                log::info!("not banned, because many users stand behind it: source={source} rule={rule}");
            }
            Judgement::Ban => match self.bans.add(self.datapath.as_mut(), source, &rule, ban.duration) {
                Ok(()) => {
                    self.registry.control.bans_issued.fetch_add(1, Relaxed);
                    log::info!("banned: source={source} rule={rule} for={:?}", ban.duration);
                    self.close_source(source);
                }
                Err(error) => log::warn!("cannot ban: source={source} rule={rule}: {error:#}"),
            },
        }
    }

    /// Open connections of a banned source would hang: their packets do not come any more.
    fn close_source(&self, source: std::net::IpAddr) {
        for worker in &self.workers {
            worker.tell(worker::Command::CloseSource(source));
        }
    }

    /// An endpoint answered, or did not.
    pub fn probed(&mut self, answer: &Probed) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        let Some(index) = snapshot.config.upstreams.iter().position(|upstream| upstream.name == answer.upstream) else {
            return;
        };
        let Some(probe) = &snapshot.config.upstreams[index].probe else { return };
        let endpoints = snapshot.upstreams.get(index).map(|upstream| &upstream.endpoints[..]).unwrap_or_default();
        let Some(endpoint) = endpoints.iter().find(|endpoint| endpoint.address == answer.address) else { return };
        let Some(belief) = endpoint.health().record(answer.good, probe.rise, probe.fall) else { return };
        let (upstream, address) = (&answer.upstream, answer.address);
        self.registry.endpoint(upstream, &address.to_string()).believe(belief.is_healthy);
        match belief.is_healthy {
            true => log::info!("healthy again: upstream={upstream} endpoint={address}"),
            false => log::warn!("unhealthy: upstream={upstream} endpoint={address} reason={:?}", answer.reason),
        }
        if let Some(datapath) = &mut self.datapath {
            let healthy = |upstream, address| is_healthy(&snapshot, upstream, address);
            if let Err(error) = datapath.apply(&snapshot.config, &snapshot.tunables, healthy) {
                log::error!("the rings keep their endpoints: {error:#}");
            }
        }
    }

    /// Once a second.
    pub fn housekeeping(&mut self) {
        if let Err(error) = self.bans.sweep(self.datapath.as_mut()) {
            log::error!("cannot end bans that are over: {error:#}");
        }
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.refresh_neighbours()
        {
            log::error!("cannot refresh neighbours: {error:#}");
        }
    }

    /// Answers one question. Whoever asked may be gone; that is no fault.
    pub fn answer(&mut self, request: Request) {
        match request {
            Request::Status(way_back) => drop(way_back.send(self.status())),
            Request::Metrics(way_back) => drop(way_back.send(self.metrics())),
            Request::Sysctl(request, way_back) => drop(way_back.send(self.sysctl(&request))),
            Request::Bans(way_back) => drop(way_back.send(self.bans.list(self.datapath.as_ref()))),
            Request::Ban(source, duration, way_back) => {
                let banned = self.bans.add(self.datapath.as_mut(), source, OPERATOR, duration);
                if banned.is_ok() {
                    log::info!("banned: source={source} rule={OPERATOR} for={duration:?}");
                    self.close_source(source);
                }
                let _ = way_back.send(banned.map_err(|error| format!("{error:#}")));
            }
            Request::Unban(source, way_back) => {
                let lifted = self.bans.remove(self.datapath.as_mut(), source);
                let _ = way_back.send(lifted.map_err(|error| format!("{error:#}")));
            }
            Request::Reload(way_back) => match self.say(&ToKeeper::Reload) {
                Ok(()) => self.reloads.push(way_back),
                Err(error) => drop(way_back.send(Err(vec![Diagnostic::error(format!("{error:#}"))]))),
            },
            Request::Limits(way_back) => {
                let tunables = self.tunables();
                let limits = (tunables.admin.request_bytes_max, tunables.admin.request_timeout);
                let _ = way_back.send(limits);
            }
        }
    }

    fn tunables(&self) -> Arc<Tunables> {
        self.snapshot.as_ref().map_or_else(Arc::default, |snapshot| Arc::clone(&snapshot.tunables))
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
        let Some(snapshot) = &self.snapshot else { return };
        if *snapshot.tunables == tunables {
            return;
        }
        for line in changed_lines(&snapshot.tunables, &tunables) {
            log::info!("tunable set at run time: {line}");
        }
        let snapshot = Arc::new(snapshot.with_tunables(Arc::new(tunables)));
        for worker in &self.workers {
            let snapshot = Arc::clone(&snapshot);
            worker.tell(worker::Command::Apply { snapshot, listeners: Vec::new(), close: Vec::new() });
        }
        if let Some(datapath) = &mut self.datapath {
            let healthy = |upstream, address| is_healthy(&snapshot, upstream, address);
            if let Err(error) = datapath.apply(&snapshot.config, &snapshot.tunables, healthy) {
                log::error!("the kernel half keeps its limits: {error:#}");
            }
        }
        self.snapshot = Some(snapshot);
        self.remember();
    }

    /// Tells the keeper what the next daemon should know.
    fn remember(&mut self) {
        let tunables = self.tunables();
        let at_run_time = tunables.iter().filter(|(_, _, origin)| **origin == Origin::Runtime);
        let runtime = at_run_time.map(|(tunable, value, _)| (tunable.key.to_owned(), value)).collect();
        let names = self.datapath.as_ref().map(|datapath| datapath.names().clone()).unwrap_or_default();
        let memory = Memory { names, runtime };
        if memory != self.remembered && self.say(&ToKeeper::Remember(memory.clone())).is_ok() {
            self.remembered = memory;
        }
    }

    fn metrics(&mut self) -> String {
        let mut outside = Outside {
            bans: Some(self.bans.count()),
            certificates: self.certificates.clone(),
            start_time_seconds: self.started.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            ..Outside::default()
        };
        if let Some(datapath) = &mut self.datapath {
            match datapath.counts() {
                Ok(counts) => {
                    outside.verdicts = counts.verdicts;
                    outside.listener_traffic = counts.listeners;
                    outside.flow_entries = Some(counts.flows);
                    outside.rule_drops = counts.rule_drops;
                    let upstreams = self.snapshot.iter().flat_map(|snapshot| &snapshot.config.upstreams);
                    for upstream in upstreams {
                        for endpoint in &upstream.endpoints {
                            let Some((packets, bytes)) = counts.endpoints.get(&endpoint.address) else { continue };
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

    fn status(&mut self) -> super::status::Status {
        let flows = self.datapath.as_mut().and_then(|datapath| datapath.counts().ok()).map(|counts| counts.flows);
        let resolved = self.datapath.as_ref().map(Writer::resolved);
        let facts = super::status::Facts {
            start: &self.start,
            snapshot: self.snapshot.as_deref(),
            registry: &self.registry,
            uptime: self.started.elapsed().unwrap_or_default(),
            bans: self.bans.count(),
            flows,
            resolved,
        };
        facts.status()
    }

    fn say(&self, message: &ToKeeper) -> Result<()> {
        channel::send(&self.channel, message, &[]).context("write to the keeper")
    }
}

fn is_healthy(snapshot: &Snapshot, upstream: usize, address: SocketAddr) -> bool {
    let endpoints = snapshot.upstreams.get(upstream).map(|upstream| &upstream.endpoints[..]).unwrap_or_default();
    endpoints.iter().find(|endpoint| endpoint.address == address).is_none_or(|endpoint| endpoint.health().is_healthy())
}

fn listener_at(config: &Config, address: SocketAddr) -> Option<usize> {
    config.listeners.iter().position(|listener| listener.addresses.iter().any(|listened| listened.socket == address))
}

/// What was set at run time under the daemon before. A key that this version does not know is forgotten.
fn restore_runtime(tunables: &mut Tunables, runtime: &[(String, String)]) {
    for (key, value) in runtime {
        if let Err(error) = tunables.assign(key, value, Origin::Runtime) {
            log::warn!("set at run time, and lost now: {error}");
        }
    }
}

fn changed_lines(before: &Tunables, after: &Tunables) -> Vec<String> {
    let pairs = before.iter().zip(after.iter());
    let changed = pairs.filter(|((_, before, _), (_, after, _))| before != after);
    changed.map(|((tunable, before, _), (_, after, _))| format!("{}={after} (it was {before})", tunable.key)).collect()
}

/// Listener, file and end of validity of each certificate.
fn certificates(config: &Config) -> Vec<([String; 2], i64)> {
    let mut ends = Vec::new();
    for listener in &config.listeners {
        let ListenerMode::Serve { tls: Some(listener_tls) } = &listener.mode else { continue };
        for pem in &listener_tls.certificates {
            if let Ok(certificate) = tls::Certificate::parse(&pem.chain, &pem.key) {
                ends.push(([listener.name.clone(), pem.path.display().to_string()], certificate.not_after_s()));
            }
        }
    }
    ends
}
