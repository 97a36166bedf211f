//! The action `upstream`: the request goes to an endpoint, the response comes back, and either body streams meanwhile.

use super::{Exchange, Next, settle};
use crate::access_log::Span;
use crate::call::{self, AnswerError, Call, ConnectError, Tries};
use crate::codec::h1::{
    Body, BodyDecoder, BodyEncoder, BodyError, HeadError, Pace, Transfer, TransferError,
};
use crate::config::Route;
use crate::message::{
    Answer, CONTINUE, Forward, Framing, Reject, Reply, RequestHead, ResponseHead, Told,
};
use crate::net::{self, Either, Instant};
use crate::tunable::ForwardedFields;
use crate::upstream;

/// Interim responses (1xx) before the final one; an origin that sends more has gone astray.
const INTERIMS_MAX: usize = 16;
const INTERIM_TOO_MANY: Reject = Reject {
    status: 502,
    reason: "interim_too_many",
};

/// Why there is no whole response. Whose fault it is decides what the client is told, and whether another endpoint is asked.
#[derive(Debug)]
enum Failure {
    Connect(ConnectError),
    /// The endpoint sent no head, or none that is taken.
    Head(HeadError),
    /// The endpoint broke its response off.
    Response(TransferError),
    /// The client's body came to no end.
    Request(TransferError),
    /// The client takes nothing any more.
    Client,
    /// The route's deadline has passed.
    Late,
}

/// Who lets its connection live on after the exchange.
struct Kept {
    client: bool,
    origin: bool,
}

/// Relays one exchange to one of these upstreams. If it fails before anything was sent, the client gets an answer of ours.
pub(super) async fn relay(
    exchange: &Exchange<'_>,
    route: &Route,
    choices: &[(usize, u32)],
    request: &RequestHead,
    response: &mut ResponseHead,
    body: &mut Body<'_>,
) -> Next {
    let random = exchange.gateway.caller().random();
    let Some(upstream) = upstream::choose_weighted(choices, random) else {
        let failure = Failure::Connect(ConnectError::NoEndpoint);
        return exchange.reply(failure.reply(), request, body).await;
    };
    let deadline = route
        .exchange_timeout
        .map_or(Instant::NEVER, |timeout| exchange.notes.started() + timeout);
    let tried = net::timeout(
        deadline,
        net::select(
            try_endpoints(exchange, route, upstream, request, response, body),
            // Whoever resets the connection waits for nothing any more, and neither need the endpoint.
            exchange.out.tcp().broken(),
        ),
    )
    .await;
    let done = match tried {
        Ok(Either::Left(done)) => done,
        Ok(Either::Right(())) => Err(Failure::Client),
        Err(net::Elapsed) => Err(Failure::Late),
    };
    match done {
        Ok(keep_alive) => settle(exchange, body, keep_alive).await,
        Err(failure) if matches!(failure, Failure::Client) || exchange.notes.status.get() > 0 => {
            exchange.reject(failure.reply().reason);
            Next::Abort
        }
        // Where a body broke off nothing can be found behind it.
        Err(failure @ Failure::Request(_)) => exchange.refuse(&failure.reply(), request).await,
        Err(failure) => exchange.reply(failure.reply(), request, body).await,
    }
}

/// Asks one endpoint, and another one where that is safe: whether the client's connection may live on.
async fn try_endpoints(
    exchange: &Exchange<'_>,
    route: &Route,
    upstream: usize,
    request: &RequestHead,
    response: &mut ResponseHead,
    body: &mut Body<'_>,
) -> Result<bool, Failure> {
    let (caller, snapshot) = (exchange.gateway.caller(), exchange.snapshot);
    let limits = &snapshot.tunables.upstream;
    let mut tries = Tries {
        left: route.retries.unwrap_or(limits.retries),
        avoid: None,
        renew: None,
    };
    // A body is gone once it was sent, and who asks for a change twice may get it twice.
    let is_repeatable = matches!(request.framing(), Framing::None | Framing::Length(0))
        && request.method().is_idempotent();
    let mut call = exchange.begin(upstream, &mut tries).await?;
    if request.expects_continue() && !body.is_ended() {
        exchange
            .out
            .queue([CONTINUE.into()])
            .map_err(|_| Failure::Client)?;
    }
    loop {
        let (failure, index) =
            match attempt(exchange, route, &mut call, request, response, body).await {
                Ok(kept) => {
                    let idle_max = limits.idle_connections_max as usize;
                    caller.succeed(call, kept.origin, idle_max);
                    return Ok(kept.client);
                }
                Err(failure) => (failure, call.index),
            };
        let is_gone = matches!(
            failure,
            Failure::Head(HeadError::Gone | HeadError::CutShort)
        );
        let is_stale = call.is_reused && matches!(failure, Failure::Head(HeadError::Gone));
        if is_stale && is_repeatable {
            // The endpoint closed a connection that had waited too long: nobody's failure.
            drop(call);
            tries.renew = Some(index);
            call = exchange.begin(upstream, &mut tries).await?;
            continue;
        }
        if failure.is_by_origin() {
            caller.fail(call);
        }
        if !is_gone || !is_repeatable || tries.left == 0 {
            return Err(failure);
        }
        caller.count_retry(snapshot, upstream, index, &mut tries);
        exchange.notes.retries.update(|retries| retries + 1);
        call = exchange.begin(upstream, &mut tries).await?;
    }
}

/// One call and its response.
async fn attempt(
    exchange: &Exchange<'_>,
    route: &Route,
    call: &mut Call<'_>,
    request: &RequestHead,
    response: &mut ResponseHead,
    body: &mut Body<'_>,
) -> Result<Kept, Failure> {
    let (snapshot, limits) = (exchange.snapshot, &exchange.snapshot.response_limits);
    let head = encode_request(exchange, route, call, request);
    let (mut reader, origin) = call.connection.wire.split();
    let encoder = BodyEncoder::new(request.framing());
    let mut upload = Transfer::new(head, body, encoder, origin, upload_pace(exchange))
        .counted(&exchange.notes.received_bytes)
        .with_trailers(&route.trailers);
    let timeout = snapshot.tunables.upstream.head_timeout;
    response.restart();
    for interims in 0.. {
        call::answer(
            &mut reader,
            &mut upload,
            response,
            request.method(),
            limits,
            timeout,
        )
        .await?;
        if !response.is_interim() {
            break;
        }
        if interims == INTERIMS_MAX {
            return Err(Failure::Head(HeadError::Refused(INTERIM_TOO_MANY)));
        }
        pass_interim(exchange, request, response)?;
    }
    exchange.notes.end(Span::FirstByte);
    exchange.notes.is_answered.set(true);
    for policy in &route.policies {
        snapshot.policies.response(*policy, response);
    }

    let answer = response.answer(request, exchange.keep_alive());
    let mut head = Vec::new();
    response.encode(&mut head, &answer, &exchange.gateway.date());
    let mut origin_body = reader.body(BodyDecoder::new(response.framing(), limits));
    let encoder = BodyEncoder::new(answer.framing);
    let mut download = Transfer::new(
        head,
        &mut origin_body,
        encoder,
        exchange.out,
        download_pace(exchange),
    )
    .counted(&exchange.notes.sent_bytes)
    .with_trailers(&route.trailers);
    // Whoever sends nonsense right behind a head is found out before the head has gone on.
    download.look().map_err(Failure::Response)?;
    exchange.notes.status.set(response.status());
    let done = if upload.is_done() {
        download.run().await
    } else {
        match net::select(download.run(), upload.run()).await {
            // Answered before all was asked: the rest of the request is of no interest any more.
            Either::Left(done) => done,
            Either::Right(Ok(()) | Err(TransferError::Sink | TransferError::SinkLate)) => {
                download.run().await
            }
            Either::Right(Err(error)) => return Err(Failure::Request(error)),
        }
    };
    match done {
        Ok(()) => Ok(Kept {
            client: answer.keep_alive,
            origin: response.keep_alive() && upload.is_done(),
        }),
        Err(TransferError::Sink | TransferError::SinkLate) => Err(Failure::Client),
        Err(error) => Err(Failure::Response(error)),
    }
}

impl<'e> Exchange<'e> {
    /// Begins a call, and notes which endpoint it goes to.
    async fn begin(&self, upstream: usize, tries: &mut Tries) -> Result<Call<'e>, ConnectError> {
        let (caller, notes) = (self.gateway.caller(), self.notes);
        let left = tries.left;
        let begun = caller.begin(self.snapshot, upstream, tries).await;
        notes.end(Span::Connect);
        if let Ok(call) = &begun {
            notes.call(upstream, call.index, call.is_reused);
        }
        let failed = left.saturating_sub(tries.left);
        notes.retries.update(|retries| retries + failed);
        begun
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
        port: exchange.out.local().port(),
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

fn upload_pace(exchange: &Exchange<'_>) -> Pace {
    let tunables = &exchange.snapshot.tunables;
    Pace {
        wait: tunables.http.body_timeout,
        rate_min: tunables.http.body_rate_min,
        send: tunables.net.send_timeout,
        bytes_max: tunables.http.body_bytes_max as u64,
        splice_bytes_min: tunables.net.splice_bytes_min as u64,
    }
}

fn download_pace(exchange: &Exchange<'_>) -> Pace {
    let tunables = &exchange.snapshot.tunables;
    Pace {
        wait: tunables.upstream.body_timeout,
        rate_min: 0,
        send: tunables.net.send_timeout,
        bytes_max: u64::MAX,
        splice_bytes_min: tunables.net.splice_bytes_min as u64,
    }
}

impl Failure {
    /// The endpoint is to blame.
    fn is_by_origin(&self) -> bool {
        match self {
            Self::Head(_) | Self::Response(_) => true,
            Self::Connect(_) | Self::Request(_) | Self::Client | Self::Late => false,
        }
    }

    /// What the client is told, if it can still be told anything, and the reason that is counted.
    fn reply(&self) -> Reply {
        match self {
            Self::Connect(ConnectError::NoEndpoint) => {
                Reply::new(503, "no_endpoint").field("retry-after", "1")
            }
            Self::Connect(ConnectError::Exhausted) => {
                Reply::new(503, "no_descriptor").field("retry-after", "1")
            }
            // Every try was refused before a byte was sent: there is nobody to ask now, as where no endpoint is healthy.
            Self::Connect(ConnectError::Refused) => {
                Reply::new(503, "origin_unreachable").field("retry-after", "1")
            }
            Self::Connect(ConnectError::Late) => Reply::new(504, "origin_connect_timeout"),
            Self::Head(HeadError::Gone | HeadError::CutShort) => Reply::new(502, "origin_closed"),
            Self::Head(HeadError::Late) => Reply::new(504, "origin_head_timeout"),
            Self::Head(HeadError::Refused(reject)) => Reply::new(502, reject.reason),
            Self::Response(TransferError::Body(BodyError::Refused(reject))) => {
                Reply::new(502, reject.reason)
            }
            Self::Response(TransferError::Late) => Reply::new(504, "origin_body_timeout"),
            Self::Response(_) => Reply::new(502, "origin_body_cut_short"),
            Self::Request(TransferError::Body(BodyError::Refused(reject))) => Reply::from(*reject),
            Self::Request(TransferError::Late) => Reply::new(408, "body_timeout"),
            Self::Request(TransferError::TooLarge) => Reply::new(413, "body_too_large"),
            Self::Request(_) => Reply::new(400, "body_cut_short"),
            Self::Client => Reply::new(499, "client_gone"),
            Self::Late => Reply::new(504, "exchange_timeout"),
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        Self::Connect(error)
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        match error {
            AnswerError::Head(error) => Self::Head(error),
            AnswerError::Upload(error) => Self::Request(error),
        }
    }
}
