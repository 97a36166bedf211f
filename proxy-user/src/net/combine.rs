//! Futures inside of a task: the first of two, one that may panic, one that is not waited for, one with memory of its own.
//!
//! They are structs and not `async fn`s, whose state would hold each future twice: as argument, and pinned. An idle
//! connection is as large as the largest state of its task.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;

/// What [`select`] ended with.
#[derive(Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first future was ready.
    Left(A),
    /// The second future was ready, and the first was not.
    Right(B),
}

/// Runs both futures until one ends; the other one is dropped. The first is asked first and wins a tie.
///
/// A future that was made before and pinned outside (`pin!`) can be given as `&mut` and goes on afterwards.
pub fn select<A: Future, B: Future>(left: A, right: B) -> Select<A, B> {
    Select { left, right }
}

/// Runs a future to its end, or to a panic in it, which ends the future and not the task.
///
/// # Errors
/// What it panicked with. What it had borrowed may be left half changed.
pub fn caught<F: Future>(future: F) -> Caught<F> {
    Caught { future }
}

/// Makes a future where it shall lie on the heap. `Box::pin` would make it elsewhere and copy all of its bytes, most of which say
/// nothing yet.
pub fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::into_pin(Box::write(Box::new_uninit(), make()))
}

/// Asks a future once, and drops it: its output if that is there at once. The task is woken later all the same.
pub fn at_once<F: Future>(future: F) -> AtOnce<F> {
    AtOnce { future }
}

pin_project! {
    /// See [`select`].
    #[must_use = "futures do nothing unless awaited"]
    pub struct Select<A, B> {
        #[pin]
        left: A,
        #[pin]
        right: B,
    }
}

impl<A: Future, B: Future> Future for Select<A, B> {
    type Output = Either<A::Output, B::Output>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(output) = this.left.poll(context) {
            return Poll::Ready(Either::Left(output));
        }
        this.right.poll(context).map(Either::Right)
    }
}

pin_project! {
    /// See [`caught`].
    #[must_use = "futures do nothing unless awaited"]
    pub struct Caught<F> {
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for Caught<F> {
    type Output = Result<F::Output, Box<dyn Any + Send>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.project().future;
        match catch_unwind(AssertUnwindSafe(|| future.poll(context))) {
            Ok(polled) => polled.map(Ok),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    }
}

pin_project! {
    /// See [`at_once`].
    #[must_use = "futures do nothing unless awaited"]
    pub struct AtOnce<F> {
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for AtOnce<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().future.poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => Poll::Ready(None),
        }
    }
}

/// Runs both futures to their ends and returns both results.
#[cfg(test)]
pub async fn join<A: Future, B: Future>(left: A, right: B) -> (A::Output, B::Output) {
    let (mut left, mut right) = (Box::pin(left), Box::pin(right));
    match select(&mut left, &mut right).await {
        Either::Left(output) => (output, right.await),
        Either::Right(output) => {
            let left = left.await;
            (left, output)
        }
    }
}
