//! Stand-in until the integrator's worker comes: accepts nothing, obeys its commands.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Instant;

use crate::offload::{Cells, Denied};
use crate::snapshot::Snapshot;
use crate::{metric, net, report};

/// What control tells a worker.
#[derive(Debug)]
pub enum Command {
    Apply {
        snapshot: Arc<Snapshot>,
        listeners: Vec<(usize, OwnedFd)>,
        close: Vec<SocketAddr>,
    },
    CloseSource(IpAddr),
    Drain {
        deadline: Instant,
    },
    Stop,
}

/// What a worker shares with control.
#[derive(Debug)]
pub struct Shared {
    pub commands: Receiver<Command>,
    pub doorbell: net::Doorbell,
    pub reports: report::Sender,
    pub cells: Arc<Cells>,
    pub denied: Arc<Denied>,
    pub metrics: Arc<metric::Worker>,
}

/// Starts a worker on a CPU.
///
/// # Errors
/// No thread is left.
pub fn start(
    index: usize,
    _cpu: usize,
    _settings: net::Settings,
    shared: Shared,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let mut sockets = Vec::new();
            for command in &shared.commands {
                match command {
                    Command::Apply { listeners, .. } => sockets.extend(listeners),
                    Command::CloseSource(_) => {}
                    Command::Drain { .. } | Command::Stop => return,
                }
            }
        })
}
