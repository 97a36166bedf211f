//! A packet's whole way through the kernel half.

use aya_ebpf::helpers::bpf_xdp_get_buff_len;
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::abi::{Listener, ListenerKey4, ListenerKey6, Ports, mode};
use proxy_ebpf::packet::{Family, Frame, Packet};
use proxy_ebpf::verdict::Verdict;

use crate::maps::{LISTENER_TRAFFIC, LISTENERS4, LISTENERS6, PORTS, count_traffic};
use crate::{forward, guard};

/// What becomes of a packet.
pub struct Decision {
    pub verdict: Verdict,
    /// The interface it leaves by, when it is sent.
    pub ifindex: u32,
}

impl Decision {
    /// A verdict that sends the packet nowhere.
    pub const fn stay(verdict: Verdict) -> Self {
        Self {
            verdict,
            ifindex: 0,
        }
    }
}

/// A packet of ours, and where it came in.
pub struct Arrival<'a> {
    pub frame: Frame<'a>,
    pub packet: Packet,
    pub ifindex: u32,
    /// Bytes of the whole frame, which may go on behind the first buffer.
    pub bytes: u64,
}

/// The way of one packet. An early exit is a verdict that leaves every byte as it was.
#[inline(always)]
pub fn ingress(ctx: &XdpContext) -> Result<Decision, Verdict> {
    // SAFETY: the kernel gives the program these bytes to read and write until it returns.
    let frame = unsafe { Frame::from_pointers(ctx.data() as *mut u8, ctx.data_end() as *mut u8) };
    let ports = PORTS.get(0).ok_or(Verdict::Inconsistent)?;
    let packet = Packet::parse(&frame, |port| {
        let (word, bit) = place(port);
        (ports.listener[word] | ports.nat[word]) & bit != 0
    })?;
    let listener = find_listener(ports, &packet)?;
    let arrival = arrive(ctx, frame, packet)?;

    if listener.mode == mode::NAT_RETURN {
        return forward::give_back(&arrival, listener.target);
    }
    guard::refuse_banned(&arrival.packet.source)?;
    let decision = match listener.mode {
        mode::SERVE => Decision::stay(Verdict::Serve),
        mode::NAT => forward::forward(&arrival, listener.target)?,
        _ => return Err(Verdict::NotOurs),
    };
    count_traffic(&LISTENER_TRAFFIC, listener.id, arrival.bytes);
    Ok(decision)
}

/// Where a port stands in a bitmap of `Ports`: the word, and the bit in it.
#[inline(always)]
const fn place(port: [u8; 2]) -> (usize, u64) {
    let port = u16::from_be_bytes(port);
    ((port / 64) as usize, 1 << (port % 64))
}

/// The listener that a packet is for, or the NAT source that it comes back to.
#[inline(always)]
fn find_listener(ports: &Ports, packet: &Packet) -> Result<&'static Listener, Verdict> {
    let (word, bit) = place(packet.destination_port);
    if ports.listener[word] & bit != 0
        && let Some(listener) = look_up(packet, packet.destination_port, packet.protocol)
    {
        return Ok(listener);
    }
    if ports.nat[word] & bit != 0
        && let Some(source) = look_up(packet, [0; 2], 0)
    {
        return Ok(source);
    }
    Err(Verdict::NotOurs)
}

#[inline(always)]
fn look_up(packet: &Packet, port: [u8; 2], protocol: u8) -> Option<&'static Listener> {
    match packet.family {
        Family::V4 => {
            let key = ListenerKey4 {
                address: packet.destination.as_v4(),
                port,
                protocol,
                zero: 0,
            };
            // SAFETY: a value that is replaced meanwhile is read as old or new, field by field; each is checked where it is used.
            unsafe { LISTENERS4.get(&key) }
        }
        Family::V6 => {
            let key = ListenerKey6 {
                address: packet.destination.0,
                port,
                protocol,
                zero: [0; 5],
            };
            // SAFETY: as above.
            unsafe { LISTENERS6.get(&key) }
        }
    }
}

/// Adds what only a packet of ours is asked for, and checks that its frame is as long as its headers say.
#[inline(always)]
fn arrive<'a>(ctx: &XdpContext, frame: Frame<'a>, packet: Packet) -> Result<Arrival<'a>, Verdict> {
    // SAFETY: the context is the one that the kernel gave this program.
    let bytes = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    if (packet.frame_bytes_min as u64) > bytes {
        return Err(Verdict::Malformed);
    }
    Ok(Arrival {
        frame,
        packet,
        ifindex: ctx.ingress_ifindex() as u32,
        bytes,
    })
}
