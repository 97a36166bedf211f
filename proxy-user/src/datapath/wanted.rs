//! From the configuration to what the kernel half shall do.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use proxy_ebpf::abi::{mode, option, protocol};

use super::plan::{Wanted, WantedEndpoint, WantedListener, WantedNat, WantedUpstream};
use crate::config::{Config, Fragments, ListenerMode, PolicyKind, Protocol, Via};
use crate::tunable::Tunables;

/// What `config` asks of the kernel half. `is_healthy` is asked for each endpoint; `addresses` are those of the
/// interfaces that XDP is attached to, which a listener on all addresses stands for.
pub fn wanted(
    config: &Config,
    tunables: &Tunables,
    addresses: &[IpAddr],
    is_healthy: impl Fn(usize, SocketAddr) -> bool,
) -> Wanted {
    let mut wanted = Wanted {
        nat: nat(config, tunables),
        tunnel: tunnel(config),
        rules: rules(config),
        ..Wanted::default()
    };
    // Only upstreams that a listener forwards to have a ring: one for each family by NAT, one for both otherwise.
    let mut rings = HashMap::new();
    for listener in &config.listeners {
        let upstream = match &listener.mode {
            ListenerMode::Serve { .. } => None,
            ListenerMode::Forward { upstream, via, .. } => Some((*upstream, *via)),
        };
        for address in &listener.addresses {
            let protocol = match address.protocol {
                Protocol::Tcp => protocol::TCP,
                Protocol::Udp => protocol::UDP,
            };
            for ip in expand(address.socket.ip(), addresses) {
                let address = SocketAddr::new(ip, address.socket.port());
                let upstream = upstream.map(|(index, via)| {
                    let v4 = (!via.crosses_families()).then_some(ip.is_ipv4());
                    let ring = *rings.entry((index, v4)).or_insert_with(|| {
                        let ring = ring(config, index, v4, &is_healthy);
                        wanted.upstreams.push(ring);
                        wanted.upstreams.len() - 1
                    });
                    (ring, mode_of(via))
                });
                wanted.listeners.push(WantedListener {
                    name: listener.name.clone(),
                    address,
                    protocol,
                    upstream,
                    options: options(&listener.mode),
                });
            }
        }
    }
    keep_exact(&mut wanted.listeners, config);
    wanted
}

const fn mode_of(via: Via) -> u32 {
    match via {
        Via::Nat => mode::NAT,
        Via::Direct => mode::DIRECT,
        Via::Ipip => mode::IPIP,
        Via::Gue => mode::GUE,
    }
}

const fn options(listener: &ListenerMode) -> u32 {
    match listener {
        ListenerMode::Forward { fragments, .. } => match fragments {
            Fragments::Follow => 0,
            Fragments::Pass => option::FRAGMENTS_PASS,
            Fragments::Drop => option::FRAGMENTS_DROP,
        },
        ListenerMode::Serve { .. } => 0,
    }
}

/// The endpoints of an upstream: of one family, or all.
fn ring(
    config: &Config,
    index: usize,
    v4: Option<bool>,
    is_healthy: impl Fn(usize, SocketAddr) -> bool,
) -> WantedUpstream {
    let upstream = config.upstreams.get(index);
    let of_family = upstream
        .iter()
        .flat_map(|upstream| &upstream.endpoints)
        .filter(|endpoint| v4.is_none_or(|v4| endpoint.address.is_ipv4() == v4));
    let endpoints = of_family.map(|endpoint| WantedEndpoint {
        address: endpoint.address,
        weight: endpoint.weight,
        healthy: is_healthy(index, endpoint.address),
    });
    WantedUpstream {
        // A name of the configuration's has no space in it.
        name: format!(
            "{} {}",
            upstream.map_or("", |upstream| &upstream.name),
            match v4 {
                Some(true) => "IPv4",
                Some(false) => "IPv6",
                None => "all",
            }
        ),
        endpoints: endpoints.collect(),
    }
}

/// The unspecified address stands for every address of its family.
fn expand(ip: IpAddr, addresses: &[IpAddr]) -> Vec<IpAddr> {
    if !ip.is_unspecified() {
        return vec![ip];
    }
    addresses
        .iter()
        .copied()
        .filter(|address| address.is_ipv4() == ip.is_ipv4())
        .collect()
}

/// Where a listener names an address and another stands for all of them, the one that names it is meant, as in Linux.
fn keep_exact(listeners: &mut Vec<WantedListener>, config: &Config) {
    let named = |name: &str, address: SocketAddr| {
        let of_name = config
            .listeners
            .iter()
            .filter(|listener| listener.name == name);
        of_name
            .flat_map(|listener| &listener.addresses)
            .any(|listened| listened.socket == address)
    };
    let exact: std::collections::HashSet<_> = listeners
        .iter()
        .filter(|listener| named(&listener.name, listener.address))
        .map(|listener| (listener.address, listener.protocol))
        .collect();
    listeners.retain(|listener| {
        !exact.contains(&(listener.address, listener.protocol))
            || named(&listener.name, listener.address)
    });
}

fn nat(config: &Config, tunables: &Tunables) -> Option<WantedNat> {
    let ns = |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let tcp_idle_ns = ns(tunables.flow.tcp_idle_timeout);
    config.datapath.nat.as_ref().map(|nat| WantedNat {
        sources: nat.source.clone(),
        port_first: nat.ports.0,
        port_last: nat.ports.1,
        tcp_idle_ns,
        tcp_brief_ns: ns(tunables.flow.tcp_brief_timeout).min(tcp_idle_ns),
        udp_idle_ns: ns(tunables.flow.udp_idle_timeout),
    })
}

fn tunnel(config: &Config) -> Vec<IpAddr> {
    let tunnel = config.datapath.tunnel.as_ref();
    tunnel.map_or_else(Vec::new, |tunnel| tunnel.source.clone())
}

fn rules(config: &Config) -> Vec<String> {
    let bans =
        |kind: &PolicyKind| matches!(kind, PolicyKind::RateLimit(limit) if limit.ban.is_some());
    config
        .policies
        .iter()
        .filter(|policy| bans(&policy.kind))
        .map(|policy| policy.name.clone())
        .collect()
}
