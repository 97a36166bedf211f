//! Every map, and who writes it. Sizes are defaults: the loader may set others.
//!
//! The names are those of `abi::name`; an attribute takes no constant, so a fixture test compares them.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{
    Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, ReusePortSockArray,
};
use proxy_ebpf::abi::{
    Address, Ban, Endpoint, FlowKey, FragmentKey, FragmentPorts, Guard, HashKeys, Inserts,
    Listener, ListenerKey4, ListenerKey6, Nat, NatFlow, Ports, Prefix, RingPage, Signs, StampPage,
    SteerKey, Traffic, Tunnel, Upstream, size,
};
use proxy_ebpf::packet::Packet;
use proxy_ebpf::verdict::Verdict;

use crate::ingress::Desk;

// Written by the user half only.

#[map(name = "abi")]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

#[map(name = "ports")]
pub static PORTS: Array<Ports> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "listeners4")]
pub static LISTENERS4: HashMap<ListenerKey4, Listener> =
    HashMap::with_max_entries(size::LISTENERS, 0);

#[map(name = "listeners6")]
pub static LISTENERS6: HashMap<ListenerKey6, Listener> =
    HashMap::with_max_entries(size::LISTENERS, 0);

/// The key is a `PrefixKey` as aya has it: its first word apart.
#[map(name = "prefixes")]
pub static PREFIXES: LpmTrie<[u8; 20], Prefix> = LpmTrie::with_max_entries(size::PREFIXES, 0);

#[map(name = "upstreams")]
pub static UPSTREAMS: Array<Upstream> = Array::with_max_entries(size::UPSTREAMS, 0);

#[map(name = "rings")]
pub static RINGS: Array<RingPage> = Array::with_max_entries(size::RING_PAGES, BPF_F_MMAPABLE);

#[map(name = "endpoints")]
pub static ENDPOINTS: Array<Endpoint> = Array::with_max_entries(size::ENDPOINTS, 0);

#[map(name = "tunnel")]
pub static TUNNEL: Array<Tunnel> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "hash_keys")]
pub static HASH_KEYS: Array<HashKeys> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "guard")]
pub static GUARD: Array<Guard> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "steer")]
pub static STEER: HashMap<SteerKey, u32> = HashMap::with_max_entries(size::LISTENERS, 0);

#[map(name = "sockets")]
pub static SOCKETS: ReusePortSockArray = ReusePortSockArray::with_max_entries(size::SOCKETS, 0);

/// Index 0: the program `rare`.
#[map(name = "programs")]
pub static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(1, 0);

// Written by both halves.

/// The user half writes the moment of a change, the kernel half that somebody still needs the owner before it.
#[map(name = "stamps")]
pub static STAMPS: Array<StampPage> = Array::with_max_entries(size::RING_PAGES, BPF_F_MMAPABLE);

/// The user half writes the layout, the kernel half the cursors.
#[map(name = "nat")]
pub static NAT: Array<Nat> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The user half writes the ban, the kernel half its count.
#[map(name = "bans")]
pub static BANS: HashMap<Address, Ban> = HashMap::with_max_entries(size::BANS, 0);

/// Workers spend from them; the kernel half will, once it has rates of its own.
#[map(name = "cells")]
static CELLS: Array<u64> = Array::with_max_entries(size::CELLS, BPF_F_MMAPABLE);

// Written by the kernel half only.

#[map(name = "flows")]
pub static FLOWS: HashMap<FlowKey, u64> = HashMap::with_max_entries(size::NAT_FLOWS, 0);

#[map(name = "nat_flows")]
pub static NAT_FLOWS: Array<NatFlow> = Array::with_max_entries(size::NAT_FLOWS, 0);

#[map(name = "moved")]
pub static MOVED: LruHashMap<FlowKey, u64> = LruHashMap::with_max_entries(size::MOVED, 0);

#[map(name = "inserts")]
pub static INSERTS: PerCpuArray<Inserts> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "fragments")]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts> =
    LruHashMap::with_max_entries(size::FRAGMENTS, 0);

/// Where the program `rare` keeps the packet it is at.
#[map(name = "desk")]
pub static DESK: PerCpuArray<Desk> = PerCpuArray::with_max_entries(1, 0);

#[map(name = "rule_drops")]
pub static RULE_DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(size::RULES, 0);

#[map(name = "verdicts")]
static VERDICTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Verdict::COUNT as u32, 0);

#[map(name = "listener_traffic")]
pub static LISTENER_TRAFFIC: PerCpuArray<Traffic> =
    PerCpuArray::with_max_entries(size::LISTENERS, 0);

#[map(name = "endpoint_traffic")]
pub static ENDPOINT_TRAFFIC: PerCpuArray<Traffic> =
    PerCpuArray::with_max_entries(size::ENDPOINTS, 0);

#[map(name = "endpoint_signs")]
pub static ENDPOINT_SIGNS: PerCpuArray<Signs> = PerCpuArray::with_max_entries(size::ENDPOINTS, 0);

/// Counts a packet's verdict.
#[inline(always)]
pub fn count_verdict(verdict: Verdict) {
    count(&VERDICTS, verdict as u32);
}

/// Counts one in a per-CPU counter; an index that does not exist counts nowhere.
#[inline(always)]
pub fn count(counters: &PerCpuArray<u64>, index: u32) {
    if let Some(counter) = counters.get_ptr_mut(index) {
        // SAFETY: the value belongs to this CPU, and XDP is not interrupted by itself.
        unsafe { *counter += 1 };
    }
}

/// Counts one packet, and its bytes.
#[inline(always)]
pub fn count_traffic(counters: &PerCpuArray<Traffic>, index: u32, packet: &Packet) {
    if let Some(counter) = counters.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += packet.frame_bytes_min as u64;
        }
    }
}
