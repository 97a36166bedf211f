//! Writes a configuration into the maps and reads the counters: what control does without any privilege.

mod bans;
mod counts;
mod entry;
mod reach;
mod retire;
mod ring;

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use proxy_ebpf::abi::{self, name};

use super::map::{Counters, List, Maps, Memory, Table, Trie, Value};
use super::neighbour::{Neighbours, Reach};
use super::network::Network;
use super::plan::{
    self, Capacity, Endpoints, Key, Names, PortSets, State, Wanted, WantedUpstream, Write,
};
use super::wanted::{RingOf, wanted};
use super::{Interface, ip, port};
use crate::config::Via;
use crate::offload::now_ns;
use crate::snapshot::Snapshot;
pub use bans::Ban;
pub use counts::Counts;
use entry::{bits, change, key_of, prefix_of, reset, trie_key};
use reach::SegmentLimit;
use retire::Retired;

/// The rule of what an operator bans by hand.
const OPERATOR: &str = "operator";

/// Offset of words in `abi::Guard` and `abi::Ports`.
const GUARD_FILTER_AT: usize = 1;
const NAT_PORTS_AT: usize = 1024;
const PREFIX_PORTS_AT: usize = 2048;

/// The maps of an instance, and what stands in them.
pub struct Writer {
    state: State,
    ports: Memory,
    rings: Memory,
    stamps: Memory,
    /// How long a slot's earlier owner is remembered after it was last needed, in the unit of stamps.
    idle_stamps: u16,
    /// The longest idle limit of a flow.
    idle: Duration,
    retired: BTreeMap<u16, Retired>,
    /// When ids are looked for next.
    retire_at: Instant,
    nat: Memory,
    tunnel: Memory,
    guard: Memory,
    listeners4: Table<abi::ListenerKey4, abi::Listener>,
    listeners6: Table<abi::ListenerKey6, abi::Listener>,
    prefixes: Trie<abi::Prefix>,
    upstreams: List<abi::Upstream>,
    endpoints: List<abi::Endpoint>,
    moved: Table<abi::FlowKey, u64>,
    flows: Table<abi::FlowKey, u64>,
    nat_flows: List<abi::NatFlow>,
    bans: Table<abi::Address, abi::Ban>,
    bans_max: u32,
    rule_drops: Counters<u64>,
    verdicts: Counters<u64>,
    listener_traffic: Counters<abi::Traffic>,
    endpoint_traffic: Counters<abi::Traffic>,
    endpoint_signs: Counters<abi::Signs>,
    network: Network,
    neighbours: Neighbours,
    /// Which segments SYNs may announce by what stands in the map; `None` before that is known.
    segment_limit: Option<SegmentLimit>,
    /// How each endpoint is reached by what stands in the map.
    reaches: BTreeMap<u16, Reach>,
    interfaces: Vec<u32>,
    in_force: Option<InForce>,
    flows_counted: Option<(Instant, u64)>,
}

/// What was wanted last, and is in force.
struct InForce {
    wanted: Wanted,
    /// Of whom each ring is, by index in `wanted.upstreams`.
    rings: Vec<RingOf>,
    ways: HashSet<(usize, Via)>,
}

impl Writer {
    /// Opens the maps by the descriptors that the keeper passed, and reads what a daemon before us left in them.
    ///
    /// # Errors
    /// A map is missing or is not as this version makes it.
    pub fn open(
        descriptors: BTreeMap<String, OwnedFd>,
        names: Names,
        interfaces: Vec<u32>,
    ) -> Result<Self> {
        let mut maps = Maps(descriptors);
        let capacity = Capacity {
            listeners: maps.entries(name::LISTENERS4)? as usize,
            prefixes: maps.entries(name::PREFIXES)?,
            upstreams: maps.entries(name::UPSTREAMS)?,
            endpoints: maps.entries(name::ENDPOINTS)?,
            ring_pages: maps.entries(name::RINGS)?,
            nat_flows: maps.entries(name::NAT_FLOWS)?,
        };
        let mut writer = Self {
            bans_max: maps.entries(name::BANS)?,
            ports: maps.memory(name::PORTS)?,
            rings: maps.memory(name::RINGS)?,
            stamps: maps.memory(name::STAMPS)?,
            idle_stamps: ring::IDLE_STAMPS_MAX,
            idle: Duration::MAX,
            retired: BTreeMap::new(),
            retire_at: Instant::now(),
            nat: maps.memory(name::NAT)?,
            tunnel: maps.memory(name::TUNNEL)?,
            guard: maps.memory(name::GUARD)?,
            listeners4: maps.table(name::LISTENERS4)?,
            listeners6: maps.table(name::LISTENERS6)?,
            prefixes: maps.trie(name::PREFIXES)?,
            upstreams: maps.list(name::UPSTREAMS)?,
            endpoints: maps.list(name::ENDPOINTS)?,
            moved: maps.table(name::MOVED)?,
            flows: maps.table(name::FLOWS)?,
            nat_flows: maps.list(name::NAT_FLOWS)?,
            bans: maps.table(name::BANS)?,
            rule_drops: maps.counters(name::RULE_DROPS)?,
            verdicts: maps.counters(name::VERDICTS)?,
            listener_traffic: maps.counters(name::LISTENER_TRAFFIC)?,
            endpoint_traffic: maps.counters(name::ENDPOINT_TRAFFIC)?,
            endpoint_signs: maps.counters(name::ENDPOINT_SIGNS)?,
            network: Network::open().context("open a netlink socket")?,
            neighbours: Neighbours::default(),
            segment_limit: None,
            reaches: BTreeMap::new(),
            interfaces,
            in_force: None,
            flows_counted: None,
            state: State {
                capacity,
                names: names.within(&capacity),
                listeners: BTreeMap::new(),
                prefixes: BTreeMap::new(),
                upstreams: BTreeMap::new(),
                endpoints: Endpoints::default(),
                nat: bytemuck::Zeroable::zeroed(),
                tunnel: bytemuck::Zeroable::zeroed(),
            },
        };
        writer.read_state()?;
        Ok(writer)
    }

    /// Reads from the maps what they say.
    fn read_state(&mut self) -> Result<()> {
        self.state.listeners.clear();
        self.state.prefixes.clear();
        self.state.upstreams.clear();
        self.state.endpoints = Endpoints::default();
        for entry in self.listeners4.iter() {
            let (Value(key), Value(listener)) = entry?;
            self.state.listeners.insert(
                key_of(IpAddr::from(key.address), key.port, key.protocol),
                listener,
            );
        }
        for entry in self.listeners6.iter() {
            let (Value(key), Value(listener)) = entry?;
            self.state.listeners.insert(
                key_of(IpAddr::from(key.address), key.port, key.protocol),
                listener,
            );
        }
        for entry in self.prefixes.iter() {
            let (key, Value(prefix)) = entry?;
            self.state.prefixes.insert(prefix_of(&key), prefix);
        }
        for (id, entry) in (0..).zip(self.upstreams.iter()) {
            let Value(upstream) = entry?;
            if upstream.slots > 0 {
                self.state.upstreams.insert(id, upstream);
            }
        }
        // Ids are given in order and stay written, so what follows the first that is free is free too.
        for (id, entry) in (0..=u16::MAX).zip(self.endpoints.iter()).skip(1) {
            let Value(endpoint) = entry?;
            if endpoint.port == [0; 2] {
                break;
            } else {
                let address =
                    SocketAddr::new(ip(endpoint.address), u16::from_be_bytes(endpoint.port));
                self.state.endpoints.insert(id, address);
                let reach = Reach {
                    ifindex: endpoint.ifindex,
                    mac: endpoint.mac,
                    source_mac: endpoint.source_mac,
                    mtu_bytes: endpoint.mtu_bytes,
                    plain_mtu_bytes: endpoint.plain_mtu_bytes,
                    back_mtu_bytes: endpoint.back_mtu_bytes,
                };
                self.reaches.insert(id, reach);
                self.neighbours.believe(address.ip(), reach);
            }
        }
        self.state.nat = self.nat.read();
        self.state.tunnel = self.tunnel.read();
        Ok(())
    }

    /// Those of `interfaces` on which another program runs than ours, or none: somebody took it away, or the interface
    /// went and came back.
    ///
    /// # Errors
    /// rtnetlink does not answer.
    pub fn lost(&mut self, interfaces: &[Interface]) -> Result<Vec<String>> {
        let links = self
            .network
            .links()
            .context("read the interfaces of this host")?;
        let runs = |interface: &&Interface| {
            links.iter().any(|link| {
                link.index == interface.index
                    && link.xdp.is_some_and(|(id, _)| id == interface.program)
            })
        };
        let lost = interfaces.iter().filter(|interface| !runs(interface));
        Ok(lost.map(|interface| interface.name.clone()).collect())
    }

    /// XDP is attached to these from now on.
    pub fn follow(&mut self, interfaces: &[Interface]) {
        self.interfaces = interfaces.iter().map(|interface| interface.index).collect();
        self.neighbours.forget_routes();
    }

    /// Which names have which ids: what the next daemon needs to know.
    pub fn names(&self) -> &Names {
        &self.state.names
    }

    /// Makes the maps say what `snapshot` says: all of it, or nothing. An endpoint whose neighbour is not known, see `seek`,
    /// gets no new flows while there are others, for Linux would answer them with a reset.
    ///
    /// # Errors
    /// It does not fit, or NAT would change under living flows; then nothing was written. What the system says about a
    /// write that it refuses; then what was in force before is written again.
    pub fn apply(&mut self, snapshot: &Snapshot) -> Result<()> {
        let addresses = self.own_addresses()?;
        let ways = reach::ways(&snapshot.config);
        for (upstream, via) in &ways {
            if let Some(upstream) = snapshot.upstreams.get(*upstream) {
                reach::check_links(self, upstream, *via)?;
            }
        }
        let is_reached = |ip| self.neighbours.reach(ip) != Reach::default();
        let limits = &snapshot.tunables.flow;
        self.idle_stamps = ring::idle_stamps(limits.tcp_idle_timeout);
        self.idle = limits.tcp_idle_timeout.max(limits.udp_idle_timeout);
        let (wanted, rings) = wanted(
            &snapshot.config,
            &snapshot.upstreams,
            &snapshot.tunables,
            &addresses,
            is_reached,
        );
        let in_force = self.in_force.as_ref().map(|in_force| &in_force.wanted);
        let (writes, next) = plan::plan(&self.state, &wanted, in_force)?;
        if !plan::keeps_flows(&self.state.nat, &next.nat) {
            self.forget_flows()?;
        }
        match self.perform(writes) {
            Ok(()) => self.state = next,
            Err(error) => return Err(self.take_back(error)),
        }
        self.limit_segments(&snapshot.tunables)?;
        self.in_force = Some(InForce {
            wanted,
            rings,
            ways,
        });
        let endpoints: Vec<_> = self.state.endpoints.iter().collect();
        self.write_reaches(endpoints).map(drop)
    }

    /// Makes the rings of one upstream, by its index, have its endpoints as they are now: who there is, weights, health,
    /// neighbours. All else stays as it is.
    ///
    /// # Errors
    /// As `apply`.
    pub fn change(&mut self, snapshot: &Snapshot, upstream: usize) -> Result<()> {
        let (Some(in_force), Some(one)) = (&self.in_force, snapshot.upstreams.get(upstream)) else {
            return Ok(());
        };
        for (_, via) in in_force.ways.iter().filter(|(of, _)| *of == upstream) {
            reach::check_links(self, one, *via)?;
        }
        let is_reached = |ip| self.neighbours.reach(ip) != Reach::default();
        let rings = in_force.rings.iter().zip(&in_force.wanted.upstreams);
        let changed: Vec<(usize, WantedUpstream)> = (0..)
            .zip(rings)
            .filter(|(_, (of, _))| of.upstream == upstream)
            .map(|(at, (of, before))| (at, of.ring(Some(one), is_reached), before))
            .filter(|(_, ring, before)| ring != *before)
            .map(|(at, ring, _)| (at, ring))
            .collect();
        let mut change = plan::change(&self.state, changed.iter().map(|(_, ring)| ring))?;
        match self.perform(std::mem::take(&mut change.writes)) {
            Ok(()) => self.state.take(change),
            Err(error) => return Err(self.take_back(error)),
        }
        if let Some(in_force) = &mut self.in_force {
            for (at, ring) in changed {
                in_force.wanted.upstreams[at] = ring;
            }
        }
        Ok(())
    }

    fn perform(&mut self, writes: Vec<Write>) -> Result<()> {
        writes.into_iter().try_for_each(|write| self.write(write))
    }

    /// After a write that failed: what was in force is written again. Answers the error, with what became of that.
    fn take_back(&mut self, error: anyhow::Error) -> anyhow::Error {
        let taken_back = self.write_in_force();
        match taken_back {
            Ok(()) => error,
            Err(second) => {
                error.context(format!("the kernel half is not as it was, for {second:#}"))
            }
        }
    }

    fn write_in_force(&mut self) -> Result<()> {
        self.read_state()?;
        // Before the first time nothing is in force; what there is leads nowhere wrong, by the order of the writes.
        let Some(before) = &self.in_force else {
            return Ok(());
        };
        let (writes, next) = plan::plan(&self.state, &before.wanted, None)?;
        self.perform(writes)?;
        self.state = next;
        Ok(())
    }

    /// Addresses of the interfaces that XDP is attached to.
    fn own_addresses(&mut self) -> Result<Vec<IpAddr>> {
        let addresses = self
            .network
            .addresses()
            .context("read the addresses of this host")?;
        Ok(addresses
            .into_iter()
            .filter(|(index, _)| self.interfaces.contains(index))
            .map(|(_, ip)| ip)
            .collect())
    }

    fn write(&mut self, write: Write) -> Result<()> {
        match write {
            Write::Endpoint(id, at) => {
                self.write_endpoint(id, at, self.neighbours.reach(at.ip()))?;
                // Traffic of whoever had the id before, in another life of the pins.
                reset(&mut self.endpoint_traffic, u32::from(id))?;
                Ok(reset(&mut self.endpoint_signs, u32::from(id))?)
            }
            Write::Ring {
                page,
                slots,
                before,
                dead,
            } => {
                self.write_ring(page, &slots, before, &dead);
                Ok(())
            }
            Write::Upstream(id, entry) => self
                .upstreams
                .set(id, Value(entry), 0)
                .context("write an upstream"),
            Write::Nat(nat) => {
                self.write_nat(&nat);
                Ok(())
            }
            Write::Tunnel(tunnel) => {
                let words: [u64; size_of::<abi::Tunnel>() / 8] = bytemuck::cast(tunnel);
                self.tunnel.write(0, &words);
                Ok(())
            }
            Write::AddPorts(ports) => {
                self.write_ports(&ports, true);
                Ok(())
            }
            Write::SetPorts(ports) => {
                self.write_ports(&ports, false);
                Ok(())
            }
            Write::ResetListener(id) => Ok(reset(&mut self.listener_traffic, id)?),
            Write::Listener(key, entry) => self.write_listener(key, Some(entry)),
            Write::RemoveListener(key) => self.write_listener(key, None),
            Write::Prefix(key, prefix) => {
                let written = self.prefixes.insert(&trie_key(&key), Value(*prefix), 0);
                written.context("write a prefix")
            }
            Write::RemovePrefix(key) => {
                let removed = self.prefixes.remove(&trie_key(&key));
                removed.context("remove a prefix")
            }
        }
    }

    /// All but the cursors, which are the kernel half's; the number of ports, which is the gate, last when it opens.
    fn write_nat(&self, nat: &abi::Nat) {
        let words: [u64; size_of::<abi::Nat>() / 8] = bytemuck::cast(*nat);
        let sources = size_of_val(&nat.sources) / 8;
        // `port_first` and `ports` share a word; the counts of sources stand in the one before.
        let gate = sources + 1;
        if nat.ports == 0 {
            self.nat.write(gate, &words[gate..=gate]);
        }
        let idle = std::mem::offset_of!(abi::Nat, cursors) / 8;
        self.nat.write(0, &words[..gate]);
        self.nat.write(gate + 1, &words[gate + 1..idle]);
        self.nat.write(gate, &words[gate..=gate]);
    }

    fn write_ports(&self, ports: &PortSets, keep: bool) {
        let ranges = |ranges: &[(u16, u16)]| bits(ranges.iter().flat_map(|(a, b)| *a..=*b));
        let parts = [
            (0, bits(ports.listener.iter().copied())),
            (NAT_PORTS_AT, ranges(ports.nat.as_slice())),
            (PREFIX_PORTS_AT, ranges(&ports.prefix)),
        ];
        for (at, mut words) in parts {
            if keep {
                for (word, old) in words.iter_mut().zip(&self.ports.words()[at..]) {
                    *word |= old.load(std::sync::atomic::Ordering::Relaxed);
                }
            }
            self.ports.write(at, &words);
        }
    }

    fn write_listener(&mut self, key: Key, entry: Option<abi::Listener>) -> Result<()> {
        let act = "write a listener";
        match key.address {
            IpAddr::V4(v4) => {
                let key = abi::ListenerKey4 {
                    address: v4.octets(),
                    port: port(key.port),
                    protocol: key.protocol,
                    zero: 0,
                };
                change(&mut self.listeners4, key, entry).context(act)
            }
            IpAddr::V6(v6) => {
                let address = v6.octets();
                let key = abi::ListenerKey6 {
                    address,
                    port: port(key.port),
                    protocol: key.protocol,
                    zero: [0; 5],
                };
                change(&mut self.listeners6, key, entry).context(act)
            }
        }
    }

    /// NAT ports are about to mean something else, so that no flow may be left.
    fn forget_flows(&mut self) -> Result<()> {
        const IN_USE: &str = "datapath.nat cannot change while flows use it: sources may be added at the end and nothing else; \
             to change it all the same, run `sluice datapath down`, which cuts these flows, and start again";
        let now_ns = now_ns();
        let mut old = Vec::new();
        for entry in self.flows.iter() {
            // More than there is room for: the table changes under the walk, for flows come and go.
            if old.len() > self.nat_flows.len() as usize {
                bail!(IN_USE);
            }
            let (Value(key), Value(index)) = entry?;
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let flow = self.nat_flows.get(&index, 0).map(|Value(flow)| flow).ok();
            let lives = flow.is_some_and(|flow| {
                flow.key == key
                    && flow.seen_ns > 0
                    && now_ns.saturating_sub(flow.seen_ns) < flow.idle_ns(&self.state.nat)
            });
            if lives {
                bail!(IN_USE);
            }
            old.push((key, index));
        }
        let unused: abi::NatFlow = bytemuck::Zeroable::zeroed();
        for (key, index) in old {
            change(&mut self.flows, key, None)?;
            if index < self.nat_flows.len() {
                self.nat_flows.set(index, Value(unused), 0)?;
            }
        }
        Ok(())
    }
}
