//! The keeper's life after its start: what holds, what is being tried, and what happens on each event.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::Flock;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::User;

use super::daemon::Daemon;
use super::signal::Signals;
use super::sockets::Sockets;
use super::{Settings, read, tell_warnings};
use crate::config::{Bundle, Config, Diagnostic, ListenerMode, Loaded, diagnostic};
use crate::control::message::{Apply, Memory, Socket, Start, ToDaemon, ToKeeper};
use crate::datapath::Kernel;
use crate::tunable::Tunables;

/// How long a daemon may take to put a configuration in force.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a daemon may take to end when told to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits before a daemon that keeps dying is started again: doubled each time.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A daemon that lived so long did not die of its start.
const LIVED: Duration = Duration::from_secs(10);

/// The file that remembers ids beside the pins.
const MEMORY_FILE: &str = "memory.json";

/// A generation: the files it came from, and what they said.
struct Generation {
    number: u64,
    bundle: Bundle,
    config: Config,
    tunables: Tunables,
}

/// A generation that the daemon has not yet answered for.
struct Pending {
    generation: Generation,
    /// Addresses whose sockets were opened for it.
    opened: Vec<SocketAddr>,
    deadline: Instant,
}

pub(super) struct Keeper {
    settings: Settings,
    signals: Signals,
    user: Option<User>,
    kernel: Option<Kernel>,
    cpus: Vec<usize>,
    cells: OwnedFd,
    admin: UnixListener,
    folder: PathBuf,
    lock: Option<Flock<File>>,
    sockets: Sockets,
    daemon: Option<Daemon>,
    in_force: Option<Generation>,
    pending: Option<Pending>,
    reload_again: bool,
    memory: Memory,
    restarts: u64,
    backoff: Duration,
    restart_at: Option<Instant>,
    /// When the daemon is killed that was told to end.
    ending: Option<Instant>,
}

impl Keeper {
    #[expect(clippy::too_many_arguments, reason = "each is a thing that the keeper holds from its start to its end")]
    pub fn new(
        settings: Settings,
        signals: Signals,
        user: Option<User>,
        kernel: Option<Kernel>,
        cpus: Vec<usize>,
        cells: OwnedFd,
        admin: UnixListener,
        folder: PathBuf,
    ) -> Self {
        let memory = fs::read(folder.join(MEMORY_FILE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        // What was set at run time ends with the keeper; ids live as long as the pins.
        let memory = Memory { runtime: Vec::new(), ..memory.unwrap_or_default() };
        Self {
            settings,
            signals,
            user,
            kernel,
            cpus,
            cells,
            admin,
            folder,
            lock: None,
            sockets: Sockets::default(),
            daemon: None,
            in_force: None,
            pending: None,
            reload_again: false,
            memory,
            restarts: 0,
            backoff: Duration::ZERO,
            restart_at: None,
            ending: None,
        }
    }

    /// Keeps the instance's lock until the end.
    pub fn hold(&mut self, lock: Flock<File>) {
        self.lock = Some(lock);
    }

    /// From the first generation to the end.
    ///
    /// # Errors
    /// The first daemon cannot be started, or ends before it is ready.
    pub fn run(mut self, loaded: Loaded, bundle: Bundle) -> Result<ExitCode> {
        let opened = match self.open_sockets(&loaded.config, &loaded.tunables) {
            Ok(opened) => opened,
            Err(faults) => {
                eprint!("{}", diagnostic::render(&faults, self.settings.colour));
                self.clean_up();
                return Ok(ExitCode::FAILURE);
            }
        };
        let generation = Generation { number: 1, bundle, config: loaded.config, tunables: loaded.tunables };
        self.pending = Some(Pending { generation, opened, deadline: Instant::now() + APPLY_TIMEOUT });
        let ended = self.start_daemon().and_then(|()| self.serve());
        self.clean_up();
        ended
    }

    fn serve(&mut self) -> Result<ExitCode> {
        loop {
            let (signal, said, ended) = self.wait()?;
            if signal {
                while let Some(signal) = self.signals.next() {
                    self.take(signal);
                }
            }
            if said {
                self.listen();
            }
            if ended
                && let Some(code) = self.daemon_ended()?
            {
                return Ok(code);
            }
            if self.refused_first() {
                return Ok(ExitCode::FAILURE);
            }
            self.mind_the_time()?;
            if self.daemon.is_none() && self.ending.is_some() {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }

    /// Waits for a signal, a word of the daemon, its end, or the next deadline.
    fn wait(&self) -> Result<(bool, bool, bool)> {
        let deadlines = [self.pending.as_ref().map(|pending| pending.deadline), self.restart_at, self.ending];
        let next = deadlines.into_iter().flatten().min();
        let timeout = next.map_or(PollTimeout::NONE, |at| {
            let wait = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        let mut polled = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if let Some(daemon) = &self.daemon {
            polled.push(PollFd::new(daemon.channel(), PollFlags::POLLIN));
            polled.push(PollFd::new(daemon.end(), PollFlags::POLLIN));
        }
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("wait for events"),
        }
        let came = |index: usize| polled.get(index).and_then(PollFd::any).unwrap_or(false);
        Ok((came(0), came(1), came(2)))
    }

    fn take(&mut self, signal: Signal) {
        match signal {
            Signal::SIGHUP => self.reload(),
            Signal::SIGTERM | Signal::SIGINT => self.end(ToDaemon::Stop, STOP_TIMEOUT),
            Signal::SIGQUIT => {
                let drain = self.in_force.as_ref().map_or(Duration::ZERO, |now| now.tunables.worker.drain_timeout);
                self.end(ToDaemon::Drain, drain + STOP_TIMEOUT);
            }
            Signal::SIGUSR1 | Signal::SIGUSR2 => log::warn!("{signal} does nothing in this version"),
            _ => {}
        }
    }

    fn end(&mut self, how: ToDaemon, within: Duration) {
        log::info!("{}", if matches!(how, ToDaemon::Drain) { "draining" } else { "stopping" });
        self.ending = Some(Instant::now() + within);
        self.restart_at = None;
        if let Some(daemon) = &mut self.daemon
            && daemon.say(&how, &[]).is_err()
        {
            daemon.kill();
        }
    }

    // Reload.

    /// Reads everything again; all of it comes into force, or nothing.
    fn reload(&mut self) {
        if self.pending.is_some() || self.daemon.is_none() {
            self.reload_again = true;
            return;
        }
        let tried = read(&self.settings).and_then(|(loaded, bundle)| {
            tell_warnings(&loaded.warnings, self.settings.colour);
            self.refuse_restart_matters(&loaded.config)?;
            let opened = self.open_sockets(&loaded.config, &loaded.tunables)?;
            Ok((loaded, bundle, opened))
        });
        match tried {
            Ok((loaded, bundle, opened)) => {
                let number = self.in_force.as_ref().map_or(0, |now| now.number) + 1;
                let generation = Generation { number, bundle, config: loaded.config, tunables: loaded.tunables };
                self.pending = Some(Pending { generation, opened, deadline: Instant::now() + APPLY_TIMEOUT });
                self.send_pending();
            }
            Err(diagnostics) => {
                self.tell_refused(&diagnostics);
                if let Some(daemon) = &mut self.daemon
                    && daemon.say(&ToDaemon::NotApplied(diagnostics), &[]).is_err()
                {
                    daemon.kill();
                }
            }
        }
    }

    fn tell_refused(&self, diagnostics: &[Diagnostic]) {
        eprint!("{}", diagnostic::render(diagnostics, self.settings.colour));
        log::error!(
            "reload refused, generation {} goes on: {}",
            self.in_force.as_ref().map_or(0, |now| now.number),
            diagnostic::summary(diagnostics)
        );
    }

    /// What only a new keeper can change.
    fn refuse_restart_matters(&self, config: &Config) -> Result<(), Vec<Diagnostic>> {
        let Some(now) = &self.in_force else { return Ok(()) };
        let (before, after) = (&now.config.datapath, &config.datapath);
        if before.interfaces == after.interfaces && before.mode == after.mode {
            return Ok(());
        }
        Err(vec![
            Diagnostic::error("the interfaces and the mode of the datapath change only when Sluice starts")
                .at(&after.at)
                .help("restart Sluice: packets of forward listeners are forwarded meanwhile"),
        ])
    }

    /// Opens and steers the sockets that are missing; answers their addresses.
    fn open_sockets(&mut self, config: &Config, tunables: &Tunables) -> Result<Vec<SocketAddr>, Vec<Diagnostic>> {
        let opened = self.sockets.open_missing(config, self.cpus.len(), tunables.net.backlog)?;
        let addresses: Vec<SocketAddr> = opened.iter().map(|(address, _)| address).collect();
        if let Some(kernel) = &mut self.kernel {
            for (address, sockets) in opened.iter() {
                let group: Vec<(u32, BorrowedFd<'_>)> =
                    self.cpus.iter().zip(sockets).map(|(cpu, socket)| (*cpu as u32, socket.as_fd())).collect();
                if let Err(error) = kernel.steer(address, &group) {
                    // The kernel chooses by its own hash then: slower, and right.
                    log::warn!("connections to {address} are not steered to the CPU that takes them: {error:#}");
                }
            }
        }
        self.sockets.extend(opened);
        Ok(addresses)
    }

    fn close_sockets(&mut self, addresses: &[SocketAddr]) {
        if let Some(kernel) = &mut self.kernel {
            addresses.iter().for_each(|address| kernel.unsteer(*address));
        }
        self.sockets.close(addresses);
    }

    /// Gives the pending generation to a daemon that runs already.
    fn send_pending(&mut self) {
        let (Some(pending), Some(daemon)) = (&self.pending, &mut self.daemon) else { return };
        let new = self.sockets.each().filter(|(address, ..)| pending.opened.contains(address));
        let (sockets, descriptors): (Vec<_>, Vec<_>) =
            new.map(|(address, worker, socket)| (Socket { address, worker }, socket)).unzip();
        let generation = &pending.generation;
        let apply = Apply {
            generation: generation.number,
            main: self.settings.main.clone(),
            bundle: generation.bundle.clone(),
            flags: self.settings.flags.clone(),
            sockets,
            closed: self.sockets.surplus(&generation.config),
            start: None,
        };
        if let Err(error) = daemon.say(&ToDaemon::Apply(Box::new(apply)), &descriptors) {
            log::error!("the daemon does not listen: {error}");
            daemon.kill();
        }
    }

    // The daemon's words.

    fn listen(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        match daemon.hear() {
            Ok(Some(ToKeeper::Applied { generation })) => self.applied(generation),
            Ok(Some(ToKeeper::Refused { generation, diagnostics })) => self.refused(generation, &diagnostics),
            Ok(Some(ToKeeper::Reload)) => self.reload(),
            Ok(Some(ToKeeper::Remember(memory))) => self.remember(memory),
            // It has ended, or is no use any more.
            Ok(None) => daemon.kill(),
            Err(error) => {
                log::error!("the daemon cannot be understood: {error}");
                daemon.kill();
            }
        }
    }

    fn applied(&mut self, number: u64) {
        if let Some(daemon) = &mut self.daemon {
            daemon.ready = true;
        }
        match self.pending.take_if(|pending| pending.generation.number == number) {
            Some(pending) => {
                let surplus = self.sockets.surplus(&pending.generation.config);
                self.close_sockets(&surplus);
                let first = self.in_force.replace(pending.generation).is_none();
                self.tell_in_force(first);
            }
            None => {
                let pid = self.daemon.as_ref().map_or(0, Daemon::pid);
                log::info!("a new daemon serves generation {number} on the same sockets: pid={pid}");
            }
        }
        if std::mem::take(&mut self.reload_again) {
            self.reload();
        }
    }

    fn tell_in_force(&self, first: bool) {
        let Some(now) = &self.in_force else { return };
        if !first {
            log::info!("generation {} is in force", now.number);
            return;
        }
        for listener in &now.config.listeners {
            let addresses: Vec<String> = listener.addresses.iter().map(ToString::to_string).collect();
            log::info!("listening: listener={} addresses={}", listener.name, addresses.join(","));
        }
        let pid = self.daemon.as_ref().map_or(0, Daemon::pid);
        log::info!(
            "ready: instance={} workers={} daemon={pid} admin={}",
            self.settings.instance,
            self.cpus.len(),
            self.settings.admin.display()
        );
    }

    fn refused(&mut self, number: u64, diagnostics: &[Diagnostic]) {
        self.tell_refused(diagnostics);
        if self.pending.as_ref().is_some_and(|pending| pending.generation.number == number) {
            self.roll_back();
        } else if let Some(daemon) = &mut self.daemon {
            // It will not serve what served before: another may.
            daemon.kill();
        }
        if std::mem::take(&mut self.reload_again) {
            self.reload();
        }
    }

    /// As if the pending generation had never been.
    fn roll_back(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.close_sockets(&pending.opened);
        }
    }

    /// The first generation was refused: there is nothing to go on with.
    fn refused_first(&self) -> bool {
        self.in_force.is_none() && self.pending.is_none()
    }

    fn remember(&mut self, memory: Memory) {
        self.memory = memory;
        let path = self.folder.join(MEMORY_FILE);
        let fresh = self.folder.join("memory.json.new");
        let written = serde_json::to_vec(&self.memory)
            .map_err(std::io::Error::from)
            .and_then(|bytes| fs::write(&fresh, bytes))
            .and_then(|()| fs::rename(&fresh, &path));
        if let Err(error) = written {
            log::warn!("cannot write {}: {error}; counters may change their ids at the next start", path.display());
        }
    }

    // The daemon's life.

    fn start_daemon(&mut self) -> Result<()> {
        let generation = match (&self.in_force, &self.pending) {
            (Some(now), _) => now,
            (None, Some(first)) => &first.generation,
            (None, None) => bail!("there is no configuration to start with"),
        };
        let daemon = Daemon::start(self.user.as_ref())?;
        let maps = self.kernel.as_ref().map(Kernel::descriptors).transpose()?.unwrap_or_default();
        let mut descriptors = vec![self.admin.as_fd(), self.cells.as_fd()];
        descriptors.extend(maps.iter().map(|(_, map)| map.as_fd()));
        let (sockets, of_sockets): (Vec<_>, Vec<_>) =
            self.sockets.each().map(|(address, worker, socket)| (Socket { address, worker }, socket)).unzip();
        descriptors.extend(of_sockets);
        let apply = Apply {
            generation: generation.number,
            main: self.settings.main.clone(),
            bundle: generation.bundle.clone(),
            flags: self.settings.flags.clone(),
            sockets,
            closed: Vec::new(),
            start: Some(Start {
                instance: self.settings.instance.clone(),
                cpus: self.cpus.clone(),
                restarts: self.restarts,
                cells: generation.tunables.guard.cells_max as usize,
                interfaces: self.kernel.as_ref().map(|kernel| kernel.interfaces.clone()).unwrap_or_default(),
                maps: maps.iter().map(|(name, _)| name.clone()).collect(),
                memory: self.memory.clone(),
            }),
        };
        daemon.say(&ToDaemon::Apply(Box::new(apply)), &descriptors).context("tell the daemon what to do")?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// The daemon has ended; the exit code, where that is the end of us as well.
    fn daemon_ended(&mut self) -> Result<Option<ExitCode>> {
        // What it said last still counts.
        while self.daemon.as_ref().is_some_and(|daemon| readable(daemon.channel())) {
            let before = self.daemon.as_ref().map(Daemon::pid);
            match self.daemon.as_ref().map(Daemon::hear) {
                Some(Ok(Some(ToKeeper::Refused { generation, diagnostics }))) => self.refused(generation, &diagnostics),
                Some(Ok(Some(ToKeeper::Remember(memory)))) => self.remember(memory),
                Some(Ok(Some(_))) => {}
                _ => break,
            }
            if self.daemon.as_ref().map(Daemon::pid) != before {
                break;
            }
        }
        let Some(status) = self.daemon.as_mut().and_then(Daemon::ended) else { return Ok(None) };
        let Some(daemon) = self.daemon.take() else { return Ok(None) };
        if self.ending.is_some() {
            return Ok(Some(ExitCode::SUCCESS));
        }
        if self.refused_first() {
            return Ok(Some(ExitCode::FAILURE));
        }
        if self.in_force.is_none() {
            bail!("the daemon ended before it was ready ({status}); what it said stands above");
        }
        if let Some(pending) = &self.pending {
            log::error!("the daemon died over generation {}, which is refused for that", pending.generation.number);
            self.roll_back();
        }
        self.restarts += 1;
        let lived = daemon.ready && daemon.started.elapsed() >= LIVED;
        self.backoff = match self.backoff {
            _ if lived || self.restarts == 1 => Duration::ZERO,
            Duration::ZERO => BACKOFF.0,
            earlier => (earlier * 2).min(BACKOFF.1),
        };
        log::error!("the daemon died ({status}); sockets and kernel half stay, a new one starts in {:?}", self.backoff);
        self.restart_at = Some(Instant::now() + self.backoff);
        Ok(None)
    }

    fn mind_the_time(&mut self) -> Result<()> {
        let now = Instant::now();
        if self.restart_at.is_some_and(|at| now >= at) {
            self.restart_at = None;
            if let Err(error) = self.start_daemon() {
                if self.in_force.is_none() {
                    return Err(error);
                }
                log::error!("cannot start the daemon: {error:#}");
                self.backoff = (self.backoff * 2).clamp(BACKOFF.0, BACKOFF.1);
                self.restart_at = Some(now + self.backoff);
            }
        }
        let late = self.pending.as_ref().is_some_and(|pending| now >= pending.deadline);
        if late && let Some(daemon) = &mut self.daemon {
            log::error!("the daemon did not answer within {APPLY_TIMEOUT:?}");
            daemon.kill();
        }
        if self.ending.is_some_and(|deadline| now >= deadline) && let Some(daemon) = &mut self.daemon {
            log::warn!("the daemon did not end in time and is killed");
            daemon.kill();
            self.ending = Some(now + STOP_TIMEOUT);
        }
        Ok(())
    }

    /// What ends with us; the kernel half does not.
    fn clean_up(&mut self) {
        self.daemon = None;
        let _ = fs::remove_file(&self.settings.admin);
        let forwards = |now: &Generation| {
            now.config.listeners.iter().any(|listener| matches!(listener.mode, ListenerMode::Forward { .. }))
        };
        if self.kernel.is_some() && self.in_force.as_ref().is_some_and(forwards) {
            log::info!(
                "the kernel half goes on forwarding; `sluice datapath down{}` ends that",
                if self.settings.instance == "main" { String::new() } else { format!(" --instance {}", self.settings.instance) }
            );
        }
    }
}

fn readable(descriptor: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(descriptor, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
