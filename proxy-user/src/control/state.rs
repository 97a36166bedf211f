//! What control holds, and each thing that can happen to it.

mod answer;
mod apply;
mod endpoints;
mod health;
mod learn;
mod names;
mod reloads;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use super::access_log::AccessLog;
use super::bans::Bans;
use super::ejections::Ejections;
use super::endpoints::Changes;
use super::message::{Memory, Start, ToKeeper};
use super::names::Names;
use super::offences::Offences;
use super::probes::{Answer as Probed, Probes};
use super::request::Request;
use super::{WorkerThread, channel};
use crate::datapath::{Interface, Writer};
use crate::file::Carrier;
use crate::metric::Registry;
use crate::offload::{Cells, Denied};
use crate::report::{self};
use crate::snapshot::Snapshot;
use crate::tunable::Origin;
use crate::{net, worker};
use apply::Incoming;
use reloads::Reloads;

/// How long workers may take to close everything when told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// The daemon's state.
pub struct Control {
    channel: Arc<UnixStream>,
    start: Start,
    /// The back-end of the workers.
    net: net::Choice,
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
    names: Option<Names>,
    ejections: Ejections,
    /// How far endpoints that start slowly were when the rings of an upstream, by its index, were made.
    steps: BTreeMap<usize, Vec<u32>>,
    /// The generation in force.
    snapshot: Option<Arc<Snapshot>>,
    certificates: Vec<([String; 2], i64)>,
    remembered: Memory,
    /// Interfaces that the kernel half has lost.
    lost: Vec<String>,
    /// Of endpoints, to what the files of the generation in force say.
    changes: Changes,
    /// A generation that is not in force yet.
    incoming: Option<Incoming>,
    /// Requests to change the generation in force, which wait until it is decided which one that is.
    deferred: Vec<Request>,
    /// Upstreams, by index, some of whose endpoints are new and not reached yet; and until when they are sought.
    sought: BTreeMap<usize, Instant>,
    reloads: Reloads,
    /// When workers must have ended, once they were told to.
    ending: Option<Instant>,
}

impl Control {
    /// # Errors
    /// The bans in the kernel cannot be read.
    pub fn new(
        channel: Arc<UnixStream>,
        start: Start,
        net: net::Choice,
        registry: Arc<Registry>,
        cells: Arc<Cells>,
        reports: report::Queue,
        datapath: Option<Writer>,
    ) -> Result<Self> {
        let denied = Arc::<Denied>::default();
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
            net,
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
            names: None,
            ejections: Ejections::default(),
            steps: BTreeMap::new(),
            snapshot: None,
            certificates: Vec::new(),
            changes: Changes::default(),
            incoming: None,
            deferred: Vec::new(),
            sought: BTreeMap::new(),
            reloads: Reloads::default(),
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

    /// Interfaces came back: what is found out of neighbours from now on leads over them.
    pub fn attached(&mut self, interfaces: Vec<Interface>) {
        if let Some(datapath) = &mut self.datapath {
            datapath.follow(&interfaces);
        }
        self.start.interfaces = interfaces;
    }

    /// Makes ready what workers log by.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn start_access_log(&mut self) -> Result<()> {
        // Where workers use epoll this thread does without tokio-uring.
        let carrier = match self.net.backend {
            net::Backend::Uring => Carrier::Uring,
            net::Backend::Epoll => Carrier::Threads,
        };
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
            endpoints: self.changes.clone(),
            resolved: self
                .names
                .as_ref()
                .map(Names::remembered)
                .unwrap_or_default(),
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
