//! Signals as a descriptor that is read when there is time for it.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that mean something to the keeper.
const TAKEN: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// The keeper's signals. They are blocked from `open` on, so none is lost and none ends us.
pub struct Signals(SignalFd);

impl Signals {
    /// # Errors
    /// What the system says.
    pub fn open() -> nix::Result<Self> {
        let set: SigSet = TAKEN.into_iter().collect();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags)?))
    }

    /// The next signal, if one came.
    pub fn next(&self) -> Option<Signal> {
        let taken = self.0.read_signal().ok().flatten()?;
        Signal::try_from(taken.ssi_signo as i32).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
