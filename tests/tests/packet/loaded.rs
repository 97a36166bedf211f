//! The kernel half loaded for one test: maps of its own, not pinned, filled by hand, and packets sent through it.

use std::io::Write;
use std::net::IpAddr;

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, ProgramArray};
use aya::programs::{Program, SkReuseport, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use bytemuck::Zeroable;
use proxy_ebpf::abi::{
    Address, Ban, Endpoint, FlowKey, Guard, HashKeys, Listener, ListenerKey4, ListenerKey6, Nat,
    NatFlow, Ports, RING_PAGE_SLOTS, RingPage, Slot, StampPage, Traffic, Tunnel, Upstream,
    guard_bit, mode, name, stamp,
};
use proxy_ebpf::maglev::{self, Member};
use proxy_ebpf::object;
use proxy_ebpf::verdict::Verdict;

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

/// The loaded program and its maps.
pub struct Loaded {
    ebpf: Ebpf,
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
    load_sized(&[
        (name::FLOWS, 1024),
        (name::NAT_FLOWS, 1024),
        (name::RINGS, 16),
    ])
}

/// The same with other sizes of the maps named; what no test fills is small always.
pub fn load_sized(sizes: &[(&str, u32)]) -> Option<Loaded> {
    // SAFETY: the call takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        skip("needs root");
        return None;
    }
    Some(Loaded::new(sizes))
}

impl Loaded {
    fn new(sizes: &[(&str, u32)]) -> Self {
        let mut loader = EbpfLoader::new();
        let small = [
            (name::LISTENERS4, 64),
            (name::LISTENERS6, 64),
            (name::UPSTREAMS, 16),
            (name::ENDPOINTS, 64),
            (name::BANS, 128),
            (name::CELLS, 64),
            (name::STEER, 16),
            (name::SOCKETS, 16),
            (name::MOVED, 1024),
            (name::FRAGMENTS, 1024),
            (name::LISTENER_TRAFFIC, 64),
            (name::ENDPOINT_TRAFFIC, 64),
        ];
        for (map, entries) in small.iter().chain(sizes) {
            loader.map_max_entries(map, *entries);
        }
        let mut ebpf = loader.load(object::KERNEL).expect("the object loads");
        for name in [name::INGRESS, name::RARE] {
            let program = ebpf.program_mut(name).expect("a program of that name");
            let program: &mut Xdp = program.try_into().expect("an XDP program");
            program.load().expect("the verifier accepts it");
        }
        let rare: &Xdp = ebpf.program(name::RARE).unwrap().try_into().unwrap();
        let rare = rare.fd().unwrap().try_clone().unwrap();
        let programs = ebpf.map_mut(name::PROGRAMS).expect("the programs");
        let mut programs = ProgramArray::try_from(programs).expect("a program array");
        programs.set(0, &rare, 0).unwrap();
        let mut loaded = Self {
            ebpf,
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

    pub fn map_mut(&mut self, name: &str) -> &mut Map {
        self.ebpf.map_mut(name).expect("a map of that name")
    }

    pub fn program(&self, name: &str) -> &Program {
        self.ebpf.program(name).expect("a program of that name")
    }

    pub fn array<T: bytemuck::Pod>(&mut self, map: &str) -> Array<&mut MapData, Value<T>> {
        let map = self.map_mut(map);
        Array::try_from(map).expect("an array of that type")
    }

    pub fn hash<K: bytemuck::Pod, V: bytemuck::Pod>(
        &mut self,
        map: &str,
    ) -> HashMap<&mut MapData, Value<K>, Value<V>> {
        let map = self.map_mut(map);
        HashMap::try_from(map).expect("a hash of that type")
    }

    /// The maps of the object, sorted.
    pub fn map_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.ebpf.maps().map(|(name, _)| name.to_owned()).collect();
        names.sort();
        names
    }

    pub fn ingress(&self) -> &Xdp {
        let program = self.program(name::INGRESS);
        program.try_into().expect("an XDP program")
    }

    /// Loads the other program, which BPF_PROG_TEST_RUN cannot run.
    pub fn load_select(&mut self) {
        let program = self.ebpf.program_mut(name::SELECT).expect("select");
        let program: &mut SkReuseport = program.try_into().expect("an sk_reuseport program");
        program.load().expect("the verifier accepts it");
    }

    /// The value of a per-CPU array, of each CPU.
    fn per_cpu<T: bytemuck::Pod>(&mut self, map: &str, index: u32) -> Vec<T> {
        let map = self.map_mut(map);
        let map: PerCpuArray<_, Value<T>> = PerCpuArray::try_from(map).expect("a per-CPU array");
        let values = map.get(&index, 0).expect("an entry");
        values.iter().map(|value| value.0).collect()
    }

    pub fn verdicts(&mut self) -> [u64; Verdict::COUNT] {
        Verdict::ALL.map(|verdict| {
            self.per_cpu::<u64>(name::VERDICTS, verdict as u32)
                .iter()
                .sum()
        })
    }

    pub fn rule_drops(&mut self, rule: u32) -> u64 {
        self.per_cpu::<u64>(name::RULE_DROPS, rule).iter().sum()
    }

    pub fn traffic(&mut self, map: &str, id: u32) -> Traffic {
        let mut total = Traffic::default();
        for value in self.per_cpu::<Traffic>(map, id) {
            total.packets += value.packets;
            total.bytes += value.bytes;
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
            zero: [0; 6],
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
        self.array(name::HASH_KEYS).get(&0, 0).unwrap().0
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
        let mut stamps: StampPage = self.array(name::STAMPS).get(&page, 0).unwrap().0;
        for (index, owner) in owners(endpoints).into_iter().enumerate() {
            ring.slots[index] = ring.slots[index].passed_to(owner, |id| dead.contains(&id));
            stamps.stamps[index] = now;
        }
        self.set_stamps(id, &stamps);
        self.array(name::RINGS).set(page, Value(*ring), 0).unwrap();
    }

    fn page_of(&mut self, upstream: u32) -> u32 {
        let upstream: Value<Upstream> = self.array(name::UPSTREAMS).get(&upstream, 0).unwrap();
        upstream.0.page
    }

    /// The first page of an upstream's ring.
    pub fn ring(&mut self, upstream: u32) -> Box<RingPage> {
        let page = self.page_of(upstream);
        Box::new(self.array(name::RINGS).get(&page, 0).unwrap().0)
    }

    /// The same of its stamps.
    pub fn stamps(&mut self, upstream: u32) -> Box<StampPage> {
        let page = self.page_of(upstream);
        Box::new(self.array(name::STAMPS).get(&page, 0).unwrap().0)
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
        let key = address(source).ban_key();
        self.hash::<Address, Ban>(name::BANS)
            .get(&Value(key), 0)
            .unwrap()
            .0
    }

    /// The index under which `FLOWS` holds a flow, if it does.
    pub fn find_flow(&mut self, key: FlowKey) -> Option<u32> {
        let found = self.hash::<FlowKey, u64>(name::FLOWS).get(&Value(key), 0);
        found.ok().map(|index| index.0 as u32)
    }

    pub fn flow_count(&mut self) -> usize {
        self.hash::<FlowKey, u64>(name::FLOWS).keys().count()
    }

    pub fn nat_flow(&mut self, index: u32) -> NatFlow {
        self.array(name::NAT_FLOWS)
            .get(&index, 0)
            .map(|flow| flow.0)
            .unwrap()
    }

    pub fn set_nat_flow(&mut self, index: u32, flow: NatFlow) {
        self.array(name::NAT_FLOWS)
            .set(index, Value(flow), 0)
            .unwrap();
    }

    /// Sends a frame through the program once; exactly one verdict must have been counted for it.
    pub fn send(&mut self, frame: &[u8]) -> Outcome {
        let before = self.verdicts();
        let (action, bytes) = self.run(frame);
        self.sent += 1;
        let after = self.verdicts();
        let counted: Vec<Verdict> = Verdict::ALL
            .into_iter()
            .flat_map(|verdict| {
                let index = verdict as usize;
                std::iter::repeat_n(verdict, (after[index] - before[index]) as usize)
            })
            .collect();
        let [verdict] = counted[..] else {
            panic!("one packet, verdicts {counted:?}");
        };
        Outcome {
            verdict,
            action,
            bytes,
        }
    }

    /// Runs the program over a frame once, on whichever CPU the caller is.
    pub fn run(&self, frame: &[u8]) -> (Action, Vec<u8>) {
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
