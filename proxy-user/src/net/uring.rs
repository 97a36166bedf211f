//! The operations of a [`Driver`](super::driver::Driver) on io_uring, whose completions are the kernel's own.

use std::{
    collections::VecDeque,
    io,
    mem::ManuallyDrop,
    os::fd::{IntoRawFd, OwnedFd, RawFd},
    time::Duration,
};

use io_uring::{
    EnterFlags, IoUring, Submitter, cqueue, opcode,
    squeue::{self, Flags},
    types::{CancelBuilder, Fd, SubmitArgs, Timespec},
};

use super::{driver::Completion, pool::Pool};

/// The one group of provided buffers.
const BUFFER_GROUP: u16 = 0;

/// The token of operations whose end interests nobody: closes and cancels.
const NOBODY: u64 = u64::MAX;

/// A uring with SINGLE_ISSUER, DEFER_TASKRUN and SUBMIT_ALL: it belongs to the thread that made it.
pub(super) struct Uring {
    /// Borrows `io`; it alone knows the registered descriptor, so it has to live as long.
    submitter: ManuallyDrop<Submitter<'static>>,
    /// From `Box::into_raw`.
    io: *mut IoUring,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    wait_flags: EnterFlags,
}

impl Uring {
    /// Makes the uring and registers the pool's buffers with it.
    pub(super) fn new(entries: u32, pool: &Pool) -> io::Result<Self> {
        let io = Box::into_raw(Box::new(build(entries)?));
        // SAFETY: `io` comes from a box that nothing else has; `drop` below ends the submitter before it frees the box.
        let mut submitter = unsafe { (*io).submitter() };
        // A registered descriptor spares each enter a look-up; the limit of registrations per thread may be reached, and then it goes without.
        let _ = submitter.register_ring_fd();
        let mut wait_flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        // SAFETY: as above; a shared look at the parameters, which never change.
        if unsafe { (*io).params().is_feature_no_iowait() } {
            // Else an idle worker would count as one that waits for a disk.
            wait_flags |= EnterFlags::NO_IOWAIT;
        }
        let uring = Self {
            submitter: ManuallyDrop::new(submitter),
            io,
            backlog: VecDeque::new(),
            wait_flags,
        };
        let (address, buffers) = pool.ring_address();
        // SAFETY: the ring's memory belongs to the pool, which the worker keeps until after this uring is closed and its operations are drained.
        unsafe {
            uring
                .submitter
                .register_buf_ring_with_flags(address, buffers, BUFFER_GROUP, 0)?;
        }
        Ok(uring)
    }

    /// Accepts connections on `listener` until cancelled or failed: one completion each, its result the descriptor.
    pub(super) fn accept(&mut self, listener: RawFd, token: u64) {
        self.push(
            opcode::AcceptMulti::new(Fd(listener))
                .flags(libc::SOCK_CLOEXEC)
                .build()
                .user_data(token),
        );
    }

    /// Receives into provided buffers until the end, a failure, or cancelled.
    pub(super) fn recv(&mut self, socket: RawFd, token: u64) {
        self.push(
            opcode::RecvMulti::new(Fd(socket), BUFFER_GROUP)
                .build()
                .user_data(token),
        );
    }

    /// Sends from one range of memory.
    ///
    /// # Safety
    /// The memory must stay as it is until the token's completion.
    pub(super) unsafe fn send(&mut self, socket: RawFd, bytes: &[u8], token: u64) {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.push(
            opcode::Send::new(Fd(socket), bytes.as_ptr(), len)
                .flags(libc::MSG_NOSIGNAL)
                .build()
                .user_data(token),
        );
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
        self.push(
            opcode::SendMsg::new(Fd(socket), message)
                .flags(libc::MSG_NOSIGNAL as u32)
                .build()
                .user_data(token),
        );
    }

    /// Waits until one of these events of poll(2), or an error or the end, is there.
    pub(super) fn poll(&mut self, socket: RawFd, events: libc::c_short, token: u64) {
        self.push(
            opcode::PollAdd::new(Fd(socket), u32::from(events.unsigned_abs()))
                .build()
                .user_data(token),
        );
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
        self.push(
            opcode::Connect::new(Fd(socket), address, len)
                .build()
                .user_data(token),
        );
    }

    /// Reads from an eventfd.
    ///
    /// # Safety
    /// `into` must stay valid until the token's completion.
    pub(super) unsafe fn read(&mut self, event: RawFd, into: *mut u64, token: u64) {
        self.push(
            opcode::Read::new(Fd(event), into.cast(), size_of::<u64>() as u32)
                .build()
                .user_data(token),
        );
    }

    /// Asks the operation with this token to end; its last completion still comes.
    pub(super) fn cancel(&mut self, token: u64) {
        self.push(
            opcode::AsyncCancel::new(token)
                .build()
                .flags(Flags::SKIP_SUCCESS)
                .user_data(NOBODY),
        );
    }

    /// Asks every operation to end.
    pub(super) fn cancel_all(&mut self) {
        self.push(
            opcode::AsyncCancel2::new(CancelBuilder::any().all())
                .build()
                .flags(Flags::SKIP_SUCCESS)
                .user_data(NOBODY),
        );
    }

    /// Closes a descriptor, after everything that was asked for before.
    pub(super) fn close(&mut self, fd: OwnedFd) {
        self.push(
            opcode::Close::new(Fd(fd.into_raw_fd()))
                .build()
                .flags(Flags::SKIP_SUCCESS)
                .user_data(NOBODY),
        );
    }

    /// Hands in what was asked for, waits for a completion at most `wait` (None: for ever), and takes all there are.
    ///
    /// One system call, unless more was asked for than the submission queue holds.
    pub(super) fn turn(
        &mut self,
        wait: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> io::Result<()> {
        while !self.backlog.is_empty() {
            tolerate(self.submitter.submit())?;
            let before = self.backlog.len();
            while let Some(entry) = self.backlog.pop_front() {
                if !self.try_push(&entry) {
                    self.backlog.push_front(entry);
                    break;
                }
            }
            if self.backlog.len() == before {
                break;
            }
        }
        let time = Timespec::from(wait.unwrap_or_default());
        let mut arguments = SubmitArgs::new();
        if wait.is_some() {
            arguments = arguments.timespec(&time);
        }
        let pending = self.submission().len() as u32;
        // SAFETY: the flags name the kind of argument that is given, and it and the time it points to outlive the call.
        tolerate(unsafe {
            self.submitter
                .enter(pending, 1, self.wait_flags.bits(), Some(&arguments))
        })?;
        // SAFETY: `io` is valid while self is; the only completion queue there is, and `self` is borrowed exclusively.
        let completed = unsafe { (*self.io).completion_shared() };
        completions.extend(
            completed
                .filter(|entry| entry.user_data() != NOBODY)
                .map(|entry| Completion {
                    token: entry.user_data(),
                    result: entry.result(),
                    buffer: cqueue::buffer_select(entry.flags()),
                    more: cqueue::more(entry.flags()),
                }),
        );
        Ok(())
    }

    /// Entries stay in order: one that finds the queue full waits, and all later ones behind it.
    fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: every entry is made by a method above, whose caller has promised for the memory it names; the other entries name none.
        unsafe { self.submission().push(entry).is_ok() }
    }

    fn submission(&mut self) -> squeue::SubmissionQueue<'_> {
        // SAFETY: `io` is valid while self is; `self` is borrowed exclusively, so there is no other submission queue.
        unsafe { (*self.io).submission_shared() }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let _ = self.submitter.unregister_ring_fd();
        // SAFETY: dropped once, here, and not used afterwards; it borrows from the box below.
        unsafe { ManuallyDrop::drop(&mut self.submitter) };
        // SAFETY: the pointer is from `Box::into_raw` in `new`, and nothing that borrows from it is left.
        drop(unsafe { Box::from_raw(self.io) });
    }
}

/// The flags of Linux 6.1, and the one of 6.6 where it is known.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all();
    match builder.clone().setup_no_sqarray().build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder.build(entries),
        built => built,
    }
}

/// What an enter may say without anything being wrong: time is up, a signal came, or completions have to be taken first.
fn tolerate(entered: io::Result<usize>) -> io::Result<()> {
    match entered {
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}
