//! VLAN tags: taken off where a packet comes in and put on where it leaves, so that nothing between has to know of them.

use aya_ebpf::helpers::bpf_xdp_adjust_head;
use aya_ebpf::programs::XdpContext;
use proxy_ebpf::packet::ethertype;

/// Bytes of both MACs, behind which tags stand.
const MACS_BYTES: usize = 12;

/// Up to two tags as they stand in a frame, outermost first; zero where there is none.
#[derive(Clone, Copy, PartialEq)]
pub struct Tags(pub u64);

impl Tags {
    pub const NONE: Self = Self(0);

    /// One tag of a VLAN (network order); 0 = none.
    #[inline(always)]
    pub const fn vlan(id: [u8; 2]) -> Self {
        if u16::from_ne_bytes(id) == 0 {
            return Self::NONE;
        }
        let [a, b] = ethertype::VLAN;
        Self(u64::from_ne_bytes([a, b, id[0], id[1], 0, 0, 0, 0]))
    }

    /// The tags as two words.
    #[inline(always)]
    const fn words(&self) -> [u32; 2] {
        bytemuck::must_cast(self.0)
    }
}

/// Takes the tags off a frame that carries IP behind them; every other frame stays as it is.
#[inline(always)]
pub fn untag(ctx: &XdpContext) -> Tags {
    let Some(kind) = read::<[u8; 2]>(ctx, MACS_BYTES) else {
        return Tags::NONE;
    };
    if !is_tag(kind) {
        return Tags::NONE;
    }
    let Some(outer) = read::<u32>(ctx, MACS_BYTES) else {
        return Tags::NONE;
    };
    match read::<[u8; 2]>(ctx, MACS_BYTES + 4) {
        Some(ethertype::IPV4 | ethertype::IPV6) => {
            take_off::<4>(ctx, Tags(bytemuck::must_cast([outer, 0])))
        }
        Some(inner) if is_tag(inner) => match (
            read::<u32>(ctx, MACS_BYTES + 4),
            read::<[u8; 2]>(ctx, MACS_BYTES + 8),
        ) {
            (Some(inner), Some(ethertype::IPV4 | ethertype::IPV6)) => {
                take_off::<8>(ctx, Tags(bytemuck::must_cast([outer, inner])))
            }
            _ => Tags::NONE,
        },
        _ => Tags::NONE,
    }
}

/// Puts tags on, as they were or as the way on wants them.
///
/// # Errors
///
/// There is no room in front of the frame, which a driver always leaves; then nothing has changed.
#[inline(always)]
pub fn tag(ctx: &XdpContext, tags: Tags) -> Result<(), ()> {
    match tags.words() {
        [0, 0] => Ok(()),
        [_, 0] => put_on::<4>(ctx, tags),
        _ => put_on::<8>(ctx, tags),
    }
}

#[inline(always)]
const fn is_tag(kind: [u8; 2]) -> bool {
    matches!(kind, ethertype::VLAN | ethertype::SERVICE_VLAN)
}

/// Moves the MACs up to the IP header's type, and the beginning of the frame after them.
#[inline(always)]
fn take_off<const BYTES: usize>(ctx: &XdpContext, tags: Tags) -> Tags {
    let Some(macs) = read::<[u32; 3]>(ctx, 0) else {
        return Tags::NONE;
    };
    // SAFETY: the context is the kernel's; every pointer into the frame is made anew afterwards.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, BYTES as i32) } != 0 {
        return Tags::NONE;
    }
    let _ = write(ctx, 0, macs);
    tags
}

#[inline(always)]
fn put_on<const BYTES: usize>(ctx: &XdpContext, tags: Tags) -> Result<(), ()> {
    let macs = read::<[u32; 3]>(ctx, 0).ok_or(())?;
    // SAFETY: as in `take_off`.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(BYTES as i32)) } != 0 {
        return Err(());
    }
    write(ctx, 0, macs)?;
    let [outer, inner] = tags.words();
    write(ctx, MACS_BYTES, outer)?;
    if BYTES == 8 {
        write(ctx, MACS_BYTES + 4, inner)?;
    }
    Ok(())
}

#[inline(always)]
fn read<T: bytemuck::Pod>(ctx: &XdpContext, at: usize) -> Option<T> {
    let first = ctx.data() + at;
    if first + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the bytes exist; words are read as in `packet::Header`.
    Some(unsafe { (first as *const T).read() })
}

#[inline(always)]
fn write<T: bytemuck::Pod>(ctx: &XdpContext, at: usize, value: T) -> Result<(), ()> {
    let first = ctx.data() + at;
    if first + size_of::<T>() > ctx.data_end() {
        return Err(());
    }
    // SAFETY: as in `read`.
    unsafe { (first as *mut T).write(value) };
    Ok(())
}
