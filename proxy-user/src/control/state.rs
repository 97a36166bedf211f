//! What control holds, and each thing that can happen to it.

mod answer;
mod learn;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc as sync_mpsc};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot};

use super::access_log::AccessLog;
use super::bans::Bans;
use super::configuration::load;
use super::message::{Apply, Memory, Start, ToKeeper};
use super::offences::Offences;
use super::probes::{Answer as Probed, Probes};
use super::{WorkerThread, channel, net_settings};
use crate::config::{Config, Diagnostic, ListenerMode, Loaded};
use crate::datapath::{Interface, Writer};
use crate::file::Carrier;
use crate::metric::Registry;
use crate::offload::{Cells, Denied};
use crate::report::{self};
use crate::snapshot::Snapshot;
use crate::tunable::{Origin, Tunables};
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
    access_log: Option<AccessLog>,
    datapath: Option<Writer>,
    bans: Bans,
    offences: Offences,
    workers: Vec<WorkerThread>,
    probes: Option<Probes>,
    /// The generation in force.
    snapshot: Option<Arc<Snapshot>>,
    certificates: Vec<([String; 2], i64)>,
    remembered: Memory,
    /// Interfaces that the kernel half has lost.
    lost: Vec<String>,
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
        registry
            .control
            .daemon_restarts
            .store(start.restarts, Relaxed);
        Ok(Self {
            bans: Bans::adopt(Arc::clone(&denied), datapath.as_ref(), &start.memory.bans)
                .context("read the bans")?,
            channel,
            remembered: start.memory.clone(),
            lost: Vec::new(),
            start,
            started: SystemTime::now(),
            registry,
            cells,
            denied,
            reports,
            access_log: None,
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
                self.registry
                    .control
                    .last_reload_success
                    .store(true, Relaxed);
                self.remember();
                self.say(&ToKeeper::Applied { generation })?;
                for reload in self.reloads.drain(..) {
                    let _ = reload.send(Ok(generation));
                }
            }
            Err(diagnostics) => {
                self.say(&ToKeeper::Refused {
                    generation,
                    diagnostics: diagnostics.clone(),
                })?;
                self.not_applied(diagnostics);
            }
        }
        Ok(())
    }

    /// Everything that can be refused, without a change to anything that is seen from outside but the maps, last.
    fn prepare(&mut self, apply: &Apply) -> Result<Arc<Snapshot>, Vec<Diagnostic>> {
        let loaded = load(&apply.bundle, &apply.main, &apply.flags)?;
        let Loaded {
            config,
            mut tunables,
            ..
        } = loaded;
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
        let loaded = Loaded {
            config,
            tunables: tunables.clone(),
            warnings: Vec::new(),
        };
        let workers = self.start.cpus.len();
        let previous = self.snapshot.as_deref();
        let snapshot = Snapshot::build(
            apply.generation,
            loaded,
            Arc::new(tunables),
            previous,
            workers,
            &self.registry,
            self.start.cells_seed,
        )?;
        if let Some(datapath) = &mut self.datapath {
            let healthy = |upstream, address| is_healthy(&snapshot, upstream, address);
            datapath
                .apply(&snapshot.config, &snapshot.tunables, healthy)
                .map_err(|error| {
                    vec![Diagnostic::error(format!("{error:#}")).at(&snapshot.config.datapath.at)]
                })?;
        }
        self.certificates = certificates;
        Ok(Arc::new(snapshot))
    }

    /// Workers and probes go over to a snapshot; the first one starts the workers.
    fn enforce(
        &mut self,
        snapshot: Arc<Snapshot>,
        apply: &Apply,
        sockets: Vec<OwnedFd>,
    ) -> Result<()> {
        while self.workers.len() < self.start.cpus.len() {
            let worker = self.start_worker(self.workers.len(), &snapshot.tunables)?;
            self.workers.push(worker);
        }
        let mut given: Vec<Vec<(usize, OwnedFd)>> =
            self.workers.iter().map(|_| Vec::new()).collect();
        for (socket, descriptor) in apply.sockets.iter().zip(sockets) {
            let listener = listener_at(&snapshot.config, socket.address);
            if let (Some(listener), Some(of_worker)) = (listener, given.get_mut(socket.worker)) {
                of_worker.push((listener, descriptor));
            }
        }
        for (worker, listeners) in self.workers.iter().zip(given) {
            let snapshot = Arc::clone(&snapshot);
            worker.tell(worker::Command::Apply {
                snapshot,
                listeners,
                close: apply.closed.clone(),
            });
        }
        if let Some(probes) = &mut self.probes {
            let upstreams = snapshot.config.upstreams.iter();
            let wanted = upstreams
                .filter_map(|upstream| Some((upstream, upstream.probe.clone()?)))
                .flat_map(|(upstream, probe)| {
                    let endpoints = upstream.endpoints.iter();
                    endpoints.map(move |endpoint| {
                        (upstream.name.clone(), endpoint.address, probe.clone())
                    })
                });
            probes.set(wanted);
        }
        self.snapshot = Some(snapshot);
        Ok(())
    }

    fn start_worker(&self, index: usize, tunables: &Tunables) -> Result<WorkerThread> {
        let access_log = self.access_log.as_ref().context("the log ends")?;
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
                access_log: access_log.queue(),
                cells: Arc::clone(&self.cells),
                denied: Arc::clone(&self.denied),
                metrics,
            },
        )
        .with_context(|| format!("start worker {index}"))?;
        Ok(WorkerThread {
            commands,
            doorbell,
            thread,
        })
    }

    /// A reload came to nothing; the generation in force goes on.
    pub fn not_applied(&mut self, diagnostics: Vec<Diagnostic>) {
        self.registry
            .control
            .last_reload_success
            .store(false, Relaxed);
        self.registry.control.reloads_refused.fetch_add(1, Relaxed);
        for reload in self.reloads.drain(..) {
            let _ = reload.send(Err(diagnostics.clone()));
        }
    }

    /// Interfaces came back: what is found out of neighbours from now on leads over them.
    pub fn attached(&mut self, interfaces: Vec<Interface>) {
        if let Some(datapath) = &mut self.datapath {
            datapath.follow(&interfaces);
        }
        self.start.interfaces = interfaces;
    }

    /// Makes ready what workers log by; `carrier` is what this thread writes by.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn start_access_log(&mut self, carrier: Carrier) -> Result<()> {
        self.access_log = Some(AccessLog::start(carrier, Arc::clone(&self.registry))?);
        Ok(())
    }

    /// The keeper has opened the access log, again perhaps.
    pub fn log_to(&self, files: Vec<OwnedFd>) {
        if let (Some(access_log), Some(file)) = (&self.access_log, files.into_iter().next()) {
            access_log.write_to(file);
        }
    }

    /// Workers have ended, and their last lines wait to be written.
    pub async fn end_log(&mut self) {
        if let Some(access_log) = self.access_log.take() {
            access_log.end().await;
        }
    }

    /// Exchanges may end, nothing new begins.
    pub fn drain(&mut self) {
        let timeout = self.snapshot.as_ref().map_or(Duration::ZERO, |snapshot| {
            snapshot.tunables.worker.drain_timeout
        });
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
        let ended = self
            .workers
            .iter()
            .filter(|worker| worker.thread.is_finished())
            .count();
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

    /// Tells the keeper what the next daemon should know.
    fn remember(&mut self) {
        let tunables = self.tunables();
        let at_run_time = tunables
            .iter()
            .filter(|(_, _, origin)| **origin == Origin::Runtime);
        let runtime = at_run_time
            .map(|(tunable, value, _)| (tunable.key.to_owned(), value))
            .collect();
        let names = self
            .datapath
            .as_ref()
            .map(|datapath| datapath.names().clone())
            .unwrap_or_default();
        let bans = match self.datapath {
            Some(_) => Vec::new(),
            None => self.bans.memory(),
        };
        let memory = Memory {
            names,
            runtime,
            bans,
        };
        if memory != self.remembered && self.say(&ToKeeper::Remember(memory.clone())).is_ok() {
            self.remembered = memory;
        }
    }

    fn say(&self, message: &ToKeeper) -> Result<()> {
        channel::send(&self.channel, channel::Patience::WITH_KEEPER, message, &[])
            .context("write to the keeper")
    }
}

fn is_healthy(snapshot: &Snapshot, upstream: usize, address: SocketAddr) -> bool {
    let endpoints = snapshot
        .upstreams
        .get(upstream)
        .map(|upstream| &upstream.endpoints[..])
        .unwrap_or_default();
    endpoints
        .iter()
        .find(|endpoint| endpoint.address == address)
        .is_none_or(|endpoint| endpoint.health().is_healthy())
}

fn listener_at(config: &Config, address: SocketAddr) -> Option<usize> {
    config.listeners.iter().position(|listener| {
        listener
            .addresses
            .iter()
            .any(|listened| listened.socket == address)
    })
}

/// What was set at run time under the daemon before. A key that this version does not know is forgotten.
fn restore_runtime(tunables: &mut Tunables, runtime: &[(String, String)]) {
    for (key, value) in runtime {
        if let Err(error) = tunables.assign(key, value, Origin::Runtime) {
            log::warn!("set at run time, and lost now: {error}");
        }
    }
}

/// Listener, file and end of validity of each certificate.
fn certificates(config: &Config) -> Vec<([String; 2], i64)> {
    let mut ends = Vec::new();
    for listener in &config.listeners {
        let ListenerMode::Serve {
            tls: Some(listener_tls),
        } = &listener.mode
        else {
            continue;
        };
        for pem in &listener_tls.certificates {
            if let Ok(certificate) = tls::Certificate::parse(&pem.chain, &pem.key) {
                ends.push((
                    [listener.name.clone(), pem.path.display().to_string()],
                    certificate.not_after_s(),
                ));
            }
        }
    }
    ends
}
