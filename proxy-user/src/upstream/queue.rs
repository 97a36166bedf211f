//! Who waits for room at an upstream: one line for all workers, first come, first served.
//!
//! Nobody takes a lock as long as there is room: whoever leaves looks at a number, and only where that says that somebody
//! waits, the line is locked for a moment. A turn is leave to look for room, not room itself. As long as anybody waits,
//! newcomers line up, so that nobody overtakes; and each turn ends with room taken, passed on, or given up.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// The line, shared by workers and generations.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: AtomicU32,
    line: Mutex<Line>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Line {
    waiters: VecDeque<Waiter>,
    next: u64,
    /// Room was left when all who waited were looking already: one of them may have looked too early.
    missed: bool,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    has_turn: bool,
    waker: Option<Waker>,
}

/// What happened to those who came; any thread counts, for waiting is rare.
#[derive(Debug, Default)]
struct Counts {
    queued: AtomicU64,
    full: AtomicU64,
    late: AtomicU64,
    waited_us: AtomicU64,
}

/// What is told of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueFacts {
    /// Requests that wait now.
    pub pending: u32,
    /// Requests that had to wait.
    pub queued: u64,
    /// Requests that were refused because too many waited.
    pub full: u64,
    /// Requests that waited in vain.
    pub late: u64,
    /// What all waited together, in microseconds.
    pub waited_us: u64,
}

impl Queue {
    /// Nobody waits; one load.
    pub fn is_empty(&self) -> bool {
        self.waiting.load(SeqCst) == 0
    }

    /// A place at the end of the line; `None` if so many wait already. Where nobody has a turn the newcomer has one: what
    /// was left before it came was left to nobody.
    pub fn join(&self, pending_max: u32) -> Option<Place<'_>> {
        let mut line = self.locked();
        if line.waiters.len() >= pending_max as usize {
            self.counts.full.fetch_add(1, Relaxed);
            return None;
        }
        let number = line.next;
        line.next += 1;
        let has_turn = line.missed || !line.waiters.iter().any(|waiter| waiter.has_turn);
        line.missed = false;
        line.waiters.push_back(Waiter {
            number,
            has_turn,
            waker: None,
        });
        self.waiting.store(line.waiters.len() as u32, SeqCst);
        self.counts.queued.fetch_add(1, Relaxed);
        Some(Place {
            queue: self,
            number,
        })
    }

    /// Room was left: the first who has no turn yet gets one.
    pub fn call_next(&self) {
        self.locked().call_first();
    }

    /// Room may have come in another way (an endpoint is back, a limit was raised): the first may look, if nobody looks now.
    pub fn nudge(&self) {
        let mut line = self.locked();
        if !line.waiters.iter().any(|waiter| waiter.has_turn) {
            line.call_first();
        }
    }

    pub fn facts(&self) -> QueueFacts {
        QueueFacts {
            pending: self.waiting.load(Relaxed),
            queued: self.counts.queued.load(Relaxed),
            full: self.counts.full.load(Relaxed),
            late: self.counts.late.load(Relaxed),
            waited_us: self.counts.waited_us.load(Relaxed),
        }
    }

    /// A poisoned lock still guards a whole line: nothing in here panics half way.
    fn locked(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn find(&self, number: u64) -> Option<usize> {
        self.waiters
            .binary_search_by_key(&number, |waiter| waiter.number)
            .ok()
    }

    /// Gives a turn to the first without one.
    fn call_first(&mut self) {
        self.missed = !self.call_from(0) && !self.waiters.is_empty();
    }

    /// Gives a turn to the first without one from this number on; whether there is one.
    fn call_from(&mut self, number: u64) -> bool {
        let mut waiters = self.waiters.iter_mut();
        let Some(waiter) = waiters.find(|waiter| !waiter.has_turn && waiter.number >= number)
        else {
            return false;
        };
        waiter.has_turn = true;
        if let Some(waker) = waiter.waker.take() {
            waker.wake();
        }
        true
    }
}

/// A place in the line; dropped, it is left, and the one behind may look whether there is room for it, too.
#[derive(Debug)]
pub struct Place<'q> {
    queue: &'q Queue,
    number: u64,
}

impl Place<'_> {
    /// Waits until it is this one's turn.
    pub async fn turn(&self) {
        poll_fn(|context| {
            let mut line = self.queue.locked();
            let waiter = line.find(self.number).map(|at| &mut line.waiters[at]);
            match waiter {
                Some(waiter) if !waiter.has_turn => {
                    waiter.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
    }

    /// There was no room for it: it waits on. What it wants may be its own, and then `others` may look.
    pub fn wait_on(&self, others: bool) {
        let mut line = self.queue.locked();
        if std::mem::take(&mut line.missed) {
            return;
        }
        if let Some(at) = line.find(self.number) {
            line.waiters[at].has_turn = false;
        }
        if others {
            line.call_from(self.number + 1);
        }
    }

    /// It has waited so long, and found room.
    pub fn served(self, waited_us: u64) {
        self.queue.counts.waited_us.fetch_add(waited_us, Relaxed);
    }

    /// It has waited in vain.
    pub fn give_up(self) {
        self.queue.counts.late.fetch_add(1, Relaxed);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut line = self.queue.locked();
        let left = line
            .find(self.number)
            .and_then(|at| line.waiters.remove(at));
        self.queue.waiting.store(line.waiters.len() as u32, SeqCst);
        if left.is_some_and(|waiter| waiter.has_turn) {
            line.call_first();
        }
    }
}
