//! A new generation: all of it comes into force, or nothing.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::{APPLY_TIMEOUT, Generation, Keeper, Pending};
use crate::config::{Config, Diagnostic, diagnostic};
use crate::control::message::{Apply, Socket, ToDaemon};
use crate::datapath::Kernel;
use crate::keeper::daemon::Daemon;
use crate::keeper::sockets::Sockets;
use crate::keeper::{access_log, read, tell};
use crate::tunable::Tunables;

impl Keeper {
    /// Reads everything again; all of it comes into force, or nothing.
    pub(super) fn reload(&mut self) {
        // What a daemon has not answered for yet, a new one's start as well, would be lost to it over the next.
        let is_ready = self.daemon.as_ref().is_some_and(|daemon| daemon.ready);
        if self.pending.is_some() || !is_ready {
            self.reload_again = true;
            return;
        }
        let tried = read(&self.held.settings).and_then(|(loaded, bundle)| {
            tell(&loaded.warnings, self.held.settings.colour);
            self.refuse_restart_matters(&loaded.config)?;
            let access_log = access_log::open(&loaded.config)?;
            let opened = self.open_sockets(&loaded.config, &loaded.tunables)?;
            Ok((loaded, bundle, opened, access_log))
        });
        match tried {
            Ok((loaded, bundle, opened, access_log)) => {
                let number = self.in_force.as_ref().map_or(0, |now| now.number) + 1;
                let generation = Generation {
                    number,
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
                self.send_pending();
            }
            Err(diagnostics) => {
                self.tell_refused(&diagnostics);
                let said = ToDaemon::NotApplied {
                    asked: self.asked,
                    diagnostics,
                };
                if let Some(daemon) = &mut self.daemon
                    && daemon.say(&said, &[]).is_err()
                {
                    daemon.kill();
                }
            }
        }
    }

    fn tell_refused(&self, diagnostics: &[Diagnostic]) {
        eprint!(
            "{}",
            diagnostic::render(diagnostics, self.held.settings.colour)
        );
        let summary = diagnostic::summary(diagnostics);
        match &self.in_force {
            Some(now) => {
                log::error!(
                    "reload refused, generation {} goes on: {summary}",
                    now.number
                )
            }
            None => log::error!("the daemon refused to start: {summary}"),
        }
    }

    /// What only a new keeper can change.
    fn refuse_restart_matters(&self, config: &Config) -> Result<(), Vec<Diagnostic>> {
        let Some(now) = &self.in_force else {
            return Ok(());
        };
        let (before, after) = (&now.config.datapath, &config.datapath);
        if before.interfaces == after.interfaces
            && before.mode == after.mode
            && before.hash_key == after.hash_key
        {
            return Ok(());
        }
        Err(vec![
            Diagnostic::error(
                "the interfaces, the mode and the hash key of the datapath change only when Sluice starts",
            )
            .at(&after.at)
            .help("restart Sluice: packets of forward listeners are forwarded meanwhile"),
        ])
    }

    /// Opens the sockets that are missing; answers their addresses.
    fn open_sockets(
        &mut self,
        config: &Config,
        tunables: &Tunables,
    ) -> Result<Vec<SocketAddr>, Vec<Diagnostic>> {
        let workers = self.held.cpus.len();
        let opened =
            self.sockets
                .open_missing(config, workers, tunables.net.backlog, Duration::ZERO)?;
        Ok(self.adopt(opened))
    }

    /// Steers sockets and holds them from now on; answers their addresses.
    pub(super) fn adopt(&mut self, opened: Sockets) -> Vec<SocketAddr> {
        if let Some(kernel) = &mut self.held.kernel {
            for (address, sockets) in opened.iter() {
                let group: Vec<(u32, BorrowedFd<'_>)> = self
                    .held
                    .cpus
                    .iter()
                    .zip(sockets)
                    .map(|(cpu, socket)| (*cpu as u32, socket.as_fd()))
                    .collect();
                if let Err(error) = kernel.steer(address, &group) {
                    // The kernel chooses by its own hash then: slower, and right.
                    log::warn!(
                        "connections to {address} are not steered to the CPU that takes them: {error:#}"
                    );
                }
            }
        }
        let addresses = opened.iter().map(|(address, _)| address).collect();
        self.sockets.extend(opened);
        addresses
    }

    fn close_sockets(&mut self, addresses: &[SocketAddr]) {
        if let Some(kernel) = &mut self.held.kernel {
            addresses
                .iter()
                .for_each(|address| kernel.unsteer(*address));
        }
        self.sockets.close(addresses);
    }

    /// Gives the pending generation to a daemon that runs already.
    fn send_pending(&mut self) {
        let (Some(pending), Some(daemon)) = (&self.pending, &mut self.daemon) else {
            return;
        };
        let new = self
            .sockets
            .each()
            .filter(|(address, ..)| pending.opened.contains(address));
        let (sockets, descriptors): (Vec<_>, Vec<_>) = new
            .map(|(address, worker, socket)| (Socket { address, worker }, socket))
            .unzip();
        let generation = &pending.generation;
        let apply = Apply {
            generation: generation.number,
            main: self.held.settings.main.clone(),
            bundle: generation.bundle.clone(),
            flags: self.held.settings.flags.clone(),
            asked: self.asked,
            sockets,
            closed: self.sockets.surplus(&generation.config),
            start: None,
        };
        if let Err(error) = daemon.say(&ToDaemon::Apply(Box::new(apply)), &descriptors) {
            log::error!("the daemon does not listen: {error}");
            daemon.kill();
        }
    }

    pub(super) fn applied(&mut self, number: u64) {
        if let Some(daemon) = &mut self.daemon {
            daemon.ready = true;
        }
        match self
            .pending
            .take_if(|pending| pending.generation.number == number)
        {
            Some(pending) => {
                self.access_log = pending.access_log;
                self.give_access_log();
                let surplus = self.sockets.surplus(&pending.generation.config);
                self.close_sockets(&surplus);
                let first = self.in_force.replace(pending.generation).is_none();
                self.held.kernel.iter_mut().for_each(Kernel::keep);
                self.tell_in_force(first);
            }
            None => {
                let pid = self.daemon.as_ref().map_or(0, Daemon::pid);
                log::info!(
                    "a new daemon serves generation {number} on the same sockets: pid={pid}"
                );
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
            let addresses: Vec<String> =
                listener.addresses.iter().map(ToString::to_string).collect();
            log::info!(
                "listening: listener={} addresses={}",
                listener.name,
                addresses.join(",")
            );
        }
        let pid = self.daemon.as_ref().map_or(0, Daemon::pid);
        log::info!(
            "ready: instance={} workers={} daemon={pid} admin={}",
            self.held.settings.instance,
            self.held.cpus.len(),
            self.held.settings.admin.display()
        );
    }

    pub(super) fn refused(&mut self, number: u64, diagnostics: &[Diagnostic]) {
        self.tell_refused(diagnostics);
        if self
            .pending
            .as_ref()
            .is_some_and(|pending| pending.generation.number == number)
        {
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
    pub(super) fn roll_back(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.close_sockets(&pending.opened);
        }
    }

    /// The first generation was refused: there is nothing to go on with.
    pub(super) fn refused_first(&self) -> bool {
        self.in_force.is_none() && self.pending.is_none()
    }
}
