//! A proxy that runs for one round, and its end.

use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::namespace::Namespace;
use rig::process::{self, Process};
use rig::wait;

use super::LISTEN;
use crate::sample;

/// A start with ten thousand routes takes the slowest of them seconds.
const START_MAX: Duration = Duration::from_secs(30);
/// After a SIGTERM; then it is killed.
const STOP_MAX: Duration = Duration::from_secs(5);

/// A running proxy. It is ended when this goes, with all that descends from it; a bench that dies takes the proxy with it.
pub struct Running {
    process: Process,
}

impl Running {
    /// Starts it and waits until it accepts connections.
    pub fn start(name: &str, namespace: &Namespace, command: Command) -> Result<Self> {
        let name = name.replace('/', "-");
        let mut running = Self {
            process: Process::start(&name, command)?,
        };
        let what = format!("{name} to listen on {LISTEN}");
        wait::until(&what, START_MAX, || {
            if let Err(error) = running.process.expect_running() {
                return Some(Err(error));
            }
            namespace
                .inside(|| TcpStream::connect(LISTEN))
                .is_ok()
                .then_some(Ok(()))
        })
        .and_then(|listens| listens)
        .with_context(|| format!("{name} said:\n{}", running.process.tail(20)))?;
        Ok(running)
    }

    /// Its process id; workers descend from it.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it printed last.
    pub fn last_words(&self) -> String {
        self.process.tail(10)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // All of these fail only where it has ended already, which is what is wanted.
        let tree = sample::tree(self.pid()).unwrap_or_default();
        let _ = self.process.signal(Signal::SIGTERM);
        let _ = self.process.wait(STOP_MAX);
        for pid in tree.into_iter().filter(|pid| process::runs(*pid)) {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }
}
