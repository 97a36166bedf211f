//! The kernel half loaded for one test: maps of its own, not pinned, filled by hand, and packets sent through it.

use std::collections::HashSet;
use std::io::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::programs::{Program, SkReuseport, TestRun, TestRunOptions, Xdp};
use bytemuck::Zeroable;
use proxy_ebpf::abi::{
    Address, Ban, Endpoint, FlowKey, Guard, HashKeys, Listener, ListenerKey4, ListenerKey6, Nat,
    NatFlow, Ports, RING_PAGE_SLOTS, RingPage, Signs, Slot, StampPage, Traffic, Tunnel, Upstream,
    guard_bit, mode, name, stamp,
};
use proxy_ebpf::maglev::{self, Member};
use proxy_ebpf::verdict::Verdict;
use rig::model::Model;

use super::{mirror, pool};

#[path = "loaded/prefix.rs"]
mod prefix;

/// What XDP programs return (include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Drop,
    Pass,
    Tx,
    Redirect,
}

/// What became of a packet.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub action: Action,
    pub bytes: Vec<u8>,
}

/// The interface that BPF_PROG_TEST_RUN says packets come from: the loopback.
pub const INGRESS: u32 = 1;
/// Another one, to redirect to. Nothing is sent in a test run, so it need not exist.
pub const OTHER: u32 = 77;

/// The MACs that endpoints are reached by.
pub const ENDPOINT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0x0e, 0x01];
pub const EDGE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0x0e, 0x02];

/// Idle limits of the tests' NAT.
pub const TCP_IDLE_NS: u64 = 600_000_000_000;
pub const TCP_BRIEF_NS: u64 = 20_000_000_000;
pub const UDP_IDLE_NS: u64 = 40_000_000_000;

/// Any of our types as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Value<T>(pub T);

// SAFETY: a type that is Pod for bytemuck has no padding and any bytes are a value of it.
unsafe impl<T: bytemuck::Pod> aya::Pod for Value<T> {}

/// The loaded program and its maps, and the model that each packet is compared with.
pub struct Loaded {
    /// There until the end, when the pool gets it back.
    pub ebpf: Option<Ebpf>,
    pub sizes: pool::Sizes,
    pub model: Model,
    /// Maps that the model has to read again before the next packet.
    pub stale: HashSet<&'static str>,
    /// Packets ran of which the model does not know.
    pub unseen: AtomicBool,
    ports: Box<Ports>,
    guard: Box<Guard>,
    listeners: u32,
    nat_sources: Vec<IpAddr>,
    /// Options of the listener added next, and of its address.
    pub options: u32,
    page: u32,
    sent: u64,
}

/// Loads the kernel half, or says aloud why not and returns nothing.
pub fn load() -> Option<Loaded> {
    load_sized(&[])
}

/// The same with other sizes of the maps named; what no test fills is small always.
pub fn load_sized(sizes: &[(&'static str, u32)]) -> Option<Loaded> {
    // SAFETY: the call takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        skip("needs root");
        return None;
    }
    Some(Loaded::new(sizes))
}

impl Loaded {
    fn new(sizes: &[(&'static str, u32)]) -> Self {
        let sizes = pool::Sizes::with(sizes);
        let mut loaded = Self {
            ebpf: Some(pool::take(&sizes)),
            model: Model::new(mirror::state(&sizes)),
            sizes,
            stale: HashSet::new(),
            unseen: AtomicBool::new(false),
            ports: bytemuck::zeroed_box(),
            guard: bytemuck::zeroed_box(),
            listeners: 0,
            nat_sources: vec![],
            options: 0,
            page: 0,
            sent: 0,
        };
        let mut keys = HashKeys::zeroed();
        for (index, key) in keys.keys.iter_mut().enumerate() {
            *key = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        loaded
            .array(name::HASH_KEYS)
            .set(0, Value(keys), 0)
            .unwrap();
        loaded
    }

    pub fn ebpf(&self) -> &Ebpf {
        self.ebpf.as_ref().expect("it is there until the end")
    }

    fn ebpf_mut(&mut self) -> &mut Ebpf {
        self.ebpf.as_mut().expect("it is there until the end")
    }

    pub fn map_mut(&mut self, name: &str) -> &mut Map {
        self.ebpf_mut().map_mut(name).expect("a map of that name")
    }

    pub fn program(&self, name: &str) -> &Program {
        self.ebpf().program(name).expect("a program of that name")
    }

    /// An array to write to.
    pub fn array<T: bytemuck::Pod>(&mut self, map: &'static str) -> Array<&mut MapData, Value<T>> {
        self.stale.insert(map);
        Array::try_from(self.map_mut(map)).expect("an array of that type")
    }

    /// A hash to write to.
    pub fn hash<K: bytemuck::Pod, V: bytemuck::Pod>(
        &mut self,
        map: &'static str,
    ) -> HashMap<&mut MapData, Value<K>, Value<V>> {
        self.stale.insert(map);
        HashMap::try_from(self.map_mut(map)).expect("a hash of that type")
    }

    /// The value at an index of an array.
    pub fn at<T: bytemuck::Pod>(&self, map: &str, index: u32) -> T {
        let map = self.ebpf().map(map).expect("a map of that name");
        let array: Array<_, Value<T>> = Array::try_from(map).expect("an array of that type");
        array.get(&index, 0).expect("an index of the array").0
    }

    /// The value of a key in a hash.
    pub fn find<K: bytemuck::Pod, V: bytemuck::Pod>(&self, map: &str, key: K) -> Option<V> {
        let map = self.ebpf().map(map).expect("a map of that name");
        let hash: HashMap<_, Value<K>, Value<V>> = HashMap::try_from(map).expect("a hash");
        hash.get(&Value(key), 0).ok().map(|value| value.0)
    }

    /// All that a hash has.
    pub fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(&self, map: &str) -> Vec<(K, V)> {
        let map = self.ebpf().map(map).expect("a map of that name");
        let hash: HashMap<_, Value<K>, Value<V>> = HashMap::try_from(map).expect("a hash");
        let entries = hash.iter().map(|entry| entry.expect("an entry"));
        entries.map(|(key, value)| (key.0, value.0)).collect()
    }

    /// The maps of the object, sorted.
    pub fn map_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .ebpf()
            .maps()
            .map(|(name, _)| name.to_owned())
            .collect();
        names.sort();
        names
    }

    pub fn ingress(&self) -> &Xdp {
        let program = self.program(name::INGRESS);
        program.try_into().expect("an XDP program")
    }

    /// Loads the other program, which BPF_PROG_TEST_RUN cannot run.
    pub fn load_select(&mut self) {
        let program = self.ebpf_mut().program_mut(name::SELECT).expect("select");
        let program: &mut SkReuseport = program.try_into().expect("an sk_reuseport program");
        if program.fd().is_err() {
            program.load().expect("the verifier accepts it");
        }
    }

    /// The value of a per-CPU array, of each CPU.
    pub fn per_cpu<T: bytemuck::Pod>(&self, map: &str, index: u32) -> Vec<T> {
        let map = self.ebpf().map(map).expect("a map of that name");
        let map: PerCpuArray<_, Value<T>> = PerCpuArray::try_from(map).expect("a per-CPU array");
        let values = map.get(&index, 0).expect("an entry");
        values.iter().map(|value| value.0).collect()
    }

    /// The packets of each verdict.
    pub fn verdicts(&self) -> [u64; Verdict::COUNT] {
        self.verdicts_by_cpu().map(|cpus| cpus.iter().sum())
    }

    fn verdicts_by_cpu(&self) -> [Vec<u64>; Verdict::COUNT] {
        Verdict::ALL.map(|verdict| self.per_cpu::<u64>(name::VERDICTS, verdict as u32))
    }

    pub fn rule_drops(&self, rule: u32) -> u64 {
        self.per_cpu::<u64>(name::RULE_DROPS, rule).iter().sum()
    }

    pub fn traffic(&self, map: &str, id: u32) -> Traffic {
        let mut total = Traffic::default();
        for value in self.per_cpu::<Traffic>(map, id) {
            total.packets += value.packets;
            total.bytes += value.bytes;
        }
        total
    }

    /// What became of the flows of an endpoint.
    pub fn signs(&self, id: u32) -> Signs {
        let mut total = Signs::default();
        for value in self.per_cpu::<Signs>(name::ENDPOINT_SIGNS, id) {
            total.opened += value.opened;
            total.answered += value.answered;
            total.refused += value.refused;
        }
        total
    }

    /// How many packets were sent through the program.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Adds a listener; returns its id.
    pub fn listener(&mut self, at: (IpAddr, u16), protocol: u8, mode: u32, target: u32) -> u32 {
        self.listeners += 1;
        let id = self.listeners;
        self.ports.listener[usize::from(at.1 / 64)] |= 1 << (at.1 % 64);
        self.write_ports();
        self.listener_entry(at, protocol, id, mode, target);
        if !self.nat_sources.contains(&at.0) {
            self.listener_entry((at.0, 0), 0, 0, mode::ADDRESS, 0);
        }
        id
    }

    fn listener_entry(&mut self, at: (IpAddr, u16), protocol: u8, id: u32, mode: u32, target: u32) {
        let port = at.1.to_be_bytes();
        let listener = Value(Listener {
            id,
            mode,
            target,
            options: self.options,
        });
        match at.0 {
            IpAddr::V4(address) => {
                let key = ListenerKey4 {
                    address: address.octets(),
                    port,
                    protocol,
                    zero: 0,
                };
                self.hash(name::LISTENERS4)
                    .insert(Value(key), listener, 0)
                    .unwrap();
            }
            IpAddr::V6(address) => {
                let key = ListenerKey6 {
                    address: address.octets(),
                    port,
                    protocol,
                    zero: [0; 5],
                };
                self.hash(name::LISTENERS6)
                    .insert(Value(key), listener, 0)
                    .unwrap();
            }
        }
    }

    fn write_ports(&mut self) {
        let ports = *self.ports;
        self.array(name::PORTS).set(0, Value(ports), 0).unwrap();
    }

    /// Lays out NAT: sources (IPv4 ones first), ports, and the way back to them.
    pub fn nat(&mut self, sources: &[IpAddr], port_first: u16, ports: u16) {
        let mut nat = Nat::zeroed();
        for (index, source) in sources.iter().enumerate() {
            nat.sources[index] = address(*source);
            self.nat_sources.push(*source);
            self.listener_entry((*source, 0), 0, 0, mode::NAT_RETURN, index as u32);
        }
        nat.sources_count = sources.len() as u32;
        nat.sources_v4 = sources.iter().filter(|source| source.is_ipv4()).count() as u32;
        nat.port_first = u32::from(port_first);
        nat.ports = u32::from(ports);
        nat.tcp_idle_ns = TCP_IDLE_NS;
        nat.tcp_brief_ns = TCP_BRIEF_NS;
        nat.udp_idle_ns = UDP_IDLE_NS;
        self.array(name::NAT).set(0, Value(nat), 0).unwrap();
        for port in port_first..=port_first + (ports - 1) {
            self.ports.nat[usize::from(port / 64)] |= 1 << (port % 64);
        }
        self.write_ports();
    }

    /// Adds an endpoint, reached through an interface (0: not resolved).
    pub fn endpoint(&mut self, id: u16, at: (IpAddr, u16), ifindex: u32) {
        self.endpoint_entry(id, at, ifindex, |_| {});
    }

    /// The same with something about it changed.
    pub fn endpoint_entry(
        &mut self,
        id: u16,
        at: (IpAddr, u16),
        ifindex: u32,
        change: impl FnOnce(&mut Endpoint),
    ) {
        let mut endpoint = Endpoint {
            address: address(at.0),
            port: at.1.to_be_bytes(),
            mac: ENDPOINT_MAC,
            source_mac: EDGE_MAC,
            vlan: [0; 2],
            ifindex,
            mtu_bytes: 0,
            plain_mtu_bytes: 0,
            back_mtu_bytes: 0,
            mss_bytes: 0,
            zero: [0; 4],
        };
        change(&mut endpoint);
        self.array(name::ENDPOINTS)
            .set(u32::from(id), Value(endpoint), 0)
            .unwrap();
    }

    /// What encapsulations have in common.
    pub fn tunnel(&mut self, tunnel: Tunnel) {
        self.array(name::TUNNEL).set(0, Value(tunnel), 0).unwrap();
    }

    /// The keys of the flow hash.
    pub fn hash_keys(&mut self) -> HashKeys {
        self.at(name::HASH_KEYS, 0)
    }

    /// Gives an upstream a new ring of these endpoints.
    pub fn upstream(&mut self, id: u32, endpoints: &[(u16, (IpAddr, u16))]) {
        let owners = owners(endpoints);
        let slots_count = owners.len() as u32;
        let page = self.page;
        self.page += maglev::ring_pages(slots_count);
        for (index, part) in owners.chunks(RING_PAGE_SLOTS).enumerate() {
            let mut ring: Box<RingPage> = bytemuck::zeroed_box();
            for (slot, owner) in ring.slots.iter_mut().zip(part) {
                *slot = Slot::new(*owner, 0);
            }
            self.array(name::RINGS)
                .set(page + index as u32, Value(*ring), 0)
                .unwrap();
        }
        let upstream = Upstream {
            page,
            slots: slots_count,
        };
        self.array(name::UPSTREAMS)
            .set(id, Value(upstream), 0)
            .unwrap();
    }

    /// Changes the endpoints of an upstream whose ring is one page, in place, as the user half does.
    pub fn change(&mut self, id: u32, endpoints: &[(u16, (IpAddr, u16))], dead: &[u16]) {
        let page = self.page_of(id);
        let mut ring = self.ring(id);
        let now = stamp(now_ns());
        let mut stamps: StampPage = self.at(name::STAMPS, page);
        for (index, owner) in owners(endpoints).into_iter().enumerate() {
            ring.slots[index] = ring.slots[index].passed_to(owner, |id| dead.contains(&id));
            stamps.stamps[index] = now;
        }
        self.set_stamps(id, &stamps);
        self.array(name::RINGS).set(page, Value(*ring), 0).unwrap();
    }

    /// The first page of an upstream's ring and stamps.
    pub fn page_of(&self, upstream: u32) -> u32 {
        self.at::<Upstream>(name::UPSTREAMS, upstream).page
    }

    /// The first page of an upstream's ring.
    pub fn ring(&mut self, upstream: u32) -> Box<RingPage> {
        let page = self.page_of(upstream);
        Box::new(self.at(name::RINGS, page))
    }

    /// The same of its stamps.
    pub fn stamps(&mut self, upstream: u32) -> Box<StampPage> {
        let page = self.page_of(upstream);
        Box::new(self.at(name::STAMPS, page))
    }

    pub fn set_stamps(&mut self, upstream: u32, stamps: &StampPage) {
        let page = self.page_of(upstream);
        self.array(name::STAMPS)
            .set(page, Value(*stamps), 0)
            .unwrap();
    }

    /// Bans a source until a time of CLOCK_MONOTONIC_COARSE.
    pub fn ban(&mut self, source: IpAddr, until_ns: u64, rule: u32) {
        let key = address(source).ban_key();
        let ban = Ban {
            until_ns,
            rule,
            zero: 0,
            dropped: 0,
        };
        self.hash(name::BANS)
            .insert(Value(key), Value(ban), 0)
            .unwrap();
        let bit = guard_bit(&key);
        self.guard.bans += 1;
        self.guard.filter[(bit / 64) as usize] |= 1 << (bit % 64);
        let guard = *self.guard;
        self.array(name::GUARD).set(0, Value(guard), 0).unwrap();
    }

    /// Sets every bit of the filter, as if each source shared its bit with a banned one.
    pub fn set_whole_filter(&mut self) {
        self.guard.filter = [u64::MAX; 1024];
        let guard = *self.guard;
        self.array(name::GUARD).set(0, Value(guard), 0).unwrap();
    }

    pub fn find_ban(&mut self, source: IpAddr) -> Ban {
        self.find(name::BANS, address(source).ban_key()).unwrap()
    }

    /// The index under which `FLOWS` holds a flow, if it does.
    pub fn find_flow(&self, key: FlowKey) -> Option<u32> {
        let index: Option<u64> = self.find(name::FLOWS, key);
        index.map(|index| index as u32)
    }

    pub fn flow_count(&self) -> usize {
        self.entries::<FlowKey, u64>(name::FLOWS).len()
    }

    pub fn nat_flow(&self, index: u32) -> NatFlow {
        self.at(name::NAT_FLOWS, index)
    }

    pub fn set_nat_flow(&mut self, index: u32, flow: NatFlow) {
        self.array(name::NAT_FLOWS)
            .set(index, Value(flow), 0)
            .unwrap();
    }

    /// Sends a frame through the program once; exactly one verdict must have been counted for it, and the model must
    /// say the same of the packet, and of all that is remembered after it.
    #[track_caller]
    pub fn send(&mut self, frame: &[u8]) -> Outcome {
        self.refresh();
        let before = self.verdicts_by_cpu();
        let from_ns = now_ns();
        let (action, bytes) = self.run_once(frame);
        let to_ns = now_ns();
        self.sent += 1;
        let after = self.verdicts_by_cpu();
        let mut counted = vec![];
        for verdict in Verdict::ALL {
            let index = verdict as usize;
            for (cpu, (before, after)) in before[index].iter().zip(&after[index]).enumerate() {
                counted.extend((*before..*after).map(|_| (verdict, cpu)));
            }
        }
        let [(verdict, cpu)] = counted[..] else {
            panic!("one packet, verdicts {counted:?}");
        };
        let outcome = Outcome {
            verdict,
            action,
            bytes,
        };
        self.compare(frame, &outcome, cpu, (from_ns, to_ns));
        outcome
    }

    /// Runs the program over a frame once, on whichever CPU the caller is, and tells the model nothing.
    pub fn run(&self, frame: &[u8]) -> (Action, Vec<u8>) {
        self.unseen.store(true, Relaxed);
        self.run_once(frame)
    }

    fn run_once(&self, frame: &[u8]) -> (Action, Vec<u8>) {
        let mut bytes = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut bytes),
            ..TestRunOptions::default()
        };
        let result = self.ingress().test_run(options).expect("the test run");
        bytes.truncate(result.data_size_out as usize);
        let action = match result.return_value {
            1 => Action::Drop,
            2 => Action::Pass,
            3 => Action::Tx,
            4 => Action::Redirect,
            other => panic!("action {other}"),
        };
        (action, bytes)
    }

    /// Sends a frame that must be passed, untouched, with this verdict.
    #[track_caller]
    pub fn passes(&mut self, frame: &[u8], verdict: Verdict) {
        let outcome = self.send(frame);
        let wanted = Outcome {
            verdict,
            action: Action::Pass,
            bytes: frame.to_vec(),
        };
        assert_eq!(outcome, wanted);
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // Who took the programs away has sent packets of which the model knows nothing.
        if std::thread::panicking() || self.ebpf.is_none() {
            return;
        }
        self.compare_all();
        if let Some(ebpf) = self.ebpf.take() {
            pool::give_back(&self.sizes, ebpf);
        }
    }
}

/// The owners of the slots of a ring of these endpoints.
fn owners(endpoints: &[(u16, (IpAddr, u16))]) -> Vec<u16> {
    let mut members: Vec<Member> = endpoints
        .iter()
        .map(|(id, at)| Member::new(*id, address(at.0), at.1.to_be_bytes(), 1))
        .collect();
    let mut slots = vec![0; maglev::ring_slots(endpoints.len()) as usize];
    maglev::fill(&mut members, &mut slots);
    slots
}

/// Says aloud that this test did not run: straight to stderr, for libtest swallows what a passing test prints.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("?");
    let line = format!("test {test} ... ignored, {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// CLOCK_MONOTONIC_COARSE, ns.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes to the timespec it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// An address as the maps hold it.
pub fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address(ip.octets()),
    }
}
