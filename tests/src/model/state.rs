//! What the kernel half remembers and is told: its maps as plain tables.

use std::collections::HashMap;

use bytemuck::Zeroable;
use proxy_ebpf::abi::{
    Address, Ban, Endpoint, FlowKey, FragmentKey, FragmentPorts, HashKeys, Inserts, Listener, Nat,
    NatFlow, Ports, Prefix, PrefixKey, RING_PAGE_SLOTS, Signs, Slot, Traffic, Tunnel, Upstream,
    stamp,
};

use super::Read;

/// An entry of a table that a packet can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    Ban(Address),
    RuleDrops(u32),
    Fragment(FragmentKey),
    Moved(FlowKey),
    /// Of a CPU.
    Inserts(usize),
    /// Page, and slot in it.
    Stamp(u32, usize),
    Flow(FlowKey),
    NatFlow(u32),
    NatCursor(usize),
    ListenerTraffic(u32),
    EndpointTraffic(u32),
    EndpointSigns(u32),
}

/// The maps. Their sizes are the lengths of the vectors, and `flows_max`; LRU tables never evict here.
pub struct State {
    pub ports: Box<Ports>,
    /// By address, port and protocol; 0 and 0 for the address as such.
    pub listeners: HashMap<(Address, u16, u8), Listener>,
    /// Listeners of prefixes, in any order.
    pub prefixes: Vec<(PrefixKey, Prefix)>,
    pub upstreams: Vec<Upstream>,
    /// By page.
    pub rings: Vec<Vec<Slot>>,
    /// By page.
    pub stamps: Vec<Vec<u16>>,
    pub endpoints: Vec<Endpoint>,
    pub hash_keys: HashKeys,
    pub tunnel: Tunnel,
    pub moved: HashMap<FlowKey, u64>,
    /// By CPU.
    pub inserts: HashMap<usize, Inserts>,
    pub fragments: HashMap<FragmentKey, FragmentPorts>,
    pub nat: Nat,
    pub flows: HashMap<FlowKey, u64>,
    pub flows_max: usize,
    pub nat_flows: Vec<NatFlow>,
    pub bans: HashMap<Address, Ban>,
    pub rule_drops: Vec<u64>,
    pub listener_traffic: Vec<Traffic>,
    pub endpoint_traffic: Vec<Traffic>,
    pub endpoint_signs: Vec<Signs>,
}

impl State {
    /// Empty tables of the sizes given.
    pub fn new(sizes: Sizes) -> Self {
        Self {
            ports: Box::new(Ports::zeroed()),
            listeners: HashMap::new(),
            prefixes: vec![],
            upstreams: vec![Upstream::zeroed(); sizes.upstreams],
            rings: vec![vec![Slot(0); RING_PAGE_SLOTS]; sizes.ring_pages],
            stamps: vec![vec![0; RING_PAGE_SLOTS]; sizes.ring_pages],
            endpoints: vec![Endpoint::zeroed(); sizes.endpoints],
            hash_keys: HashKeys::zeroed(),
            tunnel: Tunnel::zeroed(),
            moved: HashMap::new(),
            inserts: HashMap::new(),
            fragments: HashMap::new(),
            nat: Nat::zeroed(),
            flows: HashMap::new(),
            flows_max: sizes.flows,
            nat_flows: vec![NatFlow::zeroed(); sizes.nat_flows],
            bans: HashMap::new(),
            rule_drops: vec![0; sizes.rules],
            listener_traffic: vec![Traffic::default(); sizes.listeners],
            endpoint_traffic: vec![Traffic::default(); sizes.endpoints],
            endpoint_signs: vec![Signs::default(); sizes.endpoints],
        }
    }

    /// Whether a port can be ours at all.
    pub fn is_wanted(&self, port: u16) -> bool {
        self.is_listener_port(port)
            || self.is_nat_port(port)
            || self.is_prefix_port(port)
            || self.is_listener_port(0)
    }

    pub(super) fn is_prefix_port(&self, port: u16) -> bool {
        self.ports.prefix[usize::from(port / 64)] >> (port % 64) & 1 == 1
    }

    pub(super) fn is_listener_port(&self, port: u16) -> bool {
        self.ports.listener[usize::from(port / 64)] >> (port % 64) & 1 == 1
    }

    pub(super) fn is_nat_port(&self, port: u16) -> bool {
        self.ports.nat[usize::from(port / 64)] >> (port % 64) & 1 == 1
    }

    /// The ports that the first fragment of a packet's datagram had, if it came in the last 30 s or so.
    pub(super) fn first_fragment(&self, packet: &Read, now_ns: u64) -> Option<(u16, u16)> {
        let first = self.fragments.get(&fragment_key(packet))?;
        let age = stamp(now_ns).wrapping_sub(first.seen);
        (age <= 30).then(|| {
            (
                u16::from_be_bytes(first.source_port),
                u16::from_be_bytes(first.destination_port),
            )
        })
    }

    pub(super) fn remember_first_fragment(&mut self, packet: &Read, now_ns: u64) -> FragmentKey {
        let key = fragment_key(packet);
        let ports = FragmentPorts {
            source_port: packet.source_port.to_be_bytes(),
            destination_port: packet.destination_port.to_be_bytes(),
            seen: stamp(now_ns),
            zero: 0,
        };
        self.fragments.insert(key, ports);
        key
    }

    pub(super) fn put_stamp(&mut self, page: u32, slot: usize, stamp: u16) {
        if let Some(page) = self.stamps.get_mut(page as usize) {
            page[slot] = stamp;
        }
    }

    pub(super) fn count_rule_drop(&mut self, rule: u32) {
        if let Some(drops) = self.rule_drops.get_mut(rule as usize) {
            *drops += 1;
        }
    }

    pub(super) fn count_listener(&mut self, id: u32, bytes: u64) {
        add(&mut self.listener_traffic, id, bytes);
    }

    pub(super) fn count_endpoint(&mut self, id: u32, bytes: u64) {
        add(&mut self.endpoint_traffic, id, bytes);
    }
}

/// The listener of the longest prefix that holds an address, if it has the port. Protocol 0: the address as such.
pub(super) fn listener_of_prefix(
    state: &State,
    address: Address,
    port: u16,
    protocol: u8,
) -> Option<Listener> {
    let leading = |address: Address, bits: u32| {
        let number = u128::from_be_bytes(address.0);
        number.checked_shr(128 - bits).unwrap_or(0)
    };
    let holds = |key: &PrefixKey| {
        let bits = key.bits - 32;
        key.protocol == protocol
            && (key.family == 4) == address.is_v4()
            && leading(key.address, bits) == leading(address, bits)
    };
    let found = state.prefixes.iter().filter(|(key, _)| holds(key));
    let (_, longest) = found.max_by_key(|(key, _)| key.bits)?;
    let ranges = longest.ranges.iter().take(longest.count as usize);
    let mut of_port = ranges.filter(|range| (range.first..=range.last).contains(&port));
    of_port.next().map(|range| range.listener)
}

/// How many entries each table has.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub upstreams: usize,
    pub ring_pages: usize,
    pub endpoints: usize,
    pub flows: usize,
    pub nat_flows: usize,
    pub rules: usize,
    pub listeners: usize,
}

/// The listener of a packet's destination.
pub(super) fn listener_of(state: &State, packet: &Read) -> Option<Listener> {
    let key = (packet.destination, packet.destination_port, packet.protocol);
    state.listeners.get(&key).copied()
}

fn fragment_key(packet: &Read) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        protocol: packet.protocol,
        zero: [0; 3],
    }
}

/// One packet more for an id that has a counter.
fn add(counters: &mut [Traffic], id: u32, bytes: u64) {
    if let Some(counter) = counters.get_mut(id as usize) {
        counter.packets += 1;
        counter.bytes += bytes;
    }
}
