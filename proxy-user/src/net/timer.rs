//! Deadlines: sleeping until one, and doing something before one.

use std::{
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

use super::{
    clock::Instant,
    runtime::{self, Core},
    wheel::Key,
};

/// A deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the deadline has passed")
    }
}

impl std::error::Error for Elapsed {}

/// Waits until the deadline has passed: never less, and about a millisecond more.
///
/// # Panics
/// Outside of [`super::run`].
pub async fn sleep_until(deadline: Instant) {
    Sleep::new(deadline).await;
}

/// Runs the future, or as much of it as the deadline allows; then it is dropped.
///
/// A future that is ready at once costs no timer, and is ready even after the deadline.
///
/// # Errors
/// [`Elapsed`] if the deadline came first.
///
/// # Panics
/// Outside of [`super::run`].
pub fn timeout<F: Future>(deadline: Instant, future: F) -> Timeout<F> {
    Timeout {
        future,
        sleep: Sleep::new(deadline),
    }
}

pin_project! {
    /// See [`timeout`]. A struct and no `async fn` for the reason that stands in `combine`.
    #[must_use = "futures do nothing unless awaited"]
    pub struct Timeout<F> {
        #[pin]
        future: F,
        sleep: Sleep,
    }
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.future.poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(this.sleep).poll(context).map(|()| Err(Elapsed))
    }
}

struct Sleep {
    core: Rc<Core>,
    deadline: Instant,
    key: Option<Key>,
}

impl Sleep {
    fn new(deadline: Instant) -> Self {
        Self {
            core: runtime::current(),
            deadline,
            key: None,
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.deadline {
            return Poll::Ready(());
        }
        if self.deadline == Instant::NEVER {
            return Poll::Pending;
        }
        let core = self.core.clone();
        let mut timers = core.timers.borrow_mut();
        let waker = context.waker();
        if !self
            .key
            .is_some_and(|key| timers.replace(key, waker.clone()))
        {
            self.key = Some(timers.insert(self.deadline, waker.clone()));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.core.timers.borrow_mut().remove(key);
        }
    }
}
