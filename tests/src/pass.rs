//! The two-instruction XDP program that the far end of a veth pair needs before we may send into it.
//!
//! A veth takes frames from XDP_TX and redirect only while its peer has a program too (its receive queue runs under
//! NAPI then). Made by bpf(2) itself, so that this needs no toolchain, no object file and no library.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;

use crate::namespace::Namespace;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const XDP_PASS: u64 = 2;

/// The start of `union bpf_attr` for BPF_PROG_LOAD (include/uapi/linux/bpf.h).
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The start of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct Link {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// A program that passes everything, attached while this lives.
pub struct Pass {
    _link: OwnedFd,
}

impl Pass {
    /// Attaches to `interface` of `namespace`, in native mode.
    pub fn attach(namespace: &Namespace, interface: &str) -> Result<Self> {
        let link = namespace
            .inside(|| link(&program()?, interface))
            .with_context(|| {
                format!(
                    "attach a pass program to {interface} in {}",
                    namespace.label()
                )
            })?;
        Ok(Self { _link: link })
    }
}

fn program() -> Result<OwnedFd> {
    // mov64 r0, XDP_PASS; exit. Opcode in the lowest byte, immediate in the upper half.
    let code: [u64; 2] = [0xb7 | XDP_PASS << 32, 0x95];
    let license = CString::new("GPL")?;
    let attributes = Load {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: 2,
        insns: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: BPF_F_XDP_HAS_FRAGS,
        prog_name: *b"rig_pass\0\0\0\0\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: BPF_XDP,
    };
    bpf(BPF_PROG_LOAD, &attributes).context("load the pass program")
}

fn link(program: &OwnedFd, interface: &str) -> Result<OwnedFd> {
    let attributes = Link {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: if_nametoindex(interface).context("find the interface")?,
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    bpf(BPF_LINK_CREATE, &attributes).context("attach")
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> std::io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a live value, and what that points at outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: both commands that are used here return a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
