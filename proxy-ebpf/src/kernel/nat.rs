//! L4 by NAT: allocate a port, rewrite, send; and the way back.
//!
//! A flow is one entry in `NAT_FLOWS`, at the index of its port, and one key in `FLOWS` that leads there. The way
//! back needs no key: the port is the index. Both checks of an entry (the key on the way out, the endpoint on the
//! way back) make a port that is taken over in this very moment look like a miss, never like somebody else's flow:
//! while its key changes it has no endpoint, and the way back asks for the endpoint before it reads the key and after.

use core::num::NonZeroU64;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::{bpf_check_mtu, bpf_jiffies64, bpf_ktime_get_coarse_ns};
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::abi::{Endpoint, FlowKey, Nat, NatFlow, flow_state, protocol, size};
use proxy_ebpf::packet::{ETHERNET_BYTES, Family, Packet, Part, Rewrite, headers_bytes, tcp_flag};
use proxy_ebpf::verdict::Verdict;

use crate::atomic;
use crate::forward::{Place, exceeds, reach};
use crate::ingress::{Arrival, Decision, Exit, Way};
use crate::link::Tags;
use crate::maps::{ENDPOINT_TRAFFIC, ENDPOINTS, FLOWS, NAT, NAT_FLOWS, count_traffic};
use crate::sign::{self, Sign};

/// Ports that are tried for a new flow before it is left to Linux.
const PORT_TRIES: u32 = 8;

/// Jiffies after which `seen_ns` is written anew: a quarter of a second to 2.6 s, by the kernel's HZ.
/// Seldom enough that the CPUs of both directions do not fight for the cache line.
const SEEN_JIFFIES: u64 = 256;

/// Who sent a packet of a flow.
#[derive(Clone, Copy)]
enum Side {
    Client,
    Endpoint,
}

/// Says what a client's packet becomes on its way to an endpoint of the upstream. `TooBig`: it does not fit, and
/// `way.longest` bytes would. Without `RARE` a SYN that may announce too large segments is left to the other program.
#[inline(always)]
pub fn forward<const RARE: bool>(
    ctx: &XdpContext,
    arrival: &Arrival,
    upstream: u32,
    way: &mut Way,
) -> Result<Decision, Exit> {
    let packet = arrival.packet;
    refuse_at_end_of_way(packet)?;
    let (edge_mac, client_mac) = arrival.frame.macs()?;
    let nat = NAT.get_ptr_mut(0).ok_or(Verdict::Inconsistent)?;
    let key = packet.flow_key();
    let flow = match find(&key) {
        Some(flow) => flow,
        None => open(nat, &key, packet, upstream)?,
    };
    // SAFETY: map values outlive the program's run.
    if packet.opens_flow() && unsafe { (*flow).has_ended() } {
        lead_anew(flow, &key, packet, upstream)?;
    }
    // SAFETY: map values outlive the program's run; the words that others change at the same time are each written whole.
    let (flow, nat) = unsafe { (&mut *flow, &*nat) };
    let endpoint = reachable(flow.endpoint, packet.family)?;
    if let Some(mtu) = exceeds(packet, endpoint.plain_mtu_bytes, 0) {
        way.longest = mtu;
        return Err(Verdict::TooBig.into());
    }
    way.mss_bytes = segment::<RARE>(packet, endpoint)?;
    if RARE && way.mss_bytes != 0 {
        // What the endpoint sends, has to fit the client's interface as well.
        let mtu_bytes = mtu(ctx, arrival.ifindex, 0).1.min(u16::MAX as u32) as u16;
        let fits = mtu_bytes.saturating_sub(headers_bytes(packet.family));
        if fits != 0 && fits < way.mss_bytes {
            way.mss_bytes = fits;
        }
    }
    // The mask is for the verifier; a source is never above 7.
    let source = nat.sources[flow.source as usize & (size::NAT_SOURCES - 1)];
    way.to = Rewrite {
        source,
        destination: endpoint.address,
        source_port: flow.port,
        destination_port: endpoint.port,
        source_mac: endpoint.source_mac,
        destination_mac: endpoint.mac,
    };
    // An error tells of a flow, and is no packet of it: anybody on the way may send one.
    if !matches!(packet.part, Part::Error) {
        note(flow, flow.endpoint, packet, Side::Client);
        note_client(flow, arrival, client_mac, edge_mac);
    }
    count_traffic(&ENDPOINT_TRAFFIC, flow.endpoint, packet);
    Ok(Decision {
        verdict: Verdict::Forward,
        ifindex: endpoint.ifindex,
        tags: Tags::vlan(endpoint.vlan),
    })
}

/// Says what a packet that came to a NAT source becomes on its way back to the client of its flow. `TooBig`: as in
/// `forward`; without `RARE` perhaps, and the other program finds out.
#[inline(always)]
pub fn give_back<const RARE: bool>(
    ctx: &XdpContext,
    arrival: &Arrival,
    source: u32,
    way: &mut Way,
) -> Result<Decision, Exit> {
    let packet = arrival.packet;
    let nat = NAT.get(0).ok_or(Verdict::Inconsistent)?;
    let port = u16::from_be_bytes(packet.destination_port) as u32;
    let offset = port.wrapping_sub(nat.port_first);
    if offset >= nat.ports {
        return Err(Verdict::NotOurs.into());
    }
    let index = nat.flow_index(source, packet.protocol, offset);
    let flow = NAT_FLOWS.get_ptr_mut(index).ok_or(Verdict::Inconsistent)?;
    // SAFETY: as in `forward`; read anew each time, for another CPU may take the port over meanwhile.
    let endpoint_now = move || unsafe { (&raw const (*flow).endpoint).read_volatile() };
    // SAFETY: as in `forward`.
    let flow = unsafe { &mut *flow };
    if flow.seen_ns == 0 || flow.key.protocol != packet.protocol {
        return Err(Verdict::NotOurs.into());
    }
    let id = endpoint_now();
    let endpoint = ENDPOINTS.get(id).ok_or(Verdict::Inconsistent)?;
    if id == 0
        || !endpoint.address.is(&packet.source)
        || u16::from_ne_bytes(endpoint.port) != u16::from_ne_bytes(packet.source_port)
    {
        return Err(Verdict::NotOurs.into());
    }
    refuse_at_end_of_way(packet)?;
    way.mss_bytes = segment::<RARE>(packet, endpoint)?;
    way.to = Rewrite {
        source: flow.key.listener,
        destination: flow.key.client,
        source_port: flow.key.listener_port,
        destination_port: flow.key.client_port,
        source_mac: flow.edge_mac,
        destination_mac: flow.client_mac,
    };
    // Between both looks lies a call of the kernel's, which no read of the key is moved across.
    // SAFETY: the helper takes nothing.
    let _ = unsafe { bpf_jiffies64() };
    if endpoint_now() != id {
        return Err(Verdict::NotOurs.into());
    }
    let (ifindex, tags) = (flow.client_ifindex, Tags(flow.client_tags));
    if exceeds(packet, endpoint.back_mtu_bytes, 0).is_some() {
        if !RARE {
            return Err(Verdict::TooBig.into());
        }
        fit(ctx, packet, ifindex, &mut way.longest)?;
    }
    if !matches!(packet.part, Part::Error) {
        note(flow, id, packet, Side::Endpoint);
    } else if RARE && packet.sender.is(&endpoint.address) && packet.is_unreachable(&arrival.frame) {
        note_unreachable(flow, id);
    }
    Ok(Decision {
        verdict: Verdict::Return,
        ifindex,
        tags,
    })
}

/// The largest segment that a packet of an endpoint's flow may announce; 0 = it announces none, or what it likes. What it
/// announces only the other program reads.
#[inline(always)]
const fn segment<const RARE: bool>(packet: &Packet, endpoint: &Endpoint) -> Result<u16, Exit> {
    if !packet.is_syn() || endpoint.mss_bytes == 0 {
        return Ok(0);
    }
    if RARE {
        Ok(endpoint.mss_bytes)
    } else {
        Err(Exit::Rare)
    }
}

/// Asks the kernel whether a packet may leave by an interface: which one it is differs from flow to flow.
#[inline(always)]
fn fit(ctx: &XdpContext, packet: &Packet, ifindex: u32, longest: &mut u16) -> Result<(), Verdict> {
    let bytes = packet.frame_bytes_min - ETHERNET_BYTES as u32;
    let (answer, mtu_bytes) = mtu(ctx, ifindex, bytes);
    // Negative: there is no such interface, which sending will find out, too.
    if answer <= 0 {
        return Ok(());
    }
    *longest = mtu_bytes as u16;
    Err(Verdict::TooBig)
}

/// What the kernel says of an IP packet of so many bytes at an interface: positive where it does not fit; and the MTU, or the
/// bytes where there is no such interface.
#[inline(always)]
fn mtu(ctx: &XdpContext, ifindex: u32, bytes: u32) -> (i64, u32) {
    // In: the packet's length from its IP header on. Out: the MTU.
    let mut bytes = bytes;
    // SAFETY: the context is the kernel's, and the helper reads and writes the one word.
    let answer = unsafe { bpf_check_mtu(ctx.ctx.cast(), ifindex, &raw mut bytes, 0, 0) };
    (answer, bytes)
}

/// A packet that may not be sent on any more: Linux tells its sender so.
#[inline(always)]
const fn refuse_at_end_of_way(packet: &Packet) -> Result<(), Verdict> {
    if packet.hop_limit <= 1 {
        return Err(Verdict::HopLimit);
    }
    Ok(())
}

/// The flow of a key. An entry that leads to another flow's port is stale, and is removed.
#[inline(always)]
fn find(key: &FlowKey) -> Option<*mut NatFlow> {
    // SAFETY: the value is one aligned word.
    let index = unsafe { *FLOWS.get(key)? };
    let flow = NAT_FLOWS.get_ptr_mut(index as u32)?;
    // SAFETY: map values outlive the program's run.
    if unsafe { (*flow).key.is(key) } {
        return Some(flow);
    }
    let _ = FLOWS.remove(key);
    None
}

/// Of a client's port whose last connection has ended, a new one goes where the ring leads now: the endpoint of the last may be
/// one that takes nothing new any more. It keeps the port, so that nothing can be exhausted by it.
#[inline(never)]
fn lead_anew(
    flow: *mut NatFlow,
    key: &FlowKey,
    packet: &Packet,
    upstream: u32,
) -> Result<(), Verdict> {
    let (endpoint, _) = choose(key, packet, upstream)?;
    // SAFETY: map values outlive the program's run, and the words are aligned; the helper takes nothing.
    unsafe {
        let seen_ns = (*flow).seen_ns;
        // Claimed like a free port, lest another CPU does that meanwhile: then the state says that it is another flow's.
        let now_ns = bpf_ktime_get_coarse_ns();
        if atomic::replace(&raw mut (*flow).seen_ns, seen_ns, now_ns) && (*flow).has_ended() {
            let way = (&raw mut (*flow).endpoint).cast::<u64>();
            atomic::publish(way, bytemuck::must_cast([endpoint, 0u32]));
        }
    }
    Ok(())
}

/// Opens a flow: an endpoint by the ring, and a port of our own towards it.
#[inline(always)]
fn open(
    nat: *mut Nat,
    key: &FlowKey,
    packet: &Packet,
    upstream: u32,
) -> Result<*mut NatFlow, Verdict> {
    if !packet.opens_flow() {
        return Err(Verdict::NoFlow);
    }
    let (endpoint, v4) = choose(key, packet, upstream)?;
    let (index, flow) = allocate(nat, v4, packet.protocol)?;
    // SAFETY: the port was claimed for us alone.
    unsafe {
        let way = (&raw mut (*flow).endpoint).cast::<u64>();
        atomic::publish(way, 0);
        (*flow).key = *key;
        (*flow).seen_jiffies = bpf_jiffies64();
        // The interface is noted with the client's packet.
        atomic::publish(way, bytemuck::must_cast([endpoint, 0u32]));
    }
    if FLOWS.insert(key, index as u64, BPF_NOEXIST as u64).is_ok() {
        sign::count(endpoint, Sign::Opened);
        return Ok(flow);
    }
    // Full; or another CPU opened the same flow in this moment, and then its port is the right one.
    // SAFETY: still ours alone, for no key leads here.
    unsafe { (*flow).seen_ns = 0 };
    find(key).ok_or(Verdict::NatExhausted)
}

/// The endpoint for a new flow, and whether it is IPv4. Flows that are open are found by their port, so that an earlier owner of
/// the slot has no say.
#[inline(always)]
fn choose(key: &FlowKey, packet: &Packet, upstream: u32) -> Result<(u32, bool), Verdict> {
    let endpoint = Place::of(key, upstream)?.slot.owner() as u32;
    if endpoint == 0 {
        return Err(Verdict::NoEndpoint);
    }
    // The endpoint's family is the packet's, and is one that LLVM knows nothing of: told the packet's, it takes the
    // verifier's bounds away.
    let v4 = reachable(endpoint, packet.family)?.address.is_v4();
    Ok((endpoint, v4))
}

/// The endpoint of an id, when packets of this family can be sent there now.
#[inline(always)]
fn reachable(id: u32, family: Family) -> Result<&'static Endpoint, Verdict> {
    let endpoint = reach(id)?;
    // NAT keeps the family; a mixed upstream is a mistake that the user half refuses beforehand.
    if endpoint.address.is_v4() != matches!(family, Family::V4) {
        return Err(Verdict::Inconsistent);
    }
    Ok(endpoint)
}

/// Claims a port that is free, or whose flow has been idle too long, and says whose port it is now.
#[inline(always)]
fn allocate(nat: *mut Nat, v4: bool, number: u8) -> Result<(u32, *mut NatFlow), Verdict> {
    // SAFETY: map values outlive the program's run; only the cursor is written, atomically.
    let layout = unsafe { &*nat };
    let (source_first, sources) = if v4 {
        (0, layout.sources_v4)
    } else {
        let count = layout.sources_count;
        (layout.sources_v4, count.saturating_sub(layout.sources_v4))
    };
    // Division by a type that cannot be zero leaves no panic behind, which the verifier would refuse.
    let (Some(sources), Some(ports)) = (
        NonZeroU64::new(sources as u64),
        NonZeroU64::new(layout.ports as u64),
    ) else {
        return Err(Verdict::Inconsistent);
    };
    let area = Nat::area(v4, number) & 3;
    // SAFETY: as above; the helper takes nothing.
    let (cursor, now_ns) = unsafe { (&raw mut (*nat).cursors[area], bpf_ktime_get_coarse_ns()) };
    for _ in 0..PORT_TRIES {
        // SAFETY: the cursor is an aligned word of the map's value.
        let turn = unsafe { atomic::fetch_add(cursor, 1) };
        let source = source_first.wrapping_add((turn % sources) as u32);
        let offset = (turn / sources % ports) as u32;
        let index = layout.flow_index(source, number, offset);
        let flow = NAT_FLOWS.get_ptr_mut(index).ok_or(Verdict::Inconsistent)?;
        // SAFETY: as above.
        if unsafe { claim(flow, index, layout, now_ns) } {
            let port = layout.port_first.wrapping_add(offset) as u16;
            // SAFETY: the port was claimed for us alone.
            unsafe {
                (*flow).port = port.to_be_bytes();
                (*flow).source = source as u8;
            }
            return Ok((index, flow));
        }
    }
    Err(Verdict::NatExhausted)
}

/// Takes a port when nobody uses it, and forgets the flow that had it.
///
/// # Safety
///
/// `flow` must be a value of `NAT_FLOWS`, at `index`.
#[inline(always)]
unsafe fn claim(flow: *mut NatFlow, index: u32, nat: &Nat, now_ns: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let seen_ns = (*flow).seen_ns;
        if seen_ns != 0 && now_ns.saturating_sub(seen_ns) < (*flow).idle_ns(nat) {
            return false;
        }
        if !atomic::replace(&raw mut (*flow).seen_ns, seen_ns, now_ns) {
            return false;
        }
        // At once, so that nobody takes the new flow for one that has ended (`lead_anew`).
        (*flow).state = 0;
        if seen_ns != 0 && FLOWS.get(&(*flow).key).copied() == Some(index as u64) {
            let _ = FLOWS.remove(&(*flow).key);
        }
    }
    true
}

/// Notes that a flow lives, and what its packet says of it and its endpoint; writes only what is new.
#[inline(always)]
fn note(flow: &mut NatFlow, endpoint: u32, packet: &Packet, side: Side) {
    // SAFETY: the helpers take nothing.
    unsafe {
        let jiffies = bpf_jiffies64();
        if jiffies.wrapping_sub(flow.seen_jiffies) > SEEN_JIFFIES {
            flow.seen_jiffies = jiffies;
            flow.seen_ns = bpf_ktime_get_coarse_ns();
        }
    }
    let before = flow.state;
    let state = match side {
        Side::Client => after_client(before, packet),
        Side::Endpoint => after_endpoint(before, packet),
    };
    if state == before {
        return;
    }
    flow.state = state;
    match side {
        // Of a new flow, the sign is counted where it is opened.
        Side::Client if before & flow_state::TAKEN != 0 && state == 0 => {
            sign::count(endpoint, Sign::Opened);
        }
        Side::Endpoint if before & flow_state::TAKEN == 0 => {
            let refused = packet.tcp_flags & tcp_flag::RST != 0;
            sign::count(
                endpoint,
                if refused {
                    Sign::Refused
                } else {
                    Sign::Answered
                },
            );
        }
        _ => {}
    }
}

/// The state of a flow after a packet of its client's.
#[inline(always)]
const fn after_client(state: u8, packet: &Packet) -> u8 {
    if packet.protocol != protocol::TCP {
        return state;
    }
    // A new connection from the same port; if it is a repeated SYN, nothing was noted yet.
    if packet.opens_flow() {
        return 0;
    }
    let kept = state & !flow_state::CLIENT_RESET;
    kept | ending(packet, flow_state::CLIENT_CLOSED, flow_state::CLIENT_RESET)
}

/// The state of a flow after a packet of its endpoint's.
#[inline(always)]
const fn after_endpoint(state: u8, packet: &Packet) -> u8 {
    let kept = state & !flow_state::ENDPOINT_RESET | flow_state::ANSWERED;
    kept | ending(
        packet,
        flow_state::ENDPOINT_CLOSED,
        flow_state::ENDPOINT_RESET,
    )
}

/// What a packet's flags (none but TCP's) say of the end of its flow.
#[inline(always)]
const fn ending(packet: &Packet, closed: u8, reset: u8) -> u8 {
    let mut state = 0;
    if packet.tcp_flags & tcp_flag::FIN != 0 {
        state |= closed;
    }
    if packet.tcp_flags & tcp_flag::RST != 0 {
        state |= reset;
    }
    state
}

/// Notes that the endpoint's host refuses a flow, unless it is known already how it took it.
#[inline(always)]
fn note_unreachable(flow: &mut NatFlow, endpoint: u32) {
    if flow.state & flow_state::TAKEN == 0 {
        flow.state |= flow_state::UNREACHABLE;
        sign::count(endpoint, Sign::Refused);
    }
}

/// Notes where the client's packets come from, for its gateway may change while the flow lives.
#[inline(always)]
fn note_client(flow: &mut NatFlow, arrival: &Arrival, client_mac: [u8; 6], edge_mac: [u8; 6]) {
    if flow.client_ifindex != arrival.ifindex {
        flow.client_ifindex = arrival.ifindex;
    }
    if differ(flow.client_mac, client_mac) || differ(flow.edge_mac, edge_mac) {
        flow.client_mac = client_mac;
        flow.edge_mac = edge_mac;
    }
    if arrival.tags.0 != flow.client_tags {
        flow.client_tags = arrival.tags.0;
    }
}

/// Whether two MACs differ; in words, for there is no `memcmp` here.
#[inline(always)]
fn differ(a: [u8; 6], b: [u8; 6]) -> bool {
    let (a, b): ([u16; 3], [u16; 3]) = (bytemuck::must_cast(a), bytemuck::must_cast(b));
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) != 0
}
