//! The keeper's life after its start: what holds, what is being tried, and what happens on each event.

mod reload;
mod watch;

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::User;

use super::daemon::Daemon;
use super::signal::Signals;
use super::sockets::Sockets;
use super::{AdminSocket, Settings, access_log, tell};
use crate::config::{Bundle, Config, ListenerMode, Loaded};
use crate::control::Changes;
use crate::control::message::{Memory, ToDaemon};
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

/// How often it is looked whether an interface came back.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// And after the kernel refused to have XDP on one: it is not told every second.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// How often a daemon may have its files read again, or what it remembers written: more often nobody needs it, and a
/// daemon that is a stranger's own by now would keep us from all else.
const HEED_EVERY: Duration = Duration::from_millis(100);

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
    /// Where its access log goes.
    access_log: Option<OwnedFd>,
    deadline: Instant,
}

/// What the keeper holds from its start to its end, beside the sockets.
pub(super) struct Held {
    pub settings: Settings,
    pub signals: Signals,
    /// Who the daemon runs as; `None` = as we do.
    pub user: Option<User>,
    /// The CPU of each worker.
    pub cpus: Vec<usize>,
    pub admin: AdminSocket,
    /// Where what the instance remembers is written.
    pub folder: PathBuf,
    pub kernel: Option<Kernel>,
    pub cells: RateCells,
}

/// The rate cells of this keeper's daemons.
pub(super) struct RateCells {
    pub memory: OwnedFd,
    pub count: usize,
    /// Keys the hashes of cells. Daemons come and go, and a key must find its cell again.
    pub seed: u64,
}

pub(super) struct Keeper {
    held: Held,
    sockets: Sockets,
    daemon: Option<Daemon>,
    in_force: Option<Generation>,
    /// Where the access log of the generation in force goes.
    access_log: Option<OwnedFd>,
    pending: Option<Pending>,
    reload_again: bool,
    /// The last reload that this daemon asked for, by its number.
    asked: u64,
    memory: Memory,
    /// When what the daemon asked for is done: its memory written, its files read again.
    write_at: Option<Instant>,
    reload_at: Option<Instant>,
    /// When such was done last.
    written: Option<Instant>,
    reloaded: Option<Instant>,
    restarts: u64,
    backoff: Duration,
    restart_at: Option<Instant>,
    /// When the daemon is killed that was told to end.
    ending: Option<Instant>,
    /// When it is looked whether interfaces came back that had gone; never without a kernel half.
    look_at: Option<Instant>,
}

impl Keeper {
    pub fn new(held: Held) -> Self {
        let memory = fs::read(held.folder.join(MEMORY_FILE))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        // What was set at run time ends with the keeper; ids live as long as the pins.
        let memory = Memory {
            runtime: Vec::new(),
            endpoints: Changes::default(),
            ..memory.unwrap_or_default()
        };
        let look_at = held.kernel.is_some().then(Instant::now);
        Self {
            look_at,
            held,
            sockets: Sockets::default(),
            daemon: None,
            in_force: None,
            access_log: None,
            pending: None,
            reload_again: false,
            asked: 0,
            memory,
            write_at: None,
            reload_at: None,
            written: None,
            reloaded: None,
            restarts: 0,
            backoff: Duration::ZERO,
            restart_at: None,
            ending: None,
        }
    }

    /// From the first generation, whose sockets are open, to the end.
    ///
    /// # Errors
    /// The first daemon cannot be started, or ends before it is ready.
    pub fn run(
        mut self,
        loaded: Loaded,
        bundle: Bundle,
        opened: Sockets,
        access_log: Option<OwnedFd>,
    ) -> Result<ExitCode> {
        let opened = self.adopt(opened);
        let generation = Generation {
            number: 1,
            bundle,
            config: loaded.config,
            tunables: loaded.tunables,
        };
        self.pending = Some(Pending {
            generation,
            opened,
            access_log,
            deadline: Instant::now() + APPLY_TIMEOUT,
        });
        let ended = self.start_daemon().and_then(|()| self.serve());
        self.clean_up();
        ended
    }

    fn serve(&mut self) -> Result<ExitCode> {
        loop {
            let (signal, said, ended) = self.wait()?;
            if signal {
                while let Some(signal) = self.held.signals.next() {
                    self.take(signal);
                }
            }
            if said {
                self.listen();
            }
            if ended && let Some(code) = self.daemon_ended()? {
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
        let deadlines = [
            self.pending.as_ref().map(|pending| pending.deadline),
            self.restart_at,
            self.ending,
            self.look_at,
            self.write_at,
            self.reload_at,
        ];
        let next = deadlines.into_iter().flatten().min();
        let timeout = next.map_or(PollTimeout::NONE, |at| {
            let wait = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        let mut polled = vec![PollFd::new(self.held.signals.as_fd(), PollFlags::POLLIN)];
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
                let drain = self
                    .in_force
                    .as_ref()
                    .map_or(Duration::ZERO, |now| now.tunables.worker.drain_timeout);
                self.end(ToDaemon::Drain, drain + STOP_TIMEOUT);
            }
            Signal::SIGUSR1 => self.reopen_access_log(),
            Signal::SIGUSR2 => {
                log::warn!("{signal} does nothing in this version")
            }
            _ => {}
        }
    }

    /// Whoever rotates logs has moved the file away.
    fn reopen_access_log(&mut self) {
        let Some(now) = &self.in_force else { return };
        match access_log::open(&now.config) {
            Ok(file) => {
                self.access_log = file;
                self.give_access_log();
                log::info!("the access log was opened again");
            }
            Err(faults) => {
                tell(&faults, self.held.settings.colour);
                log::error!("the access log goes on in the file that it had");
            }
        }
    }

    /// Gives the daemon the file that it logs to.
    fn give_access_log(&mut self) {
        if let (Some(file), Some(daemon)) = (&self.access_log, &mut self.daemon)
            && daemon.say(&ToDaemon::AccessLog, &[file.as_fd()]).is_err()
        {
            daemon.kill();
        }
    }

    fn end(&mut self, how: ToDaemon, within: Duration) {
        log::info!(
            "{}",
            if matches!(how, ToDaemon::Drain) {
                "draining"
            } else {
                "stopping"
            }
        );
        self.ending = Some(Instant::now() + within);
        self.restart_at = None;
        if let Some(daemon) = &mut self.daemon
            && daemon.say(&how, &[]).is_err()
        {
            daemon.kill();
        }
    }

    /// What ends with us; the kernel half does not.
    fn clean_up(&mut self) {
        self.daemon = None;
        if self.write_at.take().is_some() {
            self.write_memory();
        }
        let forwards = |now: &Generation| {
            now.config
                .listeners
                .iter()
                .any(|listener| matches!(listener.mode, ListenerMode::Forward { .. }))
        };
        if self.held.kernel.is_some() && self.in_force.as_ref().is_some_and(forwards) {
            log::info!(
                "the kernel half goes on forwarding; `sluice datapath down{}` ends that",
                if self.held.settings.instance == "main" {
                    String::new()
                } else {
                    format!(" --instance {}", self.held.settings.instance)
                }
            );
        }
    }
}
