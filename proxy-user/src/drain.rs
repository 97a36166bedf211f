//! An orderly stop: who wants it, and how somebody who waits learns of it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// How soon something is to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Not at all.
    #[default]
    Never,
    /// When what was begun has ended.
    Soon,
    /// At once.
    Now,
}

/// A stop that one task asks for and others of the same worker watch. It can become more urgent, and is never taken back.
#[derive(Debug, Default)]
pub struct Drain {
    stop: Cell<Stop>,
    /// Something was begun that [`Stop::Soon`] lets end.
    begun: Cell<bool>,
    watchers: RefCell<Vec<Waker>>,
}

impl Drain {
    /// Asks for a stop, unless a more urgent one was asked for.
    pub fn ask(&self, stop: Stop) {
        if stop > self.stop.get() {
            self.stop.set(stop);
            self.watchers.take().into_iter().for_each(Waker::wake);
        }
    }

    /// A stop at least as urgent was asked for.
    pub fn is(&self, stop: Stop) -> bool {
        self.stop.get() >= stop
    }

    /// Notes that something was begun, or has ended.
    pub fn note_begun(&self, begun: bool) {
        self.begun.set(begun);
    }

    /// Something was begun.
    pub fn has_begun(&self) -> bool {
        self.begun.get()
    }

    /// Waits until a stop at least as urgent is asked for.
    pub async fn asked(&self, stop: Stop) {
        poll_fn(|context| {
            if self.is(stop) {
                return Poll::Ready(());
            }
            let mut watchers = self.watchers.borrow_mut();
            if !watchers
                .iter()
                .any(|known| known.will_wake(context.waker()))
            {
                watchers.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::task::{Context, Wake};

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn a_watcher_is_woken_once_and_an_urgent_stop_is_not_taken_back() {
        let (drain, woken) = (Drain::default(), Arc::new(Woken::default()));
        let waker = Waker::from(Arc::clone(&woken));
        let context = &mut Context::from_waker(&waker);
        let (mut soon, mut now) = (pin!(drain.asked(Stop::Soon)), pin!(drain.asked(Stop::Now)));
        for _ in 0..3 {
            assert!(soon.as_mut().poll(context).is_pending());
            assert!(now.as_mut().poll(context).is_pending());
        }
        drain.ask(Stop::Soon);
        assert_eq!(woken.0.load(Relaxed), 1);
        assert!(soon.as_mut().poll(context).is_ready());
        assert!(now.as_mut().poll(context).is_pending());
        drain.ask(Stop::Now);
        drain.ask(Stop::Soon);
        assert!(now.as_mut().poll(context).is_ready() && drain.is(Stop::Now));
    }
}
