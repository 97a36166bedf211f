//! Programs that do next to nothing: the far ends of veth pairs in tests, and the floor of measurements. Not part of the product.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

/// On the host there is nothing to run.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod unwrap;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::bindings::BPF_F_MMAPABLE;
    use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX};
    use aya_ebpf::helpers::bpf_xdp_adjust_head;
    use aya_ebpf::macros::{map, xdp};
    use aya_ebpf::maps::{Array, ProgramArray};
    use aya_ebpf::programs::XdpContext;
    use proxy_ebpf::measure::{FRESH_BYTES, Fresh};
    use proxy_ebpf::packet::ETHERNET_BYTES;

    /// Up to Linux, as it came.
    #[xdp(frags)]
    pub fn pass(_: XdpContext) -> u32 {
        XDP_PASS
    }

    /// Back where it came from, as it came.
    #[xdp(frags)]
    pub fn tx(_: XdpContext) -> u32 {
        XDP_TX
    }

    /// Dropped.
    #[xdp(frags)]
    pub fn drop(_: XdpContext) -> u32 {
        XDP_DROP
    }

    /// Up to Linux without the outer headers of `ipip` and `gue`.
    #[xdp(frags)]
    pub fn unwrap(ctx: XdpContext) -> u32 {
        crate::unwrap::unwrap(&ctx)
    }

    #[map(name = "template")]
    static FRESH: Array<Fresh> = Array::with_max_entries(1, BPF_F_MMAPABLE);

    /// Index 0: the program under measurement.
    #[map(name = "measured")]
    static MEASURED: ProgramArray = ProgramArray::with_max_entries(1, 0);

    /// Restores a packet that the round before has changed, makes it one of the next flow, and hands it to
    /// the program under measurement. BPF_PROG_TEST_RUN itself would feed the changed packet in again.
    #[xdp(frags)]
    pub fn fresh(ctx: XdpContext) -> u32 {
        let Some(fresh) = FRESH.get_ptr_mut(0) else {
            return XDP_ABORTED;
        };
        // SAFETY: the map's value outlives the run, and the context is this program's own.
        unsafe {
            if (*fresh).bytes != 0 {
                // It lies in one buffer, so that its length needs no helper; the mask is for the verifier.
                let end = ctx.data() + ((*fresh).bytes as usize & 0xfff);
                let grown = ctx.data_end().wrapping_sub(end);
                if grown != 0 && bpf_xdp_adjust_head(ctx.ctx, grown as i32) != 0 {
                    return XDP_ABORTED;
                }
            }
        }
        let start = ctx.data();
        // SAFETY: the map's value outlives the run.
        let word = start + unsafe { (*fresh).counted_at as usize & 63 };
        if start + FRESH_BYTES > ctx.data_end() || word + 4 > ctx.data_end() {
            return XDP_ABORTED;
        }
        let word = word as *mut u32;
        // SAFETY: the packet holds as many bytes as the template, and the word that is counted; one run at
        // a time uses the map's value. Words are read as in `packet::Header`.
        unsafe {
            // An odd factor visits each flow once, far from the one before: no line is in a cache by chance.
            let flow = (*fresh).round.wrapping_mul(0x9e37_79b1) & (*fresh).mask;
            (*fresh).round += 1;
            // Written in words within which the parser's own words lie: one that straddles two stores could be
            // read only once both have left the store buffer, and the measurement would be of that.
            let template = &raw const (*fresh).template;
            for index in 0..ETHERNET_BYTES / 2 {
                *(start as *mut u16).add(index) = *template.cast::<u16>().add(index);
            }
            let rest = template.cast::<u8>().add(ETHERNET_BYTES).cast::<u32>();
            for index in 0..(FRESH_BYTES - ETHERNET_BYTES) / 4 {
                *((start + ETHERNET_BYTES) as *mut u32).add(index) = *rest.add(index);
            }
            *word = u32::from_be(*word).wrapping_add(flow as u32).to_be();
        }
        // SAFETY: the context is this program's own.
        let _ = unsafe { MEASURED.tail_call(&ctx, 0) };
        XDP_ABORTED
    }
}

/// The verifier proves that no path ends here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers used are offered to GPL-compatible programs.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
