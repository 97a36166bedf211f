//! What `sluice status` tells: plain facts, serialised as they stand.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::endpoints::Changes;
use super::message::Start;
use crate::config::{ListenerMode, Origin};
use crate::datapath::Interface;
use crate::metric::Registry;
use crate::net;
use crate::snapshot::Snapshot;

/// A running Sluice.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub instance: String,
    pub generation: u64,
    /// Of the last reload; the generation before is in force when it was refused.
    pub last_reload_success: bool,
    pub keeper_pid: u32,
    pub daemon_pid: u32,
    pub daemon_restarts: u64,
    pub uptime_s: u64,
    /// The CPU of each worker.
    pub workers: Vec<usize>,
    pub net: Net,
    pub listeners: Vec<Listener>,
    pub upstreams: Vec<Upstream>,
    pub datapath: Datapath,
    pub bans: u64,
    pub limits: Limits,
}

/// How workers ask the kernel for connections and bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Net {
    /// `uring` or `epoll`.
    pub backend: String,
    /// Why it is not the uring, where nobody asked for epoll.
    pub refused: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listener {
    pub name: String,
    pub addresses: Vec<String>,
    /// `http`, `https` or `forward`.
    pub mode: String,
    /// Where it forwards to.
    pub upstream: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Upstream {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    /// Endpoints of the file that a command removed; a reload brings them back.
    pub removed: Vec<SocketAddr>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub weight: u32,
    /// Where it stands in the files, or `runtime` where a command added or changed it: then a reload ends that.
    pub origin: String,
    /// What probes say; an endpoint that is not probed is believed healthy.
    pub healthy: bool,
    pub probed: bool,
    /// Whether the kernel half knows its neighbour; absent where it does not forward to it.
    pub resolved: Option<bool>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Datapath {
    /// `off` where there is none.
    pub state: String,
    pub interfaces: Vec<Interface>,
    /// Those of them where it is attached no more.
    pub lost: Vec<String>,
    pub flows: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Client connections at a time, all workers together.
    pub connections_max: u64,
    /// Receive buffers of all workers, in bytes.
    pub buffer_bytes_max: u64,
    /// File descriptors that the daemon may have open.
    pub descriptors_max: u64,
}

/// Where the facts are taken from.
pub(super) struct Facts<'c> {
    pub start: &'c Start,
    pub net: &'c net::Choice,
    pub snapshot: Option<&'c Snapshot>,
    pub changes: &'c Changes,
    pub registry: &'c Registry,
    pub uptime: Duration,
    pub bans: u64,
    pub flows: Option<u64>,
    /// Interfaces that the kernel half has lost.
    pub lost: &'c [String],
    /// Whether the kernel half knows the neighbour of each endpoint.
    pub resolved: Option<BTreeMap<SocketAddr, bool>>,
}

impl Facts<'_> {
    pub fn status(&self) -> Status {
        let control = &self.registry.control;
        let on = !self.start.maps.is_empty();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: self.start.instance.clone(),
            generation: control.generation.load(Relaxed),
            last_reload_success: control.last_reload_success.load(Relaxed),
            keeper_pid: nix::unistd::getppid().as_raw().unsigned_abs(),
            daemon_pid: std::process::id(),
            daemon_restarts: self.start.restarts,
            uptime_s: self.uptime.as_secs(),
            workers: self.start.cpus.clone(),
            net: Net {
                backend: self.net.backend.name().to_owned(),
                refused: self.net.refused.as_ref().map(ToString::to_string),
            },
            listeners: self.listeners(),
            upstreams: self.upstreams(),
            datapath: Datapath {
                state: if on { "on" } else { "off" }.to_owned(),
                interfaces: self.start.interfaces.clone(),
                lost: self.lost.to_vec(),
                flows: self.flows,
            },
            bans: self.bans,
            limits: self.limits(),
        }
    }

    fn listeners(&self) -> Vec<Listener> {
        let Some(config) = self.snapshot.map(|snapshot| &snapshot.config) else {
            return Vec::new();
        };
        let listener = |listener: &crate::config::Listener| {
            let (mode, upstream) = match &listener.mode {
                ListenerMode::Serve { tls: None } => ("http", None),
                ListenerMode::Serve { tls: Some(_) } => ("https", None),
                ListenerMode::Forward { upstream, .. } => {
                    ("forward", config.upstreams.get(*upstream))
                }
            };
            Listener {
                name: listener.name.clone(),
                addresses: listener.addresses.iter().map(ToString::to_string).collect(),
                mode: mode.to_owned(),
                upstream: upstream.map(|upstream| upstream.name.clone()),
            }
        };
        config.listeners.iter().map(listener).collect()
    }

    fn upstreams(&self) -> Vec<Upstream> {
        let Some(snapshot) = self.snapshot else {
            return Vec::new();
        };
        let pairs = snapshot.upstreams.iter().zip(&snapshot.config.upstreams);
        let upstreams = pairs.map(|(upstream, config)| {
            let changes = self.changes.of(&config.name);
            let origin = |address| match changes.change(address) {
                Some(_) => Origin::Runtime.to_string(),
                None => config.at.to_string(),
            };
            let endpoints = upstream.endpoints.iter().map(|endpoint| Endpoint {
                address: endpoint.address,
                weight: endpoint.weight,
                origin: origin(endpoint.address),
                healthy: endpoint.health().is_healthy(),
                probed: config.probe.is_some(),
                resolved: self
                    .resolved
                    .as_ref()
                    .and_then(|resolved| resolved.get(&endpoint.address))
                    .copied(),
            });
            Upstream {
                name: upstream.name.clone(),
                endpoints: endpoints.collect(),
                removed: changes.removed().collect(),
            }
        });
        upstreams.collect()
    }

    fn limits(&self) -> Limits {
        let workers = self.start.cpus.len() as u64;
        let net = self.snapshot.map(|snapshot| &snapshot.tunables.net);
        Limits {
            connections_max: net.map_or(0, |net| u64::from(net.connections_max) * workers),
            buffer_bytes_max: net.map_or(0, |net| {
                u64::from(net.buffers) * net.buffer_bytes as u64 * workers
            }),
            descriptors_max: nix::sys::resource::getrlimit(
                nix::sys::resource::Resource::RLIMIT_NOFILE,
            )
            .map_or(0, |(soft, _)| soft),
        }
    }
}
