//! The operations of a [`Driver`](super::driver::Driver) on epoll, for hosts that forbid io_uring.
//!
//! What can be done at once is done at once, the rest as soon as its descriptor is ready; the completions are made of what the system
//! calls said. A descriptor is registered once and edge-triggered: epoll says when it has become ready, and from then on it is taken to
//! be so until a system call says otherwise. So a request costs no epoll_ctl(2), and a send does not wait for anybody.

mod attempt;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    rc::Rc,
    time::Duration,
};

use slab::Slab;

use super::{driver::Completion, pool::Pool};

/// Events that are taken in one system call.
const EVENTS: usize = 512;

/// No operation, no descriptor.
const NONE: u32 = u32::MAX;

/// An epoll, the descriptors that it watches, and the operations that wait for them.
pub(super) struct Epoll {
    epoll: OwnedFd,
    pool: Rc<Pool>,
    /// By the slot of their token.
    operations: Vec<Option<Pending>>,
    descriptors: Slab<Descriptor>,
    /// The key in `descriptors` of each descriptor.
    keys: Vec<u32>,
    /// Those that are ready already and have something to do.
    ready: VecDeque<usize>,
    /// What has ended since the last turn.
    done: Vec<Completion>,
    events: Vec<libc::epoll_event>,
    /// The kernel has to be asked for news in the next turn, whatever else there is.
    is_due: bool,
}

/// An operation that has not ended.
#[derive(Clone, Copy)]
struct Pending {
    token: u64,
    key: usize,
    act: Act,
}

/// Pointers are good until the operation's completion: whoever began it has promised that.
#[derive(Clone, Copy)]
enum Act {
    Accept,
    Recv,
    Ring,
    Send(*const u8, usize),
    SendMessage(*const libc::msghdr),
    Connect(*const libc::sockaddr, libc::socklen_t),
    /// A connect(2) that goes on in the kernel.
    Connecting,
    Readable,
    Writable,
}

/// What is known of a descriptor.
#[derive(Clone, Copy)]
struct Descriptor {
    fd: RawFd,
    /// The events that epoll shall tell of; 0 = it does not know the descriptor.
    interest: u32,
    is_readable: bool,
    is_writable: bool,
    /// Something is there to be read behind what one receive takes, however little that is: the end of the stream, an
    /// error, or what stands behind urgent data.
    reads_on: bool,
    /// It is in `ready`.
    is_queued: bool,
    /// Slots of the operations that wait: receive, send, and who waits to do either himself.
    waiting: [u32; 4],
}

impl Act {
    fn place(self) -> usize {
        match self {
            Self::Accept | Self::Recv | Self::Ring => 0,
            Self::Send(..) | Self::SendMessage(_) | Self::Connect(..) | Self::Connecting => 1,
            Self::Readable => 2,
            Self::Writable => 3,
        }
    }

    fn is_inward(self) -> bool {
        matches!(self.place(), 0 | 2)
    }

    /// The kernel delivers to these: they go on when it is their turn, and not when they are asked for.
    fn is_lasting(self) -> bool {
        matches!(self, Self::Accept | Self::Recv)
    }
}

impl Descriptor {
    /// It is tried to send to a new one; whether there is something to receive epoll will say.
    fn new(fd: RawFd) -> Self {
        Self {
            fd,
            interest: 0,
            is_readable: false,
            is_writable: true,
            reads_on: false,
            is_queued: false,
            waiting: [NONE; 4],
        }
    }

    fn is_ready_for(&self, act: Act) -> bool {
        if act.is_inward() {
            self.is_readable
        } else {
            self.is_writable
        }
    }
}

impl Epoll {
    pub(super) fn new(pool: Rc<Pool>) -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: the call above made this descriptor, and nobody else has it.
            epoll: unsafe { OwnedFd::from_raw_fd(epoll) },
            pool,
            operations: Vec::new(),
            descriptors: Slab::new(),
            keys: Vec::new(),
            ready: VecDeque::new(),
            done: Vec::new(),
            events: vec![libc::epoll_event { events: 0, u64: 0 }; EVENTS],
            is_due: false,
        })
    }

    pub(super) fn accept(&mut self, listener: RawFd, token: u64) {
        self.begin(listener, token, Act::Accept);
    }

    pub(super) fn recv(&mut self, socket: RawFd, token: u64) {
        self.begin(socket, token, Act::Recv);
    }

    /// # Safety
    /// As [`Driver::send`](super::driver::Driver::send).
    pub(super) unsafe fn send(&mut self, socket: RawFd, bytes: &[u8], token: u64) {
        self.begin(socket, token, Act::Send(bytes.as_ptr(), bytes.len()));
    }

    /// # Safety
    /// As [`Driver::send_message`](super::driver::Driver::send_message).
    pub(super) unsafe fn send_message(
        &mut self,
        socket: RawFd,
        message: *const libc::msghdr,
        token: u64,
    ) {
        self.begin(socket, token, Act::SendMessage(message));
    }

    pub(super) fn poll(&mut self, socket: RawFd, events: libc::c_short, token: u64) {
        let act = if events & libc::POLLIN != 0 {
            Act::Readable
        } else {
            Act::Writable
        };
        self.begin(socket, token, act);
    }

    /// # Safety
    /// As [`Driver::connect`](super::driver::Driver::connect).
    pub(super) unsafe fn connect(
        &mut self,
        socket: RawFd,
        address: *const libc::sockaddr,
        len: libc::socklen_t,
        token: u64,
    ) {
        self.begin(socket, token, Act::Connect(address, len));
    }

    /// Waits for an eventfd to be written to. It is never read: each write to it is an edge.
    pub(super) fn ring(&mut self, event: RawFd, token: u64) {
        self.begin(event, token, Act::Ring);
    }

    pub(super) fn cancel(&mut self, token: u64) {
        if let Some(pending) = self.pending(token as u32)
            && pending.token == token
        {
            self.descriptors[pending.key].waiting[pending.act.place()] = NONE;
            self.end(pending, -libc::ECANCELED);
        }
    }

    pub(super) fn cancel_all(&mut self) {
        let tokens: Vec<_> = self
            .operations
            .iter()
            .flatten()
            .map(|one| one.token)
            .collect();
        tokens.into_iter().for_each(|token| self.cancel(token));
    }

    pub(super) fn close(&mut self, fd: OwnedFd) {
        if let Some(key) = self.key(fd.as_raw_fd()) {
            for slot in self.descriptors[key].waiting {
                if let Some(pending) = self.pending(slot) {
                    self.cancel(pending.token);
                }
            }
        }
        self.forget(fd.as_raw_fd());
    }

    /// Whoever still waits for it keeps it known.
    pub(super) fn forget(&mut self, fd: RawFd) {
        let Some(key) = self.key(fd) else { return };
        let descriptor = self.descriptors[key];
        if descriptor.waiting != [NONE; 4] {
            return;
        }
        self.descriptors.remove(key);
        self.keys[fd as usize] = NONE;
        if descriptor.interest != 0 {
            // Closing it would do the same, if nobody else had the same socket open.
            let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
        }
    }

    /// Goes on with what is ready, waits for what is not, and takes the completions of both.
    pub(super) fn turn(
        &mut self,
        wait: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> io::Result<()> {
        for _ in 0..self.ready.len() {
            if let Some(key) = self.ready.pop_front()
                && let Some(descriptor) = self.descriptors.get_mut(key)
            {
                descriptor.is_queued = false;
                self.go_on(key);
            }
        }
        // Who has got what he asked for may go on before the kernel is asked for news, but not twice in a row.
        if self.done.is_empty() || self.is_due {
            self.is_due = false;
            self.take_events(wait)?;
        } else {
            self.is_due = true;
        }
        completions.append(&mut self.done);
        Ok(())
    }

    fn take_events(&mut self, wait: Option<Duration>) -> io::Result<()> {
        let wait_ms = if self.done.is_empty() && self.ready.is_empty() {
            // Rounded up: a timer fires after its deadline and never before it.
            wait.map_or(-1, |wait| {
                i32::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
            })
        } else {
            0
        };
        // SAFETY: there is room for so many events.
        let count = unsafe {
            libc::epoll_wait(
                self.epoll.as_raw_fd(),
                self.events.as_mut_ptr(),
                EVENTS as libc::c_int,
                wait_ms,
            )
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        }
        for index in 0..count.unsigned_abs() as usize {
            let libc::epoll_event { events, u64: key } = self.events[index];
            let has = |wanted: libc::c_int| events & wanted.unsigned_abs() != 0;
            let key = key as usize;
            let Some(descriptor) = self.descriptors.get_mut(key) else {
                continue;
            };
            let is_broken = has(libc::EPOLLERR | libc::EPOLLHUP);
            descriptor.reads_on |= is_broken || has(libc::EPOLLRDHUP | libc::EPOLLPRI);
            descriptor.is_readable |= is_broken || has(libc::EPOLLIN | libc::EPOLLRDHUP);
            descriptor.is_writable |= is_broken || has(libc::EPOLLOUT);
            self.go_on(key);
        }
        Ok(())
    }

    /// Notes an operation, and does it if that can be done at once.
    fn begin(&mut self, fd: RawFd, token: u64, act: Act) {
        let key = self.key(fd).unwrap_or_else(|| self.know(fd));
        let slot = token as u32;
        if self.operations.len() <= slot as usize {
            self.operations.resize(slot as usize + 1, None);
        }
        self.operations[slot as usize] = Some(Pending { token, key, act });
        let mut descriptor = self.descriptors[key];
        descriptor.waiting[act.place()] = slot;
        if descriptor.is_ready_for(act) {
            if act.is_lasting() {
                self.queue(&mut descriptor, key);
            } else {
                self.attempt(&mut descriptor, slot);
            }
        }
        if descriptor.waiting[act.place()] == slot
            && let Err(error) = self.watch(&mut descriptor, key, act.is_inward())
        {
            descriptor.waiting[act.place()] = NONE;
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.end(Pending { token, key, act }, -errno);
        }
        self.descriptors[key] = descriptor;
    }

    /// Does what waits for a descriptor and can go on.
    fn go_on(&mut self, key: usize) {
        let mut descriptor = self.descriptors[key];
        for slot in descriptor.waiting {
            if let Some(pending) = self.pending(slot)
                && descriptor.is_ready_for(pending.act)
            {
                self.attempt(&mut descriptor, slot);
            }
        }
        if descriptor.is_readable && descriptor.waiting[0] != NONE {
            self.queue(&mut descriptor, key);
        }
        self.descriptors[key] = descriptor;
    }

    /// The last word on an operation that waits no more.
    fn end(&mut self, pending: Pending, result: i32) {
        self.operations[pending.token as u32 as usize] = None;
        self.done.push(Completion {
            token: pending.token,
            result,
            buffer: None,
            more: false,
        });
    }

    fn pending(&self, slot: u32) -> Option<Pending> {
        *self.operations.get(slot as usize)?
    }

    fn key(&self, fd: RawFd) -> Option<usize> {
        let key = *self.keys.get(fd as usize)?;
        (key != NONE).then_some(key as usize)
    }

    fn know(&mut self, fd: RawFd) -> usize {
        let key = self.descriptors.insert(Descriptor::new(fd));
        if self.keys.len() <= fd as usize {
            self.keys.resize(fd as usize + 1, NONE);
        }
        self.keys[fd as usize] = key as u32;
        key
    }

    fn queue(&mut self, descriptor: &mut Descriptor, key: usize) {
        if !std::mem::replace(&mut descriptor.is_queued, true) {
            self.ready.push_back(key);
        }
    }

    /// Has epoll tell when a descriptor becomes ready, and also if it is so already.
    fn watch(&self, descriptor: &mut Descriptor, key: usize, is_inward: bool) -> io::Result<()> {
        let wanted = if is_inward {
            libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLPRI
        } else {
            libc::EPOLLOUT
        };
        let interest = descriptor.interest | (wanted | libc::EPOLLET).cast_unsigned();
        if interest != descriptor.interest {
            let operation = if descriptor.interest == 0 {
                libc::EPOLL_CTL_ADD
            } else {
                libc::EPOLL_CTL_MOD
            };
            self.control(operation, descriptor.fd, interest, key)?;
            descriptor.interest = interest;
        }
        Ok(())
    }

    fn control(&self, operation: i32, fd: RawFd, events: u32, key: usize) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events,
            u64: key as u64,
        };
        // SAFETY: the event is a local that the kernel reads.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
