//! A connected TCP socket as its users see it: receive, send, shut down, abort, hand over.

use std::{
    cell::OnceCell,
    future::poll_fn,
    io,
    net::{Ipv4Addr, Shutdown, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use socket2::SockRef;

use super::{
    chunk::{Chunk, Payload},
    runtime::{self, Core},
    socket::Socket,
};

/// A connection. Dropping it ends its operations and closes it.
///
/// All methods take `&self`: one task may receive while another sends.
pub struct Stream {
    socket: Rc<Socket>,
    peer: SocketAddr,
    local: OnceCell<SocketAddr>,
}

impl Stream {
    pub(super) fn new(core: Rc<Core>, fd: OwnedFd, peer: SocketAddr) -> Self {
        Self {
            socket: Socket::new(core, fd),
            peer,
            local: OnceCell::new(),
        }
    }

    /// Takes over a connected socket, and makes it blocking, as the uring wants it (epoll does not care).
    ///
    /// # Errors
    /// When it is no connected TCP socket.
    ///
    /// # Panics
    /// Outside of [`super::run`].
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let socket = SockRef::from(&fd);
        socket.set_nonblocking(false)?;
        let peer = socket
            .peer_addr()?
            .as_socket()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self::new(runtime::current(), fd, peer))
    }

    /// The next bytes, or None when the peer will send no more (it may still read).
    ///
    /// From the first call on, the kernel delivers what arrives without being asked again; it waits here up to a high mark, then
    /// in the kernel. Dropping the future loses nothing. One receiver at a time.
    ///
    /// # Errors
    /// What recv(2) says; ECONNABORTED after [`Self::abort`]. An end or error comes after all bytes, and stays.
    pub async fn recv(&self) -> io::Result<Option<Chunk>> {
        poll_fn(|context| self.socket.poll_recv(context.waker())).await
    }

    /// Whether [`Self::recv`] would return at once: for an idle connection in a pool, that the peer closed it or sent what nobody asked for.
    ///
    /// Only what was asked for is noticed: [`Self::recv`] or [`Self::readable`] must have been called before.
    pub fn has_input(&self) -> bool {
        self.socket.has_input()
    }

    /// Waits until [`Self::has_input`], and takes nothing.
    pub async fn readable(&self) {
        poll_fn(|context| self.socket.poll_input(context.waker())).await;
    }

    /// Waits until the connection is of no use any more: the peer has reset it, or something could not be sent. That the peer
    /// will send no more is no such thing. What lies unread above the high mark hides a reset.
    pub async fn broken(&self) {
        poll_fn(|context| self.socket.poll_broken(context.waker())).await;
    }

    /// Sends all of it.
    ///
    /// Sends do not mix: one begins when the one before has ended. A send that has begun goes on to its end when the future is dropped;
    /// only closing the stream tears it.
    ///
    /// # Errors
    /// What send(2) says; afterwards every send fails with the same.
    pub async fn send(&self, payload: impl Into<Payload>) -> io::Result<()> {
        self.send_vectored([payload.into()]).await
    }

    /// Sends all of several parts, in one system call if the kernel takes them: a head and the beginning of its body.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_vectored<const N: usize>(&self, parts: [Payload; N]) -> io::Result<()> {
        self.idle().await?;
        let number = self.socket.begin(parts);
        poll_fn(|context| self.socket.poll_ended(number, context.waker())).await
    }

    /// Sends several parts in the background, behind what is being sent. They wait in memory: await [`Self::idle`] before, and
    /// no more than one payload waits while another is on its way. An error is found by whoever sends or waits next.
    pub fn queue(&self, parts: impl IntoIterator<Item = Payload>) {
        self.socket.begin(parts);
    }

    /// Waits until nothing is being sent.
    ///
    /// # Errors
    /// When a send has failed.
    pub async fn idle(&self) -> io::Result<()> {
        poll_fn(|context| self.socket.poll_idle(context.waker())).await
    }

    /// Says that nothing more will be sent (FIN), after what is being sent.
    ///
    /// # Errors
    /// When the connection is gone, or a send has failed.
    pub async fn shutdown(&self) -> io::Result<()> {
        self.idle().await?;
        // A plain system call: the uring would hand a shutdown to a thread pool, always.
        self.socket.with(|socket| socket.shutdown(Shutdown::Write))
    }

    /// Resets the connection (RST) and closes it; whoever waits for it gets ECONNABORTED.
    pub fn abort(&self) {
        let _ = self
            .socket
            .with(|socket| socket.set_linger(Some(Duration::ZERO)));
        self.socket.close();
    }

    /// Stops, and returns what had arrived and the socket, for somebody else to go on with: a tunnel, another process.
    ///
    /// Waits for the send in flight. An end of the stream that had been seen is seen again on the socket.
    ///
    /// # Errors
    /// ENOTCONN after [`Self::abort`].
    pub async fn quiesce(self) -> io::Result<(Vec<Chunk>, OwnedFd)> {
        poll_fn(|context| self.socket.poll_quiet(context.waker())).await;
        let (chunks, fd) = self.socket.give_up();
        let fd = fd.ok_or(io::ErrorKind::NotConnected)?;
        Ok((chunks, fd))
    }

    pub(super) fn socket(&self) -> &Rc<Socket> {
        &self.socket
    }

    /// The other end.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// This end; unspecified once aborted.
    pub fn local(&self) -> SocketAddr {
        *self.local.get_or_init(|| {
            self.socket
                .with(|socket| socket.local_addr())
                .ok()
                .and_then(|address| address.as_socket())
                .unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, 0).into())
        })
    }

    /// Bytes received so far, also those that wait for [`Self::recv`].
    pub fn received_bytes(&self) -> u64 {
        self.socket.received_bytes.get()
    }

    /// Bytes that the kernel has taken to send so far: progress, for a minimum rate.
    pub fn sent_bytes(&self) -> u64 {
        self.socket.sent_bytes.get()
    }

    /// Of these, those that have reached the peer: it has room for them, if it has not read them yet. A system call.
    pub fn acknowledged_bytes(&self) -> u64 {
        let mut queued: libc::c_int = 0;
        let asked = self.socket.with_fd(|fd| {
            // SAFETY: the descriptor is open, and the kernel writes one int (SIOCOUTQ, tcp(7)) to a place for one.
            match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) } {
                0.. => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        let queued = asked.map_or(0, |()| u64::try_from(queued).unwrap_or(0));
        self.sent_bytes().saturating_sub(queued)
    }

    /// Looks at, or sets, an option of the socket.
    ///
    /// # Errors
    /// What `look` says; ENOTCONN once aborted.
    pub fn with_socket<T>(&self, look: impl FnOnce(SockRef<'_>) -> io::Result<T>) -> io::Result<T> {
        self.socket.with(look)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.socket.close();
    }
}
