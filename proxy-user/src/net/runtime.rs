//! The loop of one worker: run what is ready, hand in, wait, take completions, again.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    io,
    os::fd::{OwnedFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use super::{
    Backend, Settings,
    clock::Instant,
    driver::{Completion, Driver},
    operation::{Operation, Operations},
    pool::Pool,
    socket::{Direction, Socket},
    splice::Pipes,
    task::{Letterbox, MAIN, Name, Polled, Tasks},
    wheel::Wheel,
};

/// How long the end of a runtime waits for operations that were told to end, before it leaks their memory rather than free it.
const CLOSING_MAX: Duration = Duration::from_secs(5);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

/// Everything a worker's sockets, tasks and timers share. Each cell is borrowed for one step only, never while foreign code runs.
pub(super) struct Core {
    pub(super) settings: Settings,
    /// Under which wakers name this runtime.
    number: u16,
    /// No new operation is started any more.
    closing: Cell<bool>,
    /// None after the end.
    driver: RefCell<Option<Driver>>,
    operations: RefCell<Operations>,
    pub(super) pool: Rc<Pool>,
    pub(super) pipes: Pipes,
    tasks: Tasks,
    pub(super) timers: RefCell<Wheel<Waker>>,
    now: Cell<Instant>,
    turns: Cell<u64>,
    /// Connections keep little unread.
    lean: Cell<bool>,
    /// To be woken at the next turn.
    yielded: RefCell<Vec<Waker>>,
    /// Sockets whose receive ended because there was no buffer, in the order in which they shall go on.
    starved: RefCell<VecDeque<Rc<Socket>>>,
}

/// Makes this thread a worker: runs `main`, and all that it spawns, until `main` ends.
///
/// Then the tasks are dropped, every operation is cancelled and its last completion taken, and every descriptor is closed, in this order.
///
/// # Errors
/// When the back-end or its buffers cannot be made (for the uring, see [`super::choose`]), or the kernel refuses to go on.
///
/// # Panics
/// When `main` panics, after everything is closed; and when called inside another `run`.
pub fn run<F: Future>(settings: &Settings, main: F) -> io::Result<F::Output> {
    CURRENT.with_borrow(|current| {
        assert!(current.is_none(), "net::run inside net::run");
    });
    let letterbox = Letterbox::open()?;
    let core = Core::new(settings, letterbox.number())?;
    CURRENT.set(Some(core.clone()));
    let output = catch_unwind(AssertUnwindSafe(|| {
        let mut main = pin!(main);
        core.watch(letterbox);
        core.turn_until_ready(main.as_mut())
    }));
    core.close();
    CURRENT.set(None);
    output.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Starts a task on this worker. When it panics the hook of [`Settings`] is told, and the others go on.
///
/// # Panics
/// Outside of [`run`].
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    current().tasks.spawn(Box::pin(future));
}

/// The time at which this turn of the loop began; outside of [`run`], the clock itself.
pub fn now() -> Instant {
    CURRENT.with_borrow(|current| match current {
        Some(core) => core.now.get(),
        None => Instant::read(),
    })
}

/// Waits for the next turn of the loop: the other tasks run, and the kernel is asked for news.
///
/// # Panics
/// Outside of [`run`].
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(move |context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        let core = current();
        core.yielded.borrow_mut().push(context.waker().clone());
        Poll::Pending
    })
    .await;
}

/// How many turns this worker's loop has made, which is how many system calls it has waited in.
pub fn turns() -> u64 {
    CURRENT.with_borrow(|current| current.as_ref().map_or(0, |core| core.turns.get()))
}

/// Has the connections of this worker keep little unread from now on, or as much as the settings say: what comes on top
/// waits in the kernel, or with its sender.
///
/// # Panics
/// Outside of [`run`].
pub fn keep_lean(lean: bool) {
    current().lean.set(lean);
}

/// Gives the memory of receive buffers that are not in use back to the system.
///
/// # Panics
/// Outside of [`run`].
pub fn trim() {
    current().pool.trim();
}

/// The runtime of this thread.
///
/// # Panics
/// Outside of [`run`]: a mistake in the program, which no input can cause.
pub(super) fn current() -> Rc<Core> {
    #[expect(
        clippy::expect_used,
        reason = "documented panic for a mistake in the program"
    )]
    CURRENT
        .with_borrow(Clone::clone)
        .expect("sockets, tasks and timers exist only inside net::run")
}

/// Wakes a task if it lives on this thread; else false.
pub(super) fn wake_here(name: Name) -> bool {
    CURRENT
        .try_with(|current| match &*current.borrow() {
            Some(core) if core.number == name.runtime => {
                core.tasks.wake(name);
                true
            }
            _ => false,
        })
        .unwrap_or(false)
}

impl Core {
    fn new(settings: &Settings, number: u16) -> io::Result<Rc<Self>> {
        let (buffers, buffer_bytes) = (settings.buffers, settings.buffer_bytes);
        let pool = Rc::new(match settings.backend {
            Backend::Uring => Pool::with_ring(buffers, buffer_bytes)?,
            Backend::Epoll => Pool::without_ring(buffers, buffer_bytes)?,
        });
        let driver = Driver::new(settings, &pool)?;
        let now = Instant::read();
        Ok(Rc::new(Self {
            settings: settings.clone(),
            number,
            closing: Cell::new(false),
            driver: RefCell::new(Some(driver)),
            operations: RefCell::default(),
            pool,
            pipes: Pipes::default(),
            tasks: Tasks::new(number),
            timers: RefCell::new(Wheel::new(now)),
            now: Cell::new(now),
            turns: Cell::new(0),
            lean: Cell::new(false),
            yielded: RefCell::default(),
            starved: RefCell::default(),
        }))
    }

    /// Notes an operation and asks the driver for it; None at and after the end.
    pub(super) fn start(
        &self,
        operation: Operation,
        ask: impl FnOnce(&mut Driver, u64),
    ) -> Option<u64> {
        if self.closing.get() {
            return None;
        }
        let mut driver = self.driver.borrow_mut();
        let driver = driver.as_mut()?;
        let token = self.operations.borrow_mut().insert(operation);
        ask(driver, token);
        Some(token)
    }

    pub(super) fn now(&self) -> Instant {
        self.now.get()
    }

    /// With so many buffers unread, a connection stops receiving.
    pub(super) fn inbox_high_buffers(&self) -> usize {
        let settings = &self.settings;
        if self.lean.get() {
            settings
                .inbox_high_buffers
                .min(settings.inbox_low_buffers + 1)
        } else {
            settings.inbox_high_buffers
        }
    }

    pub(super) fn cancel(&self, token: u64) {
        if let Some(driver) = self.driver.borrow_mut().as_mut() {
            driver.cancel(token);
        }
    }

    /// Closes a descriptor after the operations that were asked for before; at once after the end.
    pub(super) fn close_fd(&self, fd: OwnedFd) {
        if let Some(driver) = self.driver.borrow_mut().as_mut() {
            driver.close(fd);
        }
    }

    /// Whether listening sockets have to be non-blocking.
    pub(super) fn is_nonblocking(&self) -> bool {
        let driver = self.driver.borrow();
        driver.as_ref().is_some_and(Driver::is_nonblocking)
    }

    /// Somebody else closes this descriptor, or has it from now on. No operation on it is under way.
    pub(super) fn forget_fd(&self, fd: RawFd) {
        if let Some(driver) = self.driver.borrow_mut().as_mut() {
            driver.forget(fd);
        }
    }

    /// The socket is to receive again as soon as there are buffers.
    pub(super) fn starve(&self, socket: Rc<Socket>) {
        self.pool.ran_dry();
        self.starved.borrow_mut().push_back(socket);
    }

    fn turn_until_ready<F: Future>(&self, mut main: Pin<&mut F>) -> io::Result<F::Output> {
        let mut completions = Vec::new();
        let mut due = Vec::new();
        loop {
            if let Poll::Ready(output) = self.run_ready(&mut main) {
                return Ok(output);
            }
            self.feed();
            let wait = self.wait();
            self.exchange_with_kernel(wait, &mut completions)?;
            self.now.set(Instant::read());
            self.timers.borrow_mut().expire(self.now.get(), &mut due);
            due.append(&mut self.yielded.borrow_mut());
            due.drain(..).for_each(Waker::wake);
            for completion in completions.drain(..) {
                self.complete(completion);
            }
        }
    }

    /// Polls what is ready, each at most once in a while: a task that wakes itself cannot keep the others from the network.
    fn run_ready<F: Future>(&self, main: &mut Pin<&mut F>) -> Poll<F::Output> {
        for _ in 0..self.settings.polls_per_turn {
            let Some((slot, waker)) = self.tasks.next() else {
                break;
            };
            if slot == MAIN {
                if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                    return Poll::Ready(output);
                }
            } else if let Polled::Panicked(panic) = self.tasks.poll(slot, &waker) {
                (self.settings.task_panicked)(&*panic);
            }
        }
        Poll::Pending
    }

    /// Gives recycled buffers to the kernel, and then the starved sockets another chance: as many as there are buffers.
    fn feed(&self) {
        self.pool.commit();
        for _ in 0..self.pool.available() {
            let Some(socket) = self.starved.borrow_mut().pop_front() else {
                break;
            };
            socket.feed();
        }
    }

    fn wait(&self) -> Option<Duration> {
        if self.tasks.has_ready() || !self.yielded.borrow().is_empty() {
            return Some(Duration::ZERO);
        }
        let deadline = self.timers.borrow().next()?;
        Some(deadline.since(self.now.get()))
    }

    fn exchange_with_kernel(
        &self,
        wait: Option<Duration>,
        completions: &mut Vec<Completion>,
    ) -> io::Result<()> {
        self.turns.set(self.turns.get() + 1);
        match self.driver.borrow_mut().as_mut() {
            Some(driver) => driver.turn(wait, completions),
            None => Ok(()),
        }
    }

    fn complete(&self, completion: Completion) {
        let operation = self
            .operations
            .borrow_mut()
            .complete(completion.token, completion.more);
        let chunk = completion.buffer.map(|buffer| {
            let len = usize::try_from(completion.result).unwrap_or(0);
            self.pool.received(buffer, len)
        });
        match operation {
            Some(Operation::Recv(socket)) => socket.received(completion, chunk),
            Some(Operation::Send(socket)) => socket.sent(completion.result),
            Some(Operation::Readable(socket)) => socket.ready(Direction::In),
            Some(Operation::Writable(socket)) => socket.ready(Direction::Out),
            Some(Operation::Accept(listener)) => listener.accepted(completion),
            Some(Operation::Connect(connecting)) => connecting.connected(completion.result),
            Some(Operation::Ring(bell)) => bell.rung(completion.result),
            None => {}
        }
    }

    /// A task of the runtime's own that hands wakes from other threads to the tasks they are for.
    fn watch(self: &Rc<Self>, letterbox: Letterbox) {
        let core = Rc::downgrade(self);
        let receiver = letterbox.doorbell().receiver();
        self.tasks.spawn(Box::pin(async move {
            while receiver.wait().await.is_ok()
                && let Some(core) = core.upgrade()
            {
                letterbox.empty().for_each(|name| core.tasks.wake(name));
            }
        }));
    }

    /// Ends everything in order: tasks, operations, descriptors, the driver.
    fn close(&self) {
        self.closing.set(true);
        if let Some(panic) = self.tasks.clear() {
            (self.settings.task_panicked)(&*panic);
        }
        self.starved.take();
        let deadline = Instant::read() + CLOSING_MAX;
        let mut completions = Vec::new();
        let mut is_quiet = true;
        loop {
            let idle = self.operations.borrow().is_empty();
            // Once, and again where nothing came of it: each looks at every operation there is, and a turn brings the ends of
            // some twenty of them.
            if let (false, true, Some(driver)) = (idle, is_quiet, self.driver.borrow_mut().as_mut())
            {
                driver.cancel_all();
            }
            // One turn is made in any case, for the descriptors that are still to be closed.
            let wait = if idle {
                Duration::ZERO
            } else {
                Duration::from_millis(100)
            };
            let turned = self.exchange_with_kernel(Some(wait), &mut completions);
            is_quiet = completions.is_empty();
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            if idle {
                break;
            }
            if turned.is_err() || Instant::read() > deadline {
                // The kernel may still write into this memory, so nobody else may ever have it.
                std::mem::forget((self.operations.take(), self.pool.clone()));
                break;
            }
        }
        self.driver.take();
    }
}
