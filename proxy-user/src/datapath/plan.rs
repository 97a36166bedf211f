//! From what the maps hold to what they shall hold: checked as a whole, then writes in an order that no packet can notice.

mod prefix;
mod ring;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use proxy_ebpf::abi::{self, mode, option};
use serde::{Deserialize, Serialize};

use super::{Full, address, port};
use crate::config::ListenAddress;
pub use ring::{Endpoints, change};

/// Where endpoints expect generic UDP encapsulation (the port that IANA gave it).
const GUE_PORT: u16 = 6080;

/// What the kernel half shall do, in words of the configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    pub listeners: Vec<WantedListener>,
    pub prefixes: Vec<WantedPrefix>,
    pub upstreams: Vec<WantedUpstream>,
    pub nat: Option<WantedNat>,
    /// Sources of encapsulated packets; at most one of each family.
    pub tunnel: Vec<IpAddr>,
    /// Names of rules that may ban.
    pub rules: Vec<String>,
}

/// One address of a listener.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedListener {
    pub name: String,
    pub address: SocketAddr,
    /// One of `abi::protocol`.
    pub protocol: u8,
    /// Index into `Wanted::upstreams`, and the `mode` by which it forwards; `None` = handed up to a worker.
    pub upstream: Option<(usize, u32)>,
    /// Bits of `abi::option`.
    pub options: u32,
}

/// An address of a listener that stands for more than would each get an entry.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedPrefix {
    pub name: String,
    pub address: ListenAddress,
    /// As in `WantedListener`.
    pub protocol: u8,
    pub upstream: Option<(usize, u32)>,
    pub options: u32,
}

/// An upstream that a listener forwards to.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedUpstream {
    pub name: String,
    pub endpoints: Vec<WantedEndpoint>,
}

/// One endpoint of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WantedEndpoint {
    pub address: SocketAddr,
    pub weight: u32,
    pub healthy: bool,
}

/// NAT, in host order.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedNat {
    pub sources: Vec<IpAddr>,
    pub port_first: u16,
    pub port_last: u16,
    pub tcp_idle_ns: u64,
    pub tcp_brief_ns: u64,
    pub udp_idle_ns: u64,
}

/// Which id a name has, kept over reloads and restarts, so that counters keep their meaning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Names {
    pub listeners: BTreeMap<String, u32>,
    pub upstreams: BTreeMap<String, u32>,
    pub rules: BTreeMap<String, u32>,
}

impl Names {
    /// Without ids that these maps do not have, and without two names for one id: what is remembered comes from a file,
    /// and before that from a daemon that may have been somebody else's.
    pub fn within(mut self, capacity: &Capacity) -> Self {
        let listeners = u32::try_from(capacity.listeners).unwrap_or(u32::MAX);
        for (ids, end) in [
            (&mut self.listeners, listeners),
            (&mut self.upstreams, capacity.upstreams),
            (&mut self.rules, abi::size::RULES),
        ] {
            let mut seen = BTreeSet::new();
            ids.retain(|_, id| (1..end).contains(id) && seen.insert(*id));
        }
        self
    }
}

/// How much the maps can hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    pub listeners: usize,
    pub prefixes: u32,
    pub upstreams: u32,
    pub endpoints: u32,
    pub ring_pages: u32,
    pub nat_flows: u32,
}

/// The address a listener stands on. Port and protocol 0: a NAT source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: u8,
}

/// What the maps hold.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub capacity: Capacity,
    pub names: Names,
    pub listeners: BTreeMap<Key, abi::Listener>,
    pub prefixes: BTreeMap<abi::PrefixKey, abi::Prefix>,
    pub upstreams: BTreeMap<u32, abi::Upstream>,
    /// The neighbour in them is not this plan's matter.
    pub endpoints: Endpoints,
    pub nat: abi::Nat,
    pub tunnel: abi::Tunnel,
}

impl State {
    /// Ids of listeners that a packet may find.
    pub fn listener_ids(&self) -> BTreeSet<u32> {
        let in_prefixes = self.prefixes.values().flat_map(|prefix| &prefix.ranges);
        let in_prefixes = in_prefixes.map(|range| range.listener.id);
        let exact = self.listeners.values().map(|listener| listener.id);
        exact.chain(in_prefixes).collect()
    }
}

/// Ports that can be ours.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PortSets {
    /// Port 0 among them says that a listener has all ports of its address.
    pub listener: BTreeSet<u16>,
    pub nat: Option<(u16, u16)>,
    /// Ranges; port 0 among them says that there are prefixes.
    pub prefix: Vec<(u16, u16)>,
}

/// One write. Each is atomic for a packet, and the state after each is one that a packet may meet.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// An endpoint without a neighbour yet.
    Endpoint(u16, SocketAddr),
    /// Owners of slots from the beginning of a page on. Flows of a slot that moves stay with its owner in the ring
    /// `before`, unless that is one of `dead`.
    Ring {
        page: u32,
        slots: Vec<u16>,
        before: Option<abi::Upstream>,
        dead: BTreeSet<u16>,
    },
    Upstream(u32, abi::Upstream),
    /// NAT with its cursors left as they are.
    Nat(Box<abi::Nat>),
    Tunnel(abi::Tunnel),
    /// Bits of these ports, in addition to those that are set.
    AddPorts(PortSets),
    /// Counters of a listener begin at 0.
    ResetListener(u32),
    Listener(Key, abi::Listener),
    RemoveListener(Key),
    Prefix(abi::PrefixKey, Box<abi::Prefix>),
    RemovePrefix(abi::PrefixKey),
    /// Bits of these ports and of no others.
    SetPorts(PortSets),
}

/// Computes the writes from `state` to `wanted`, and the state after them. Rings that are as wanted by what is `in_force`
/// are left alone.
///
/// # Errors
/// Something does not fit; then nothing is to be written.
pub fn plan(
    state: &State,
    wanted: &Wanted,
    in_force: Option<&Wanted>,
) -> Result<(Vec<Write>, State), Full> {
    let mut next = Planner {
        state: state.clone(),
        writes: Vec::new(),
    };
    next.upstreams(state, wanted, in_force)?;
    next.nat(wanted)?;
    next.tunnel(wanted);
    next.listeners(state, wanted)?;
    next.rules(wanted)?;
    Ok((next.writes, next.state))
}

struct Planner {
    state: State,
    writes: Vec<Write>,
}

impl Planner {
    fn upstreams(
        &mut self,
        before: &State,
        wanted: &Wanted,
        in_force: Option<&Wanted>,
    ) -> Result<(), Full> {
        let in_use: BTreeSet<u32> = before.upstreams.keys().copied().collect();
        let names: Vec<&str> = wanted
            .upstreams
            .iter()
            .map(|upstream| upstream.name.as_str())
            .collect();
        let capacity = self.state.capacity.upstreams;
        assign(
            &mut self.state.names.upstreams,
            &names,
            1..capacity,
            &in_use,
        )
        .ok_or(Full::new("upstreams", capacity))?;
        let in_force: HashMap<&str, &WantedUpstream> = in_force
            .iter()
            .flat_map(|wanted| &wanted.upstreams)
            .map(|upstream| (upstream.name.as_str(), upstream))
            .collect();
        let others = wanted
            .upstreams
            .iter()
            .filter(|upstream| in_force.get(upstream.name.as_str()) != Some(upstream));
        let mut change = change(&self.state, others)?;
        self.writes.append(&mut change.writes);
        self.state.take(change);
        Ok(())
    }

    fn nat(&mut self, wanted: &Wanted) -> Result<(), Full> {
        let mut nat = wanted
            .nat
            .as_ref()
            .map_or_else(bytemuck::Zeroable::zeroed, encode_nat);
        nat.cursors = self.state.nat.cursors;
        let flows = u64::from(nat.sources_count) * 2 * u64::from(nat.ports);
        let capacity = self.state.capacity.nat_flows;
        if flows > u64::from(capacity) {
            return Err(Full {
                needed: Some(flows),
                ..Full::new("nat_flows", capacity)
            });
        }
        if nat != self.state.nat {
            self.state.nat = nat;
            self.writes.push(Write::Nat(Box::new(nat)));
        }
        Ok(())
    }

    /// Sources that are not wanted any more stay until others come: what still leaves must leave from somewhere.
    fn tunnel(&mut self, wanted: &Wanted) {
        let mut tunnel = self.state.tunnel;
        tunnel.gue_port = port(GUE_PORT);
        for source in &wanted.tunnel {
            let place = if source.is_ipv4() {
                &mut tunnel.source4
            } else {
                &mut tunnel.source6
            };
            *place = address(*source);
        }
        if !wanted.tunnel.is_empty() && tunnel != self.state.tunnel {
            self.state.tunnel = tunnel;
            self.writes.push(Write::Tunnel(tunnel));
        }
    }

    /// Listeners last when they come, first when they go.
    fn listeners(&mut self, before: &State, wanted: &Wanted) -> Result<(), Full> {
        let capacity = self.state.capacity.listeners;
        let full = Full::new("listeners", u32::try_from(capacity).unwrap_or(u32::MAX));
        let in_use = before.listener_ids();
        let exact = wanted.listeners.iter().map(|listener| &listener.name);
        let of_prefixes = wanted.prefixes.iter().map(|prefix| &prefix.name);
        let mut names: Vec<&str> = exact.chain(of_prefixes).map(String::as_str).collect();
        names.dedup();
        let fresh = assign(
            &mut self.state.names.listeners,
            &names,
            1..full.capacity,
            &in_use,
        )
        .ok_or(full.clone())?;
        self.writes
            .extend(fresh.into_iter().map(Write::ResetListener));

        let prefixes = self.prefix_entries(wanted)?;
        let target = self.listener_entries(wanted);
        let v4 = target.keys().filter(|key| key.address.is_ipv4()).count();
        // Old and new ones are in the map together for a moment.
        let old = |v4: bool| {
            let gone = |key: &&Key| key.address.is_ipv4() == v4 && !target.contains_key(key);
            before.listeners.keys().filter(gone).count()
        };
        if v4 + old(true) > capacity || target.len() - v4 + old(false) > capacity {
            return Err(full);
        }
        let of_listeners = target.keys().filter(|key| key.protocol > 0);
        let ports = PortSets {
            listener: of_listeners.map(|key| key.port).collect(),
            nat: (wanted.nat.as_ref()).map(|nat| (nat.port_first, nat.port_last)),
            prefix: prefix::ports(wanted),
        };
        self.writes.push(Write::AddPorts(ports.clone()));
        self.add_prefixes(before, &prefixes);
        for (key, entry) in &target {
            if before.listeners.get(key) != Some(entry) {
                self.writes.push(Write::Listener(*key, *entry));
            }
        }
        for key in before
            .listeners
            .keys()
            .filter(|key| !target.contains_key(key))
        {
            self.writes.push(Write::RemoveListener(*key));
        }
        self.remove_prefixes(before, &prefixes);
        self.writes.push(Write::SetPorts(ports));
        self.state.listeners = target;
        self.state.prefixes = prefixes;
        self.retire_upstreams(wanted);
        Ok(())
    }

    fn listener_entries(&self, wanted: &Wanted) -> BTreeMap<Key, abi::Listener> {
        let mut entries = BTreeMap::new();
        for listener in &wanted.listeners {
            let key = Key {
                address: listener.address.ip().to_canonical(),
                port: listener.address.port(),
                protocol: listener.protocol,
            };
            let own = self.listener(&listener.name, listener.upstream, listener.options, wanted);
            entries.insert(key, own);
            // What has no ports is judged by its address, and dropped only where all that stand there would drop it.
            let place = Key {
                port: 0,
                protocol: 0,
                ..key
            };
            let around = wanted.prefixes.iter();
            let around = around.filter(|prefix| prefix.address.has_ip(key.address));
            let dropped = around.fold(listener.options, |all, one| all & one.options);
            let dropped = dropped & option::FRAGMENTS_DROP;
            entries
                .entry(place)
                .and_modify(|entry: &mut abi::Listener| entry.options &= dropped)
                .or_insert(entry(0, mode::ADDRESS, 0, dropped));
        }
        for (index, source) in wanted
            .nat
            .iter()
            .flat_map(|nat| sorted(&nat.sources))
            .enumerate()
        {
            let key = Key {
                address: source,
                port: 0,
                protocol: 0,
            };
            entries.insert(key, entry(0, mode::NAT_RETURN, index as u32, 0));
        }
        entries
    }

    /// What the kernel half knows of a listener.
    fn listener(
        &self,
        name: &str,
        upstream: Option<(usize, u32)>,
        options: u32,
        wanted: &Wanted,
    ) -> abi::Listener {
        let id = self.state.names.listeners.get(name).copied().unwrap_or(0);
        let upstream =
            upstream.and_then(|(index, mode)| Some((mode, wanted.upstreams.get(index)?)));
        let (mode, target) = match upstream {
            Some((mode, upstream)) => (mode, self.state.names.upstreams[&upstream.name]),
            None => (mode::SERVE, 0),
        };
        entry(id, mode, target, options)
    }

    /// Upstreams that no listener points at any more lose their ring.
    fn retire_upstreams(&mut self, wanted: &Wanted) {
        let kept: BTreeSet<u32> = wanted
            .upstreams
            .iter()
            .filter_map(|upstream| self.state.names.upstreams.get(&upstream.name))
            .copied()
            .collect();
        let gone: Vec<u32> = self
            .state
            .upstreams
            .keys()
            .filter(|id| !kept.contains(id))
            .copied()
            .collect();
        for id in gone {
            self.state.upstreams.remove(&id);
            self.writes
                .push(Write::Upstream(id, abi::Upstream { page: 0, slots: 0 }));
        }
    }

    fn rules(&mut self, wanted: &Wanted) -> Result<(), Full> {
        let names: Vec<&str> = wanted.rules.iter().map(String::as_str).collect();
        let range = 1..abi::size::RULES;
        assign(&mut self.state.names.rules, &names, range, &BTreeSet::new())
            .ok_or(Full::new("rules", abi::size::RULES))?;
        Ok(())
    }
}

const fn entry(id: u32, mode: u32, target: u32, options: u32) -> abi::Listener {
    abi::Listener {
        id,
        mode,
        target,
        options,
    }
}

/// Gives each name an id of the range, those it has already first; answers the ids that are new. Names that are
/// not wanted keep their ids until others need them, so that a name that comes back finds its counters.
fn assign(
    ids: &mut BTreeMap<String, u32>,
    names: &[&str],
    range: std::ops::Range<u32>,
    in_use: &BTreeSet<u32>,
) -> Option<Vec<u32>> {
    let mut fresh = Vec::new();
    let mut free = free_ids(ids, &range, in_use);
    for name in names {
        if ids.contains_key(*name) {
            continue;
        }
        let id = free.next().or_else(|| {
            let wanted: HashSet<&str> = names.iter().copied().collect();
            ids.retain(|known, _| wanted.contains(known.as_str()));
            free = free_ids(ids, &range, &BTreeSet::new());
            free.next()
        })?;
        ids.insert((*name).to_owned(), id);
        fresh.push(id);
    }
    Some(fresh)
}

fn free_ids(
    ids: &BTreeMap<String, u32>,
    range: &std::ops::Range<u32>,
    in_use: &BTreeSet<u32>,
) -> impl Iterator<Item = u32> + use<> {
    let taken: HashSet<u32> = ids.values().chain(in_use).copied().collect();
    range.clone().filter(move |id| !taken.contains(id))
}

/// IPv4 first, otherwise in the order written.
fn sorted(sources: &[IpAddr]) -> Vec<IpAddr> {
    let mut sources = sources.to_vec();
    sources.sort_by_key(IpAddr::is_ipv6);
    sources
}

fn encode_nat(wanted: &WantedNat) -> abi::Nat {
    let mut nat: abi::Nat = bytemuck::Zeroable::zeroed();
    let sources = sorted(&wanted.sources);
    for (slot, source) in nat.sources.iter_mut().zip(&sources) {
        *slot = address(*source);
    }
    nat.sources_count = sources.len().min(abi::size::NAT_SOURCES) as u32;
    nat.sources_v4 = sources.iter().filter(|source| source.is_ipv4()).count() as u32;
    nat.port_first = u32::from(wanted.port_first);
    nat.ports = u32::from(wanted.port_last.saturating_sub(wanted.port_first)) + 1;
    nat.tcp_idle_ns = wanted.tcp_idle_ns;
    nat.tcp_brief_ns = wanted.tcp_brief_ns;
    nat.udp_idle_ns = wanted.udp_idle_ns;
    nat
}

/// Whether flows made under `before` still find their way back under `after`: each source at its index, the same ports.
pub fn keeps_flows(before: &abi::Nat, after: &abi::Nat) -> bool {
    let used = before.sources_count as usize;
    before.ports == 0
        || (before.ports == after.ports
            && before.port_first == after.port_first
            && after.sources_count >= before.sources_count
            && before.sources[..used] == after.sources[..used])
}

#[cfg(test)]
mod tests;
