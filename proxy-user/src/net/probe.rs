//! Which back-end is used: whether the uring can be, and if not, why, and what can be done about it.

use std::{fmt, io};

use super::{Backend, pool::Pool, uring::Uring};
use crate::tunable::NetBackend;

/// Why the uring cannot be used; its text ends with the remedy.
#[derive(Debug)]
pub enum ProbeError {
    /// The system call does not exist: CONFIG_IO_URING is off, or a seccomp profile hides it.
    Absent,
    /// `kernel.io_uring_disabled` forbids it; the value that was read (io_uring_disabled is of Linux 6.6).
    Disabled(u8),
    /// Refused with EPERM and not by the sysctl: a seccomp profile, as container runtimes have by default.
    Forbidden,
    /// The kernel knows the uring, but not what Linux 6.1 added.
    TooOld { release: String },
    /// No memory may be locked for it.
    MemoryLimit,
    /// Anything else.
    Other(io::Error),
}

/// A back-end that works here.
#[derive(Debug)]
pub struct Choice {
    pub backend: Backend,
    /// Why it is not the uring, which was wanted.
    pub refused: Option<ProbeError>,
}

/// The back-end to run on, where this one is wanted.
///
/// # Errors
/// It is the uring and nothing else, and something stands in the way.
pub fn choose(wanted: NetBackend) -> Result<Choice, ProbeError> {
    let (backend, refused) = match wanted {
        NetBackend::Epoll => (Backend::Epoll, None),
        NetBackend::Uring => probe().map(|()| (Backend::Uring, None))?,
        NetBackend::Auto => match probe() {
            Ok(()) => (Backend::Uring, None),
            Err(refused) => (Backend::Epoll, Some(refused)),
        },
    };
    Ok(Choice { backend, refused })
}

/// Makes a small uring as a worker makes its own, with a ring of buffers, and closes it. What root may and the daemon may not
/// is refused here, too.
fn probe() -> Result<(), ProbeError> {
    if is_for_root(io_uring_disabled(), &setting("io_uring_group")) {
        return Err(ProbeError::Disabled(1));
    }
    let made = Pool::with_ring(1, 4096).and_then(|pool| Uring::new(4, &pool).map(drop));
    made.map_err(|error| explain(error, io_uring_disabled(), release))
}

fn explain(error: io::Error, disabled: u8, release: impl FnOnce() -> String) -> ProbeError {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => ProbeError::Absent,
        Some(libc::EPERM) if disabled > 0 => ProbeError::Disabled(disabled),
        Some(libc::EPERM | libc::EACCES) => ProbeError::Forbidden,
        Some(libc::EINVAL) => ProbeError::TooOld { release: release() },
        Some(libc::ENOMEM) => ProbeError::MemoryLimit,
        _ => ProbeError::Other(error),
    }
}

/// Whether nobody without CAP_SYS_ADMIN may have a uring: there is a group for them, and it is nobody's (-1).
fn is_for_root(disabled: u8, group: &str) -> bool {
    disabled == 1 && group.trim().parse().is_ok_and(|group: i64| group < 0)
}

/// 0 where the sysctl does not exist or cannot be read.
fn io_uring_disabled() -> u8 {
    setting("io_uring_disabled").trim().parse().unwrap_or(0)
}

/// Empty where the sysctl does not exist or cannot be read.
fn setting(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default()
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|_| "of an unknown release".to_owned())
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str(
                "io_uring does not exist here: the kernel was built without it, or a seccomp profile hides it; \
                 run on Linux 6.1 or later, and in a container allow the system calls io_uring_setup, io_uring_enter and io_uring_register",
            ),
            Self::Disabled(value) => write!(
                f,
                "io_uring is switched off: kernel.io_uring_disabled is {value}; set it to 0 (sysctl -w kernel.io_uring_disabled=0){}",
                if *value == 1 {
                    ", or give the daemon's user the group in kernel.io_uring_group"
                } else {
                    ""
                }
            ),
            Self::Forbidden => f.write_str(
                "io_uring is forbidden here, most likely by a seccomp profile, as container runtimes have by default; \
                 allow the system calls io_uring_setup, io_uring_enter and io_uring_register",
            ),
            Self::TooOld { release } => write!(
                f,
                "the kernel {release} is too old for the way in which io_uring is used; run on Linux 6.1 or later",
            ),
            Self::MemoryLimit => f.write_str(
                "io_uring may not lock the memory that it needs; raise the limit (LimitMEMLOCK=infinity, or ulimit -l unlimited)",
            ),
            Self::Other(error) => write!(
                f,
                "io_uring cannot be used: {error}; the kernel's log may say more (dmesg)"
            ),
        }
    }
}

impl std::error::Error for ProbeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Other(error) => Some(error),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn because(errno: i32, disabled: u8) -> String {
        explain(io::Error::from_raw_os_error(errno), disabled, || {
            "5.15.0".to_owned()
        })
        .to_string()
    }

    #[test]
    fn each_reason_names_its_remedy() {
        assert!(because(libc::ENOSYS, 0).contains("allow the system calls"));
        assert!(because(libc::EPERM, 1).contains("kernel.io_uring_group"));
        assert!(because(libc::EPERM, 2).contains("kernel.io_uring_disabled is 2"));
        assert!(because(libc::EPERM, 0).contains("seccomp"));
        assert!(because(libc::EINVAL, 0).contains("5.15.0 is too old"));
        assert!(because(libc::ENOMEM, 0).contains("LimitMEMLOCK"));
        assert!(because(libc::EIO, 0).contains("dmesg"));
    }

    #[test]
    fn what_only_root_may_is_refused() {
        assert!(is_for_root(1, "-1\n"));
        assert!(!is_for_root(1, "1000\n"));
        assert!(!is_for_root(0, "-1\n"));
        assert!(!is_for_root(1, ""));
    }

    #[test]
    fn who_asks_for_epoll_gets_it_and_nothing_is_said() {
        let choice = choose(NetBackend::Epoll).expect("it is everywhere");
        assert!(choice.backend == Backend::Epoll && choice.refused.is_none());
    }

    #[test]
    fn the_uring_works_here() {
        if let Err(error) = probe() {
            assert!(
                !matches!(error, ProbeError::Other(_)),
                "an unknown reason: {error}"
            );
            eprintln!("skipped: {error}");
        }
    }
}
