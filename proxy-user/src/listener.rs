//! Accepts connections on one socket and starts them.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::connection::{self, Connections, Place};
use crate::drain::{Drain, Stop};
use crate::exchange::Gateway;
use crate::net::{self, Either, Stream};
use crate::offload::{self, Denied};

/// How long accepting rests when it cannot go on: no descriptor is left, enough connections are open, or a worker is overloaded.
const REST: Duration = Duration::from_millis(20);

/// What accepts on one worker.
pub struct Accepting {
    pub gateway: Rc<Gateway>,
    pub connections: Rc<Connections>,
    pub denied: Arc<Denied>,
    /// Sockets that are accepted from.
    sockets: Cell<usize>,
}

/// One socket that is accepted from.
pub struct Listening {
    pub place: Rc<Place>,
}

impl Listening {
    /// Accepts from this socket, which listens already, until it is stopped.
    ///
    /// # Errors
    /// When it is no listening TCP socket.
    pub fn start(accepting: &Rc<Accepting>, fd: OwnedFd, listener: usize) -> io::Result<Self> {
        let socket = net::Listener::from_fd(fd)?;
        let place = Rc::new(Place {
            address: socket.local(),
            listener: Some(listener).into(),
            drain: Drain::default(),
        });
        accepting.sockets.update(|sockets| sockets + 1);
        net::spawn(Rc::clone(accepting).accept(socket, Rc::clone(&place)));
        Ok(Self { place })
    }

    /// Accepts no more. Who was accepted already is served, and told that his connection ends with his exchange.
    pub fn stop(&self) {
        self.place.drain.ask(Stop::Soon);
    }
}

impl Accepting {
    pub fn new(gateway: Gateway, denied: Arc<Denied>) -> Self {
        Self {
            gateway: Rc::new(gateway),
            connections: Rc::default(),
            denied,
            sockets: Cell::new(0),
        }
    }

    /// Nothing is accepted any more, and whoever was is gone.
    pub fn is_over(&self) -> bool {
        self.sockets.get() == 0 && self.connections.is_empty()
    }

    async fn accept(self: Rc<Self>, socket: net::Listener, place: Rc<Place>) {
        while let Either::Left(step) =
            net::select(self.step(&socket, &place), place.drain.asked(Stop::Soon)).await
        {
            if step.is_err() {
                net::sleep_until(net::now() + REST).await;
            }
        }
        // Whoever was accepted is served; whoever waits in the kernel is the keeper's to give to somebody else.
        let (waiting, _) = socket.quiesce().await;
        for stream in waiting {
            self.start(&place, stream);
        }
        self.sockets.update(|sockets| sockets - 1);
    }

    /// Accepts one connection, if there is room for it.
    async fn step(self: &Rc<Self>, socket: &net::Listener, place: &Rc<Place>) -> io::Result<()> {
        let open_max = self.gateway.snapshot().tunables.net.connections_max as usize;
        if self.connections.len() >= open_max {
            socket.pause();
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let rest = self.gateway.overload().rest();
        let stream = match net::select(rest.asked(Stop::Soon), socket.accept()).await {
            Either::Right(stream) => stream?,
            Either::Left(()) => {
                socket.pause();
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
        };
        self.start(place, stream);
        Ok(())
    }

    fn start(self: &Rc<Self>, place: &Rc<Place>, stream: Stream) {
        if self.denied.denies(stream.peer().ip(), offload::now_ns()) {
            self.gateway.metrics().connections_banned.add(1);
            return stream.abort();
        }
        let open = self
            .connections
            .enter(stream.peer().ip().to_canonical(), place);
        let (this, place) = (Rc::clone(self), Rc::clone(place));
        net::spawn(async move {
            let metrics = listener_metrics(&this.gateway, &place);
            let shard = metrics
                .as_ref()
                .map(|metrics| metrics.of(this.gateway.worker()));
            let _active = shard.map(|shard| {
                shard.accepted.add(1);
                shard.active.add(1);
                Active(shard)
            });
            connection::serve(&this.gateway, &open, stream).await;
        });
    }
}

/// The counters of the listener at this place, held as long as a connection is open.
fn listener_metrics(gateway: &Gateway, place: &Place) -> Option<Arc<crate::metric::Listener>> {
    let snapshot = gateway.snapshot();
    let listener = snapshot.listeners.get(place.listener.get()?)?;
    Some(Arc::clone(&listener.metrics))
}

/// A connection that is counted as open; also when its task panics.
struct Active<'m>(&'m crate::metric::ListenerShard);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.active.add(-1);
    }
}
