//! One connected socket: what has arrived, what is being sent, and the operations in flight for both.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    rc::Rc,
    task::{Poll, Waker},
};

use socket2::SockRef;

use super::{
    chunk::{Chunk, Payload},
    driver::Completion,
    operation::Operation,
    runtime::Core,
};

/// At most this many ranges go into one sendmsg(2); the kernel's own limit is 1024.
const VECTORS_MAX: usize = 64;

/// Shared by the stream that users hold and by its operations, so that memory lives until the last completion.
pub(super) struct Socket {
    pub(super) core: Rc<Core>,
    /// None once closed.
    fd: RefCell<Option<OwnedFd>>,
    inbound: RefCell<Inbound>,
    outbound: RefCell<Outbound>,
    pub(super) received_bytes: Cell<u64>,
    pub(super) sent_bytes: Cell<u64>,
}

/// The receiving half. It is armed (a multishot receive is in flight), starved (waits for a buffer), or at rest
/// (not yet asked for, above the high mark, stopped, or at its end).
#[derive(Default)]
struct Inbound {
    inbox: VecDeque<Chunk>,
    end: Option<End>,
    armed: Option<u64>,
    cancelled: bool,
    starved: bool,
    /// Not armed: somebody else goes on reading.
    stopped: bool,
    watch: Watch,
    waker: Option<Waker>,
}

/// Of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    In,
    Out,
}

/// Whether the socket is ready for a system call, for who makes that himself.
#[derive(Default)]
struct Watch {
    in_flight: Option<u64>,
    /// It was so, and nobody has looked yet.
    is_ready: bool,
}

#[derive(Clone, Copy)]
enum End {
    Finished,
    /// The errno.
    Failed(i32),
}

/// The sending half: at most one operation in flight, which goes on until everything it was given is sent.
struct Outbound {
    parts: VecDeque<Payload>,
    /// How much of the first part is sent.
    offset: usize,
    vectors: Vec<libc::iovec>,
    header: libc::msghdr,
    in_flight: Option<u64>,
    /// Sends that have begun, and of these, that have ended.
    begun: u64,
    ended: u64,
    /// The errno of the send that failed; what was to follow would make no sense without it.
    failed: Option<i32>,
    watch: Watch,
    wakers: Vec<Waker>,
}

impl Socket {
    pub(super) fn new(core: Rc<Core>, fd: OwnedFd) -> Rc<Self> {
        // SAFETY: all zeroes is a message header without address, vectors and control data.
        let header = unsafe { std::mem::zeroed() };
        Rc::new(Self {
            core,
            fd: RefCell::new(Some(fd)),
            inbound: RefCell::default(),
            outbound: RefCell::new(Outbound {
                parts: VecDeque::new(),
                offset: 0,
                vectors: Vec::new(),
                header,
                in_flight: None,
                begun: 0,
                ended: 0,
                failed: None,
                watch: Watch::default(),
                wakers: Vec::new(),
            }),
            received_bytes: Cell::new(0),
            sent_bytes: Cell::new(0),
        })
    }

    fn raw_fd(&self) -> Option<RawFd> {
        self.fd.borrow().as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Looks at the socket itself; not connected when closed.
    pub(super) fn with<T>(&self, look: impl FnOnce(SockRef<'_>) -> io::Result<T>) -> io::Result<T> {
        match self.fd.borrow().as_ref() {
            Some(fd) => look(SockRef::from(fd)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Uses the descriptor; not connected when closed.
    pub(super) fn with_fd<T>(
        &self,
        act: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        match self.fd.borrow().as_ref() {
            Some(fd) => act(fd.as_fd()),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    pub(super) fn count(counter: &Cell<u64>, bytes: usize) {
        counter.set(counter.get() + bytes as u64);
    }

    // Receiving.

    pub(super) fn poll_recv(self: &Rc<Self>, waker: &Waker) -> Poll<io::Result<Option<Chunk>>> {
        let mut inbound = self.inbound.borrow_mut();
        if let Some(chunk) = inbound.inbox.pop_front() {
            if inbound.inbox.len() <= self.core.settings.inbox_low_buffers {
                self.arm(&mut inbound);
            }
            return Poll::Ready(Ok(Some(chunk)));
        }
        match inbound.end {
            Some(End::Finished) => return Poll::Ready(Ok(None)),
            Some(End::Failed(errno)) => {
                return Poll::Ready(Err(io::Error::from_raw_os_error(errno)));
            }
            None => {}
        }
        self.arm(&mut inbound);
        inbound.wait(waker)
    }

    pub(super) fn poll_input(self: &Rc<Self>, waker: &Waker) -> Poll<()> {
        let mut inbound = self.inbound.borrow_mut();
        if inbound.has_input() {
            return Poll::Ready(());
        }
        self.arm(&mut inbound);
        inbound.wait(waker)
    }

    pub(super) fn has_input(&self) -> bool {
        self.inbound.borrow().has_input()
    }

    /// Ready when receiving or sending has failed.
    pub(super) fn poll_broken(self: &Rc<Self>, waker: &Waker) -> Poll<()> {
        let (mut inbound, mut outbound) = (self.inbound.borrow_mut(), self.outbound.borrow_mut());
        if matches!(inbound.end, Some(End::Failed(_))) || outbound.failed.is_some() {
            return Poll::Ready(());
        }
        if inbound.inbox.len() <= self.core.settings.inbox_low_buffers {
            self.arm(&mut inbound);
        }
        let _: Poll<()> = outbound.wait(waker);
        inbound.wait(waker)
    }

    fn arm(self: &Rc<Self>, inbound: &mut Inbound) {
        if inbound.armed.is_some() || inbound.starved || inbound.stopped || inbound.end.is_some() {
            return;
        }
        let Some(fd) = self.raw_fd() else {
            inbound.end = Some(End::Failed(libc::ENOTCONN));
            return;
        };
        inbound.armed = self
            .core
            .start(Operation::Recv(self.clone()), |driver, token| {
                driver.recv(fd, token);
            });
        if inbound.armed.is_none() {
            inbound.end = Some(End::Failed(libc::ECANCELED));
        }
    }

    /// Some bytes, or the end of the operation.
    pub(super) fn received(self: &Rc<Self>, completion: Completion, chunk: Option<Chunk>) {
        let mut inbound = self.inbound.borrow_mut();
        if !completion.more {
            inbound.armed = None;
            inbound.cancelled = false;
        }
        let settings = &self.core.settings;
        match completion.result {
            1.. => {
                let bytes = completion.result.unsigned_abs();
                Self::count(&self.received_bytes, bytes as usize);
                if inbound.end.is_none() {
                    inbound.inbox.extend(chunk);
                }
            }
            0 => inbound.finish(End::Finished),
            errno => match -errno {
                libc::ECANCELED | libc::EINTR | libc::EAGAIN => {}
                libc::ENOBUFS => {
                    inbound.starved = true;
                    self.core.starve(self.clone());
                }
                errno => inbound.finish(End::Failed(errno)),
            },
        }
        if inbound.inbox.len() >= self.core.inbox_high_buffers() {
            inbound.cancel(&self.core);
        } else if inbound.inbox.len() <= settings.inbox_low_buffers {
            self.arm(&mut inbound);
        }
        if let Some(waker) = inbound.waker.take() {
            waker.wake();
        }
    }

    /// There are buffers again.
    pub(super) fn feed(self: &Rc<Self>) {
        let mut inbound = self.inbound.borrow_mut();
        inbound.starved = false;
        // Who has enough unread already goes on when it is read, as ever.
        if inbound.inbox.len() <= self.core.settings.inbox_low_buffers {
            self.arm(&mut inbound);
        }
    }

    // Sending.

    /// Ready when nothing is being sent.
    pub(super) fn poll_idle(&self, waker: &Waker) -> Poll<io::Result<()>> {
        let mut outbound = self.outbound.borrow_mut();
        match (outbound.in_flight, outbound.failed) {
            (Some(_), _) => outbound.wait(waker),
            (None, Some(errno)) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
            (None, None) => Poll::Ready(Ok(())),
        }
    }

    /// Begins to send, or queues behind what is being sent, and returns the number to wait for.
    pub(super) fn begin(self: &Rc<Self>, parts: impl IntoIterator<Item = Payload>) -> u64 {
        let mut outbound = self.outbound.borrow_mut();
        outbound.begun += 1;
        if outbound.failed.is_none() {
            outbound
                .parts
                .extend(parts.into_iter().filter(|part| !part.is_empty()));
        }
        if outbound.in_flight.is_none() {
            self.send_on(&mut outbound);
        }
        outbound.begun
    }

    pub(super) fn poll_ended(&self, number: u64, waker: &Waker) -> Poll<io::Result<()>> {
        let mut outbound = self.outbound.borrow_mut();
        if outbound.ended >= number {
            return Poll::Ready(Ok(()));
        }
        if let Some(errno) = outbound.failed {
            return Poll::Ready(Err(io::Error::from_raw_os_error(errno)));
        }
        outbound.wait(waker)
    }

    /// Sends what is left of the parts; with nothing left, the send has ended.
    fn send_on(self: &Rc<Self>, outbound: &mut Outbound) {
        if outbound.parts.is_empty() {
            outbound.ended = outbound.begun;
            return;
        }
        let Some(fd) = self.raw_fd() else {
            outbound.fail(libc::ENOTCONN);
            return;
        };
        let single = outbound.parts.len() == 1;
        if !single {
            outbound.gather();
        }
        let Outbound {
            parts,
            offset,
            header,
            ..
        } = &*outbound;
        outbound.in_flight = self
            .core
            .start(Operation::Send(self.clone()), |driver, token| {
                // SAFETY: the parts, the vectors and the header lie in `self`, of which the operation holds a share until its completion;
                // nothing changes them while `in_flight` is set.
                unsafe {
                    if single {
                        driver.send(fd, &parts[0][*offset..], token);
                    } else {
                        driver.send_message(fd, header, token);
                    }
                }
            });
        if outbound.in_flight.is_none() {
            outbound.fail(libc::ECANCELED);
        }
    }

    /// The operation has completed; goes on with what it has left over.
    pub(super) fn sent(self: &Rc<Self>, result: i32) {
        let mut outbound = self.outbound.borrow_mut();
        outbound.in_flight = None;
        match result {
            1.. => {
                let bytes = result.unsigned_abs() as usize;
                Self::count(&self.sent_bytes, bytes);
                outbound.consume(bytes);
                self.send_on(&mut outbound);
            }
            0 => outbound.fail(libc::EPIPE),
            errno if matches!(-errno, libc::EINTR | libc::EAGAIN) => self.send_on(&mut outbound),
            errno => outbound.fail(-errno),
        }
        if outbound.in_flight.is_none() {
            outbound.wakers.drain(..).for_each(Waker::wake);
        }
    }

    // For somebody else who receives and sends for a while.

    /// Receives nothing any more, until resumed.
    pub(super) fn hold(&self) {
        let mut inbound = self.inbound.borrow_mut();
        inbound.stopped = true;
        inbound.cancel(&self.core);
    }

    /// Ready when what was received before being held is all here.
    pub(super) fn poll_held(&self, waker: &Waker) -> Poll<()> {
        let mut inbound = self.inbound.borrow_mut();
        if inbound.armed.is_some() {
            return inbound.wait(waker);
        }
        Poll::Ready(())
    }

    /// Receives again, when it is asked to.
    pub(super) fn resume(&self) {
        if self.fd.borrow().is_some() {
            self.inbound.borrow_mut().stopped = false;
        }
    }

    /// Ready when a system call in this direction has something to do, or to say; it may turn out to be too early all the same.
    pub(super) fn poll_ready(self: &Rc<Self>, direction: Direction, waker: &Waker) -> Poll<()> {
        let (mut inbound, mut outbound) = (self.inbound.borrow_mut(), self.outbound.borrow_mut());
        let (watch, events, operation) = match direction {
            Direction::In => (
                &mut inbound.watch,
                libc::POLLIN,
                Operation::Readable(self.clone()),
            ),
            Direction::Out => (
                &mut outbound.watch,
                libc::POLLOUT,
                Operation::Writable(self.clone()),
            ),
        };
        if std::mem::take(&mut watch.is_ready) {
            return Poll::Ready(());
        }
        if watch.in_flight.is_none() {
            let Some(fd) = self.raw_fd() else {
                return Poll::Ready(());
            };
            watch.in_flight = self
                .core
                .start(operation, |driver, token| driver.poll(fd, events, token));
        }
        match direction {
            Direction::In => inbound.wait(waker),
            Direction::Out => outbound.wait(waker),
        }
    }

    /// The watch of one direction has ended.
    pub(super) fn ready(&self, direction: Direction) {
        let ready = Watch {
            in_flight: None,
            is_ready: true,
        };
        match direction {
            Direction::In => {
                let mut inbound = self.inbound.borrow_mut();
                inbound.watch = ready;
                if let Some(waker) = inbound.waker.take() {
                    waker.wake();
                }
            }
            Direction::Out => {
                let mut outbound = self.outbound.borrow_mut();
                outbound.watch = ready;
                outbound.wakers.drain(..).for_each(Waker::wake);
            }
        }
    }

    // Ending.

    /// Ends all operations and closes the descriptor; whoever waits is told that the connection was aborted.
    pub(super) fn close(&self) {
        let Some(fd) = self.fd.borrow_mut().take() else {
            return;
        };
        let mut inbound = self.inbound.borrow_mut();
        inbound.stopped = true;
        inbound.cancel(&self.core);
        inbound.inbox.clear();
        inbound.end = Some(End::Failed(libc::ECONNABORTED));
        let mut outbound = self.outbound.borrow_mut();
        if let Some(token) = outbound.in_flight {
            self.core.cancel(token);
        }
        outbound.failed = Some(libc::ECONNABORTED);
        // A watch, too, keeps the connection open.
        for watch in [&inbound.watch, &outbound.watch] {
            watch.cancel(&self.core);
        }
        self.core.close_fd(fd);
        if let Some(waker) = inbound.waker.take() {
            waker.wake();
        }
        outbound.wakers.drain(..).for_each(Waker::wake);
    }

    /// Stops receiving; ready when no operation is in flight any more.
    pub(super) fn poll_quiet(&self, waker: &Waker) -> Poll<()> {
        let mut inbound = self.inbound.borrow_mut();
        inbound.stopped = true;
        inbound.cancel(&self.core);
        let idle = self.poll_idle(waker).is_ready();
        let mut outbound = self.outbound.borrow_mut();
        let watches = [&inbound.watch, &outbound.watch];
        watches.iter().for_each(|watch| watch.cancel(&self.core));
        let is_watched = watches.iter().any(|watch| watch.in_flight.is_some());
        if inbound.armed.is_some() || is_watched || !idle {
            let _: Poll<()> = outbound.wait(waker);
            return inbound.wait(waker);
        }
        Poll::Ready(())
    }

    /// What had arrived, and the descriptor, for somebody else to go on with.
    pub(super) fn give_up(&self) -> (Vec<Chunk>, Option<OwnedFd>) {
        let chunks = self.inbound.borrow_mut().inbox.drain(..).collect();
        let fd = self.fd.borrow_mut().take();
        if let Some(fd) = &fd {
            self.core.forget_fd(fd.as_raw_fd());
        }
        (chunks, fd)
    }
}

impl Watch {
    fn cancel(&self, core: &Core) {
        if let Some(token) = self.in_flight {
            core.cancel(token);
        }
    }
}

impl Inbound {
    fn has_input(&self) -> bool {
        !self.inbox.is_empty() || self.end.is_some()
    }

    fn cancel(&mut self, core: &Core) {
        if let (Some(token), false) = (self.armed, self.cancelled) {
            self.cancelled = true;
            core.cancel(token);
        }
    }

    /// The first end stands.
    fn finish(&mut self, end: End) {
        self.end.get_or_insert(end);
    }

    fn wait<T>(&mut self, waker: &Waker) -> Poll<T> {
        self.waker = Some(waker.clone());
        Poll::Pending
    }
}

impl Outbound {
    /// Points the header at what is left.
    fn gather(&mut self) {
        self.vectors.clear();
        let mut offset = self.offset;
        for part in self.parts.iter().take(VECTORS_MAX) {
            let rest = &part[offset..];
            offset = 0;
            self.vectors.push(libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
        }
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len();
    }

    /// Drops the parts of which everything is sent.
    fn consume(&mut self, bytes: usize) {
        self.offset += bytes;
        while let Some(part) = self.parts.front()
            && self.offset >= part.len()
        {
            self.offset -= part.len();
            self.parts.pop_front();
        }
    }

    fn fail(&mut self, errno: i32) {
        self.failed.get_or_insert(errno);
        self.parts.clear();
        self.offset = 0;
    }

    fn wait<T>(&mut self, waker: &Waker) -> Poll<T> {
        if !self.wakers.iter().any(|known| known.will_wake(waker)) {
            self.wakers.push(waker.clone());
        }
        Poll::Pending
    }
}
