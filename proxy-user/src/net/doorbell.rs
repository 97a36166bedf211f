//! Waking a worker from another thread: an eventfd that one side rings and a task on the other side waits for.

use std::{
    cell::{RefCell, UnsafeCell},
    future::poll_fn,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Poll, Waker},
};

use super::{
    operation::Operation,
    runtime::{self, Core},
};

/// The button: cloned and rung from any thread. Leave the message first, then ring.
#[derive(Clone, Debug)]
pub struct Doorbell {
    wire: Arc<Wire>,
}

#[derive(Debug)]
struct Wire {
    event: OwnedFd,
    /// Rung and not yet answered: rings in between need no system call.
    rung: AtomicBool,
}

impl Doorbell {
    /// A new doorbell.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let event = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if event < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above made this descriptor, and nobody else has it.
        let event = unsafe { OwnedFd::from_raw_fd(event) };
        Ok(Self {
            wire: Arc::new(Wire {
                event,
                rung: AtomicBool::new(false),
            }),
        })
    }

    /// Makes the receiver's `wait` return, now or when it is next called; many rings may count as one.
    pub fn ring(&self) {
        if !self.wire.rung.swap(true, Ordering::AcqRel) {
            let one = 1_u64;
            // SAFETY: eight bytes of a local are read. The write cannot fail: the descriptor is open, and the counter is far from its end.
            unsafe { libc::write(self.wire.event.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// The end that listens; call it on the worker, and have one at a time.
    ///
    /// # Panics
    /// Outside of [`super::run`].
    pub fn receiver(&self) -> DoorbellReceiver {
        DoorbellReceiver {
            bell: Rc::new(Bell {
                core: runtime::current(),
                wire: self.wire.clone(),
                counter: UnsafeCell::new(0),
                state: RefCell::default(),
            }),
        }
    }
}

/// A doorbell and its receiver on this worker.
///
/// # Errors
/// When there is no descriptor left.
///
/// # Panics
/// Outside of [`super::run`].
pub fn doorbell() -> io::Result<(Doorbell, DoorbellReceiver)> {
    let doorbell = Doorbell::new()?;
    let receiver = doorbell.receiver();
    Ok((doorbell, receiver))
}

/// The end of a doorbell that listens.
pub struct DoorbellReceiver {
    bell: Rc<Bell>,
}

impl DoorbellReceiver {
    /// Waits for a ring. Afterwards look for messages, all of them: rings come together.
    ///
    /// # Errors
    /// When the worker is closing.
    pub async fn wait(&self) -> io::Result<()> {
        poll_fn(|context| self.bell.poll(context.waker())).await
    }
}

impl Drop for DoorbellReceiver {
    fn drop(&mut self) {
        let token = self.bell.state.borrow_mut().reading;
        if let Some(token) = token {
            self.bell.core.cancel(token);
        }
    }
}

/// The state of a receiver, shared with its read in flight.
pub(super) struct Bell {
    core: Rc<Core>,
    wire: Arc<Wire>,
    /// The kernel writes the eventfd's counter here; nobody reads it.
    counter: UnsafeCell<u64>,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    reading: Option<u64>,
    rung: bool,
    waker: Option<Waker>,
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.core.forget_fd(self.wire.event.as_raw_fd());
    }
}

impl Bell {
    fn poll(self: &Rc<Self>, waker: &Waker) -> Poll<io::Result<()>> {
        let mut state = self.state.borrow_mut();
        if std::mem::take(&mut state.rung) {
            // From here on a ring makes a system call again; who left a message before is seen by our caller.
            self.wire.rung.swap(false, Ordering::AcqRel);
            return Poll::Ready(Ok(()));
        }
        if state.reading.is_none() {
            let event = self.wire.event.as_raw_fd();
            state.reading = self
                .core
                .start(Operation::Ring(self.clone()), |driver, token| {
                    // SAFETY: the operation holds a share of `self`, and with it the counter, until its completion.
                    unsafe { driver.read(event, self.counter.get(), token) };
                });
            if state.reading.is_none() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        state.waker = Some(waker.clone());
        Poll::Pending
    }

    /// The read has completed.
    pub(super) fn rung(&self, result: i32) {
        let mut state = self.state.borrow_mut();
        state.reading = None;
        state.rung |= result > 0;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}
