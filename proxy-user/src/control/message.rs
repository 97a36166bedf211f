//! What keeper and daemon say to each other.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::configuration::Flags;
use super::endpoints::Changes;
use super::names::Remembered;
use crate::config::{Bundle, Diagnostic};
use crate::datapath::{Interface, Names};
use crate::tunable::NetBackend;

/// From the keeper. Descriptors come in the order: admin socket, cells, maps, then `sockets`; the first three only with `start`.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToDaemon {
    /// Make this configuration the one in force. Answered with `Applied` or `Refused`.
    Apply(Box<Apply>),
    /// A reload came to nothing: the files are bad, or a socket could not be opened.
    NotApplied {
        /// As of `Apply`.
        asked: u64,
        diagnostics: Vec<Diagnostic>,
    },
    /// Interfaces that had gone are back, and XDP is attached to them again: all of them as they are now.
    Attached(Vec<Interface>),
    /// Lines of the access log go to the file that comes beside, from now on.
    AccessLog,
    /// End all exchanges in an orderly way, then end.
    Drain,
    /// End.
    Stop,
}

/// A generation of the configuration.
#[derive(Debug, Serialize, Deserialize)]
pub struct Apply {
    pub generation: u64,
    /// The main file, by the path under which `bundle` has it.
    pub main: PathBuf,
    pub bundle: Bundle,
    pub flags: Flags,
    /// Of the reloads that this daemon asked for, the last that had come when the files were read. 0 = none.
    pub asked: u64,
    /// New listening sockets.
    pub sockets: Vec<Socket>,
    /// Addresses that are not listened on any more.
    pub closed: Vec<SocketAddr>,
    /// In the first message to a daemon.
    pub start: Option<Start>,
}

/// A listening socket, which comes beside the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    pub address: SocketAddr,
    /// Index of the worker that it is for.
    pub worker: usize,
}

/// What a daemon needs to know once.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    pub instance: String,
    /// The CPU of each worker.
    pub cpus: Vec<usize>,
    pub backend: NetBackend,
    /// Daemons before this one.
    pub restarts: u64,
    /// Rate cells in the memory that comes beside.
    pub cells: usize,
    /// What their keys are hashed with: secret, and as old as the keeper.
    pub cells_seed: u64,
    /// Where XDP is attached; empty without a datapath.
    pub interfaces: Vec<Interface>,
    /// Names of the maps that come beside.
    pub maps: Vec<String>,
    pub memory: Memory,
}

/// What a daemon wants the next one to know; the keeper keeps it and does not read it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Ids in the maps.
    pub names: Names,
    /// What the DNS said last of each name.
    pub resolved: Remembered,
    /// Tunables that were set at run time.
    pub runtime: Vec<(String, String)>,
    /// Endpoints that were changed at run time.
    pub endpoints: Changes,
    /// Bans where there is no datapath to remember them: source, end on the coarse clock, rule.
    pub bans: Vec<(IpAddr, u64, String)>,
}

/// From the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToKeeper {
    /// The generation is in force, and the daemon needs no socket of the one before.
    Applied {
        generation: u64,
    },
    /// The generation is not in force; the one before still is.
    Refused {
        generation: u64,
        diagnostics: Vec<Diagnostic>,
    },
    /// Somebody asked for a reload; each daemon counts its own, from 1.
    Reload {
        asked: u64,
    },
    Remember(Memory),
}
