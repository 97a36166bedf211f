//! The way of one request and its response: read head, find route, run policies, act, stream the bodies, report.

mod gateway;
mod notes;
mod relay;
mod reply;

use std::net::IpAddr;

use crate::access_log::Span;
use crate::codec::h1::{Body, BodyDecoder, Wire};
use crate::config::{self, Action, Route};
use crate::drain::{Drain, Stop};
use crate::message::{Framing, Reply, RequestHead, ResponseHead};
use crate::metric;
use crate::net;
use crate::offload;
use crate::policy::{Facts, Step};
use crate::report::Report;
use crate::snapshot::Snapshot;
use crate::tls::Transport;

pub use gateway::Gateway;
use notes::{Logged, Notes};
pub use notes::{Opening, microseconds};

/// A client as its exchanges know it; the memory of its heads is used again for each.
pub struct Client {
    pub wire: Wire,
    origin: Origin,
    request: RequestHead,
    response: ResponseHead,
    /// Exchanges so far.
    exchanges: u32,
    opening: Opening,
}

/// Where requests come from.
struct Origin {
    address: IpAddr,
    /// The same, written once for all `X-Forwarded-For`.
    text: String,
    /// `http` or `https`.
    scheme: &'static str,
    /// The port that they come to.
    port: u16,
}

/// What becomes of a client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It lives on for another exchange.
    Exchange,
    /// It ends behind what was sent.
    Close,
    /// It is broken off: what was sent must not look whole.
    Abort,
}

/// One exchange under way; counted when it is dropped, however it ended.
struct Exchange<'e> {
    gateway: &'e Gateway,
    snapshot: &'e Snapshot,
    client: &'e Origin,
    listener: &'e config::Listener,
    /// Who asks: the peer, or who stands behind it where it is a hop that is trusted.
    source: IpAddr,
    is_through_hop: bool,
    out: &'e Transport,
    metrics: &'e metric::Route,
    /// The client lets its connection live on, and this is not the last exchange that it may have.
    keep_alive: bool,
    drain: &'e Drain,
    notes: &'e Notes,
}

/// A request for this path panics where its policies would run.
#[cfg(test)]
pub const PANICS_AT: &str = "/panics";

/// A request for these panics when its response is here, and when the head of it was sent.
#[cfg(test)]
pub const PANICS_WITH: &str = "/panics/with";
#[cfg(test)]
pub const PANICS_IN: &str = "/panics/in";

/// A request for this path keeps its worker busy for 100 ms.
#[cfg(test)]
pub const STALLS_AT: &str = "/stalls";

impl Client {
    /// Of a connection that was accepted at this port.
    pub fn new(transport: impl Into<Transport>, port: u16, opening: Opening) -> Self {
        let wire = Wire::new(transport);
        let address = wire.transport().peer().ip().to_canonical();
        let scheme = if wire.transport().tls().is_some() {
            "https"
        } else {
            "http"
        };
        Self {
            wire,
            origin: Origin {
                address,
                text: address.to_string(),
                scheme,
                port,
            },
            request: RequestHead::default(),
            response: ResponseHead::default(),
            exchanges: 0,
            opening,
        }
    }

    /// It has had no exchange yet.
    pub fn is_new(&self) -> bool {
        self.exchanges == 0
    }
}

/// Serves one request to a client of this listener (index in `Config::listeners`), of which the first byte has arrived.
///
/// `drain` is the connection's: when it is to stop soon, the client is told that this was the last exchange. A panic costs this
/// exchange and nothing else.
pub async fn serve(gateway: &Gateway, client: &mut Client, listener: usize, drain: &Drain) -> Next {
    let snapshot = gateway.snapshot();
    let notes = Notes::new(&snapshot);
    let logged = Logged {
        gateway,
        snapshot: &snapshot,
        client,
        listener,
        notes: &notes,
    };
    let place = (listener, drain);
    match net::caught(serve_one(gateway, &snapshot, logged.client, &notes, place)).await {
        Ok(next) => next,
        // The message was printed by the panic itself.
        Err(_) => excuse(gateway, &snapshot, logged.client, &notes, place).await,
    }
}

/// The story of one exchange.
async fn serve_one(
    gateway: &Gateway,
    snapshot: &Snapshot,
    client: &mut Client,
    notes: &Notes,
    (listener, drain): (usize, &Drain),
) -> Next {
    let (Some(at), Some(of_listener)) = (
        snapshot.listeners.get(listener),
        snapshot.config.listeners.get(listener),
    ) else {
        return Next::Close;
    };
    let Client {
        wire,
        request,
        response,
        ..
    } = client;
    let (mut reader, out) = wire.split();
    let mut exchange = Exchange {
        gateway,
        snapshot,
        client: &client.origin,
        listener: of_listener,
        source: client.origin.address,
        is_through_hop: false,
        out,
        metrics: &at.unrouted,
        keep_alive: false,
        drain,
        notes,
    };

    let deadline = notes.started() + snapshot.tunables.http.head_timeout;
    let limits = &snapshot.request_limits;
    let head = reader
        .head(deadline, |bytes| request.parse(bytes, limits))
        .await;
    if let Err(error) = head {
        request.forget();
        request.identify(false, || gateway.new_id());
        return exchange.refuse_head(error, request).await;
    }
    drain.note_begun(true);
    notes.is_asked.set(true);
    notes.end(Span::Head);
    client.exchanges = client.exchanges.saturating_add(1);
    let is_last = client.exchanges >= snapshot.tunables.http.exchanges_per_connection_max;
    exchange.keep_alive = request.keep_alive() && !is_last && !gateway.overload().closes();
    let mut body = reader.body(BodyDecoder::new(request.framing(), limits));

    if !exchange.recognise(request) {
        let looped = Reply::new(508, "loop");
        return exchange.reply(looped, request, &mut body).await;
    }
    if let Some(reason) = gateway.overload().refusal() {
        let reply = Reply::new(503, reason).field("retry-after", "1");
        return exchange.reply(reply, request, &mut body).await;
    }
    let Some(found) = snapshot
        .routes
        .find(listener, request.host(), request.path())
    else {
        return exchange
            .reply(Reply::new(404, "no_route"), request, &mut body)
            .await;
    };
    let index = found.index;
    let route = &snapshot.config.routes[index];
    exchange.metrics = &at.routes[index];
    notes.route.set(Some(index as u32));
    let admitted = exchange.admit(route, request);
    notes.end(Span::Route);
    if let Err(reply) = admitted {
        return exchange.reply(reply, request, &mut body).await;
    }
    match &route.action {
        Action::Upstream(choices) => {
            relay::relay(&exchange, index, choices, request, response, &mut body).await
        }
        Action::Respond {
            status,
            headers,
            body: content,
        } => {
            let fields = headers.iter().map(|(name, value)| (&**name, &**value));
            exchange
                .respond(*status, fields, content, request, &mut body)
                .await
        }
        Action::Redirect { status, location } => {
            let fields = [("location", &**location)].into_iter();
            exchange
                .respond(*status, fields, b"", request, &mut body)
                .await
        }
    }
}

/// Answers in place of an exchange that has panicked, if nothing was answered yet.
async fn excuse(
    gateway: &Gateway,
    snapshot: &Snapshot,
    client: &Client,
    notes: &Notes,
    (listener, drain): (usize, &Drain),
) -> Next {
    gateway.metrics().panics.add(1);
    let (Some(at), Some(of_listener)) = (
        snapshot.listeners.get(listener),
        snapshot.config.listeners.get(listener),
    ) else {
        return Next::Abort;
    };
    if notes.status.get() > 0 {
        notes.reason.set("panic");
        return Next::Abort;
    }
    let exchange = Exchange {
        gateway,
        snapshot,
        client: &client.origin,
        listener: of_listener,
        source: client.origin.address,
        is_through_hop: false,
        out: client.wire.transport(),
        metrics: &at.unrouted,
        keep_alive: false,
        drain,
        notes,
    };
    exchange
        .refuse(&Reply::new(500, "panic"), &client.request)
        .await
}

impl Exchange<'_> {
    /// The connection may live on, as far as the client and we are concerned. A drain may begin while the answer is awaited.
    fn keep_alive(&self) -> bool {
        self.keep_alive && !self.drain.is(Stop::Soon)
    }

    /// Finds out who asks, and gives the request its id. False for a request that has come through us before.
    fn recognise(&mut self, request: &mut RequestHead) -> bool {
        let trusted = self.listener.trusted.as_ref();
        let hop = trusted.filter(|trusted| trusted.contains(self.client.address));
        self.is_through_hop = hop.is_some();
        request.identify(self.is_through_hop, || self.gateway.new_id());
        if let Some(trusted) = hop {
            let client = request.believe(trusted.claim, |ip| trusted.contains(ip));
            self.source = client.unwrap_or(self.source);
        }
        let via = self.listener.via.as_ref();
        !via.is_some_and(|pseudonym| request.came_via(pseudonym))
    }

    /// Runs what stands between a route and its action: its policies, in their order, and the size that a body may have.
    fn admit(&self, route: &Route, request: &mut RequestHead) -> Result<(), Reply> {
        #[cfg(test)]
        match request.path() {
            PANICS_AT => panic!("a test asked for it"),
            STALLS_AT => std::thread::sleep(std::time::Duration::from_millis(100)),
            _ => {}
        }
        let (snapshot, source) = (self.snapshot, self.source);
        if matches!(request.framing(), Framing::Length(length) if length > snapshot.tunables.http.body_bytes_max as u64)
        {
            return Err(Reply::new(413, "body_too_large"));
        }
        // Nothing to ask, and so the clock is not read.
        if route.policies.is_empty() {
            return Ok(());
        }
        let mut facts = Facts {
            peer: source,
            now_ns: offload::now_ns(),
            consumer: None,
        };
        for policy in &route.policies {
            let step =
                snapshot
                    .policies
                    .request(*policy, request, &mut facts, self.gateway.cells());
            let Step::Refuse(refusal) = step else {
                continue;
            };
            // Behind a hop there may be many, and its address is no client's.
            if refusal.offence.is_some() && !self.is_through_hop {
                let generation = snapshot.generation;
                self.gateway.report(Report::Offence {
                    source,
                    generation,
                    policy: *policy,
                });
            }
            return Err(refusal.reply);
        }
        if let Some(consumer) = facts.consumer {
            request.set_consumer(consumer);
            if !self.is_through_hop {
                self.gateway.identify(source, consumer);
            }
        }
        Ok(())
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        let status = self.notes.status.get();
        // An exchange that sent nothing has no status: its client was gone.
        if status > 0 {
            let took = net::now() - self.notes.started();
            let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            self.metrics.count(self.gateway.worker(), status, took_us);
        }
    }
}

/// Reads and forgets what is left of a request's body, so that the next request can be found behind it.
async fn settle(exchange: &Exchange<'_>, body: &mut Body<'_>, keep_alive: bool) -> Next {
    let http = &exchange.snapshot.tunables.http;
    let (deadline, mut left) = (net::now() + http.body_timeout, http.drain_bytes_max);
    while keep_alive && !body.is_ended() {
        let next = net::timeout(deadline, body.next()).await;
        let Ok(Ok(Some(data))) = next else { break };
        match left.checked_sub(data.len()) {
            Some(rest) => left = rest,
            None => return Next::Close,
        }
    }
    if keep_alive && body.is_ended() {
        Next::Exchange
    } else {
        Next::Close
    }
}
