//! What the keeper may do once it has started: what reloads and new daemons need, and nothing more.

use std::io;

/// Capabilities that stay, by their number (linux/capability.h).
const KEPT: [u32; 8] = [
    2,  // CAP_DAC_READ_SEARCH: a reload reads what the start could read
    5,  // CAP_KILL: the daemon is another user's
    6,  // CAP_SETGID: a new daemon becomes its user
    7,  // CAP_SETUID
    8,  // CAP_SETPCAP: and loses everything for good
    10, // CAP_NET_BIND_SERVICE: a reload may name ports below 1024
    12, // CAP_NET_ADMIN: steering, detaching
    39, // CAP_BPF
];

/// linux/capability.h: version 3, this process.
const HEADER: [u32; 2] = [0x2008_0522, 0];

/// Effective, permitted and inheritable capabilities; the lower 32, then the upper.
type Sets = [[u32; 3]; 2];

/// Gives up every other capability, for good.
///
/// # Errors
/// What the system says.
pub fn give_up() -> io::Result<()> {
    let kept = KEPT.iter().fold(0_u64, |kept, number| kept | 1 << number);
    let mut sets: Sets = [[0; 3]; 2];
    // SAFETY: the kernel reads the header and writes two triples of words, which live on our stack.
    check(unsafe { libc::syscall(libc::SYS_capget, HEADER.as_ptr(), sets.as_mut_ptr()) })?;
    for (set, kept) in sets.iter_mut().zip([kept as u32, (kept >> 32) as u32]) {
        let [effective, permitted, inheritable] = set;
        *effective &= kept;
        *permitted &= kept;
        *inheritable = 0;
    }
    // SAFETY: the kernel reads the same.
    check(unsafe { libc::syscall(libc::SYS_capset, HEADER.as_ptr(), sets.as_ptr()) })
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
