//! What `sluice status` tells: plain facts, serialised as they stand.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::ejections::Ejections;
use super::endpoints::Changes;
use super::message::Start;
use super::names::Names;
use crate::config::{self, ListenerMode, Origin};
use crate::datapath::Interface;
use crate::metric::Registry;
use crate::net;
use crate::offload::now_ns;
use crate::overload::{Signal, Stage};
use crate::snapshot::Snapshot;
use crate::upstream::{self, SHARE_WHOLE};

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
    pub overload: Vec<Overload>,
    pub limits: Limits,
}

/// What one signal of overload says, in the worst worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Overload {
    pub signal: String,
    pub used_percent: i64,
    /// What is left off because of it; `none` is nothing.
    pub stage: String,
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
    /// Health is ignored, because too few endpoints have it.
    pub panics: bool,
    /// `open` while nobody is asked because too many calls failed, else `closed`; absent where there is no breaker.
    pub breaker: Option<String>,
    pub endpoints: Vec<Endpoint>,
    /// Calls that may be under way at a time; absent where there is no limit.
    pub calls_max: Option<u32>,
    /// Requests that wait for room.
    pub pending: u32,
    pub names: Vec<Name>,
    /// Endpoints of the file that a command removed; a reload brings them back.
    pub removed: Vec<SocketAddr>,
}

/// A name that stands for endpoints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Name {
    pub name: String,
    /// How many addresses the DNS has for it, by the last good answer.
    pub addresses: usize,
    /// Why the last answer was none.
    pub failure: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub weight: u32,
    /// It is asked only while no other can be.
    pub backup: bool,
    /// Calls under way.
    pub calls_active: u64,
    /// Calls that may be under way at a time; absent where there is no limit.
    pub calls_max: Option<u32>,
    /// Where it stands in the files, or `runtime` where a command added or changed it: then a reload ends that; or `dns`.
    pub origin: String,
    /// What its probe says, and the calls to it; one of which neither speaks is believed healthy.
    pub healthy: bool,
    pub probed: bool,
    /// For how long it is still left out because calls to it failed.
    pub ejected_s: Option<u64>,
    /// The share of its weight that it takes part with, while it starts slowly.
    pub share_percent: Option<u32>,
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
    pub ejections: &'c Ejections,
    pub names: Option<&'c Names>,
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
            overload: self.overload(),
            limits: self.limits(),
        }
    }

    fn overload(&self) -> Vec<Overload> {
        let signals = Signal::ALL.into_iter().zip(self.registry.overload());
        let told = signals.map(|(signal, (used_percent, stage))| {
            let stage = usize::try_from(stage).ok();
            let stage = stage.and_then(|stage| Stage::ALL.get(stage));
            Overload {
                signal: signal.word().to_owned(),
                used_percent,
                stage: stage.map_or("none", |stage| stage.word()).to_owned(),
            }
        });
        told.collect()
    }

    fn listeners(&self) -> Vec<Listener> {
        let Some(config) = self.snapshot.map(|snapshot| &snapshot.config) else {
            return Vec::new();
        };
        let listener = |listener: &config::Listener| {
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
            let endpoints = upstream.endpoints.iter();
            let endpoints = endpoints.map(|endpoint| {
                let origin = match changes.change(endpoint.address) {
                    Some(_) => Origin::Runtime.to_string(),
                    None if endpoint.is_named => "dns".to_owned(),
                    None => config.at.to_string(),
                };
                self.endpoint(upstream, endpoint, origin, config.probe.is_some())
            });
            Upstream {
                name: upstream.name.clone(),
                panics: upstream.panics(),
                breaker: upstream
                    .breaker()
                    .map(|breaker| if breaker.is_open() { "open" } else { "closed" }.to_owned()),
                endpoints: endpoints.collect(),
                calls_max: upstream.calls_max,
                pending: upstream.queue().facts().pending,
                names: self.names(config),
                removed: changes.removed().collect(),
            }
        });
        upstreams.collect()
    }

    fn names(&self, upstream: &config::Upstream) -> Vec<Name> {
        let names = upstream.names.iter().filter_map(|name| {
            let known = self.names?.known(name);
            Some(Name {
                name: name.name().to_owned(),
                addresses: known.targets.len(),
                failure: known.failure,
            })
        });
        names.collect()
    }

    fn endpoint(
        &self,
        upstream: &upstream::Upstream,
        endpoint: &upstream::Endpoint,
        origin: String,
        probed: bool,
    ) -> Endpoint {
        let address = endpoint.address;
        let left = self
            .ejections
            .left((&upstream.name, address), Instant::now());
        let share = upstream.share(endpoint, now_ns());
        let resolved = self.resolved.as_ref();
        Endpoint {
            address,
            weight: endpoint.weight,
            backup: endpoint.is_backup,
            calls_active: endpoint.active(),
            calls_max: endpoint.calls_max,
            origin,
            healthy: endpoint.is_healthy(),
            probed,
            ejected_s: left.map(|left| left.as_secs()),
            share_percent: (share < SHARE_WHOLE).then_some(share * 100 / SHARE_WHOLE),
            resolved: resolved
                .and_then(|resolved| resolved.get(&address))
                .copied(),
        }
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
