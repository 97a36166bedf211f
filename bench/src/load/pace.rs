//! When requests are sent: as soon as the last answer has come, or at fixed moments, whether it has come or not.

use std::cell::Cell;
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use sluice::net::{self, Instant};

use super::tally::Tally;

/// How fast a round goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Each connection sends its next request when it has its answer.
    Saturated,
    /// So many requests a second in all, at moments that are fixed beforehand. A late answer makes the next request late and not absent:
    /// its latency counts from the moment at which it should have been sent, so nothing slow is left out.
    PerSecond(u32),
}

/// The moments of a paced round: request `k` belongs to connection `k` modulo their number.
pub struct Schedule {
    start: Instant,
    interval: Duration,
    slots: Rc<[Slot]>,
}

/// What one connection has to send by now.
#[derive(Default)]
struct Slot {
    due: Cell<u64>,
    stopped: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// The moments of one connection, in order.
pub struct Turns {
    slots: Rc<[Slot]>,
    number: usize,
    next: Instant,
    step: Duration,
}

impl Schedule {
    /// Begins now, and goes on until the tally says stop.
    pub fn start(per_second: u32, connections: usize, tally: &Rc<Tally>) -> Self {
        let schedule = Self {
            start: Instant::read(),
            interval: Duration::from_secs(1) / per_second,
            slots: (0..connections).map(|_| Slot::default()).collect(),
        };
        let (start, interval) = (schedule.start, schedule.interval);
        let (slots, tally) = (schedule.slots.clone(), tally.clone());
        // The loop's timers are a millisecond coarse, so this one looks at the clock at each turn: the core is ours.
        net::spawn(async move {
            let (mut next, mut number) = (start, 0);
            while !tally.is_stopping() {
                let now = Instant::read();
                while next <= now {
                    slots[number].raise();
                    next = next + interval;
                    number = (number + 1) % slots.len();
                }
                net::yield_now().await;
            }
        });
        schedule
    }

    /// The moments of a connection.
    pub fn turns(&self, number: usize) -> Turns {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Turns {
            slots: self.slots.clone(),
            number,
            next: self.start + self.interval * count(number),
            step: self.interval * count(self.slots.len()),
        }
    }

    /// What is due and not yet sent stays unsent.
    pub fn stop(&self) {
        for slot in &*self.slots {
            slot.stopped.set(true);
            slot.wake();
        }
    }
}

impl Turns {
    /// Waits for the next moment and gives it; None when the round is over.
    pub async fn next(&mut self) -> Option<Instant> {
        let slot = &self.slots[self.number];
        poll_fn(|context| {
            if slot.stopped.get() {
                return Poll::Ready(None);
            }
            if let Some(left) = slot.due.get().checked_sub(1) {
                slot.due.set(left);
                return Poll::Ready(Some(()));
            }
            *slot.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await?;
        let moment = self.next;
        self.next = moment + self.step;
        Some(moment)
    }
}

impl Slot {
    fn raise(&self) {
        self.due.set(self.due.get() + 1);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_falls_behind_is_told_the_moments_it_missed() {
        let moments = net::run(&net::Settings::default(), async {
            let tally = Rc::new(Tally::new());
            let schedule = Schedule::start(1000, 2, &tally);
            let mut turns = schedule.turns(1);
            net::sleep_until(Instant::read() + Duration::from_millis(20)).await;
            let mut moments = Vec::new();
            for _ in 0..3 {
                moments.extend(turns.next().await);
            }
            schedule.stop();
            tally.stop();
            assert_eq!(turns.next().await, None, "stopped");
            moments
                .iter()
                .map(|moment| moment.since(schedule.start).as_millis())
                .collect::<Vec<_>>()
        })
        .unwrap();
        assert_eq!(moments, [1, 3, 5]);
    }
}
