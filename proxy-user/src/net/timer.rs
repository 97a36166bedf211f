//! Deadlines: sleeping until one, and doing something before one.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
};

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
    Sleep {
        core: runtime::current(),
        deadline,
        key: None,
    }
    .await;
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
pub async fn timeout<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    let mut sleep = Sleep {
        core: runtime::current(),
        deadline,
        key: None,
    };
    poll_fn(move |context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => Pin::new(&mut sleep).poll(context).map(|()| Err(Elapsed)),
    })
    .await
}

struct Sleep {
    core: Rc<Core>,
    deadline: Instant,
    key: Option<Key>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.deadline {
            return Poll::Ready(());
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
