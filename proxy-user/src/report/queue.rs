//! A bounded queue from workers to control, with a descriptor that is readable while there is something to take.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, sync_channel};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The end of whoever sends, which never waits.
#[derive(Debug)]
pub struct Sender<T> {
    queue: SyncSender<T>,
    bell: Arc<Bell>,
}

/// The other end.
#[derive(Debug)]
pub struct Receiver<T> {
    queue: mpsc::Receiver<T>,
    bell: Arc<Bell>,
    /// What is taken at a time at most.
    max: usize,
}

/// A queue in which `max` wait at most.
///
/// # Errors
/// No descriptor is left.
pub fn bounded<T>(max: usize) -> io::Result<(Sender<T>, Receiver<T>)> {
    let (sender, receiver) = sync_channel(max);
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = Arc::new(Bell {
        event: EventFd::from_value_and_flags(0, flags)?,
        rung: AtomicBool::new(false),
    });
    let sender = Sender {
        queue: sender,
        bell: Arc::clone(&bell),
    };
    let receiver = Receiver {
        queue: receiver,
        bell,
        max,
    };
    Ok((sender, receiver))
}

impl<T> Sender<T> {
    /// False: the queue is full, or nobody listens any more.
    #[must_use]
    pub fn send(&self, item: T) -> bool {
        let is_sent = self.queue.try_send(item).is_ok();
        if is_sent {
            self.bell.ring();
        }
        is_sent
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            bell: Arc::clone(&self.bell),
        }
    }
}

impl<T> Receiver<T> {
    /// What there is, as far as it goes at a time: a flood does not keep control here. What is left rings again.
    pub fn take(&self) -> Vec<T> {
        // In this order. Were the event read last, it would swallow a ring of this very moment, and the bell would count as
        // rung for ever. And a swap, not a store: it sees what was sent before a ring that found the bell rung already.
        let _ = self.bell.event.read();
        self.bell.rung.swap(false, Ordering::AcqRel);
        let taken: Vec<T> = self.queue.try_iter().take(self.max).collect();
        if taken.len() == self.max {
            self.bell.ring();
        }
        taken
    }
}

impl<T> AsFd for Receiver<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.event.as_fd()
    }
}

impl<T> AsRawFd for Receiver<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

#[derive(Debug)]
struct Bell {
    event: EventFd,
    /// Rung and not yet answered: rings in between need no system call.
    rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // Its counter is far from its end, so the write cannot fail.
            let _ = self.event.write(1);
        }
    }
}
