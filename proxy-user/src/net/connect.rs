//! Connections of our own to somebody else.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
    task::{Poll, Waker},
};

use socket2::{Domain, Protocol, SockAddr, Type};

use super::{
    operation::Operation,
    runtime::{self, Core},
    stream::Stream,
};

/// Connects over TCP, with TCP_NODELAY. The deadline is the caller's; dropping the future gives the attempt up.
///
/// # Errors
/// What connect(2) says.
///
/// # Panics
/// Outside of [`super::run`].
pub async fn connect(to: SocketAddr) -> io::Result<Stream> {
    let socket = socket2::Socket::new(
        Domain::for_address(to),
        Type::STREAM.cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_tcp_nodelay(true)?;
    let attempt = Attempt(Rc::new(Connecting {
        core: runtime::current(),
        address: SockAddr::from(to),
        state: RefCell::new(State {
            fd: Some(socket.into()),
            ..State::default()
        }),
    }));
    let fd = poll_fn(|context| attempt.0.poll(context.waker())).await?;
    Ok(Stream::new(attempt.0.core.clone(), fd, to))
}

/// Gives the attempt up when dropped before its end.
struct Attempt(Rc<Connecting>);

impl Drop for Attempt {
    fn drop(&mut self) {
        let token = self.0.state.borrow().token;
        if let Some(token) = token {
            self.0.core.cancel(token);
        }
    }
}

/// An attempt, shared with its operation; the socket is closed with the last share if nobody has taken it.
pub(super) struct Connecting {
    core: Rc<Core>,
    address: SockAddr,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    fd: Option<OwnedFd>,
    token: Option<u64>,
    result: Option<i32>,
    waker: Option<Waker>,
}

impl Connecting {
    fn poll(self: &Rc<Self>, waker: &Waker) -> Poll<io::Result<OwnedFd>> {
        let mut state = self.state.borrow_mut();
        match (state.result, &state.fd) {
            (Some(0), Some(_)) => Poll::Ready(state.fd.take().ok_or_else(closing)),
            (Some(errno), _) => Poll::Ready(Err(io::Error::from_raw_os_error(-errno))),
            (None, Some(fd)) => {
                let fd = fd.as_raw_fd();
                if state.token.is_none() {
                    state.token =
                        self.core
                            .start(Operation::Connect(self.clone()), |driver, token| {
                                // SAFETY: the operation holds a share of `self`, and with it the address, until its completion.
                                unsafe {
                                    driver.connect(
                                        fd,
                                        self.address.as_ptr().cast(),
                                        self.address.len(),
                                        token,
                                    );
                                }
                            });
                    if state.token.is_none() {
                        return Poll::Ready(Err(closing()));
                    }
                }
                state.waker = Some(waker.clone());
                Poll::Pending
            }
            (None, None) => Poll::Ready(Err(closing())),
        }
    }

    /// The operation has completed.
    pub(super) fn connected(&self, result: i32) {
        let mut state = self.state.borrow_mut();
        state.token = None;
        state.result = Some(result);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        if let Some(fd) = self.state.get_mut().fd.take() {
            self.core.close_fd(fd);
        }
    }
}

fn closing() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the worker is closing")
}
