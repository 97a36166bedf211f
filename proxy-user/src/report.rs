//! What a worker tells control: small facts on a bounded queue; what does not fit is dropped and counted.

pub mod queue;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::metric;

/// Reports of all workers that wait for control.
pub const QUEUE_MAX: usize = 16_384;

/// One fact.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// A request of `source` was refused by a policy that bans those who go on.
    Offence {
        source: IpAddr,
        /// Generation of the snapshot that `policy` counts in.
        generation: u64,
        /// Index into `Config::policies`; its rule says after how many offences the source is banned.
        policy: usize,
    },
    /// A request of `source` was let through as this consumer; `consumer` is any number that two consumers do not share.
    /// Workers may leave most of them out: three different ones in ten minutes are what matters.
    Identity { source: IpAddr, consumer: u64 },
    /// A connection to an endpoint failed, or broke before a response.
    EndpointFailed { address: SocketAddr },
}

/// A worker's end of the queue. Sending never waits.
#[derive(Clone, Debug)]
pub struct Sender {
    queue: queue::Sender<Report>,
    metrics: Arc<metric::Worker>,
}

impl Sender {
    /// Sends one report, or counts it as dropped when the queue is full or nobody listens any more.
    pub fn send(&self, report: Report) {
        if !self.queue.send(report) {
            self.metrics.reports_dropped.add(1);
        }
    }
}

/// Where senders come from.
#[derive(Debug)]
pub struct Queue(queue::Sender<Report>);

/// Control's end of the queue.
pub type Reports = queue::Receiver<Report>;

impl Queue {
    /// A queue, and the end that control reads.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<(Self, Reports)> {
        let (sender, reports) = queue::bounded(QUEUE_MAX)?;
        Ok((Self(sender), reports))
    }

    /// The end of one worker; what it drops is counted in its `metrics`.
    pub fn sender(&self, metrics: Arc<metric::Worker>) -> Sender {
        Sender {
            queue: self.0.clone(),
            metrics,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_does_not_fit_is_counted_and_nobody_waits() -> io::Result<()> {
        let metrics = Arc::new(metric::Worker::default());
        let (queue, reports) = Queue::new()?;
        let sender = queue.sender(Arc::clone(&metrics));
        let source = IpAddr::from([192, 0, 2, 1]);
        for consumer in 0..QUEUE_MAX as u64 + 3 {
            sender.send(Report::Identity { source, consumer });
        }
        assert_eq!(metrics.reports_dropped.value(), 3);
        assert_eq!(reports.take().len(), QUEUE_MAX);
        drop(reports);
        sender.send(Report::Identity {
            source,
            consumer: 0,
        });
        assert_eq!(metrics.reports_dropped.value(), 4);
        Ok(())
    }

    #[test]
    fn no_report_waits_for_the_next_one_however_sending_and_taking_meet() -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        const COUNT: u16 = 60_000;
        let (queue, reports) = Queue::new()?;
        let metrics = Arc::new(metric::Worker::default());
        let sender = queue.sender(Arc::clone(&metrics));
        let sending = std::thread::spawn(move || {
            for port in 0..COUNT {
                let address = SocketAddr::from(([192, 0, 2, 1], port));
                sender.send(Report::EndpointFailed { address });
                // Now and then the other side catches up, and goes to sleep.
                if port % 7 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let mut taken = 0;
        while taken + metrics.reports_dropped.value() < u64::from(COUNT) {
            let mut polled = [PollFd::new(reports.as_fd(), PollFlags::POLLIN)];
            let woken = poll(&mut polled, PollTimeout::from(5_000u16))?;
            assert!(woken > 0, "asleep, and {taken} of {COUNT} taken");
            taken += reports.take().len() as u64;
        }
        assert!(sending.join().is_ok());
        Ok(())
    }

    #[test]
    fn the_descriptor_is_readable_while_there_is_something_to_take() -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let (queue, reports) = Queue::new()?;
        let sender = queue.sender(Arc::default());
        let is_readable = || {
            let mut polled = [PollFd::new(reports.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0)
        };
        for _ in 0..2 {
            assert!(!is_readable());
            for port in 0..3 {
                let address = SocketAddr::from(([192, 0, 2, 1], port));
                sender.send(Report::EndpointFailed { address });
            }
            assert!(is_readable());
            assert_eq!(reports.take().len(), 3);
        }
        Ok(())
    }
}
