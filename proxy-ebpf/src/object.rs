//! The kernel half as it was built for the bpf target: ELF objects for aya to load.

/// Bytes aligned as the ELF reader wants them.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static KERNEL_BYTES: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/sluice-kernel")));

static FLOOR_BYTES: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/sluice-floor")));

/// The product: the programs and maps of `abi::name`.
pub static KERNEL: &[u8] = &KERNEL_BYTES.0;

/// Programs for the far ends of veth pairs and as the floor of measurements: `pass`, `tx`, `drop`, `unwrap`, `fresh`.
pub static FLOOR: &[u8] = &FLOOR_BYTES.0;

/// Which toolchain built them.
pub const TOOLCHAIN: &str = env!("SLUICE_BPF_TOOLCHAIN");
