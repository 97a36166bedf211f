//! A packet's whole way through the kernel half.
//!
//! The verifier refuses what a small change makes of this now and then; `tests/tests/packet/verifier.rs` sees it. What it says,
//! and what helps:
//! - "invalid size of register fill": LLVM copied something with a pointer in it in halves, mostly an enum or a struct that a
//!   function gives back, or reads a part of it. Give back words, not pointers into maps (`copy`), and small things by value.
//! - "processed 1000001 insns": what follows is walked once for each thing that a value can be before it. Of words read
//!   from memory the verifier knows nothing, and walks once: read them out of the map early (`copy`, `read_rare`), search without
//!   branches (`Prefix::find`), or put the long part into a function that is not inlined and takes and gives numbers.
//! - "invalid access to packet": a bounds check and its access were moved apart: one header, one check, one constant length.
//! - "invalid mem access 'scalar'": a pointer into the packet from before its head or tail was moved, perhaps on a way that is
//!   impossible: make the frame anew (`frame`).
//! - "combined stack size": a function that is not inlined has a stack of its own, but all in a chain share 512 bytes (`apart`).

use aya_ebpf::helpers::bpf_xdp_get_buff_len;
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::abi::{Listener, ListenerKey4, ListenerKey6, Ports, mode, option};
use proxy_ebpf::packet::{Family, Frame, Packet, Part, Rewrite, clamp_mss, rewrite, rewrite_rare};
use proxy_ebpf::verdict::Verdict;

use crate::link::Tags;
use crate::maps::{DESK, LISTENER_TRAFFIC, LISTENERS4, LISTENERS6, PORTS, count_traffic};
use crate::{forward, fragment, guard, nat, prefix};

/// Why a packet's way ends early.
pub enum Exit {
    /// With this verdict.
    Verdict(Verdict),
    /// It is a rare one: the other program takes it from the beginning.
    Rare,
}

impl Exit {
    /// The verdict of a program that leaves nothing to another one.
    #[inline(always)]
    fn verdict(self) -> Verdict {
        match self {
            Self::Verdict(verdict) => verdict,
            Self::Rare => Verdict::Inconsistent,
        }
    }
}

impl From<Verdict> for Exit {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self::Verdict(verdict)
    }
}

/// What becomes of a packet. The verdict stands first: where a function gives back a result, it tells good from bad, and the kernel
/// takes type information only of those that begin with it.
#[repr(C)]
pub struct Decision {
    pub verdict: Verdict,
    /// The interface it leaves by, when it is sent.
    pub ifindex: u32,
    /// The VLAN tags it leaves with.
    pub tags: Tags,
}

impl Decision {
    /// A verdict that sends the packet nowhere.
    #[inline(always)]
    pub const fn stay(verdict: Verdict, tags: Tags) -> Self {
        Self {
            verdict,
            ifindex: 0,
            tags,
        }
    }
}

/// What a packet says, and how it goes on.
pub struct Desk {
    pub packet: Packet,
    pub way: Way,
}

/// How a packet goes on.
pub struct Way {
    /// What it becomes where addresses change.
    pub to: Rewrite,
    /// Where it does not fit: how many bytes would.
    pub longest: u16,
    /// The largest segment that it may announce; 0 = any, or none.
    pub mss_bytes: u16,
}

/// A packet of ours, and where it came in.
pub struct Arrival<'a> {
    pub frame: Frame<'a>,
    pub packet: &'a Packet,
    pub ifindex: u32,
    pub tags: Tags,
}

/// The way of one packet, whose VLAN tags are off. An early exit leaves every byte as it was.
///
/// It is told once and compiled twice. Without `RARE` it knows whole, untagged packets that fit, which nearly all are,
/// and loses no time on the others: fragments, ICMP errors, headers that are not read, what is too big.
#[inline(always)]
pub fn ingress<const RARE: bool>(ctx: &XdpContext, tags: Tags) -> Result<Decision, Exit> {
    let frame = frame(ctx);
    let ports = PORTS.get(0).ok_or(Verdict::Inconsistent)?;
    if !RARE && frame.is_tagged() {
        return Err(Exit::Rare);
    }
    let mut own;
    let Desk { packet, way } = if RARE {
        let desk = DESK.get_ptr_mut(0).ok_or(Verdict::Inconsistent)?;
        // SAFETY: the value belongs to this CPU, XDP is not interrupted by itself, and nobody else refers to it.
        let desk = unsafe { &mut *desk };
        read_rare(frame, ports, &mut desk.packet)?;
        desk
    } else {
        own = Desk {
            packet: Packet::parse::<false>(&frame, |port| is_wanted(ports, port))?,
            way: Way {
                to: Rewrite::NOWHERE,
                longest: 0,
                mss_bytes: 0,
            },
        };
        &mut own
    };
    if !RARE && !matches!(packet.part, Part::Whole) {
        return Err(Exit::Rare);
    }
    if RARE && !fragment::knows_ports(packet) {
        return Err(judge_by_address(ports, packet).into());
    }
    let listener = find_listener(ports, packet)?;
    expect_whole(ctx, packet)?;
    let arrival = Arrival {
        frame,
        packet,
        ifindex: ctx.ingress_ifindex() as u32,
        tags,
    };

    if listener.mode == mode::NAT_RETURN {
        if RARE {
            fragment::admit(arrival.packet, 0)?;
        }
        let sent = if RARE {
            apart::give_back(ctx, &arrival, listener.target, way).map_err(Exit::from)
        } else {
            nat::give_back::<false>(ctx, &arrival, listener.target, way)
        };
        let sent = readdressed::<RARE>(sent, &arrival, way);
        return sent_or_told::<RARE>(sent, ctx, &arrival, way.longest);
    }
    guard::refuse_banned(&arrival.packet.sender)?;
    if RARE && listener.mode != mode::SERVE {
        fragment::admit(arrival.packet, listener.options)?;
    }
    let decision = match listener.mode {
        mode::SERVE => Decision::stay(Verdict::Serve, tags),
        mode::NAT => {
            let sent = if RARE {
                apart::nat(ctx, &arrival, listener.target, way).map_err(Exit::from)
            } else {
                nat::forward::<false>(ctx, &arrival, listener.target, way)
            };
            let sent = readdressed::<RARE>(sent, &arrival, way);
            sent_or_told::<RARE>(sent, ctx, &arrival, way.longest)?
        }
        mode::DIRECT | mode::IPIP | mode::GUE => {
            let sent = if RARE {
                apart::forward(ctx, &arrival, &listener, &mut way.longest)
            } else {
                forward::forward(ctx, &arrival, &listener, &mut way.longest)
            };
            sent_or_told::<RARE>(sent.map_err(Exit::from), ctx, &arrival, way.longest)?
        }
        _ => return Err(Verdict::NotOurs.into()),
    };
    count_traffic(&LISTENER_TRAFFIC, listener.id, packet);
    Ok(decision)
}

/// The bytes of the frame.
#[inline(always)]
pub fn frame(ctx: &XdpContext) -> Frame<'_> {
    // SAFETY: the kernel gives the program these bytes to read and write until it returns.
    unsafe { Frame::from_pointers(ctx.data() as *mut u8, ctx.data_end() as *mut u8) }
}

/// Reads a packet of any kind into a map's value: of what the verifier reads from there it knows nothing, and so goes
/// the rest of the way once, and not once for each chain of headers.
#[inline(never)]
fn read_rare(frame: Frame, ports: &Ports, packet: &mut Packet) -> Result<(), Verdict> {
    *packet = Packet::parse::<true>(&frame, |port| is_wanted(ports, port))?;
    Ok(())
}

/// Whether a port can be ours.
#[inline(always)]
const fn is_wanted(ports: &Ports, port: [u8; 2]) -> bool {
    let (word, bit) = place(port);
    (ports.listener[word] | ports.nat[word] | ports.prefix[word]) & bit != 0
        || has_open_address(ports)
}

/// Whether some listener has all ports of its address.
#[inline(always)]
const fn has_open_address(ports: &Ports) -> bool {
    ports.listener[0] & 1 != 0
}

/// Writes a packet anew that can go on.
#[inline(always)]
fn readdressed<const RARE: bool>(
    sent: Result<Decision, Exit>,
    arrival: &Arrival,
    way: &Way,
) -> Result<Decision, Exit> {
    let decision = sent?;
    if RARE {
        rewrite_rare(&arrival.frame, arrival.packet, &way.to)?;
        if way.mss_bytes != 0 {
            clamp_mss(&arrival.frame, arrival.packet, way.mss_bytes);
        }
    } else {
        rewrite(&arrival.frame, arrival.packet, &way.to)?;
    }
    Ok(decision)
}

/// What became of a packet: one that is too long is left to the other program, which answers it.
#[inline(always)]
fn sent_or_told<const RARE: bool>(
    sent: Result<Decision, Exit>,
    ctx: &XdpContext,
    arrival: &Arrival,
    longest: u16,
) -> Result<Decision, Exit> {
    match sent {
        Err(Exit::Verdict(Verdict::TooBig)) if RARE => {
            Ok(forward::tell_too_big(ctx, arrival, longest)?)
        }
        Err(Exit::Verdict(Verdict::TooBig)) => Err(Exit::Rare),
        sent => sent,
    }
}

/// The ways on of rare packets as functions of their own: together they would want more stack than there is.
mod apart {
    use super::{Arrival, Decision, Exit, Listener, Verdict, Way, XdpContext, forward, nat};

    #[inline(never)]
    pub fn nat(
        ctx: &XdpContext,
        arrival: &Arrival,
        upstream: u32,
        way: &mut Way,
    ) -> Result<Decision, Verdict> {
        nat::forward::<true>(ctx, arrival, upstream, way).map_err(Exit::verdict)
    }

    #[inline(never)]
    pub fn give_back(
        ctx: &XdpContext,
        arrival: &Arrival,
        source: u32,
        way: &mut Way,
    ) -> Result<Decision, Verdict> {
        nat::give_back::<true>(ctx, arrival, source, way).map_err(Exit::verdict)
    }

    #[inline(never)]
    pub fn forward(
        ctx: &XdpContext,
        arrival: &Arrival,
        listener: &Listener,
        longest: &mut u16,
    ) -> Result<Decision, Verdict> {
        forward::forward(ctx, arrival, listener, longest)
    }
}

/// Whether there are listeners of prefixes.
#[inline(always)]
const fn has_prefixes(ports: &Ports) -> bool {
    ports.prefix[0] & 1 != 0
}

/// The verdict of a packet of which only the addresses are known. A banned source reaches no address of ours this way.
#[inline(never)]
fn judge_by_address(ports: &Ports, packet: &Packet) -> Verdict {
    let mut address = look_up(packet, [0; 2], 0);
    if address.is_none() && has_prefixes(ports) {
        address = prefix::find(packet, [0; 2], 0).map(copy);
    }
    let Some(address) = address else {
        return Verdict::NotOurs;
    };
    if let Err(refused) = guard::refuse_banned(&packet.sender) {
        return refused;
    }
    if matches!(packet.part, Part::Later) && address.options & option::FRAGMENTS_DROP != 0 {
        return Verdict::FragmentRefused;
    }
    Verdict::Unsupported
}

/// Where a port stands in a bitmap of `Ports`: the word, and the bit in it.
#[inline(always)]
const fn place(port: [u8; 2]) -> (usize, u64) {
    let port = u16::from_be_bytes(port);
    ((port / 64) as usize, 1 << (port % 64))
}

/// The listener that a packet is for, or the NAT source that it comes back to: by its port first, then one that has all ports
/// of its address, then one of a prefix. An error is for whom an answer to the packet that it quotes would be for.
#[inline(always)]
fn find_listener(ports: &Ports, packet: &Packet) -> Result<Listener, Verdict> {
    let (word, bit) = place(packet.destination_port);
    if ports.listener[word] & bit != 0
        && let Some(listener) = look_up(packet, packet.destination_port, packet.protocol)
    {
        return Ok(listener);
    }
    if ports.nat[word] & bit != 0
        && let Some(source) = look_up(packet, [0; 2], 0)
        && source.mode == mode::NAT_RETURN
    {
        return Ok(source);
    }
    if has_open_address(ports)
        && let Some(listener) = look_up(packet, [0; 2], packet.protocol)
    {
        return Ok(listener);
    }
    if ports.prefix[word] & bit != 0
        && let Some(listener) = prefix::find(packet, packet.destination_port, packet.protocol)
    {
        return Ok(copy(listener));
    }
    Err(Verdict::NotOurs)
}

#[inline(always)]
fn look_up(packet: &Packet, port: [u8; 2], protocol: u8) -> Option<Listener> {
    let listener = match packet.family {
        Family::V4 => {
            let key = ListenerKey4::new(packet.destination.as_v4_word(), port, protocol);
            // SAFETY: a value that is replaced meanwhile is read as old or new, field by field; each is checked where it is used.
            unsafe { LISTENERS4.get(&key) }
        }
        Family::V6 => {
            let key = ListenerKey6::new(&packet.destination, port, protocol);
            // SAFETY: as above.
            unsafe { LISTENERS6.get(&key) }
        }
    };
    listener.map(copy)
}

/// A listener out of its map. It is read here, and not where it is used: the verifier follows all that comes after once
/// for each map that a pointer can be from, and of two words it knows nothing that tells them apart.
#[inline(always)]
fn copy(listener: &Listener) -> Listener {
    let words = (&raw const *listener).cast::<[u64; 2]>();
    // SAFETY: a listener is two aligned words. Volatile, for LLVM would move the reads back to where they are used.
    bytemuck::must_cast(unsafe { words.read_volatile() })
}

/// The frame is at least as long as its headers say. The kernel is asked only where it goes on behind the first buffer:
/// the call would cost every packet as much as looking up a listener.
#[inline(always)]
fn expect_whole(ctx: &XdpContext, packet: &Packet) -> Result<(), Verdict> {
    let bytes = packet.frame_bytes_min as usize;
    if bytes > ctx.data_end() - ctx.data() && bytes as u64 > frame_bytes(ctx) {
        return Err(Verdict::Malformed);
    }
    Ok(())
}

/// The length of the frame with all its buffers.
#[inline(always)]
pub fn frame_bytes(ctx: &XdpContext) -> u64 {
    // SAFETY: the context is the one that the kernel gave this program.
    unsafe { bpf_xdp_get_buff_len(ctx.ctx) }
}
