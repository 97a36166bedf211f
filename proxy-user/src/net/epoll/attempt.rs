//! The system calls of operations whose descriptors are ready: each is tried, and says what came of it, or that it was too early.

use std::{io, os::fd::RawFd, ptr};

use super::{Act, Descriptor, Epoll, NONE, Pending};
use crate::net::driver::Completion;

/// Buffers that are filled from one socket in one turn; then the others have theirs.
const RECEIVES_PER_TURN: usize = 4;

/// Connections that are accepted from one socket in one turn.
const ACCEPTS_PER_TURN: usize = 32;

const SEND_FLAGS: libc::c_int = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;

impl Epoll {
    /// Makes the system call of an operation whose descriptor is ready, as far as is known.
    pub(super) fn attempt(&mut self, descriptor: &mut Descriptor, slot: u32) {
        let Some(pending) = self.pending(slot) else {
            return;
        };
        let fd = descriptor.fd;
        let said = match pending.act {
            Act::Accept => self.accept_some(descriptor, pending.token),
            Act::Recv => self.receive_some(descriptor, pending.token),
            Act::Ring => {
                descriptor.is_readable = false;
                Some(size_of::<u64>() as i32)
            }
            Act::Send(start, len) => {
                // SAFETY: the memory is there until the completion, as was promised to `send`.
                let sent = unsafe { libc::send(fd, start.cast(), len, SEND_FLAGS) };
                sent_of(descriptor, answer(sent), len)
            }
            Act::SendMessage(message) => {
                // SAFETY: header, vectors and memory are there until the completion, as was promised to `send_message`.
                let (sent, len) =
                    unsafe { (libc::sendmsg(fd, message, SEND_FLAGS), len_of(message)) };
                sent_of(descriptor, answer(sent), len)
            }
            Act::Connect(address, len) => {
                self.operations[slot as usize] = Some(Pending {
                    act: Act::Connecting,
                    ..pending
                });
                descriptor.is_writable = false;
                // SAFETY: the address is there until the completion, as was promised to `connect`.
                match unsafe { connect(fd, address, len) } {
                    errno if errno == -libc::EINPROGRESS => None,
                    connected => {
                        descriptor.is_writable = true;
                        Some(connected)
                    }
                }
            }
            Act::Connecting => Some(-error_of(fd)),
            Act::Readable | Act::Writable => {
                let is_ready = is_ready_now(fd, pending.act.is_inward());
                if pending.act.is_inward() {
                    descriptor.is_readable = is_ready;
                } else {
                    descriptor.is_writable = is_ready;
                }
                is_ready.then_some(0)
            }
        };
        if let Some(result) = said {
            descriptor.waiting[pending.act.place()] = NONE;
            self.end(pending, result);
        }
    }

    /// Receives what is there, up to a turn's share; Some when no more will come.
    fn receive_some(&mut self, descriptor: &mut Descriptor, token: u64) -> Option<i32> {
        let buffer_bytes = self.pool.buffer_bytes();
        for _ in 0..RECEIVES_PER_TURN {
            let Some((buffer, start)) = self.pool.take() else {
                return Some(-libc::ENOBUFS);
            };
            // SAFETY: the buffer is ours until it is given away or back, and has so many bytes.
            let received = answer(unsafe {
                libc::recv(
                    descriptor.fd,
                    start.as_ptr().cast(),
                    buffer_bytes,
                    libc::MSG_DONTWAIT,
                )
            });
            if received <= 0 {
                self.pool.give_back(buffer);
            }
            match received {
                1.. => {
                    self.done.push(Completion {
                        token,
                        result: received,
                        buffer: Some(buffer),
                        more: true,
                    });
                    // epoll(7): a stream that gave less than there was room for is drained, unless something is behind it.
                    if (received.unsigned_abs() as usize) < buffer_bytes && !descriptor.reads_on {
                        descriptor.is_readable = false;
                        return None;
                    }
                }
                0 => return Some(0),
                errno if errno == -libc::EAGAIN => {
                    descriptor.is_readable = false;
                    return None;
                }
                errno if errno == -libc::EINTR => {}
                errno => return Some(errno),
            }
        }
        None
    }

    /// Accepts those who wait, up to a turn's share; Some when it cannot go on.
    fn accept_some(&mut self, descriptor: &mut Descriptor, token: u64) -> Option<i32> {
        for _ in 0..ACCEPTS_PER_TURN {
            // SAFETY: no memory is passed.
            let accepted = unsafe {
                libc::accept4(
                    descriptor.fd,
                    ptr::null_mut(),
                    ptr::null_mut(),
                    libc::SOCK_CLOEXEC,
                )
            };
            match answer(accepted as isize) {
                fd @ 0.. => self.done.push(Completion {
                    token,
                    result: fd,
                    buffer: None,
                    more: true,
                }),
                errno if errno == -libc::EAGAIN => {
                    descriptor.is_readable = false;
                    return None;
                }
                errno if is_of_one_connection(-errno) => {}
                errno => return Some(errno),
            }
        }
        None
    }
}

/// What a system call returned, or a negative errno.
fn answer(returned: isize) -> i32 {
    if returned < 0 {
        return -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
    }
    i32::try_from(returned).unwrap_or(i32::MAX)
}

/// What a send came to; None if the socket takes nothing at present. One that took a part takes no more for a while.
fn sent_of(descriptor: &mut Descriptor, sent: i32, len: usize) -> Option<i32> {
    if sent == -libc::EAGAIN {
        descriptor.is_writable = false;
        return None;
    }
    descriptor.is_writable =
        usize::try_from(sent).is_ok_and(|sent| sent >= len.min(i32::MAX as usize));
    Some(sent)
}

/// How many bytes a message has.
///
/// # Safety
/// The header and its vectors are there.
unsafe fn len_of(message: *const libc::msghdr) -> usize {
    // SAFETY: the caller's promise.
    let vectors = unsafe { std::slice::from_raw_parts((*message).msg_iov, (*message).msg_iovlen) };
    vectors.iter().map(|vector| vector.iov_len).sum()
}

/// Begins to connect: 0, or a negative errno.
///
/// # Safety
/// The address is there.
unsafe fn connect(fd: RawFd, address: *const libc::sockaddr, len: libc::socklen_t) -> i32 {
    let mut on: libc::c_int = 1;
    // SAFETY: an int is read; the address is there.
    unsafe {
        libc::ioctl(fd, libc::FIONBIO, &raw mut on);
        answer(libc::connect(fd, address, len) as isize)
    }
}

/// The error that a socket has to tell of, 0 for none.
fn error_of(fd: RawFd) -> i32 {
    let mut errno: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int to a place for one.
    let asked = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut errno).cast(),
            &raw mut len,
        )
    };
    if asked < 0 { -answer(-1) } else { errno }
}

/// Whether a system call in this direction has something to do, or to say.
fn is_ready_now(fd: RawFd, is_inward: bool) -> bool {
    let mut asked = libc::pollfd {
        fd,
        events: if is_inward {
            libc::POLLIN
        } else {
            libc::POLLOUT
        },
        revents: 0,
    };
    // SAFETY: one entry is there to be read and written.
    unsafe { libc::poll(&raw mut asked, 1, 0) != 0 }
}

/// What accept(2) says of a connection that ended while it waited, or of the network it came by; the next one is as good as any.
fn is_of_one_connection(errno: i32) -> bool {
    matches!(
        errno,
        libc::EINTR
            | libc::ECONNABORTED
            | libc::EPROTO
            | libc::ENETDOWN
            | libc::ENOPROTOOPT
            | libc::EHOSTDOWN
            | libc::ENONET
            | libc::EHOSTUNREACH
            | libc::EOPNOTSUPP
            | libc::ENETUNREACH
    )
}
