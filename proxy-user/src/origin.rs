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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Registry;
    use crate::net::{self, Settings};
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    /// Connections to one endpoint, which is a plain listening socket.
    struct Endpoint {
        listener: TcpListener,
        metrics: Arc<metric::Endpoint>,
    }

    impl Endpoint {
        fn new() -> Self {
            Self {
                listener: TcpListener::bind("127.0.0.1:0").unwrap(),
                metrics: Registry::new(1).endpoint("app", "one"),
            }
        }

        /// A connection that has received something, and the endpoint's end of it.
        async fn connect(&self) -> (OriginConnection, TcpStream) {
            let stream = net::connect(self.address()).await.unwrap();
            let (mut accepted, _) = self.listener.accept().unwrap();
            accepted.write_all(b"x").unwrap();
            assert_eq!(stream.recv().await.unwrap().as_deref(), Some(&b"x"[..]));
            let connection = OriginConnection::new(stream, 0, Arc::clone(&self.metrics));
            (connection, accepted)
        }

        fn address(&self) -> SocketAddr {
            self.listener.local_addr().unwrap()
        }

        fn active(&self) -> i64 {
            self.metrics.of(0).active.value()
        }
    }

    fn on_worker(test: impl Future<Output = ()>) {
        net::run(&Settings::default(), test).unwrap();
    }

    fn local(connection: &OriginConnection) -> SocketAddr {
        connection.wire.transport().local()
    }

    #[test]
    fn the_connection_used_last_is_used_first_and_no_more_than_allowed_wait() {
        on_worker(async {
            let (endpoint, pool) = (Endpoint::new(), Pool::default());
            let mut ends = Vec::new();
            let mut addresses = Vec::new();
            for _ in 0..3 {
                let (connection, end) = endpoint.connect().await;
                addresses.push(local(&connection));
                ends.push(end);
                pool.release(connection, 2, net::now());
            }
            assert_eq!(endpoint.active(), 2, "the third is closed");
            let connections = [(); 3].map(|()| pool.acquire(endpoint.address()));
            let acquired: Vec<SocketAddr> = connections.iter().flatten().map(local).collect();
            assert_eq!(acquired, [addresses[1], addresses[0]]);
            drop(connections);
            assert_eq!(endpoint.active(), 0);
            assert_eq!(endpoint.metrics.of(0).received_bytes.value(), 3);
            assert!(
                pool.acquire(SocketAddr::from(([127, 0, 0, 1], 1)))
                    .is_none()
            );
        });
    }

    #[test]
    fn a_connection_that_ended_or_said_something_while_it_waited_is_not_used() {
        on_worker(async {
            let (endpoint, pool) = (Endpoint::new(), Pool::default());
            let (ended, end) = endpoint.connect().await;
            let (talking, mut talker) = endpoint.connect().await;
            let (quiet, _quiet_end) = endpoint.connect().await;
            let quiet_address = local(&quiet);
            for connection in [quiet, ended, talking] {
                pool.release(connection, 9, net::now());
            }
            drop(end);
            talker.write_all(b"unasked").unwrap();
            net::sleep_until(net::now() + Duration::from_millis(50)).await;
            let acquired = pool.acquire(endpoint.address()).expect("the quiet one");
            assert_eq!((local(&acquired), endpoint.active()), (quiet_address, 1));
        });
    }

    #[test]
    fn what_waits_too_long_is_swept_out() {
        on_worker(async {
            let (endpoint, pool) = (Endpoint::new(), Pool::default());
            let (old, _old_end) = endpoint.connect().await;
            let (fresh, _fresh_end) = endpoint.connect().await;
            let (ended, end) = endpoint.connect().await;
            pool.release(old, 9, Instant::from_ns(1));
            pool.release(fresh, 9, Instant::from_ns(3));
            pool.release(ended, 9, Instant::from_ns(3));
            drop(end);
            net::sleep_until(net::now() + Duration::from_millis(50)).await;
            pool.sweep(Instant::from_ns(2));
            assert_eq!(endpoint.active(), 1);
            pool.sweep(Instant::from_ns(4));
            assert!(endpoint.active() == 0 && pool.idle.borrow().is_empty());
        });
    }
}
