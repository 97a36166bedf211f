//! A generation comes into force: checked first, put in force when the neighbours of its endpoints are known.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Control;
use crate::config::{Config, Diagnostic, ListenerMode, Loaded};
use crate::control::configuration::load;
use crate::control::endpoints::Changes;
use crate::control::message::{Apply, ToKeeper};
use crate::control::{WorkerThread, net_settings};
use crate::snapshot::Snapshot;
use crate::tunable::{Origin, Tunables};
use crate::{net, tls, worker};

/// How long neighbours are waited for that nobody has heard of. One that is there answers in a millisecond or two.
pub(super) const SEEK_LIMIT: Duration = Duration::from_millis(500);

/// Listener, file and end of validity of each certificate.
type Certificates = Vec<([String; 2], i64)>;

/// A generation that is good, and waits until it is known how its endpoints are reached.
pub(super) struct Incoming {
    snapshot: Snapshot,
    changes: Changes,
    certificates: Certificates,
    apply: Apply,
    sockets: Vec<OwnedFd>,
    until: Instant,
    /// Until when names are waited for that were never looked up; `None`: they are waited for no more.
    names_until: Option<Instant>,
}

impl Control {
    /// Makes a generation the one in force, now or as soon as the neighbours of its endpoints are known, or says why not:
    /// nothing is half-applied.
    ///
    /// # Errors
    /// The keeper cannot be told, or a worker cannot be started.
    pub fn apply(&mut self, apply: Apply, sockets: Vec<OwnedFd>) -> Result<()> {
        match self.prepare(&apply) {
            Ok((snapshot, certificates)) => {
                // Later generations are as their files say.
                let (snapshot, changes) = match &self.snapshot {
                    None => self.restore_endpoints(snapshot),
                    Some(_) => (snapshot, Changes::default()),
                };
                self.ask_names(&snapshot.config, &snapshot.tunables);
                let patience = snapshot.tunables.upstream.dns_start_timeout;
                self.incoming = Some(Incoming {
                    snapshot,
                    changes,
                    certificates,
                    apply,
                    sockets,
                    until: Instant::now() + SEEK_LIMIT,
                    names_until: Some(Instant::now() + patience),
                });
                self.seek()
            }
            Err(diagnostics) => self.refuse(&apply, diagnostics),
        }
    }

    /// Whether a generation is about to come into force.
    pub(super) fn is_applying(&self) -> bool {
        self.incoming.is_some()
    }

    /// Whether `seek` is to be called again soon.
    pub fn is_seeking(&self) -> bool {
        self.incoming.is_some() || !self.sought.is_empty()
    }

    /// Looks for neighbours of endpoints that are new; what waits for them goes on when they are found, or do not answer.
    ///
    /// # Errors
    /// As `apply`.
    pub fn seek(&mut self) -> Result<()> {
        if let Some(snapshot) = self.snapshot.clone() {
            for (upstream, until) in std::mem::take(&mut self.sought) {
                if !self.reaches(&snapshot, Some(upstream)) && Instant::now() < until {
                    self.sought.insert(upstream, until);
                }
            }
        }
        let Some(mut incoming) = self.incoming.take() else {
            return Ok(());
        };
        if let Some(until) = incoming.names_until {
            if !self.knows_names(&incoming.snapshot.config) && Instant::now() < until {
                self.incoming = Some(incoming);
                return Ok(());
            }
            incoming.snapshot = self.name_endpoints(incoming.snapshot, &incoming.changes);
            incoming.names_until = None;
            incoming.until = Instant::now() + SEEK_LIMIT;
        }
        if self.reaches(&incoming.snapshot, None) || Instant::now() >= incoming.until {
            self.put_in_force(incoming)?;
            for request in std::mem::take(&mut self.deferred) {
                self.answer(request);
            }
            return Ok(());
        }
        self.incoming = Some(incoming);
        Ok(())
    }

    /// Whether it is known how endpoints are reached, of all upstreams or of one. Where that is new to a ring in force, it
    /// changes.
    fn reaches(&mut self, snapshot: &Snapshot, only: Option<usize>) -> bool {
        let Some(datapath) = &mut self.datapath else {
            return true;
        };
        match datapath.seek(snapshot, only) {
            Ok(sought) => {
                self.choose_where_moved(&sought.moved);
                sought.is_settled
            }
            Err(error) => {
                log::error!("cannot look for neighbours: {error:#}");
                true
            }
        }
    }

    fn put_in_force(&mut self, incoming: Incoming) -> Result<()> {
        let Incoming {
            snapshot,
            changes,
            certificates,
            apply,
            sockets,
            ..
        } = incoming;
        let generation = apply.generation;
        self.welcome(&snapshot);
        let snapshot = match self.write_rings(snapshot) {
            Ok(snapshot) => snapshot,
            Err(diagnostics) => return self.refuse(&apply, diagnostics),
        };
        if changes != self.changes {
            log::info!(
                "endpoints changed at run time: {} now, {} before",
                changes.count(),
                self.changes.count()
            );
        }
        self.changes = changes;
        self.certificates = certificates;
        self.sought.clear();
        self.enforce(Arc::new(snapshot), &apply, sockets)?;
        let control = &self.registry.control;
        control.generation.store(generation, Relaxed);
        control.last_reload_success.store(true, Relaxed);
        self.remember();
        self.say(&ToKeeper::Applied { generation })?;
        self.reloads.answer(apply.asked, &Ok(generation));
        Ok(())
    }

    /// Lets the kernel half do what a snapshot says. What the DNS says is not worth a generation: where only an endpoint that
    /// came by its name cannot be, those of names are left out, until the DNS says something else.
    fn write_rings(&mut self, snapshot: Snapshot) -> Result<Snapshot, Vec<Diagnostic>> {
        let Some(datapath) = &mut self.datapath else {
            return Ok(snapshot);
        };
        let Err(error) = datapath.apply(&snapshot) else {
            return Ok(snapshot);
        };
        let at = snapshot.config.datapath.at.clone();
        let refused = move |error| vec![Diagnostic::error(format!("{error:#}")).at(&at)];
        let mut plain = snapshot.clone();
        for (index, upstream) in snapshot.upstreams.iter().enumerate() {
            if upstream.endpoints.iter().any(|endpoint| endpoint.is_named) {
                let config = &snapshot.config.upstreams[index];
                let by_address = config.endpoints.iter().filter(|one| !one.is_named);
                plain = plain.with_endpoints(index, by_address.copied().collect(), &self.registry);
            }
        }
        if std::ptr::eq(&*plain.upstreams, &*snapshot.upstreams) {
            return Err(refused(error));
        }
        datapath.apply(&plain).map_err(refused)?;
        log::error!(
            "endpoints by name are left out, for what the DNS says cannot be done: {error:#}"
        );
        Ok(plain)
    }

    fn refuse(&mut self, apply: &Apply, diagnostics: Vec<Diagnostic>) -> Result<()> {
        self.say(&ToKeeper::Refused {
            generation: apply.generation,
            diagnostics: diagnostics.clone(),
        })?;
        self.not_applied(apply.asked, diagnostics);
        Ok(())
    }

    /// Everything that can be refused without a look at the host, and without a change to anything.
    fn prepare(&mut self, apply: &Apply) -> Result<(Snapshot, Certificates), Vec<Diagnostic>> {
        let loaded = load(&apply.bundle, &apply.main, &apply.flags)?;
        let Loaded {
            mut config,
            mut tunables,
            ..
        } = loaded;
        // What is known already is there from the beginning, with all that was learned of it.
        for upstream in 0..config.upstreams.len() {
            config.upstreams[upstream] = self.listed(&config, upstream);
        }
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
        Ok((snapshot, certificates))
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
        let places = places(&snapshot.config);
        let mut given: Vec<Vec<(usize, OwnedFd)>> =
            self.workers.iter().map(|_| Vec::new()).collect();
        for (socket, descriptor) in apply.sockets.iter().zip(sockets) {
            let listener = places.get(&socket.address).copied();
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
        self.adopt_all(&snapshot);
        self.snapshot = Some(snapshot);
        self.forget_names();
        self.follow_all_names();
        self.set_probes();
        Ok(())
    }

    /// Lets those be probed who are endpoints now.
    pub(super) fn set_probes(&mut self) {
        let (Some(probes), Some(snapshot)) = (&mut self.probes, &self.snapshot) else {
            return;
        };
        let upstreams = snapshot.upstreams.iter().zip(&snapshot.config.upstreams);
        let wanted = upstreams
            .filter_map(|(upstream, config)| Some((upstream, config.probe.clone()?)))
            .flat_map(|(upstream, probe)| {
                let endpoints = upstream.endpoints.iter();
                endpoints
                    .map(move |endpoint| (upstream.name.clone(), endpoint.address, probe.clone()))
            });
        probes.set(wanted);
    }

    fn start_worker(&self, index: usize, tunables: &Tunables) -> Result<WorkerThread> {
        let access_log = self.access_log.as_ref().context("the log ends")?;
        let (commands, receiver) = sync_mpsc::channel();
        let doorbell = net::Doorbell::new().context("make a doorbell")?;
        let metrics = self.registry.worker(index);
        let thread = worker::start(
            index,
            self.start.cpus[index],
            net_settings(self.net.backend, tunables),
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
            is_closing: Arc::default(),
        })
    }

    /// A reload came to nothing; the generation in force goes on.
    pub fn not_applied(&mut self, asked: u64, diagnostics: Vec<Diagnostic>) {
        self.registry
            .control
            .last_reload_success
            .store(false, Relaxed);
        self.registry.control.reloads_refused.fetch_add(1, Relaxed);
        self.reloads.answer(asked, &Err(diagnostics));
    }
}

/// The listener of each address.
fn places(config: &Config) -> HashMap<SocketAddr, usize> {
    let mut places = HashMap::new();
    for (index, listener) in config.listeners.iter().enumerate() {
        for address in &listener.addresses {
            places.entry(address.socket).or_insert(index);
        }
    }
    places
}

/// What was set at run time under the daemon before. A key that this version does not know is forgotten.
fn restore_runtime(tunables: &mut Tunables, runtime: &[(String, String)]) {
    for (key, value) in runtime {
        if let Err(error) = tunables.assign(key, value, Origin::Runtime) {
            log::warn!("set at run time, and lost now: {error}");
        }
    }
}

fn certificates(config: &Config) -> Certificates {
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
