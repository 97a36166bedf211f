//! Key and value of every map that the two halves share. Ports and addresses stand in network order.
//!
//! Addresses are 16 bytes, IPv4 as v4-mapped IPv6 (RFC 4291 section 2.5.5.2), so that one code path
//! serves both families. Only the listener look-up has a map per family: its key of 8 bytes saves 9 ns per packet.

mod nat;
mod prefix;
mod ring;

use bytemuck::{Pod, Zeroable};

pub use nat::{Nat, NatFlow, flow_state};
pub use prefix::{PortRange, Prefix, PrefixKey};
pub use ring::{RING_PAGE_SLOTS, RingPage, Slot, StampPage, stamp};

/// Version of everything in this file. A keeper adopts pinned maps of this number and refuses any other.
pub const ABI: u32 = 5;

/// Names of maps and programs: the pin below `/sys/fs/bpf/sluice/<instance>/` has the same name.
pub mod name {
    /// Array\[1\] of u32: `ABI`.
    pub const ABI: &str = "abi";
    /// Array\[1\] of `Ports`, mmapable: which ports can be ours at all.
    pub const PORTS: &str = "ports";
    /// Hash of `ListenerKey4` to `Listener`.
    pub const LISTENERS4: &str = "listeners4";
    /// Hash of `ListenerKey6` to `Listener`.
    pub const LISTENERS6: &str = "listeners6";
    /// LPM trie of `PrefixKey` to `Prefix`: listeners of more addresses and ports than would each get an entry.
    pub const PREFIXES: &str = "prefixes";
    /// Array of `Upstream`, by upstream id.
    pub const UPSTREAMS: &str = "upstreams";
    /// Array of `RingPage`, mmapable: the Maglev rings, a run of pages each.
    pub const RINGS: &str = "rings";
    /// Array of `StampPage`, mmapable, page by page as in `RINGS`: when a slot's earlier owner was last needed.
    pub const STAMPS: &str = "stamps";
    /// LRU hash of `FlowKey` to u64: the endpoint id of a flow that began in a slot whose earlier owner still has flows.
    pub const MOVED: &str = "moved";
    /// Per-CPU array\[1\] of `Inserts`: how many entries `MOVED` got lately.
    pub const INSERTS: &str = "inserts";
    /// LRU hash of `FragmentKey` to `FragmentPorts`.
    pub const FRAGMENTS: &str = "fragments";
    /// Array\[1\] of `Tunnel`, mmapable: what encapsulations have in common.
    pub const TUNNEL: &str = "tunnel";
    /// Array of `Endpoint`, by endpoint id.
    pub const ENDPOINTS: &str = "endpoints";
    /// Array\[1\] of `HashKeys`, mmapable: made once, at random, and kept as long as the pins.
    pub const HASH_KEYS: &str = "hash_keys";
    /// Array\[1\] of `Nat`, mmapable: how NAT ports are laid out, and the next ones to try.
    pub const NAT: &str = "nat";
    /// Hash of `FlowKey` to u64: index into `NAT_FLOWS`.
    pub const FLOWS: &str = "flows";
    /// Array of `NatFlow`, by NAT port: the flow's only state, and its way back.
    pub const NAT_FLOWS: &str = "nat_flows";
    /// Array\[1\] of `Guard`, mmapable: whether there are bans, and a filter before their table.
    pub const GUARD: &str = "guard";
    /// Hash of `Address` to `Ban`.
    pub const BANS: &str = "bans";
    /// Per-CPU array of u64, by rule: packets dropped.
    pub const RULE_DROPS: &str = "rule_drops";
    /// Per-CPU array of u64, by `Verdict`.
    pub const VERDICTS: &str = "verdicts";
    /// Per-CPU array of `Traffic`, by listener id: packets taken from clients.
    pub const LISTENER_TRAFFIC: &str = "listener_traffic";
    /// Per-CPU array of `Traffic`, by endpoint id: packets sent to it.
    pub const ENDPOINT_TRAFFIC: &str = "endpoint_traffic";
    /// Per-CPU array of `Signs`, by endpoint id: what became of flows that NAT opened to it.
    pub const ENDPOINT_SIGNS: &str = "endpoint_signs";
    /// Array of u64, mmapable: the rate cells that XDP and workers both spend from (see `bucket`).
    pub const CELLS: &str = "cells";
    /// Hash of `SteerKey` to u32: the first index of a listener's sockets in `SOCKETS`.
    pub const STEER: &str = "steer";
    /// Reuseport socket array: index = `STEER` value + CPU.
    pub const SOCKETS: &str = "sockets";
    /// Per-CPU array\[1\]: the packet that the program `RARE` is at; of no use to anybody else.
    pub const DESK: &str = "desk";
    /// Program array: index 0 is the program `RARE`.
    pub const PROGRAMS: &str = "programs";
    /// Every map.
    pub const MAPS: [&str; 29] = [
        ABI,
        PORTS,
        LISTENERS4,
        LISTENERS6,
        PREFIXES,
        UPSTREAMS,
        RINGS,
        STAMPS,
        MOVED,
        INSERTS,
        FRAGMENTS,
        TUNNEL,
        ENDPOINTS,
        HASH_KEYS,
        NAT,
        FLOWS,
        NAT_FLOWS,
        GUARD,
        BANS,
        RULE_DROPS,
        VERDICTS,
        LISTENER_TRAFFIC,
        ENDPOINT_TRAFFIC,
        ENDPOINT_SIGNS,
        CELLS,
        STEER,
        SOCKETS,
        PROGRAMS,
        DESK,
    ];
    /// XDP program: a packet's whole way.
    pub const INGRESS: &str = "ingress";
    /// XDP program: the same way of packets that the first one leaves to it.
    pub const RARE: &str = "rare";
    /// sk_reuseport program: the worker on the CPU that took the packet.
    pub const SELECT: &str = "select";
}

/// Sizes of maps. Where a tunable sets one (`datapath.*_max`), this is its default.
pub mod size {
    /// Listener addresses of each family (each address, port and protocol counts, and each address once more).
    pub const LISTENERS: u32 = 16_384;
    /// Prefixes of listeners, a kilobyte or so each once it is there.
    pub const PREFIXES: u32 = 4096;
    /// Upstreams that the kernel half forwards to; id 0 is never used.
    pub const UPSTREAMS: u32 = 4096;
    /// Endpoints; ids are u16 in a ring slot; id 0 is never used.
    pub const ENDPOINTS: u32 = 65_536;
    /// Pages of `RING_PAGE_SLOTS` slots: 32 KiB each, and 16 KiB of stamps.
    pub const RING_PAGES: u32 = 1024;
    /// Flows remembered that began in a slot whose earlier owner still had flows.
    pub const MOVED: u32 = 131_072;
    /// Fragmented datagrams on their way at a time.
    pub const FRAGMENTS: u32 = 16_384;
    /// NAT ports of all sources and both protocols together = flows at a time.
    pub const NAT_FLOWS: u32 = 524_288;
    /// Banned sources.
    pub const BANS: u32 = 65_536;
    /// Rules that can ban; id 0 is the operator's own (`sluice ban add`).
    pub const RULES: u32 = 256;
    /// Rate cells (8 bytes each), a multiple of `bucket::WAYS`.
    pub const CELLS: u32 = 524_288;
    /// CPUs whose workers can be steered to.
    pub const CPUS: u32 = 256;
    /// Sockets that can be steered to.
    pub const SOCKETS: u32 = 65_536;
    /// NAT source addresses, both families together.
    pub const NAT_SOURCES: usize = 8;
}

/// An IPv6 address, or an IPv4 one as `::ffff:a.b.c.d`, in network order.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Address(pub [u8; 16]);
const _: () = assert!(size_of::<Address>() == 16);

impl Address {
    /// The v4-mapped form of an IPv4 address.
    #[inline(always)]
    pub const fn v4(address: [u8; 4]) -> Self {
        Self::v4_word(u32::from_ne_bytes(address))
    }

    /// The same of an address in one word, as it stands in a packet. The kernel half works in words throughout:
    /// bytes of an address handled one by one cost it more than all else it does with them.
    #[inline(always)]
    pub const fn v4_word(word: u32) -> Self {
        Self(bytemuck::must_cast([0, 0, u32::from_be(0xffff), word]))
    }

    /// The last four bytes: the IPv4 address of a v4-mapped one.
    #[inline(always)]
    pub const fn as_v4(&self) -> [u8; 4] {
        self.as_v4_word().to_ne_bytes()
    }

    /// The same in one word, as it stands in a packet.
    #[inline(always)]
    pub const fn as_v4_word(&self) -> u32 {
        let words: [u32; 4] = bytemuck::must_cast(self.0);
        words[3]
    }

    /// Whether this is an IPv4 address in its mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let words: [u32; 4] = bytemuck::must_cast(self.0);
        words[0] | words[1] == 0 && words[2] == u32::from_be(0xffff)
    }

    /// Whether the two are the same; as whole words, for the kernel half has no `memcmp`.
    #[inline(always)]
    pub const fn is(&self, other: &Self) -> bool {
        let (a, b): ([u64; 2], [u64; 2]) =
            (bytemuck::must_cast(*self), bytemuck::must_cast(*other));
        a[0] == b[0] && a[1] == b[1]
    }

    /// What a ban names: an IPv4 address itself, of an IPv6 address its /64 (one subscriber owns at least that).
    #[inline(always)]
    pub const fn ban_key(&self) -> Self {
        let [high, low]: [u64; 2] = bytemuck::must_cast(self.0);
        let low = if self.is_v4() { low } else { 0 };
        Self(bytemuck::must_cast([high, low]))
    }
}

/// IP protocol numbers the forward path knows.
pub mod protocol {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP, whose errors belong to flows.
    pub const ICMP: u8 = 1;
    /// The same for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Which ports can be ours: bit `port % 64` of word `port / 64`, port in host order.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Ports {
    /// Ports of listeners. The bit of port 0: some listener has all ports of its address, and its key port 0.
    pub listener: [u64; 1024],
    /// Ports that NAT may allocate.
    pub nat: [u64; 1024],
    /// Ports of listeners of prefixes. The bit of port 0: there are such listeners.
    pub prefix: [u64; 1024],
}
const _: () = assert!(size_of::<Ports>() == 24_576);

/// Key of an IPv4 listener. Port and protocol 0: an address of ours as such, whatever comes to it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ListenerKey4 {
    pub address: [u8; 4],
    pub port: [u8; 2],
    pub protocol: u8,
    pub zero: u8,
}
const _: () = assert!(size_of::<ListenerKey4>() == 8);

impl ListenerKey4 {
    /// A key written at once: the look-up reads it in words, and a word of several stores would have to wait until all
    /// of them have left the store buffer. The address is as it stands in a packet.
    #[inline(always)]
    pub const fn new(address: u32, port: [u8; 2], protocol: u8) -> Self {
        let address = u32::from_le(address) as u64;
        let word = address | (u16::from_le_bytes(port) as u64) << 32 | (protocol as u64) << 48;
        bytemuck::must_cast(word.to_le())
    }
}

/// Key of an IPv6 listener; otherwise as `ListenerKey4`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ListenerKey6 {
    pub address: [u8; 16],
    pub port: [u8; 2],
    pub protocol: u8,
    pub zero: [u8; 5],
}
const _: () = assert!(size_of::<ListenerKey6>() == 24);

impl ListenerKey6 {
    /// A key whose last word is written at once, as in `ListenerKey4::new`.
    #[inline(always)]
    pub const fn new(address: &Address, port: [u8; 2], protocol: u8) -> Self {
        let [first, second]: [u64; 2] = bytemuck::must_cast(*address);
        let word = u16::from_le_bytes(port) as u64 | (protocol as u64) << 16;
        bytemuck::must_cast([first, second, word.to_le()])
    }
}

/// What a listener does; a `mode` that the kernel half does not know means "to Linux".
pub mod mode {
    /// Hand up to a worker's socket.
    pub const SERVE: u32 = 1;
    /// Forward by NAT to the upstream `target`.
    pub const NAT: u32 = 2;
    /// Not a listener: a NAT source address; `target` is its index in `Nat::sources`.
    pub const NAT_RETURN: u32 = 3;
    /// Not a listener: the address of one, by which packets without ports are judged.
    pub const ADDRESS: u32 = 4;
    /// Send on to an endpoint of the upstream `target` as it is, to the endpoint's MAC. The endpoint has the
    /// listener's address, and answers the client directly.
    pub const DIRECT: u32 = 5;
    /// The same inside another IP packet, to the endpoint's address.
    pub const IPIP: u32 = 6;
    /// The same inside UDP, by generic UDP encapsulation.
    pub const GUE: u32 = 7;
}

/// Bits of `Listener::options`.
pub mod option {
    /// Fragments go to Linux. Without this bit and the next, later fragments follow the first one.
    pub const FRAGMENTS_PASS: u32 = 1;
    /// Fragments are dropped. With `mode::ADDRESS`: those whose first fragment is not known.
    pub const FRAGMENTS_DROP: u32 = 2;
    /// UDP flows follow their slot to its new owner at once; without it those of unknown age stay.
    pub const UDP_MOVE: u32 = 4;
}

/// A listener as the kernel half sees it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Listener {
    /// Index of its counters; from 1.
    pub id: u32,
    /// One of `mode`.
    pub mode: u32,
    /// Upstream id where it forwards, source index for `mode::NAT_RETURN`.
    pub target: u32,
    /// Bits of `option`.
    pub options: u32,
}
const _: () = assert!(size_of::<Listener>() == 16);

/// An upstream as the kernel half sees it: where its ring stands.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Upstream {
    /// First page of its ring in `RINGS`.
    pub page: u32,
    /// Slots in its ring, a power of two; 0 while it has no ring.
    pub slots: u32,
}
const _: () = assert!(size_of::<Upstream>() == 8);

/// How many entries `MOVED` got on one CPU within the present `window`: a flood of new flows must not flush those that live.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Inserts {
    /// The stamp of the present second.
    pub window: u32,
    pub count: u32,
}
const _: () = assert!(size_of::<Inserts>() == 8);

/// Entries that `MOVED` gets per CPU and second at most.
pub const INSERTS_PER_SECOND: u32 = 2000;

/// What encapsulations have in common.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Tunnel {
    /// Outer source addresses of each family; all zero = none, and such endpoints are not reached.
    pub source4: Address,
    pub source6: Address,
    /// Bits of the sources' last 32 that differ from flow to flow, network order: routers that
    /// spread flows by addresses alone then see many sources. Never with GUE, whose port does that.
    pub entropy4: u32,
    pub entropy6: u32,
    /// Destination port of GUE, network order.
    pub gue_port: [u8; 2],
    pub zero: [u8; 6],
}
const _: () = assert!(size_of::<Tunnel>() == 48);

/// Which datagram a fragment belongs to (RFC 791, RFC 8200 section 4.5).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FragmentKey {
    pub source: Address,
    pub destination: Address,
    pub id: u32,
    pub protocol: u8,
    pub zero: [u8; 3],
}
const _: () = assert!(size_of::<FragmentKey>() == 40);

/// What the first fragment of a datagram says about the later ones.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FragmentPorts {
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// `stamp` of when it came.
    pub seen: u16,
    pub zero: u16,
}
const _: () = assert!(size_of::<FragmentPorts>() == 8);

/// The `ifindex` of an endpoint that is this host itself.
pub const LOCAL: u32 = u32::MAX;

/// An endpoint as the kernel half sees it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Endpoint {
    pub address: Address,
    pub port: [u8; 2],
    /// Destination MAC: the endpoint's, or its gateway's.
    pub mac: [u8; 6],
    /// Source MAC: that of the interface `ifindex`.
    pub source_mac: [u8; 6],
    /// The VLAN it is reached in (network order); 0 = untagged.
    pub vlan: [u8; 2],
    /// The interface it is reached through; 0 while the neighbour is not resolved, `LOCAL` for an address of this host.
    pub ifindex: u32,
    /// Longest IP packet that may leave for it encapsulated, outer headers included; 0 = not known.
    pub mtu_bytes: u16,
    /// The same for packets that leave as long as they came; 0 where none can come that is too long.
    pub plain_mtu_bytes: u16,
    /// Packets of the endpoint's that are longer may not fit the client's interface; 0 where all do.
    pub back_mtu_bytes: u16,
    /// Largest TCP segment that SYNs of its NAT flows may announce, either way; 0 = whatever they do.
    pub mss_bytes: u16,
    pub zero: [u8; 4],
}
const _: () = assert!(size_of::<Endpoint>() == 48);

/// Keys of the flow hash (see `maglev::slot`): random, the same on all nodes that should choose alike.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct HashKeys {
    pub keys: [u64; 11],
}
const _: () = assert!(size_of::<HashKeys>() == 88);

/// One direction of a flow: the packet from client to listener.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FlowKey {
    pub client: Address,
    pub listener: Address,
    pub client_port: [u8; 2],
    pub listener_port: [u8; 2],
    pub protocol: u8,
    pub zero: [u8; 3],
}
const _: () = assert!(size_of::<FlowKey>() == 40);

impl FlowKey {
    /// A key whose last word is written at once, as in `ListenerKey4::new`.
    #[inline(always)]
    pub const fn new(
        client: &Address,
        listener: &Address,
        client_port: [u8; 2],
        listener_port: [u8; 2],
        protocol: u8,
    ) -> Self {
        let [a, b]: [u64; 2] = bytemuck::must_cast(*client);
        let [c, d]: [u64; 2] = bytemuck::must_cast(*listener);
        let ports = u16::from_le_bytes(client_port) as u64
            | (u16::from_le_bytes(listener_port) as u64) << 16;
        bytemuck::must_cast([a, b, c, d, (ports | (protocol as u64) << 32).to_le()])
    }

    /// Whether the two are the same; as whole words, for the kernel half has no `memcmp`.
    #[inline(always)]
    pub const fn is(&self, other: &Self) -> bool {
        let (a, b): ([u64; 5], [u64; 5]) =
            (bytemuck::must_cast(*self), bytemuck::must_cast(*other));
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4]
    }
}

/// Guards. A filter word is consulted only when `bans` is not 0.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Guard {
    /// How many bans stand in the table.
    pub bans: u64,
    /// Bit `guard_bit(address)`: set when a banned source may have it.
    pub filter: [u64; 1024],
}
const _: () = assert!(size_of::<Guard>() == 8200);

/// Which bit of `Guard::filter` a ban key (see `Address::ban_key`) has, 0..65 536: multiply-shift over its two halves.
#[inline(always)]
pub const fn guard_bit(ban_key: &Address) -> u32 {
    let [high, low]: [u64; 2] = bytemuck::must_cast(ban_key.0);
    let mixed = (high ^ low.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 48) as u32
}

/// A source that the kernel refuses for a time; the key is `Address::ban_key` of the source.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Ban {
    /// CLOCK_MONOTONIC_COARSE at which it ends, ns.
    pub until_ns: u64,
    /// Which rule asked for it: index into `RULE_DROPS`.
    pub rule: u32,
    pub zero: u32,
    /// Written by the kernel half: packets dropped.
    pub dropped: u64,
}
const _: () = assert!(size_of::<Ban>() == 24);

/// Packets and bytes of one counter. Bytes are counted from the Ethernet header to where the IP packet says that it ends:
/// without VLAN tags, padding, and the checksum behind them.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}
const _: () = assert!(size_of::<Traffic>() == 16);

/// What became of the flows that NAT opened to an endpoint. Each is answered or refused at most once, by what comes back
/// first; one that is neither still waits, or nobody is there. A connection that follows another one from the same
/// client port counts as a flow of its own.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Signs {
    pub opened: u64,
    /// The first packet back was no RST.
    pub answered: u64,
    /// It was a RST, or the endpoint's own host said by ICMP that it is not reached there.
    pub refused: u64,
}
const _: () = assert!(size_of::<Signs>() == 24);

/// Address and port that a group of SO_REUSEPORT sockets is bound to: `0.0.0.0` is the v4-mapped one, `[::]`
/// is all zero, also for the IPv4 connections of a socket that takes both.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SteerKey {
    pub address: Address,
    pub port: [u8; 2],
    pub protocol: u8,
    pub zero: [u8; 5],
}
const _: () = assert!(size_of::<SteerKey>() == 24);

#[cfg(test)]
mod tests {
    use super::*;

    const V6: Address = Address([0x20, 1, 0xd, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);

    #[test]
    fn an_ipv4_address_is_mapped_and_back() {
        let address = Address::v4([192, 0, 2, 1]);
        let bytes = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1];
        assert_eq!(address.0, bytes);
        assert_eq!(address.as_v4(), [192, 0, 2, 1]);
        assert!(address.is_v4());
        assert!(!V6.is_v4());
        for position in 0..12 {
            let mut other = address;
            other.0[position] ^= 1;
            assert!(!other.is_v4() && !other.is(&address));
        }
    }

    #[test]
    fn a_ban_names_an_ipv4_address_or_an_ipv6_64() {
        let v4 = Address::v4([192, 0, 2, 1]);
        assert_eq!(v4.ban_key(), v4);
        let prefix = [0x20, 1, 0xd, 0xb8, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(V6.ban_key().0, prefix);
    }

    #[test]
    fn sources_spread_over_the_filter() {
        let mut bits: Vec<u32> = (0..=255u8)
            .flat_map(|a| (0..=15u8).map(move |b| guard_bit(&Address::v4([10, 0, a, b]))))
            .collect();
        bits.sort_unstable();
        bits.dedup();
        // Of 4096 sources thrown at random 126 would meet another one.
        assert!(bits.len() > 3800, "{}", bits.len());
        assert!(bits.iter().all(|bit| *bit < 65_536));
    }
}
