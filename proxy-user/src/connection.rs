//! One client's connection: TLS, then exchanges, until either side closes; and the list of those that are open.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use slab::Slab;

use crate::drain::{Drain, Stop};
use crate::exchange::{self, Client, Gateway, Next, Opening, microseconds};
use crate::net::{self, Either, Instant, Stream};
use crate::tls::{HandshakeError, Transport};

/// How long the client may go on sending after our last byte. Closed at once, the kernel would answer what still comes with
/// a reset, which takes from the client what it has not read yet (RFC 9112 section 9.6).
const LINGER: Duration = Duration::from_secs(2);

/// How long somebody who has not been answered yet is heard although the connection is to stop: he was accepted a moment ago,
/// and has surely something to say.
const GREETING: Duration = Duration::from_secs(1);

/// An address that is listened on, as its connections know it.
#[derive(Debug)]
pub struct Place {
    pub address: SocketAddr,
    /// Index in the present `Config::listeners`; None once the configuration has it no more.
    pub listener: Cell<Option<usize>>,
    /// Asked to stop, it accepts nothing more, and its connections end with their exchange.
    pub drain: Drain,
}

/// The open connections of one worker.
#[derive(Default)]
pub struct Connections {
    entries: RefCell<Slab<Entry>>,
}

struct Entry {
    peer: IpAddr,
    place: Rc<Place>,
    drain: Rc<Drain>,
}

/// A connection that is in the list, from its accept to its end.
pub struct Open {
    connections: Rc<Connections>,
    key: usize,
    place: Rc<Place>,
    drain: Rc<Drain>,
    accepted: Instant,
}

impl Connections {
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks those to stop that fulfil a condition on peer and place, and says how many there are.
    pub fn stop(&self, stop: Stop, which: impl Fn(IpAddr, &Place) -> bool) -> usize {
        let entries = self.entries.borrow();
        let chosen = entries
            .iter()
            .filter(|(_, entry)| which(entry.peer, &entry.place));
        chosen.map(|(_, entry)| entry.drain.ask(stop)).count()
    }

    /// Ends those at once that have brought no whole request yet, and says how many there are.
    pub fn end_unbegun(&self) -> usize {
        let entries = self.entries.borrow();
        let unbegun = entries.iter().filter(|(_, entry)| !entry.drain.has_begun());
        unbegun.map(|(_, entry)| entry.drain.ask(Stop::Now)).count()
    }

    /// Notes a connection of this peer that was accepted at this place.
    pub fn enter(self: &Rc<Self>, peer: IpAddr, place: &Rc<Place>) -> Open {
        let drain = Rc::new(Drain::default());
        if place.drain.is(Stop::Soon) {
            drain.ask(Stop::Soon);
        }
        let entry = Entry {
            peer,
            place: Rc::clone(place),
            drain: Rc::clone(&drain),
        };
        Open {
            connections: Rc::clone(self),
            key: self.entries.borrow_mut().insert(entry),
            place: Rc::clone(place),
            drain,
            accepted: net::now(),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connections.entries.borrow_mut().remove(self.key);
    }
}

/// Bytes of the future that serves a connection: what it holds beside its buffers, and an idle one, too.
pub fn future_bytes() -> usize {
    fn bytes<F>(_: fn(&'static Gateway, &'static Open, Stream) -> F) -> usize {
        size_of::<F>()
    }
    bytes(serve)
}

/// Serves a connection from its first byte to its last.
pub async fn serve(gateway: &Gateway, open: &Open, stream: Stream) {
    let Open { place, drain, .. } = open;
    let begun = net::now();
    let mut opening = Opening {
        accept_us: microseconds(begun.since(open.accepted)),
        tls_us: None,
    };
    // Asked to stop now, whatever goes on is dropped, and its connections are closed.
    net::select(
        async {
            if let Some(transport) = shake_hands(gateway, place, stream).await {
                let is_tls = transport.tls().is_some();
                opening.tls_us = is_tls.then(|| microseconds(net::now().since(begun)));
                let mut client = Client::new(transport, place.address.port(), opening);
                converse(gateway, place, drain, &mut client).await;
            }
        },
        drain.asked(Stop::Now),
    )
    .await;
}

/// What the configuration says of this place: TLS or not.
async fn shake_hands(gateway: &Gateway, place: &Place, stream: Stream) -> Option<Transport> {
    let snapshot = gateway.snapshot();
    let Some(acceptor) = &snapshot.listeners.get(place.listener.get()?)?.acceptor else {
        return Some(stream.into());
    };
    let deadline = net::now() + snapshot.tunables.tls.handshake_timeout;
    let metrics = gateway.metrics();
    let accepted = net::boxed(|| acceptor.accept(stream));
    match net::timeout(deadline, accepted).await {
        Ok(Ok(stream)) => {
            metrics.handshakes.add(1);
            return Some(stream.into());
        }
        // Scanners and browsers that think better of it.
        Ok(Err(HandshakeError::Closed)) => {}
        Ok(Err(_)) | Err(net::Elapsed) => metrics.handshakes_failed.add(1),
    }
    None
}

/// One exchange after the other. Each has memory of its own, and only as long as it lasts: what waits for a request is small.
async fn converse(gateway: &Gateway, place: &Place, drain: &Drain, client: &mut Client) {
    let mut bytes = Bytes::default();
    loop {
        drain.note_begun(false);
        let next = match await_request(gateway, drain, client).await {
            Some(()) => match place.listener.get() {
                Some(listener) => {
                    net::boxed(|| exchange::serve(gateway, client, listener, drain)).await
                }
                None => Next::Close,
            },
            None => Next::Close,
        };
        bytes.count(gateway, place, client.wire.transport());
        match next {
            Next::Exchange => {}
            Next::Close => return close(gateway, client.wire.transport()).await,
            Next::Abort => return client.wire.transport().abort(),
        }
    }
}

/// Waits for the first byte of a request; None if it is not to be waited for any more.
async fn await_request(gateway: &Gateway, drain: &Drain, client: &mut Client) -> Option<()> {
    let is_new = client.is_new();
    let (mut reader, _) = client.wire.split();
    let deadline = net::now() + gateway.snapshot().tunables.http.idle_timeout;
    let request = net::timeout(deadline, reader.wait());
    let came = match net::select(request, drain.asked(Stop::Soon)).await {
        Either::Left(came) => came,
        Either::Right(()) if is_new => net::timeout(net::now() + GREETING, reader.wait()).await,
        Either::Right(()) => return None,
    };
    came.is_ok_and(|came| came).then_some(())
}

/// Says that nothing more comes, behind what is being sent, and waits for the client to agree.
async fn close(gateway: &Gateway, transport: &Transport) {
    let deadline = net::now() + gateway.snapshot().tunables.net.send_timeout;
    match net::timeout(deadline, transport.shutdown()).await {
        Ok(Ok(())) => {}
        // Closed in order, what it does not take would stay with the kernel for minutes.
        Ok(Err(_)) | Err(net::Elapsed) => return transport.abort(),
    }
    let deadline = net::now() + LINGER;
    let forget = async { while let Ok(Some(_)) = transport.tcp().recv().await {} };
    let _ = net::timeout(deadline, forget).await;
}

/// Of a connection's bytes, those that were counted.
#[derive(Default)]
struct Bytes {
    received: u64,
    sent: u64,
}

impl Bytes {
    fn count(&mut self, gateway: &Gateway, place: &Place, transport: &Transport) {
        let (received, sent) = (
            transport.tcp().received_bytes(),
            transport.tcp().sent_bytes(),
        );
        let snapshot = gateway.snapshot();
        let listener = place.listener.get();
        if let Some(listener) = listener.and_then(|index| snapshot.listeners.get(index)) {
            let shard = listener.metrics.of(gateway.worker());
            shard.received_bytes.add(received - self.received);
            shard.sent_bytes.add(sent - self.sent);
        }
        *self = Self { received, sent };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an idle connection costs: its task's state is as large as its largest moment, but for what it has on the heap.
    #[test]
    fn a_connection_is_small() {
        fn state_bytes<'c, F: Future>(_: fn(&'c Gateway, &'c Open, Stream) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = state_bytes(serve);
        assert!(
            bytes <= 2 << 10,
            "{bytes} bytes: is a future held twice, or one that is not there as long as nothing happens?"
        );
    }
}
