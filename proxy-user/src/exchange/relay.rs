//! The action `upstream`: the request goes to an endpoint, the response comes back, and either body streams meanwhile.

mod failure;
mod hedge;

use std::sync::Arc;
use std::time::Duration;

use super::{Exchange, Next, settle};
use crate::access_log::Span;
use crate::call::{self, Call, Cause, ConnectError, Times, Tries};
use crate::codec::h1::{
    Body, BodyDecoder, BodyEncoder, HeadError, Pace, Reader, Transfer, TransferError,
};
use crate::config::Route;
use crate::message::{
    Answer, CONTINUE, Forward, Framing, Limits, Reject, RequestHead, ResponseHead, Told,
};
use crate::net::{self, Either, Instant};
use crate::tunable::ForwardedFields;
use crate::upstream::{self, Active, Trial, Upstream, Wish};
use failure::Failure;

/// Interim responses (1xx) before the final one; an origin that sends more has gone astray.
const INTERIMS_MAX: usize = 16;
const INTERIM_TOO_MANY: Reject = Reject {
    status: 502,
    reason: "interim_too_many",
};

/// See [`Pace::batch_bytes_max`].
const BATCH_BYTES_MAX: usize = 128 << 10;
const BATCH_BYTES_LEAN: usize = 8 << 10;

/// Who lets its connection live on after the exchange.
struct Kept {
    client: bool,
    origin: bool,
}

/// How a call has ended.
enum Outcome {
    /// Its response went to the client, as far as that was possible.
    Passed(Result<Kept, Failure>),
    /// Its response is not good enough; whether its connection is.
    Again {
        is_fit: bool,
    },
    Failed(Failure),
}

/// A request that goes to one upstream.
#[derive(Clone, Copy)]
struct Relay<'r> {
    exchange: &'r Exchange<'r>,
    /// Index in `Config::routes`, and what stands there.
    route_index: usize,
    route: &'r Route,
    upstream: usize,
    request: &'r RequestHead,
}

/// A call that has brought the head of its response.
struct Asked<'a, 'w> {
    reader: Reader<'a>,
    /// Where there is a body that may still be on its way.
    upload: Option<Transfer<'a, 'w>>,
}

/// Relays one exchange to one of these upstreams. If it fails before anything was sent, the client gets an answer of ours.
pub(super) async fn relay(
    exchange: &Exchange<'_>,
    route_index: usize,
    choices: &[(usize, u32)],
    request: &RequestHead,
    response: &mut ResponseHead,
    body: &mut Body<'_>,
) -> Next {
    let Some(upstream) = choose_upstream(exchange, choices, request) else {
        let failure = Failure::Connect(ConnectError::NoEndpoint);
        return exchange.reply(failure.reply(), request, body).await;
    };
    let relay = Relay {
        exchange,
        route_index,
        route: &exchange.snapshot.config.routes[route_index],
        upstream,
        request,
    };
    let mut tries = relay.tries();
    let (deadline, left) = (tries.deadline, tries.left);
    let tried = net::timeout(
        deadline,
        net::select(
            relay.try_endpoints(&mut tries, response, body),
            // Whoever resets the connection waits for nothing any more, and neither need the endpoint.
            exchange.out.tcp().broken(),
        ),
    )
    .await;
    let notes = exchange.notes;
    notes.retries.set(left.saturating_sub(tries.left));
    let done = match tried {
        Ok(Either::Left(Err(failure))) if failure.is_late() && net::now() >= deadline => {
            Err(Failure::Late)
        }
        Ok(Either::Left(done)) => done,
        Ok(Either::Right(())) => Err(Failure::Client),
        Err(net::Elapsed) => Err(Failure::Late),
    };
    match done {
        Ok(keep_alive) => settle(exchange, body, keep_alive).await,
        Err(failure) if failure.is_by_client() || notes.status.get() > 0 => {
            exchange.reject(failure.reply().reason);
            Next::Abort
        }
        // Where a body broke off nothing can be found behind it.
        Err(failure @ Failure::Request(_)) => exchange.refuse(&failure.reply(), request).await,
        Err(failure) => exchange.reply(failure.reply(), request, body).await,
    }
}

/// The upstream whose sticky cookie the request has, else one by weight.
fn choose_upstream(
    exchange: &Exchange<'_>,
    choices: &[(usize, u32)],
    request: &RequestHead,
) -> Option<usize> {
    if choices.len() > 1 {
        let upstreams = &exchange.snapshot.upstreams;
        let is_its = |(upstream, _): &&(usize, u32)| {
            let upstream = upstreams.get(*upstream);
            upstream.is_some_and(|upstream| upstream.sticky_endpoint(request).is_some())
        };
        if let Some((upstream, _)) = choices.iter().find(is_its) {
            return Some(*upstream);
        }
    }
    upstream::choose_weighted(choices, exchange.gateway.caller().random())
}

impl<'r> Relay<'r> {
    /// What the route says of tries and times, else the tunables.
    fn tries(&self) -> Tries {
        let (route, tunables) = (self.route, &self.exchange.snapshot.tunables);
        let limits = &tunables.upstream;
        let timeout = route
            .timeout
            .exchange
            .unwrap_or(tunables.http.exchange_timeout);
        Tries {
            left: route.retry.retries.unwrap_or(limits.retries),
            on: route.retry.on,
            connect_timeout: route.timeout.connect.unwrap_or(limits.connect_timeout),
            per_try: route.retry.per_try,
            backoff: route.retry.backoff.unwrap_or(limits.retry_backoff),
            deadline: match timeout {
                Duration::ZERO => Instant::NEVER,
                timeout => self.exchange.notes.started() + timeout,
            },
            wish: self.upstream().map_or_else(Wish::default, |upstream| {
                upstream.wish(self.request, self.exchange.source, &route.path)
            }),
            ..Tries::default()
        }
    }

    fn upstream(&self) -> Option<&Upstream> {
        let upstreams = &self.exchange.snapshot.upstreams;
        upstreams.get(self.upstream).map(Arc::as_ref)
    }

    /// A response of this status speaks for its endpoint.
    fn is_good(&self, status: u16) -> bool {
        self.upstream()
            .is_none_or(|upstream| !upstream.blames(status))
    }

    /// Asks one endpoint, and another one where that is safe: whether the client's connection may live on.
    async fn try_endpoints(
        &self,
        tries: &mut Tries,
        response: &mut ResponseHead,
        body: &mut Body<'_>,
    ) -> Result<bool, Failure> {
        let (caller, snapshot) = (self.exchange.gateway.caller(), self.exchange.snapshot);
        let upstream = self.upstream;
        // Who asks for a change twice may get it twice.
        let is_idempotent = self.request.method().is_idempotent();
        if is_idempotent {
            self.keep(body);
        }
        let mut call = caller.begin(snapshot, upstream, tries).await?;
        if self.request.expects_continue() && !body.is_ended() {
            let out = self.exchange.out;
            out.queue([CONTINUE.into()]).map_err(|_| Failure::Client)?;
        }
        loop {
            self.note_call(&call);
            self.exchange.notes.end(Span::Connect);
            let mut heard = None;
            if let Some(hedge) = self.hedge() {
                // Boxed: whoever is not hedged needs no room for it.
                let (raced, answered) = Box::pin(self.race(call, tries, response, hedge)).await;
                (call, heard) = (raced, Some(answered));
                self.note_call(&call);
            }
            let (index, is_reused) = (call.index, call.is_reused);
            let cookie = call.set_cookie(self.exchange.client.scheme == "https");
            let outcome = {
                let asked = match heard {
                    None => self.ask(&mut call, tries, response, body).await,
                    Some(Ok(())) => Ok(Asked::raced(&mut call)),
                    Some(Err(failure)) => Err(failure),
                };
                match asked {
                    Err(failure) => Outcome::Failed(failure),
                    Ok(asked) => {
                        let may_repeat = is_idempotent && asked.can_repeat();
                        let is_tried = response.status() >= 500 && may_repeat;
                        let cause = Cause::ServerError;
                        if is_tried && caller.retry(snapshot, upstream, index, tries, cause).await {
                            let is_whole = asked.forget(response, &snapshot.response_limits);
                            let is_fit = is_whole && self.request.ends_surely();
                            Outcome::Again { is_fit }
                        } else {
                            Outcome::Passed(self.pass(asked, response, cookie).await)
                        }
                    }
                }
            };
            match outcome {
                Outcome::Passed(passed) => return self.end(call, passed, response.status()),
                Outcome::Again { is_fit } => {
                    let is_good = self.is_good(response.status());
                    caller.succeed(call, is_good, is_fit, self.idle_max());
                }
                Outcome::Failed(failure) => {
                    let may_repeat = is_idempotent && body.can_rewind();
                    let is_stale = may_repeat && is_reused && failure.is_stale();
                    if is_stale {
                        // The endpoint closed a connection that had waited too long: nobody's failure.
                        let room = call.give_up();
                        body.rewind();
                        call = caller.renew(snapshot, upstream, tries, room).await?;
                        continue;
                    }
                    self.blame(call, &failure);
                    self.retry(tries, index, failure, may_repeat).await?;
                }
            }
            body.rewind();
            call = caller.begin(snapshot, upstream, tries).await?;
        }
    }

    /// Notes which endpoint is asked now.
    fn note_call(&self, call: &Call<'_>) {
        let notes = self.exchange.notes;
        notes.call(self.upstream, call.index, call.is_reused);
    }

    /// Waits for another try after a call that failed, if there is one.
    async fn retry(
        &self,
        tries: &mut Tries,
        index: usize,
        failure: Failure,
        may_repeat: bool,
    ) -> Result<(), Failure> {
        let (caller, snapshot) = (self.exchange.gateway.caller(), self.exchange.snapshot);
        let Some(cause) = failure.cause().filter(|_| may_repeat) else {
            return Err(failure);
        };
        let retry = caller.retry(snapshot, self.upstream, index, tries, cause);
        if retry.await { Ok(()) } else { Err(failure) }
    }

    /// Has a body kept that may be sent again, if it is not known to be too long.
    fn keep(&self, body: &mut Body<'_>) {
        let bytes_max = self.exchange.snapshot.tunables.upstream.replay_bytes_max;
        let is_short = match self.request.framing() {
            Framing::None | Framing::Length(0) => false,
            Framing::Length(length) => length <= bytes_max as u64,
            Framing::Chunked | Framing::UntilClose => true,
        };
        if is_short {
            body.keep(bytes_max);
        }
    }

    /// Sends the request, and reads the head of the response.
    async fn ask<'a, 'w>(
        &self,
        call: &'a mut Call<'_>,
        tries: &Tries,
        response: &mut ResponseHead,
        body: &'a mut Body<'w>,
    ) -> Result<Asked<'a, 'w>, Failure>
    where
        'r: 'a,
    {
        let (exchange, route) = (self.exchange, self.route);
        let head = encode_request(exchange, route, call, self.request);
        let (mut reader, origin) = call.connection.wire.split();
        let encoder = BodyEncoder::new(self.request.framing());
        let pace = upload_pace(exchange, route);
        let mut upload = Transfer::new(head, body, encoder, origin, pace)
            .counted(&exchange.notes.received_bytes)
            .with_trailers(&route.trailers);
        let answered = self
            .await_final(&mut reader, Some(&mut upload), response, self.times(tries))
            .await;
        let (active, trial) = (&call.active, &mut call.trial);
        self.conclude(call.is_reused, active, trial, &answered, response);
        answered?;
        Ok(Asked {
            reader,
            upload: Some(upload),
        })
    }

    fn times(&self, tries: &Tries) -> Times {
        let first_byte = self.route.timeout.first_byte;
        Times {
            head: first_byte.unwrap_or(self.exchange.snapshot.tunables.upstream.head_timeout),
            latest: tries.try_ends,
        }
    }

    /// What is learned from how a call was answered: how long that takes, and what the breaker of the upstream wants to know.
    fn conclude(
        &self,
        is_reused: bool,
        active: &Active<'_>,
        trial: &mut Trial<'_>,
        answered: &Result<(), Failure>,
        response: &ResponseHead,
    ) {
        if answered.is_ok() {
            active.answered(net::now().as_ns());
        }
        let is_good = match answered {
            Ok(()) => response.status() < 500,
            Err(failure) if !failure.is_by_origin() => return,
            Err(failure) if is_reused && failure.is_stale() => return,
            Err(_) => false,
        };
        let (caller, snapshot) = (self.exchange.gateway.caller(), self.exchange.snapshot);
        caller.conclude(snapshot, self.upstream, trial, is_good);
    }

    /// Reads heads up to the final one, and passes the others on.
    async fn await_final(
        &self,
        reader: &mut Reader<'_>,
        mut upload: Option<&mut Transfer<'_, '_>>,
        response: &mut ResponseHead,
        times: Times,
    ) -> Result<(), Failure> {
        let limits = &self.exchange.snapshot.response_limits;
        let method = self.request.method();
        response.restart();
        for _ in 0..=INTERIMS_MAX {
            let upload = upload.as_deref_mut();
            call::answer(reader, upload, response, method, limits, times).await?;
            if !response.is_interim() {
                return Ok(());
            }
            pass_interim(self.exchange, self.request, response)?;
        }
        Err(Failure::Head(HeadError::Refused(INTERIM_TOO_MANY)))
    }

    /// Passes the response on, while what is left of the request goes on its way.
    async fn pass(
        &self,
        asked: Asked<'_, '_>,
        response: &mut ResponseHead,
        cookie: Option<String>,
    ) -> Result<Kept, Failure> {
        let (exchange, snapshot) = (self.exchange, self.exchange.snapshot);
        let Asked { reader, mut upload } = asked;
        exchange.notes.end(Span::FirstByte);
        exchange.notes.is_answered.set(true);
        #[cfg(test)]
        assert_ne!(
            self.request.path(),
            super::PANICS_WITH,
            "a test asked for it"
        );
        for policy in &self.route.policies {
            snapshot.policies.response(*policy, response);
        }
        // Behind the policies: none of them shall take it away, for it is ours and no field of the origin's.
        if let Some(cookie) = cookie {
            response.add("set-cookie", &cookie);
        }
        let answer = response.answer(self.request, exchange.keep_alive());
        let mut head = Vec::new();
        response.encode(&mut head, &answer, &exchange.gateway.date());
        let mut origin_body = reader.body(BodyDecoder::new(
            response.framing(),
            &snapshot.response_limits,
        ));
        let encoder = BodyEncoder::new(answer.framing);
        let mut download = Transfer::new(
            head,
            &mut origin_body,
            encoder,
            exchange.out,
            download_pace(exchange, self.route),
        )
        .counted(&exchange.notes.sent_bytes)
        .with_trailers(&self.route.trailers);
        // Whoever sends nonsense right behind a head is found out before the head has gone on.
        download.look().map_err(Failure::Response)?;
        exchange.notes.status.set(response.status());
        #[cfg(test)]
        assert_ne!(self.request.path(), super::PANICS_IN, "a test asked for it");
        let done = match &mut upload {
            Some(upload) if !upload.is_done() => {
                match net::select(download.run(), upload.run()).await {
                    // Answered before all was asked: the rest of the request is of no interest any more.
                    Either::Left(done) => done,
                    Either::Right(Ok(()) | Err(TransferError::Sink | TransferError::SinkLate)) => {
                        download.run().await
                    }
                    Either::Right(Err(error)) => return Err(Failure::Request(error)),
                }
            }
            _ => download.run().await,
        };
        let is_sent = upload.is_none_or(|upload| upload.is_done());
        match done {
            Ok(()) => Ok(Kept {
                client: answer.keep_alive,
                origin: response.keep_alive() && is_sent && self.request.ends_surely(),
            }),
            Err(TransferError::Sink) => Err(Failure::Client),
            Err(TransferError::SinkLate) => Err(Failure::ClientLate),
            Err(error) => Err(Failure::Response(error)),
        }
    }

    /// What becomes of a call whose response was passed on, or was to be.
    fn end(
        &self,
        call: Call<'_>,
        passed: Result<Kept, Failure>,
        status: u16,
    ) -> Result<bool, Failure> {
        match passed {
            Ok(kept) => {
                let caller = self.exchange.gateway.caller();
                caller.succeed(call, self.is_good(status), kept.origin, self.idle_max());
                Ok(kept.client)
            }
            Err(failure) => {
                self.blame(call, &failure);
                Err(failure)
            }
        }
    }

    fn blame(&self, call: Call<'_>, failure: &Failure) {
        if failure.is_by_origin() {
            self.exchange.gateway.caller().fail(call);
        }
    }

    fn idle_max(&self) -> usize {
        if self.exchange.gateway.overload().closes() {
            return 0;
        }
        self.exchange
            .snapshot
            .tunables
            .upstream
            .idle_connections_max as usize
    }
}

impl<'a> Asked<'a, '_> {
    /// Of a call that was heard already, to a request without a body.
    fn raced(call: &'a mut Call<'_>) -> Self {
        let (reader, _) = call.connection.wire.split();
        Self {
            reader,
            upload: None,
        }
    }

    /// Nothing of the request is lost: it can be sent once more.
    fn can_repeat(&self) -> bool {
        self.upload.as_ref().is_none_or(Transfer::can_repeat)
    }

    /// Reads over a response that nobody is to see; whether all of it is here, and its connection fit for another call.
    fn forget(self, response: &ResponseHead, limits: &Limits) -> bool {
        let decoder = BodyDecoder::new(response.framing(), limits);
        let mut body = self.reader.body(decoder);
        while let Ok(Some(_)) = body.ready() {}
        let is_sent = self.upload.is_none_or(|upload| upload.is_done());
        body.is_ended() && is_sent && response.keep_alive()
    }
}

fn encode_request(
    exchange: &Exchange<'_>,
    route: &Route,
    call: &Call<'_>,
    request: &RequestHead,
) -> Vec<u8> {
    let fallback = if request.authority().is_empty() {
        call.endpoint.address.to_string()
    } else {
        String::new()
    };
    let mut head = Vec::new();
    let forward = Forward {
        peer: &exchange.client.text,
        scheme: exchange.client.scheme,
        port: exchange.client.port,
        told: match exchange.snapshot.tunables.http.forwarded_fields {
            ForwardedFields::XForwarded => Told::XForwarded,
            ForwardedFields::Forwarded => Told::Forwarded,
            ForwardedFields::Both => Told::Both,
        },
        via: exchange.listener.via.as_deref(),
        passes_trailers: !route.trailers.is_empty(),
        fallback_authority: &fallback,
    };
    request.encode(&mut head, &forward);
    head
}

/// Interim responses are the client's business (RFC 9110 section 15.2), but for the 100, which we send ourselves.
fn pass_interim(
    exchange: &Exchange<'_>,
    request: &RequestHead,
    response: &ResponseHead,
) -> Result<(), Failure> {
    if response.status() == 100 || request.is_http10() {
        return Ok(());
    }
    let answer = Answer {
        framing: Framing::None,
        keep_alive: true,
        is_http10: false,
    };
    let mut head = Vec::new();
    response.encode(&mut head, &answer, "");
    exchange
        .out
        .queue([head.into()])
        .map_err(|_| Failure::Client)
}

fn upload_pace(exchange: &Exchange<'_>, route: &Route) -> Pace {
    let tunables = &exchange.snapshot.tunables;
    let (batch_bytes_max, splice_bytes_min) = buffering(exchange);
    Pace {
        wait: route.timeout.idle.unwrap_or(tunables.http.body_timeout),
        rate_min: tunables.http.body_rate_min,
        send: tunables.net.send_timeout,
        bytes_max: tunables.http.body_bytes_max as u64,
        batch_bytes_max,
        splice_bytes_min,
    }
}

fn download_pace(exchange: &Exchange<'_>, route: &Route) -> Pace {
    let tunables = &exchange.snapshot.tunables;
    let (batch_bytes_max, splice_bytes_min) = buffering(exchange);
    Pace {
        wait: route.timeout.idle.unwrap_or(tunables.upstream.body_timeout),
        rate_min: tunables.upstream.body_rate_min,
        send: tunables.net.send_timeout,
        bytes_max: u64::MAX,
        batch_bytes_max,
        splice_bytes_min,
    }
}

/// How much of a body is sent together, and from how much on it goes through a pipe; both hold memory.
fn buffering(exchange: &Exchange<'_>) -> (usize, u64) {
    if exchange.gateway.overload().is_lean() {
        return (BATCH_BYTES_LEAN, 0);
    }
    let splice_bytes_min = exchange.snapshot.tunables.net.splice_bytes_min;
    (BATCH_BYTES_MAX, splice_bytes_min as u64)
}
