//! Programs that do nothing: the far ends of veth pairs in tests, and the floor of measurements. Not part of the product.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

/// On the host there is nothing to run.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::bindings::BPF_F_MMAPABLE;
    use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX};
    use aya_ebpf::macros::{map, xdp};
    use aya_ebpf::maps::{Array, ProgramArray};
    use aya_ebpf::programs::XdpContext;

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

    /// Bytes of a template that `fresh` restores.
    const TEMPLATE_BYTES: usize = 64;

    /// What `fresh` makes of a packet.
    #[repr(C, align(8))]
    pub struct Fresh {
        /// The first bytes of the packet, as they should be at the start of each round.
        template: [u8; TEMPLATE_BYTES],
        /// Rounds so far, masked, scattered and added to the IPv4 source address: which flow the packet is of.
        round: u64,
        mask: u64,
    }

    #[map(name = "fresh_state")]
    static FRESH: Array<Fresh> = Array::with_max_entries(1, BPF_F_MMAPABLE);

    /// Index 0: the program under measurement.
    #[map(name = "measured")]
    static MEASURED: ProgramArray = ProgramArray::with_max_entries(1, 0);

    /// Restores an IPv4 packet that the round before has changed, gives it the source of the next flow, and
    /// hands it to the program under measurement. BPF_PROG_TEST_RUN itself would feed the changed packet in again.
    #[xdp(frags)]
    pub fn fresh(ctx: XdpContext) -> u32 {
        let Some(fresh) = FRESH.get_ptr_mut(0) else {
            return XDP_ABORTED;
        };
        let start = ctx.data();
        if start + TEMPLATE_BYTES > ctx.data_end() {
            return XDP_ABORTED;
        }
        // SAFETY: the packet holds as many bytes as the template; one run at a time uses the map's value.
        unsafe {
            *(start as *mut [u8; TEMPLATE_BYTES]) = (*fresh).template;
            (*fresh).round += 1;
            // An odd factor visits each flow once, far from the one before: no line is in a cache by chance.
            let flow = (*fresh).round.wrapping_mul(0x9e37_79b1) & (*fresh).mask;
            let source = (start + 26) as *mut u32;
            source
                .write_unaligned((source.read_unaligned().swap_bytes() + flow as u32).swap_bytes());
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
