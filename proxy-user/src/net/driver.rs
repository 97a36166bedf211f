//! The seam to the kernel: operations go in with a token, completions come out with it; nothing above knows by which back-end.

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    rc::Rc,
    time::Duration,
};

use super::{Backend, Settings, epoll::Epoll, pool::Pool, uring::Uring};

/// The back-end of one worker. Two known types and a branch that always goes the same way: it costs the uring nothing.
pub(super) enum Driver {
    Uring(Uring),
    Epoll(Epoll),
}

/// One completion: `more` says that the operation goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) token: u64,
    /// What the system call would have returned, or a negative errno.
    pub(super) result: i32,
    /// The buffer of the pool that was filled.
    pub(super) buffer: Option<u16>,
    pub(super) more: bool,
}

/// Calls the method of the same name of whichever back-end it is.
macro_rules! forward {
    ($self:ident, $method:ident($($argument:expr),*)) => {
        match $self {
            Self::Uring(uring) => uring.$method($($argument),*),
            Self::Epoll(epoll) => epoll.$method($($argument),*),
        }
    };
}

impl Driver {
    /// Makes the back-end that the settings name, for the buffers of this pool.
    pub(super) fn new(settings: &Settings, pool: &Rc<Pool>) -> io::Result<Self> {
        Ok(match settings.backend {
            Backend::Uring => Self::Uring(Uring::new(settings.entries, pool)?),
            Backend::Epoll => Self::Epoll(Epoll::new(pool.clone())?),
        })
    }

    /// Whether it wants listening sockets to say that nobody waits (O_NONBLOCK), and not to wait themselves.
    pub(super) fn is_nonblocking(&self) -> bool {
        matches!(self, Self::Epoll(_))
    }

    /// Accepts connections on `listener` until cancelled or failed: one completion each, its result the descriptor.
    pub(super) fn accept(&mut self, listener: RawFd, token: u64) {
        forward!(self, accept(listener, token));
    }

    /// Receives into buffers of the pool until the end, a failure, or cancelled.
    pub(super) fn recv(&mut self, socket: RawFd, token: u64) {
        forward!(self, recv(socket, token));
    }

    /// Sends from one range of memory.
    ///
    /// # Safety
    /// The memory must stay as it is until the token's completion.
    pub(super) unsafe fn send(&mut self, socket: RawFd, bytes: &[u8], token: u64) {
        // SAFETY: the caller's promise is theirs.
        unsafe { forward!(self, send(socket, bytes, token)) }
    }

    /// Sends from several ranges of memory.
    ///
    /// # Safety
    /// The header, its vectors and their memory must stay as they are until the token's completion.
    pub(super) unsafe fn send_message(
        &mut self,
        socket: RawFd,
        message: *const libc::msghdr,
        token: u64,
    ) {
        // SAFETY: the caller's promise is theirs.
        unsafe { forward!(self, send_message(socket, message, token)) }
    }

    /// Waits until one of these events of poll(2), or an error or the end, is there.
    pub(super) fn poll(&mut self, socket: RawFd, events: libc::c_short, token: u64) {
        forward!(self, poll(socket, events, token));
    }

    /// Connects a socket.
    ///
    /// # Safety
    /// The address must stay as it is until the token's completion.
    pub(super) unsafe fn connect(
        &mut self,
        socket: RawFd,
        address: *const libc::sockaddr,
        len: libc::socklen_t,
        token: u64,
    ) {
        // SAFETY: the caller's promise is theirs.
        unsafe { forward!(self, connect(socket, address, len, token)) }
    }

    /// Waits for an eventfd to be written to; what it counts is of no interest to anybody.
    ///
    /// # Safety
    /// `into` must stay valid until the token's completion.
    pub(super) unsafe fn read(&mut self, event: RawFd, into: *mut u64, token: u64) {
        match self {
            // SAFETY: the caller's promise is its.
            Self::Uring(uring) => unsafe { uring.read(event, into, token) },
            Self::Epoll(epoll) => epoll.ring(event, token),
        }
    }

    /// Asks the operation with this token to end; its last completion still comes.
    pub(super) fn cancel(&mut self, token: u64) {
        forward!(self, cancel(token));
    }

    /// Asks every operation to end.
    pub(super) fn cancel_all(&mut self) {
        forward!(self, cancel_all());
    }

    /// Closes a descriptor, after everything that was asked for before.
    pub(super) fn close(&mut self, fd: OwnedFd) {
        forward!(self, close(fd));
    }

    /// Somebody else closes this descriptor, or has it from now on. No operation on it is under way.
    pub(super) fn forget(&mut self, fd: RawFd) {
        match self {
            // It knows descriptors by their operations alone.
            Self::Uring(_) => {}
            Self::Epoll(epoll) => epoll.forget(fd),
        }
    }

    /// Hands in what was asked for, waits for a completion at most `wait` (None: for ever), and takes all there are.
    pub(super) fn turn(
        &mut self,
        wait: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> io::Result<()> {
        forward!(self, turn(wait, completions))
    }
}
