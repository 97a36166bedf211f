//! Connections to endpoints, in use or waiting for their next call: one pool per worker, the last one used first.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::codec::h1::Wire;
use crate::metric;
use crate::net::{Instant, Stream};

/// A connection to an endpoint; counted from its beginning to its end.
pub struct OriginConnection {
    pub wire: Wire,
    address: SocketAddr,
    worker: usize,
    metrics: Arc<metric::Endpoint>,
    /// Of the bytes received and sent, those counted already.
    counted: (u64, u64),
}

/// Idle connections of one worker, by address. Each has a receive in flight, so that its end, or bytes that nobody asked
/// for, are known before it is used again.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<HashMap<SocketAddr, Vec<Idle>>>,
}

struct Idle {
    connection: OriginConnection,
    since: Instant,
}

impl OriginConnection {
    /// Of worker `worker`, to the endpoint that `metrics` belongs to.
    pub fn new(stream: Stream, worker: usize, metrics: Arc<metric::Endpoint>) -> Self {
        metrics.of(worker).connects.add(1);
        metrics.of(worker).active.add(1);
        Self {
            address: stream.peer(),
            wire: Wire::new(stream),
            worker,
            metrics,
            counted: (0, 0),
        }
    }

    fn count_bytes(&mut self) {
        let (shard, tcp) = (self.metrics.of(self.worker), self.wire.transport().tcp());
        let (received, sent) = (tcp.received_bytes(), tcp.sent_bytes());
        shard.received_bytes.add(received - self.counted.0);
        shard.sent_bytes.add(sent - self.counted.1);
        self.counted = (received, sent);
    }
}

impl Drop for OriginConnection {
    fn drop(&mut self) {
        self.count_bytes();
        self.metrics.of(self.worker).active.add(-1);
    }
}

impl Pool {
    /// The connection that was given back last, if one is fit for a call.
    pub fn acquire(&self, address: SocketAddr) -> Option<OriginConnection> {
        let mut idle = self.idle.borrow_mut();
        let waiting = idle.get_mut(&address)?;
        while let Some(Idle { connection, .. }) = waiting.pop() {
            if connection.wire.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    /// Gives a connection back after a whole exchange; it is closed if `max` wait already or it is not quiet.
    pub fn release(&self, mut connection: OriginConnection, max: usize, now: Instant) {
        connection.count_bytes();
        let mut idle = self.idle.borrow_mut();
        let waiting = idle.entry(connection.address).or_default();
        if waiting.len() < max && connection.wire.is_quiet() {
            let since = now;
            waiting.push(Idle { connection, since });
        }
    }

    /// Closes what has waited since before `oldest`, and what the other side has closed.
    pub fn sweep(&self, oldest: Instant) {
        self.idle.borrow_mut().retain(|_, waiting| {
            waiting.retain(|idle| idle.since >= oldest && idle.connection.wire.is_quiet());
            !waiting.is_empty()
        });
    }
}
