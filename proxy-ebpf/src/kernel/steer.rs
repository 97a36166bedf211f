//! Which worker takes a connection: the one on the CPU that took the packet.

use aya_ebpf::bindings::{bpf_sock, sk_action::SK_PASS};
use aya_ebpf::helpers::bpf_get_smp_processor_id;
use aya_ebpf::programs::SkReuseportContext;
use proxy_ebpf::abi::{Address, SteerKey};

use crate::maps::{SOCKETS, STEER};

const AF_INET: u32 = 2;

/// Selects the socket of this CPU in the group that the packet is for. Whatever is missing, the
/// packet is let through without a choice, and the kernel chooses by its own hash.
#[inline(always)]
pub fn select(ctx: &SkReuseportContext) -> u32 {
    let sk = ctx.sk().sock;
    // SAFETY: the kernel gives this program a socket of its group, readable during the run.
    let key = unsafe { steer_key(sk, ctx.ip_protocol()) };
    // SAFETY: the value is one aligned word, which is replaced as a whole.
    if let Some(base) = unsafe { STEER.get(&key) } {
        // SAFETY: the helper takes nothing.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        // An index without a socket, or with one of another group, is refused by the kernel and then not our choice.
        let _ = SOCKETS.select_reuseport(ctx, base.wrapping_add(cpu));
    }
    SK_PASS
}

/// The address and port that the group's sockets are bound to.
///
/// # Safety
///
/// `sk` must be the socket that the kernel gave the program.
#[inline(always)]
unsafe fn steer_key(sk: *const bpf_sock, protocol: u32) -> SteerKey {
    // SAFETY: the caller's promise. Volatile, and both addresses before the choice between them, because
    // the kernel rewrites each read of a field by itself: it refuses two merged into one, and a computed offset.
    let (family, v4, v6, port) = unsafe {
        let v6 = (&raw const (*sk).src_ip6).cast::<u32>();
        (
            (&raw const (*sk).family).read_volatile(),
            (&raw const (*sk).src_ip4).read_volatile(),
            [
                v6.read_volatile(),
                v6.add(1).read_volatile(),
                v6.add(2).read_volatile(),
                v6.add(3).read_volatile(),
            ],
            (&raw const (*sk).src_port).read_volatile(),
        )
    };
    SteerKey {
        address: if family == AF_INET {
            Address::v4_word(v4)
        } else {
            Address(bytemuck::must_cast(v6))
        },
        // The only one of them that the kernel gives in host order.
        port: (port as u16).to_be_bytes(),
        protocol: protocol as u8,
        zero: [0; 5],
    }
}
