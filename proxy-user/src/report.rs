//! What a worker tells control: small facts on a bounded queue; what does not fit is dropped and counted.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::metric;

/// Reports of all workers that wait for control. Control looks every few milliseconds.
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
    queue: SyncSender<Report>,
    metrics: Arc<metric::Worker>,
}

impl Sender {
    /// Sends one report, or counts it as dropped when the queue is full or nobody listens any more.
    pub fn send(&self, report: Report) {
        match self.queue.try_send(report) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.metrics.reports_dropped.add(1)
            }
        }
    }
}

/// Where senders come from.
#[derive(Debug)]
pub struct Queue(SyncSender<Report>);

impl Queue {
    /// A queue, and the end that control reads without waiting (`try_iter`).
    pub fn new() -> (Self, Receiver<Report>) {
        let (sender, receiver) = sync_channel(QUEUE_MAX);
        (Self(sender), receiver)
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

    #[test]
    fn what_does_not_fit_is_counted_and_nobody_waits() {
        let metrics = Arc::new(metric::Worker::default());
        let (queue, receiver) = Queue::new();
        let sender = queue.sender(Arc::clone(&metrics));
        let source = IpAddr::from([192, 0, 2, 1]);
        for consumer in 0..QUEUE_MAX as u64 + 3 {
            sender.send(Report::Identity { source, consumer });
        }
        assert_eq!(metrics.reports_dropped.value(), 3);
        assert_eq!(receiver.try_iter().count(), QUEUE_MAX);
        drop(receiver);
        sender.send(Report::Identity {
            source,
            consumer: 0,
        });
        assert_eq!(metrics.reports_dropped.value(), 4);
    }
}
