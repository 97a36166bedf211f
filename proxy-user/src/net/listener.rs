//! A listening socket, accepted from by one multishot operation.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    rc::Rc,
    task::{Poll, Waker},
};

use socket2::SockRef;

use super::{
    driver::Completion,
    operation::Operation,
    runtime::{self, Core},
    stream::Stream,
};

/// Accepted connections may wait for their task so many deep; beyond, they wait in the kernel's queue.
const WAITING_MAX: usize = 256;

/// A listening socket. Dropping it stops accepting and closes it here; other holders of the descriptor keep it open.
pub struct Listener {
    accepting: Rc<Accepting>,
}

impl Listener {
    /// Takes over a socket that listens already. What it accepts inherits TCP_NODELAY, which is set here.
    ///
    /// The socket is made blocking for the uring, to which an empty queue would be an error with O_NONBLOCK, and non-blocking for epoll.
    ///
    /// # Errors
    /// When it is no listening TCP socket.
    ///
    /// # Panics
    /// Outside of [`super::run`].
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let socket = SockRef::from(&fd);
        if !socket.is_listener()? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the socket does not listen",
            ));
        }
        let core = runtime::current();
        socket.set_nonblocking(core.is_nonblocking())?;
        socket.set_tcp_nodelay(true)?;
        let local = socket
            .local_addr()?
            .as_socket()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            accepting: Rc::new(Accepting {
                core,
                fd,
                local,
                state: RefCell::default(),
            }),
        })
    }

    /// The next connection.
    ///
    /// # Errors
    /// What accept(2) says. EMFILE and ENFILE stay until descriptors are free: wait a while before the next call.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            let fd = poll_fn(|context| self.accepting.poll(context.waker())).await?;
            // A connection that was reset while it waited has no peer any more, and nobody misses it.
            if let Some(stream) = self.accepting.stream(fd) {
                return Ok(stream);
            }
        }
    }

    /// Accepts nothing more until [`Self::accept`] is called again: who comes meanwhile waits in the kernel. Who was accepted
    /// and not yet taken waits here.
    pub fn pause(&self) {
        let mut state = self.accepting.state.borrow_mut();
        if let (false, Some(token)) = (state.cancelled, state.token) {
            state.cancelled = true;
            self.accepting.core.cancel(token);
        }
    }

    /// Where it listens.
    pub fn local(&self) -> SocketAddr {
        self.accepting.local
    }

    /// Stops accepting, and returns the connections that were accepted and not yet taken, and the socket. No connection is lost.
    pub async fn quiesce(self) -> (Vec<Stream>, io::Result<OwnedFd>) {
        self.accepting.stop();
        poll_fn(|context| self.accepting.poll_stopped(context.waker())).await;
        let waiting = std::mem::take(&mut self.accepting.state.borrow_mut().waiting);
        let streams = waiting
            .into_iter()
            .filter_map(|accepted| self.accepting.stream(accepted.ok()?))
            .collect();
        (streams, self.accepting.fd.try_clone())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.stop();
        self.accepting.state.borrow_mut().waiting.clear();
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        self.core.forget_fd(self.fd.as_raw_fd());
    }
}

/// A listener's state, shared with its operation.
pub(super) struct Accepting {
    core: Rc<Core>,
    fd: OwnedFd,
    local: SocketAddr,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<io::Result<OwnedFd>>,
    token: Option<u64>,
    cancelled: bool,
    stopped: bool,
    waker: Option<Waker>,
}

impl Accepting {
    fn poll(self: &Rc<Self>, waker: &Waker) -> Poll<io::Result<OwnedFd>> {
        let mut state = self.state.borrow_mut();
        if let Some(accepted) = state.waiting.pop_front() {
            return Poll::Ready(accepted);
        }
        if state.token.is_none() {
            let listener = self.fd.as_raw_fd();
            state.token = self
                .core
                .start(Operation::Accept(self.clone()), |driver, token| {
                    driver.accept(listener, token);
                });
            if state.token.is_none() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        state.waker = Some(waker.clone());
        Poll::Pending
    }

    /// One connection, or the end of the operation.
    pub(super) fn accepted(&self, completion: Completion) {
        let mut state = self.state.borrow_mut();
        if !completion.more {
            state.token = None;
            state.cancelled = false;
        }
        match completion.result {
            fd @ 0.. => {
                // SAFETY: the kernel made this descriptor for us, and names it in this completion only.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                state.waiting.push_back(Ok(fd));
            }
            errno => match -errno {
                libc::ECANCELED
                | libc::EINTR
                | libc::EAGAIN
                | libc::ECONNABORTED
                | libc::EPROTO => {}
                errno => state
                    .waiting
                    .push_back(Err(io::Error::from_raw_os_error(errno))),
            },
        }
        if let (true, false, Some(token)) = (
            state.waiting.len() >= WAITING_MAX,
            state.cancelled,
            state.token,
        ) {
            state.cancelled = true;
            self.core.cancel(token);
        }
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    fn stop(&self) {
        let mut state = self.state.borrow_mut();
        if let (false, Some(token)) = (std::mem::replace(&mut state.stopped, true), state.token) {
            self.core.cancel(token);
        }
    }

    fn poll_stopped(&self, waker: &Waker) -> Poll<()> {
        let mut state = self.state.borrow_mut();
        if state.token.is_none() {
            return Poll::Ready(());
        }
        state.waker = Some(waker.clone());
        Poll::Pending
    }

    fn stream(&self, fd: OwnedFd) -> Option<Stream> {
        let peer = SockRef::from(&fd).peer_addr().ok()?.as_socket()?;
        Some(Stream::new(self.core.clone(), fd, peer))
    }
}
