//! A proxy that runs for one round, and its end.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::namespace::Namespace;
use rig::pass::Pass;
use rig::process::{self, Process};
use rig::wait;

use crate::sample;

/// A start with ten thousand routes takes the slowest of them seconds.
const START_MAX: Duration = Duration::from_secs(60);
/// After a SIGTERM; then it is killed.
const STOP_MAX: Duration = Duration::from_secs(1);

/// A running proxy. It is ended when this goes, with all that descends from it; a bench that dies takes the proxy with it.
pub struct Running {
    /// None where the kernel does the work.
    process: Option<Process>,
    /// What must be done after its end.
    undo: Option<Command>,
    _passes: Vec<Pass>,
}

impl Running {
    /// Starts it.
    pub fn start(name: &str, command: Command) -> Result<Self> {
        Ok(Self {
            process: Some(Process::start(&name.replace('/', "-"), command)?),
            undo: None,
            _passes: Vec::new(),
        })
    }

    /// What the kernel does by itself until `undo` has run and the programs are gone.
    pub fn in_the_kernel(undo: Option<Command>, passes: Vec<Pass>) -> Self {
        Self {
            process: None,
            undo,
            _passes: passes,
        }
    }

    /// The same, with something to do after its end.
    pub fn undone_by(mut self, undo: Command) -> Self {
        self.undo = Some(undo);
        self
    }

    /// Waits until it accepts connections.
    pub fn listens(self, namespace: &Namespace, listen: SocketAddr) -> Result<Self> {
        self.waits(&format!("it to listen on {listen}"), || {
            namespace.inside(|| TcpStream::connect(listen)).is_ok()
        })
    }

    /// Waits until something is so, and it still runs.
    pub fn waits(mut self, what: &str, mut so: impl FnMut() -> bool) -> Result<Self> {
        let Some(process) = &mut self.process else {
            return Ok(self);
        };
        let done = wait::until(what, START_MAX, || match process.expect_running() {
            Err(error) => Some(Err(error)),
            Ok(()) => so().then_some(Ok(())),
        });
        // That it has ended is told with its last words already.
        done.with_context(|| format!("it said:\n{}", process.tail(20)))??;
        Ok(self)
    }

    /// Its process id; workers descend from it.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// What it printed last.
    pub fn last_words(&self) -> String {
        self.process
            .as_ref()
            .map(|process| process.tail(10))
            .unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process
            .as_ref()
            .context("there is no process to send a signal to")?
            .signal(signal)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // All of these fail only where it has ended already, which is what is wanted.
        if let Some(process) = &mut self.process {
            let tree = sample::tree(process.pid()).unwrap_or_default();
            let _ = process.signal(Signal::SIGTERM);
            let _ = process.wait(STOP_MAX);
            for pid in tree.into_iter().filter(|pid| process::runs(*pid)) {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
            // A worker that outlives its master for a moment still has the port.
            let deadline = Instant::now() + STOP_MAX;
            while !process::children(process.pid()).is_empty() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if let Some(undo) = &mut self.undo {
            let _ = rig::namespace::output(undo);
        }
    }
}
