//! Writes a configuration into the maps and reads the counters: what control does without any privilege.

mod entry;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use proxy_ebpf::abi::{self, name};
use proxy_ebpf::verdict::Verdict;

use super::map::{Counters, List, Maps, Memory, Table, Value};
use super::neighbour::{Neighbours, Reach};
use super::network::Network;
use super::plan::{self, Capacity, Key, Names, State, Write};
use super::wanted::wanted;
use super::{Full, address, coarse_now_ns, ip, port};
use crate::config::Config;
use crate::tunable::Tunables;
use entry::{bits, change, is_full, key_of, reset, sum, traffic};

/// The flows are counted one by one, so not at every question.
const FLOWS_COUNTED_EVERY: Duration = Duration::from_secs(5);

/// Offset of words in `abi::Guard` and `abi::Ports`.
const GUARD_FILTER_AT: usize = 1;
const NAT_PORTS_AT: usize = 1024;

/// The maps of an instance, and what stands in them.
pub struct Writer {
    state: State,
    ports: Memory,
    rings: Memory,
    nat: Memory,
    guard: Memory,
    listeners4: Table<abi::ListenerKey4, abi::Listener>,
    listeners6: Table<abi::ListenerKey6, abi::Listener>,
    upstreams: List<abi::Upstream>,
    endpoints: List<abi::Endpoint>,
    flows: Table<abi::FlowKey, u64>,
    nat_flows: List<abi::NatFlow>,
    bans: Table<abi::Address, abi::Ban>,
    bans_max: u32,
    rule_drops: Counters<u64>,
    verdicts: Counters<u64>,
    listener_traffic: Counters<abi::Traffic>,
    endpoint_traffic: Counters<abi::Traffic>,
    network: Network,
    neighbours: Neighbours,
    interfaces: Vec<u32>,
    flows_counted: Option<(Instant, u64)>,
}

/// A source that is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Ban {
    pub source: IpAddr,
    pub until_ns: u64,
    /// Name of the policy; `operator` where an operator asked.
    pub rule: String,
    /// Packets dropped so far.
    pub dropped: u64,
}

/// Everything counted, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub verdicts: Vec<(&'static str, u64)>,
    /// By listener name: packets, bytes.
    pub listeners: Vec<(String, u64, u64)>,
    /// By endpoint: packets, bytes.
    pub endpoints: BTreeMap<SocketAddr, (u64, u64)>,
    pub flows: u64,
    pub rule_drops: Vec<(String, u64)>,
    pub bans: u64,
}

/// The rule of what an operator bans by hand.
const OPERATOR: &str = "operator";

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
            upstreams: maps.entries(name::UPSTREAMS)?,
            endpoints: maps.entries(name::ENDPOINTS)?,
            ring_pages: maps.entries(name::RINGS)?,
            nat_flows: maps.entries(name::NAT_FLOWS)?,
        };
        let mut writer = Self {
            bans_max: maps.entries(name::BANS)?,
            ports: maps.memory(name::PORTS)?,
            rings: maps.memory(name::RINGS)?,
            nat: maps.memory(name::NAT)?,
            guard: maps.memory(name::GUARD)?,
            listeners4: maps.table(name::LISTENERS4)?,
            listeners6: maps.table(name::LISTENERS6)?,
            upstreams: maps.list(name::UPSTREAMS)?,
            endpoints: maps.list(name::ENDPOINTS)?,
            flows: maps.table(name::FLOWS)?,
            nat_flows: maps.list(name::NAT_FLOWS)?,
            bans: maps.table(name::BANS)?,
            rule_drops: maps.counters(name::RULE_DROPS)?,
            verdicts: maps.counters(name::VERDICTS)?,
            listener_traffic: maps.counters(name::LISTENER_TRAFFIC)?,
            endpoint_traffic: maps.counters(name::ENDPOINT_TRAFFIC)?,
            network: Network::open().context("open a netlink socket")?,
            neighbours: Neighbours::default(),
            interfaces,
            flows_counted: None,
            state: State {
                capacity,
                names,
                listeners: BTreeMap::new(),
                upstreams: BTreeMap::new(),
                endpoints: BTreeMap::new(),
                nat: bytemuck::Zeroable::zeroed(),
            },
        };
        writer.read_state()?;
        Ok(writer)
    }

    fn read_state(&mut self) -> Result<()> {
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
        for (id, entry) in (0..).zip(self.upstreams.iter()) {
            let Value(upstream) = entry?;
            if upstream.slots > 0 {
                self.state.upstreams.insert(id, upstream);
            }
        }
        for (id, entry) in (0..).zip(self.endpoints.iter()) {
            let Value(endpoint) = entry?;
            if endpoint.port != [0; 2] {
                let address =
                    SocketAddr::new(ip(endpoint.address), u16::from_be_bytes(endpoint.port));
                self.state.endpoints.insert(id, address);
            }
        }
        self.state.nat = self.nat.read();
        Ok(())
    }

    /// Which names have which ids: what the next daemon needs to know.
    pub fn names(&self) -> &Names {
        &self.state.names
    }

    /// Makes the maps say what `config` says: all of it, or nothing.
    ///
    /// # Errors
    /// It does not fit, or NAT would change under living flows; then nothing was written. What the system says about a
    /// write that it refuses.
    pub fn apply(
        &mut self,
        config: &Config,
        tunables: &Tunables,
        is_healthy: impl Fn(usize, SocketAddr) -> bool,
    ) -> Result<()> {
        let addresses = self.own_addresses()?;
        let wanted = wanted(config, tunables, &addresses, is_healthy);
        let (writes, next) = plan::plan(&self.state, &wanted)?;
        if !plan::keeps_flows(&self.state.nat, &next.nat) {
            self.forget_flows()?;
        }
        for write in writes {
            self.write(write)?;
        }
        self.state = next;
        self.refresh_neighbours()
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
                let mut entry: abi::Endpoint = bytemuck::Zeroable::zeroed();
                entry.address = address(at.ip());
                entry.port = port(at.port());
                self.endpoints
                    .set(u32::from(id), Value(entry), 0)
                    .context("write an endpoint")?;
                // Traffic of whoever had the id before, in another life of the pins.
                Ok(reset(&mut self.endpoint_traffic, u32::from(id))?)
            }
            Write::Ring { page, slots } => {
                let first = page as usize * abi::RING_PAGE_SLOTS;
                for (slot, id) in self.rings.slots().iter().skip(first).zip(&slots) {
                    slot.store(*id, std::sync::atomic::Ordering::Relaxed);
                }
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
            Write::AddPorts { listener, nat } => {
                self.write_ports(&listener, nat, true);
                Ok(())
            }
            Write::SetPorts { listener, nat } => {
                self.write_ports(&listener, nat, false);
                Ok(())
            }
            Write::ResetListener(id) => Ok(reset(&mut self.listener_traffic, id)?),
            Write::Listener(key, entry) => self.write_listener(key, Some(entry)),
            Write::RemoveListener(key) => self.write_listener(key, None),
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

    fn write_ports(&self, listener: &BTreeSet<u16>, nat: Option<(u16, u16)>, keep: bool) {
        let nat_ports = nat.into_iter().flat_map(|(first, last)| first..=last);
        let halves = [
            (0, bits(listener.iter().copied())),
            (NAT_PORTS_AT, bits(nat_ports)),
        ];
        for (at, mut words) in halves {
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
        let now_ns = coarse_now_ns();
        let mut old = Vec::new();
        for entry in self.flows.iter() {
            let (Value(key), Value(index)) = entry?;
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let flow = self.nat_flows.get(&index, 0).map(|Value(flow)| flow).ok();
            let lives = flow.is_some_and(|flow| {
                flow.key == key
                    && flow.seen_ns > 0
                    && now_ns.saturating_sub(flow.seen_ns) < flow.idle_ns(&self.state.nat)
            });
            if lives {
                bail!(
                    "datapath.nat cannot change while flows use it: sources may be added at the end and nothing else; \
                     to change it all the same, run `sluice datapath down`, which cuts these flows, and start again"
                );
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

    /// Looks again how each endpoint is reached; to be called about once a second.
    ///
    /// # Errors
    /// rtnetlink or a map does not answer.
    pub fn refresh_neighbours(&mut self) -> Result<()> {
        let addresses: BTreeSet<IpAddr> =
            self.state.endpoints.values().map(SocketAddr::ip).collect();
        let changed = self
            .neighbours
            .refresh(&mut self.network, addresses.into_iter(), Instant::now())
            .context("read the neighbours of this host")?;
        for (id, at) in &self.state.endpoints {
            let Some(reach) = changed.get(&at.ip()) else {
                continue;
            };
            let mut entry: abi::Endpoint = bytemuck::Zeroable::zeroed();
            entry.address = address(at.ip());
            entry.port = port(at.port());
            // Away first, so that no packet leaves with half of one neighbour's MAC and half of another's.
            self.endpoints.set(u32::from(*id), Value(entry), 0)?;
            if *reach != Reach::default() {
                entry.mac = reach.mac;
                entry.source_mac = reach.source_mac;
                self.endpoints.set(u32::from(*id), Value(entry), 0)?;
                entry.ifindex = reach.ifindex;
                self.endpoints.set(u32::from(*id), Value(entry), 0)?;
            }
        }
        Ok(())
    }

    /// Whether the neighbour of each endpoint is resolved.
    pub fn resolved(&self) -> BTreeMap<SocketAddr, bool> {
        let resolved = |id: &u16| {
            self.endpoints
                .get(&u32::from(*id), 0)
                .is_ok_and(|Value(entry)| entry.ifindex != 0)
        };
        self.state
            .endpoints
            .iter()
            .map(|(id, at)| (*at, resolved(id)))
            .collect()
    }

    /// Refuses a source until `until_ns` of the coarse clock. `rule` is a policy's name; `None` = the operator.
    ///
    /// # Errors
    /// The table is full, or the system refuses the write.
    pub fn ban(&mut self, source: IpAddr, until_ns: u64, rule: Option<&str>) -> Result<()> {
        let key = address(source).ban_key();
        let rule = rule
            .and_then(|name| self.state.names.rules.get(name))
            .copied()
            .unwrap_or(0);
        let before = self.bans.get(&Value(key), 0).map(|Value(ban)| ban).ok();
        let dropped = before.map_or(0, |ban| ban.dropped);
        let ban = abi::Ban {
            until_ns,
            rule,
            zero: 0,
            dropped,
        };
        let written = self.bans.insert(Value(key), Value(ban), 0);
        if let Err(error) = written {
            if is_full(&error) {
                return Err(Full::new("bans", self.bans_max).into());
            }
            return Err(error).context("write a ban");
        }
        // The entry first, then the bit that leads to it.
        let bit = abi::guard_bit(&key) as usize;
        let word = &self.guard.words()[GUARD_FILTER_AT + bit / 64];
        word.fetch_or(1 << (bit % 64), std::sync::atomic::Ordering::Relaxed);
        if before.is_none() {
            self.guard.words()[0].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }

    /// Ends a ban; answers whether there was one.
    ///
    /// # Errors
    /// The system refuses the write.
    pub fn unban(&mut self, source: IpAddr) -> Result<bool> {
        let key = address(source).ban_key();
        let was = self.bans.get(&Value(key), 0).is_ok();
        change(&mut self.bans, key, None)?;
        self.rebuild_guard()?;
        Ok(was)
    }

    /// Removes the bans that are over, and makes the filter anew.
    ///
    /// # Errors
    /// The system refuses to read or write.
    pub fn sweep_bans(&mut self) -> Result<()> {
        let now_ns = coarse_now_ns();
        let over: Vec<abi::Address> = self
            .bans
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, Value(ban))| ban.until_ns <= now_ns)
            .map(|(Value(key), _)| key)
            .collect();
        if over.is_empty() {
            return Ok(());
        }
        for key in over {
            change(&mut self.bans, key, None)?;
        }
        self.rebuild_guard()
    }

    /// The filter and the count of exactly the bans there are. Bits of living bans are never absent meanwhile.
    fn rebuild_guard(&mut self) -> Result<()> {
        let mut filter = vec![0; 1024];
        let mut count = 0;
        for key in self.bans.keys() {
            let Value(key) = key?;
            let bit = abi::guard_bit(&key) as usize;
            filter[bit / 64] |= 1 << (bit % 64);
            count += 1;
        }
        self.guard.write(GUARD_FILTER_AT, &filter);
        self.guard.write(0, &[count]);
        Ok(())
    }

    /// Every ban.
    ///
    /// # Errors
    /// The system refuses to read.
    pub fn bans(&self) -> Result<Vec<Ban>> {
        let rules: BTreeMap<u32, &str> = self
            .state
            .names
            .rules
            .iter()
            .map(|(name, id)| (*id, name.as_str()))
            .collect();
        let mut bans = Vec::new();
        for entry in self.bans.iter() {
            let (Value(key), Value(ban)) = entry?;
            let rule = rules.get(&ban.rule).copied().unwrap_or(OPERATOR).to_owned();
            bans.push(Ban {
                source: ip(key),
                until_ns: ban.until_ns,
                rule,
                dropped: ban.dropped,
            });
        }
        bans.sort_by_key(|ban| ban.source);
        Ok(bans)
    }

    /// Everything counted.
    ///
    /// # Errors
    /// The system refuses to read.
    pub fn counts(&mut self) -> Result<Counts> {
        let mut counts = Counts {
            bans: self.guard.words()[0].load(std::sync::atomic::Ordering::Relaxed),
            ..Counts::default()
        };
        for verdict in Verdict::ALL {
            counts
                .verdicts
                .push((verdict.name(), sum(&self.verdicts, verdict as u32)?));
        }
        let listening: BTreeSet<u32> = self
            .state
            .listeners
            .values()
            .map(|listener| listener.id)
            .collect();
        for (name, id) in self
            .state
            .names
            .listeners
            .iter()
            .filter(|(_, id)| listening.contains(id))
        {
            let traffic = traffic(&self.listener_traffic, *id)?;
            counts
                .listeners
                .push((name.clone(), traffic.packets, traffic.bytes));
        }
        for (id, at) in &self.state.endpoints {
            let traffic = traffic(&self.endpoint_traffic, u32::from(*id))?;
            counts
                .endpoints
                .insert(*at, (traffic.packets, traffic.bytes));
        }
        counts
            .rule_drops
            .push((OPERATOR.to_owned(), sum(&self.rule_drops, 0)?));
        for (name, id) in &self.state.names.rules {
            counts
                .rule_drops
                .push((name.clone(), sum(&self.rule_drops, *id)?));
        }
        counts.flows = self.count_flows();
        Ok(counts)
    }

    fn count_flows(&mut self) -> u64 {
        let now = Instant::now();
        match self.flows_counted {
            Some((at, count)) if now.duration_since(at) < FLOWS_COUNTED_EVERY => count,
            _ => {
                let count = self.flows.keys().filter_map(Result::ok).count() as u64;
                self.flows_counted = Some((now, count));
                count
            }
        }
    }
}
