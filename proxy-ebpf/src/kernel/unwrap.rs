//! Takes outer headers off, as an endpoint of `ipip` or `gue` does: the far ends of veth pairs in tests. Not part of the product.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_get_buff_len};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::abi::protocol;
use proxy_ebpf::measure::Seen;
use proxy_ebpf::packet::{ETHERNET_BYTES, GUE_PORT, ethertype};

/// Packets by `Seen`.
#[map(name = "unwrapped")]
static UNWRAPPED: PerCpuArray<u64> = PerCpuArray::with_max_entries(Seen::COUNT, 0);

/// Protocol numbers of a packet inside a packet.
const IPV4: u8 = 4;
const IPV6: u8 = 41;

/// Hands what was inside up to Linux, and what has nothing inside as it came. What is not right is dropped.
pub fn unwrap(ctx: &XdpContext) -> u32 {
    let seen = match read(ctx) {
        Ok((seen, room)) => match take_off(ctx, room) {
            Some(()) => seen,
            None => Seen::Wrong,
        },
        Err(seen) => seen,
    };
    if let Some(count) = UNWRAPPED.get_ptr_mut(seen as u32) {
        // SAFETY: the value belongs to this CPU, and XDP is not interrupted by itself.
        unsafe { *count += 1 };
    }
    if matches!(seen, Seen::Wrong) {
        XDP_DROP
    } else {
        XDP_PASS
    }
}

/// What a frame is, and how long its outer headers are.
fn read(ctx: &XdpContext) -> Result<(Seen, usize), Seen> {
    // SAFETY: the context is this program's own.
    let bytes = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize - ETHERNET_BYTES;
    let ethernet = load::<ETHERNET_BYTES>(ctx, 0).ok_or(Seen::Plain)?;
    match [ethernet[12], ethernet[13]] {
        ethertype::IPV4 => {
            let ip = load::<20>(ctx, ETHERNET_BYTES).ok_or(Seen::Plain)?;
            // The whole of a packet without options: nobody puts anything else around ours.
            if ip[0] != 0x45 || ip[6] & 0x3f != 0 || ip[7] != 0 {
                return Err(Seen::Plain);
            }
            let seen = inside::<20>(ctx, ip[9], bytes)?;
            let total = u16::from_be_bytes([ip[2], ip[3]]) as usize;
            if total != bytes || !is_whole(&ip) {
                return Err(Seen::Wrong);
            }
            Ok(seen)
        }
        ethertype::IPV6 => {
            let ip = load::<40>(ctx, ETHERNET_BYTES).ok_or(Seen::Plain)?;
            let seen = inside::<40>(ctx, ip[6], bytes)?;
            if u16::from_be_bytes([ip[4], ip[5]]) as usize + 40 != bytes {
                return Err(Seen::Wrong);
            }
            Ok(seen)
        }
        _ => Err(Seen::Plain),
    }
}

/// What follows an outer IP header of `IP` bytes, and how long all that is outside is.
#[inline(always)]
fn inside<const IP: usize>(
    ctx: &XdpContext,
    number: u8,
    bytes: usize,
) -> Result<(Seen, usize), Seen> {
    match number {
        IPV4 | IPV6 => {
            let version = load::<1>(ctx, ETHERNET_BYTES + IP).ok_or(Seen::Wrong)?[0] >> 4;
            if (version == 4) != (number == IPV4) {
                return Err(Seen::Wrong);
            }
            Ok((Seen::Ipip, IP))
        }
        protocol::UDP => {
            let udp = load::<8>(ctx, ETHERNET_BYTES + IP).ok_or(Seen::Plain)?;
            if u16::from_be_bytes([udp[2], udp[3]]) != GUE_PORT {
                return Err(Seen::Plain);
            }
            let length = u16::from_be_bytes([udp[4], udp[5]]) as usize;
            // Without a checksum, in both families (RFC 6935).
            if length + IP != bytes || (udp[6] | udp[7]) != 0 {
                return Err(Seen::Wrong);
            }
            Ok((Seen::Gue, IP + 8))
        }
        _ => Err(Seen::Plain),
    }
}

/// Whether the checksum of an IPv4 header is right: all its words together are 0xffff.
#[inline(always)]
fn is_whole(ip: &[u8; 20]) -> bool {
    let mut sum = 0u32;
    for index in 0..10 {
        sum += u16::from_be_bytes([ip[index * 2], ip[index * 2 + 1]]) as u32;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) + (sum >> 16) == 0xffff
}

/// Removes `room` bytes behind the Ethernet header.
#[inline(always)]
fn take_off(ctx: &XdpContext, room: usize) -> Option<()> {
    let mut ethernet = load::<ETHERNET_BYTES>(ctx, 0)?;
    // SAFETY: the context is this program's own; pointers into the frame are made anew afterwards.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, room as i32) } != 0 {
        return None;
    }
    let inner = match load::<1>(ctx, ETHERNET_BYTES)?[0] >> 4 {
        4 => ethertype::IPV4,
        6 => ethertype::IPV6,
        _ => return None,
    };
    (ethernet[12], ethernet[13]) = (inner[0], inner[1]);
    let start = ctx.data();
    if start + ETHERNET_BYTES > ctx.data_end() {
        return None;
    }
    // SAFETY: the bytes exist, as was just seen.
    unsafe { (start as *mut [u8; ETHERNET_BYTES]).write(ethernet) };
    Some(())
}

/// `N` bytes from `at` on, where they all exist.
#[inline(always)]
fn load<const N: usize>(ctx: &XdpContext, at: usize) -> Option<[u8; N]> {
    let start = ctx.data() + at;
    if start + N > ctx.data_end() {
        return None;
    }
    // SAFETY: the bytes exist, as was just seen, and any bytes are bytes.
    Some(unsafe { (start as *const [u8; N]).read() })
}
