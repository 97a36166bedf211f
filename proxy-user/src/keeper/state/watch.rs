//! The daemon's life: started, heard, restarted when it dies.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    APPLY_TIMEOUT, BACKOFF, HEED_EVERY, Keeper, LIVED, LOOK_AGAIN, LOOK_EVERY, MEMORY_FILE,
    STOP_TIMEOUT,
};
use crate::control::message::{Apply, Memory, Socket, Start, ToDaemon, ToKeeper};
use crate::datapath::{Interface, Kernel};
use crate::keeper::daemon::Daemon;

/// How long a daemon that says nothing more may take to end.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Messages of a daemon that has ended.
const LAST_WORDS_MAX: usize = 16;

impl Keeper {
    pub(super) fn listen(&mut self) {
        let Some(daemon) = &mut self.daemon else {
            return;
        };
        match daemon.hear() {
            Ok(Some(ToKeeper::Applied { generation })) => self.applied(generation),
            Ok(Some(ToKeeper::Refused {
                generation,
                diagnostics,
            })) => self.refused(generation, &diagnostics),
            Ok(Some(ToKeeper::Reload { asked })) => {
                self.asked = asked;
                self.reload_at.get_or_insert(heeded(self.reloaded));
            }
            Ok(Some(ToKeeper::Remember(memory))) => self.remember(memory),
            // It is ending, and how says why; if it is not, it is no use any more.
            Ok(None) => daemon.end_within(END_PATIENCE),
            Err(error) => {
                log::error!("the daemon cannot be understood: {error}");
                daemon.kill();
            }
        }
    }

    fn remember(&mut self, memory: Memory) {
        self.memory = memory;
        self.write_at.get_or_insert(heeded(self.written));
    }

    pub(super) fn write_memory(&mut self) {
        self.written = Some(Instant::now());
        let path = self.held.folder.join(MEMORY_FILE);
        let fresh = self.held.folder.join("memory.json.new");
        let written = serde_json::to_vec(&self.memory)
            .map_err(std::io::Error::from)
            .and_then(|bytes| fs::write(&fresh, bytes))
            .and_then(|()| fs::rename(&fresh, &path));
        if let Err(error) = written {
            log::warn!(
                "cannot write {}: {error}; counters may change their ids at the next start",
                path.display()
            );
        }
    }

    pub(super) fn start_daemon(&mut self) -> Result<()> {
        let generation = match (&self.in_force, &self.pending) {
            (Some(now), _) => now,
            (None, Some(first)) => &first.generation,
            (None, None) => bail!("there is no configuration to start with"),
        };
        let daemon = Daemon::start(self.held.user.as_ref())?;
        let (maps, of_maps): (Vec<_>, Vec<_>) = self
            .held
            .kernel
            .iter()
            .flat_map(Kernel::descriptors)
            .map(|(map, descriptor)| (map.to_owned(), descriptor))
            .unzip();
        let mut descriptors = vec![
            self.held.admin.listener.as_fd(),
            self.held.cells.memory.as_fd(),
        ];
        descriptors.extend(of_maps);
        let (sockets, of_sockets): (Vec<_>, Vec<_>) = self
            .sockets
            .each()
            .map(|(address, worker, socket)| (Socket { address, worker }, socket))
            .unzip();
        descriptors.extend(of_sockets);
        let apply = Apply {
            generation: generation.number,
            main: self.held.settings.main.clone(),
            bundle: generation.bundle.clone(),
            flags: self.held.settings.flags.clone(),
            asked: 0,
            sockets,
            closed: Vec::new(),
            start: Some(Start {
                instance: self.held.settings.instance.clone(),
                cpus: self.held.cpus.clone(),
                backend: generation.tunables.net.backend,
                restarts: self.restarts,
                cells: self.held.cells.count,
                cells_seed: self.held.cells.seed,
                interfaces: self
                    .held
                    .kernel
                    .as_ref()
                    .map(|kernel| kernel.interfaces.clone())
                    .unwrap_or_default(),
                maps,
                memory: self.memory.clone(),
            }),
        };
        daemon
            .say(&ToDaemon::Apply(Box::new(apply)), &descriptors)
            .context("tell the daemon what to do")?;
        self.daemon = Some(daemon);
        self.asked = 0;
        self.give_access_log();
        Ok(())
    }

    /// The daemon has ended; the exit code, where that is the end of us as well.
    pub(super) fn daemon_ended(&mut self) -> Result<Option<ExitCode>> {
        // What it said last still counts. A process that it left behind may go on talking, and is not listened to for ever.
        for _ in 0..LAST_WORDS_MAX {
            if !self
                .daemon
                .as_ref()
                .is_some_and(|daemon| readable(daemon.channel()))
            {
                break;
            }
            let before = self.daemon.as_ref().map(Daemon::pid);
            match self.daemon.as_ref().map(Daemon::hear) {
                Some(Ok(Some(ToKeeper::Refused {
                    generation,
                    diagnostics,
                }))) => self.refused(generation, &diagnostics),
                Some(Ok(Some(ToKeeper::Remember(memory)))) => self.remember(memory),
                Some(Ok(Some(_))) => {}
                _ => break,
            }
            if self.daemon.as_ref().map(Daemon::pid) != before {
                break;
            }
        }
        let Some(status) = self.daemon.as_mut().and_then(Daemon::ended) else {
            return Ok(None);
        };
        let Some(daemon) = self.daemon.take() else {
            return Ok(None);
        };
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
            log::error!(
                "the daemon died over generation {}, which is refused for that",
                pending.generation.number
            );
            self.roll_back();
        }
        self.restarts += 1;
        let lived = daemon.ready && daemon.started.elapsed() >= LIVED;
        self.backoff = match self.backoff {
            _ if lived || self.restarts == 1 => Duration::ZERO,
            Duration::ZERO => BACKOFF.0,
            earlier => (earlier * 2).min(BACKOFF.1),
        };
        log::error!(
            "the daemon died ({status}); sockets and kernel half stay, a new one starts in {:?}",
            self.backoff
        );
        self.restart_at = Some(Instant::now() + self.backoff);
        Ok(None)
    }

    pub(super) fn mind_the_time(&mut self) -> Result<()> {
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
        if self.write_at.take_if(|at| now >= *at).is_some() {
            self.write_memory();
        }
        if self.reload_at.take_if(|at| now >= *at).is_some() {
            self.reloaded = Some(now);
            self.reload();
        }
        if self.look_at.is_some_and(|at| now >= at) {
            self.look_at = Some(now + LOOK_EVERY);
            self.look_for_interfaces();
        }
        let late = self
            .pending
            .as_ref()
            .is_some_and(|pending| now >= pending.deadline);
        if late && let Some(daemon) = &mut self.daemon {
            log::error!("the daemon did not answer within {APPLY_TIMEOUT:?}");
            daemon.kill();
        }
        if self.ending.is_some_and(|deadline| now >= deadline)
            && let Some(daemon) = &mut self.daemon
        {
            log::warn!("the daemon did not end in time and is killed");
            daemon.kill();
            self.ending = Some(now + STOP_TIMEOUT);
        }
        Ok(())
    }
}

impl Keeper {
    /// Puts the kernel half on interfaces that came back, and tells the daemon.
    fn look_for_interfaces(&mut self) {
        let (Some(kernel), Some(now)) = (&mut self.held.kernel, &self.in_force) else {
            return;
        };
        match kernel.reattach(now.config.datapath.mode) {
            Ok(back) if back.is_empty() => return,
            Ok(back) => {
                for Interface { name, mode, .. } in back {
                    log::info!("XDP attached again: interface={name} mode={mode:?}");
                }
            }
            Err(error) => {
                self.look_at = Some(Instant::now() + LOOK_AGAIN);
                log::error!("cannot attach XDP to an interface that came back: {error:#}");
            }
        }
        for note in kernel.notes.drain(..) {
            log::warn!("{note}");
        }
        // Also after an error: others may have come back before it.
        let said = ToDaemon::Attached(kernel.interfaces.clone());
        if let Some(daemon) = &mut self.daemon
            && daemon.say(&said, &[]).is_err()
        {
            daemon.kill();
        }
    }
}

/// When something is due that was done last then: now, or a moment after that.
fn heeded(last: Option<Instant>) -> Instant {
    let now = Instant::now();
    last.map_or(now, |last| (last + HEED_EVERY).max(now))
}

fn readable(descriptor: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(descriptor, PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
