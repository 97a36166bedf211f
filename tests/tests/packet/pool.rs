//! Loaded programs that wait for their next test: the verifier takes a second for them, and emptying the maps a millisecond.

use std::sync::{Mutex, PoisonError};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, PerCpuValues, ProgramArray};
use aya::programs::Xdp;
use aya::{Ebpf, EbpfLoader};
use proxy_ebpf::abi::{
    Address, Ban, Endpoint, FlowKey, FragmentKey, FragmentPorts, Guard, HashKeys, Inserts,
    Listener, ListenerKey4, ListenerKey6, Nat, NatFlow, Ports, Prefix, RingPage, Signs, StampPage,
    SteerKey, Traffic, Tunnel, Upstream, name, size,
};
use proxy_ebpf::object;
use proxy_ebpf::verdict::Verdict;

use super::loaded::Value;

/// How many entries maps have; those that are not named here have their default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes(Vec<(&'static str, u32)>);

impl Sizes {
    /// Small ones, but for those named.
    pub fn with(named: &[(&'static str, u32)]) -> Self {
        // LRU tables have room for every test: each CPU sets free entries aside, and what is evicted the model still has.
        let mut sizes = vec![
            (name::LISTENERS4, 64),
            (name::LISTENERS6, 64),
            (name::PREFIXES, 64),
            (name::UPSTREAMS, 16),
            (name::ENDPOINTS, 64),
            (name::RINGS, 16),
            (name::STAMPS, 16),
            (name::BANS, 128),
            (name::CELLS, 64),
            (name::STEER, 16),
            (name::SOCKETS, 16),
            (name::MOVED, 16_384),
            (name::FRAGMENTS, 16_384),
            (name::FLOWS, 1024),
            (name::NAT_FLOWS, 1024),
            (name::LISTENER_TRAFFIC, 64),
            (name::ENDPOINT_TRAFFIC, 64),
            (name::ENDPOINT_SIGNS, 64),
        ];
        sizes.retain(|(map, _)| named.iter().all(|(other, _)| other != map));
        sizes.extend(named);
        Self(sizes)
    }

    /// The size of a map.
    pub fn of(&self, map: &str) -> u32 {
        let found = self.0.iter().find(|(other, _)| *other == map);
        match (found, map) {
            (Some((_, entries)), _) => *entries,
            (None, name::RULE_DROPS) => size::RULES,
            (None, name::VERDICTS) => Verdict::COUNT as u32,
            (None, _) => 1,
        }
    }
}

/// Programs that no test uses now, and their maps, empty.
static WAITING: Mutex<Vec<(Sizes, Ebpf)>> = Mutex::new(Vec::new());

/// A loaded kernel half with empty maps of these sizes.
pub fn take(sizes: &Sizes) -> Ebpf {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    let found = waiting.iter().position(|(other, _)| other == sizes);
    match found {
        Some(index) => waiting.swap_remove(index).1,
        None => {
            drop(waiting);
            load(sizes)
        }
    }
}

/// Empties the maps, and keeps the programs for the next test.
pub fn give_back(sizes: &Sizes, mut ebpf: Ebpf) {
    empty(sizes, &mut ebpf);
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.push((sizes.clone(), ebpf));
}

fn load(sizes: &Sizes) -> Ebpf {
    let mut loader = EbpfLoader::new();
    for (map, entries) in &sizes.0 {
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
    ebpf
}

fn empty(sizes: &Sizes, ebpf: &mut Ebpf) {
    zero::<Ports>(sizes, ebpf, name::PORTS);
    remove::<ListenerKey4, Listener>(ebpf, name::LISTENERS4);
    remove::<ListenerKey6, Listener>(ebpf, name::LISTENERS6);
    remove_prefixes(ebpf);
    zero::<Upstream>(sizes, ebpf, name::UPSTREAMS);
    zero::<RingPage>(sizes, ebpf, name::RINGS);
    zero::<StampPage>(sizes, ebpf, name::STAMPS);
    remove::<FlowKey, u64>(ebpf, name::MOVED);
    zero_per_cpu::<Inserts>(sizes, ebpf, name::INSERTS);
    remove::<FragmentKey, FragmentPorts>(ebpf, name::FRAGMENTS);
    zero::<Tunnel>(sizes, ebpf, name::TUNNEL);
    zero::<Endpoint>(sizes, ebpf, name::ENDPOINTS);
    zero::<HashKeys>(sizes, ebpf, name::HASH_KEYS);
    zero::<Nat>(sizes, ebpf, name::NAT);
    remove::<FlowKey, u64>(ebpf, name::FLOWS);
    zero::<NatFlow>(sizes, ebpf, name::NAT_FLOWS);
    zero::<Guard>(sizes, ebpf, name::GUARD);
    remove::<Address, Ban>(ebpf, name::BANS);
    zero_per_cpu::<u64>(sizes, ebpf, name::RULE_DROPS);
    zero_per_cpu::<u64>(sizes, ebpf, name::VERDICTS);
    zero_per_cpu::<Traffic>(sizes, ebpf, name::LISTENER_TRAFFIC);
    zero_per_cpu::<Traffic>(sizes, ebpf, name::ENDPOINT_TRAFFIC);
    zero_per_cpu::<Signs>(sizes, ebpf, name::ENDPOINT_SIGNS);
    remove::<SteerKey, u32>(ebpf, name::STEER);
}

fn map_mut<'a>(ebpf: &'a mut Ebpf, map: &str) -> &'a mut Map {
    ebpf.map_mut(map).expect("a map of that name")
}

fn zero<T: bytemuck::Pod>(sizes: &Sizes, ebpf: &mut Ebpf, map: &str) {
    let mut array: Array<&mut MapData, Value<T>> = map_mut(ebpf, map).try_into().expect("an array");
    let zero: Box<T> = bytemuck::zeroed_box();
    for index in 0..sizes.of(map) {
        array.set(index, Value(*zero), 0).unwrap();
    }
}

fn zero_per_cpu<T: bytemuck::Pod>(sizes: &Sizes, ebpf: &mut Ebpf, map: &str) {
    let mut array: PerCpuArray<&mut MapData, Value<T>> =
        map_mut(ebpf, map).try_into().expect("a per-CPU array");
    let cpus = array.get(&0, 0).unwrap().len();
    for index in 0..sizes.of(map) {
        let zeros = PerCpuValues::try_from(vec![Value(T::zeroed()); cpus]).unwrap();
        array.set(index, zeros, 0).unwrap();
    }
}

fn remove_prefixes(ebpf: &mut Ebpf) {
    let mut trie: LpmTrie<&mut MapData, [u8; 20], Value<Prefix>> =
        map_mut(ebpf, name::PREFIXES).try_into().expect("a trie");
    let keys: Vec<_> = trie.keys().map(|key| key.unwrap()).collect();
    for key in keys {
        trie.remove(&key).unwrap();
    }
}

fn remove<K: bytemuck::Pod, V: bytemuck::Pod>(ebpf: &mut Ebpf, map: &str) {
    let mut hash: HashMap<&mut MapData, Value<K>, Value<V>> =
        map_mut(ebpf, map).try_into().expect("a hash");
    let keys: Vec<Value<K>> = hash.keys().map(|key| key.unwrap()).collect();
    for key in keys {
        // An LRU table may have evicted it meanwhile.
        let _ = hash.remove(&key);
    }
}
