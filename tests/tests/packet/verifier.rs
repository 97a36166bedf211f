//! The verifier takes both programs, and looks at few enough instructions for it: a change that multiplies its paths is seen here first.

use aya::programs::Xdp;
use aya::{EbpfLoader, VerifierLogLevel};
use proxy_ebpf::abi::name;
use proxy_ebpf::object;

use crate::loaded::skip;

/// The kernel gives up at a million. Whoever needs more than this has a branch too many before something long: see
/// `kernel/ingress.rs`.
const INSTRUCTIONS_MAX: u32 = 300_000;

#[test]
fn the_verifier_takes_both_programs_without_effort() {
    // SAFETY: the call takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return skip("needs root");
    }
    // A log of every step would take minutes where a program is refused.
    let mut ebpf = EbpfLoader::new()
        .verifier_log_level(VerifierLogLevel::STATS)
        .load(object::KERNEL)
        .expect("the object loads");
    for program in [name::INGRESS, name::RARE] {
        let xdp: &mut Xdp = ebpf
            .program_mut(program)
            .expect("a program of that name")
            .try_into()
            .expect("an XDP program");
        xdp.load().expect("the verifier accepts it");
        let info = xdp.info().expect("it is loaded");
        // The kernel takes a program without its types, too, and then nobody can look into it.
        assert!(
            info.btf_id().is_some(),
            "{program}: its type information is refused"
        );
        let instructions = info
            .verified_instruction_count()
            .expect("Linux 5.16 counts them");
        println!(
            "{program}: {instructions} instructions verified, {} bytes of code",
            info.size_jitted()
        );
        assert!(instructions < INSTRUCTIONS_MAX, "{program}: {instructions}");
    }
}
