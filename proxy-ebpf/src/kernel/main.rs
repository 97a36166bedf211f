//! The programs that run in the kernel. A verdict becomes an action here and nowhere else.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        internal_features,
        reason = "core has no other read-modify-write on the bpf target"
    )
)]

#[cfg(target_arch = "bpf")]
mod atomic;
#[cfg(target_arch = "bpf")]
mod forward;
#[cfg(target_arch = "bpf")]
mod fragment;
#[cfg(target_arch = "bpf")]
mod guard;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod link;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod nat;
#[cfg(target_arch = "bpf")]
mod prefix;
#[cfg(target_arch = "bpf")]
mod sign;
#[cfg(target_arch = "bpf")]
mod steer;

/// On the host there is nothing to run: the user half loads the object built for the bpf target.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX};
    use aya_ebpf::helpers::bpf_redirect;
    use aya_ebpf::macros::{sk_reuseport, xdp};
    use aya_ebpf::programs::{SkReuseportContext, XdpContext};
    use proxy_ebpf::verdict::{Disposition, Verdict};

    use crate::ingress::{Decision, Exit, ingress as decide};
    use crate::link::{Tags, tag, untag};
    use crate::{maps, steer};

    /// Every packet that an interface receives.
    #[xdp(frags)]
    pub fn ingress(ctx: XdpContext) -> u32 {
        match decide::<false>(&ctx, Tags::NONE) {
            Ok(decision) => act(&ctx, decision),
            Err(Exit::Verdict(verdict)) => act(&ctx, Decision::stay(verdict, Tags::NONE)),
            Err(Exit::Rare) => {
                // SAFETY: the context is this program's own.
                let _ = unsafe { maps::PROGRAMS.tail_call(&ctx, 0) };
                // There is no other program: to Linux.
                act(&ctx, Decision::stay(Verdict::Unsupported, Tags::NONE))
            }
        }
    }

    /// Those that the first program leaves to it.
    #[xdp(frags)]
    pub fn rare(ctx: XdpContext) -> u32 {
        let tags = untag(&ctx);
        match decide::<true>(&ctx, tags) {
            Ok(decision) => act(&ctx, decision),
            Err(Exit::Verdict(verdict)) => act(&ctx, Decision::stay(verdict, tags)),
            Err(Exit::Rare) => act(&ctx, Decision::stay(Verdict::Inconsistent, tags)),
        }
    }

    #[inline(always)]
    fn act(ctx: &XdpContext, decision: Decision) -> u32 {
        let Decision {
            verdict,
            ifindex,
            tags,
        } = decision;
        maps::count_verdict(verdict);
        #[cfg(feature = "trace")]
        aya_log_ebpf::info!(ctx, "verdict {} to interface {}", verdict as u32, ifindex);
        if tag(ctx, tags).is_err() {
            return XDP_ABORTED;
        }
        match verdict.disposition() {
            Disposition::Pass => XDP_PASS,
            Disposition::Drop => XDP_DROP,
            Disposition::Send if ifindex == ctx.ingress_ifindex() as u32 => XDP_TX,
            // SAFETY: the helper takes two numbers and only notes them.
            Disposition::Send => unsafe { bpf_redirect(ifindex, 0) as u32 },
        }
    }

    /// Every new connection, and every UDP packet, of a `serve` listener.
    #[sk_reuseport]
    pub fn select(ctx: SkReuseportContext) -> u32 {
        steer::select(&ctx)
    }
}

/// The verifier proves that no path ends here, and the linker drops it.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Our helpers are offered to GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
