//! Bytes from one socket to another inside the kernel: splice(2) through a pipe, whenever the sockets are ready.
//!
//! It spares two copies of every byte. The uring tells when a socket is ready; its own splice is handed to a pool of threads, always,
//! which costs more than a system call here. Both sockets are made non-blocking for it, which the uring's receives and sends do not mind.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use super::{
    runtime,
    socket::{Direction, Socket},
    stream::Stream,
};

/// Room in a pipe: what an unprivileged process may have (fs.pipe-max-size). The memory is that of the bytes inside, not more.
const PIPE_BYTES: usize = 1 << 20;

/// With less room a pipe is not worth its system calls: the kernel gives so little to users who have many.
const PIPE_BYTES_MIN: usize = 64 << 10;

/// Pipes of one worker; each takes two descriptors. The kernel's limit for a user (fs.pipe-user-pages-soft) is 64 of them.
const PIPES_MAX: usize = 32;

/// A way from one connection to another. As long as it is there, the first one receives nothing in the ordinary way.
///
/// Dropped with bytes inside it loses them: neither can what they were sent to be used any more then.
pub struct Splice<'s> {
    from: &'s Stream,
    to: &'s Stream,
    /// None only while it is dropped.
    pipe: Option<Pipe>,
}

/// An empty pipe of the worker's, or bytes on their way.
struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    capacity: usize,
    held: usize,
}

/// The pipes of one worker.
#[derive(Default)]
pub(super) struct Pipes {
    idle: RefCell<Vec<Pipe>>,
    /// Idle and in use.
    open: Cell<usize>,
}

impl<'s> Splice<'s> {
    /// None if there is no pipe for it, or one of them is closed.
    ///
    /// # Panics
    /// Outside of [`super::run`].
    pub fn new(from: &'s Stream, to: &'s Stream) -> Option<Self> {
        for stream in [from, to] {
            let is_set = stream.with_socket(|socket| socket.set_nonblocking(true));
            is_set.ok()?;
        }
        let pipe = runtime::current().pipes.acquire()?;
        from.socket().hold();
        Some(Self {
            from,
            to,
            pipe: Some(pipe),
        })
    }

    /// Bytes on their way.
    pub fn held(&self) -> usize {
        self.pipe.as_ref().map_or(0, |pipe| pipe.held)
    }

    /// Waits until the ordinary receive is at rest; true if it has left something that has to go first. Then [`Stream::recv`]
    /// returns it, and waits for ever once there is nothing left.
    pub async fn is_behind(&self) -> bool {
        poll_fn(|context| self.from.socket().poll_held(context.waker())).await;
        self.from.has_input()
    }

    /// Waits for bytes and takes up to `bytes_max` of them on their way. 0: what has come has to be received in the ordinary way,
    /// it may be the end, or an error. Dropping the future loses nothing.
    pub async fn take(&mut self, bytes_max: usize) -> usize {
        let Some(pipe) = &mut self.pipe else { return 0 };
        let bytes_max = bytes_max.min(pipe.capacity - pipe.held);
        let socket = self.from.socket();
        loop {
            poll_fn(|context| socket.poll_ready(Direction::In, context.waker())).await;
            let taken = socket.with_fd(|fd| splice(fd, pipe.writer.as_fd(), bytes_max));
            match taken {
                Ok(n) => {
                    pipe.held += n;
                    Socket::count(&socket.received_bytes, n);
                    return n;
                }
                Err(error) if is_transient(&error) => {}
                Err(_) => return 0,
            }
        }
    }

    /// Sends some of what is on its way, behind what is being sent; how much. Dropping the future loses nothing.
    ///
    /// # Errors
    /// What send(2) says; what is still on its way is lost then.
    pub async fn give(&mut self) -> io::Result<usize> {
        let Some(pipe) = &mut self.pipe else {
            return Ok(0);
        };
        self.to.idle().await?;
        let socket = self.to.socket();
        loop {
            let given = socket.with_fd(|fd| splice(pipe.reader.as_fd(), fd, pipe.held));
            match given {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    pipe.held -= n;
                    Socket::count(&socket.sent_bytes, n);
                    return Ok(n);
                }
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
            poll_fn(|context| socket.poll_ready(Direction::Out, context.waker())).await;
        }
    }
}

impl Drop for Splice<'_> {
    fn drop(&mut self) {
        self.from.socket().resume();
        if let Some(pipe) = self.pipe.take() {
            self.from.socket().core.pipes.release(pipe);
        }
    }
}

impl Pipes {
    fn acquire(&self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.borrow_mut().pop() {
            return Some(pipe);
        }
        if self.open.get() >= PIPES_MAX {
            return None;
        }
        let pipe = Pipe::open()
            .ok()
            .filter(|pipe| pipe.capacity >= PIPE_BYTES_MIN)?;
        self.open.set(self.open.get() + 1);
        Some(pipe)
    }

    /// What one exchange has left in a pipe no other may ever see.
    fn release(&self, pipe: Pipe) {
        if pipe.held == 0 {
            self.idle.borrow_mut().push(pipe);
        } else {
            self.open.set(self.open.get() - 1);
        }
    }
}

impl Pipe {
    fn open() -> io::Result<Self> {
        let mut ends = [-1; 2];
        // SAFETY: there is room for the two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened both, and nobody else has them.
        let [reader, writer] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let size = [libc::F_SETPIPE_SZ, libc::F_GETPIPE_SZ]
            .into_iter()
            // SAFETY: the descriptor is open; a number is given, no memory. Where the first is refused, the second tells what there is.
            .map(|ask| unsafe { libc::fcntl(writer.as_raw_fd(), ask, PIPE_BYTES as libc::c_int) })
            .find(|size| *size > 0);
        Ok(Self {
            reader,
            writer,
            capacity: size
                .and_then(|size| usize::try_from(size).ok())
                .unwrap_or(0),
            held: 0,
        })
    }
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, bytes: usize) -> io::Result<usize> {
    // SAFETY: both descriptors are open, and no memory is given: neither has a position.
    let n = unsafe {
        libc::splice(
            from.as_raw_fd(),
            ptr::null_mut(),
            to.as_raw_fd(),
            ptr::null_mut(),
            bytes,
            libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Not ready after all.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}
