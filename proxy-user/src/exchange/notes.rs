//! What is noted of an exchange on its way: for its metrics, and for its line in the access log.

use std::cell::Cell;
use std::time::Duration;

use super::{Client, Gateway};
use crate::access_log::{Entry, Span};
use crate::config::{AccessLog, Config};
use crate::net::{self, Instant};
use crate::snapshot::Snapshot;

#[derive(Default)]
pub(super) struct Notes {
    started: Instant,
    /// There is an access log: moments are noted.
    is_timed: bool,
    /// The status that was sent; 0 as long as none was.
    pub status: Cell<u16>,
    /// Why it was refused, or broke off; empty: it was not.
    pub reason: Cell<&'static str>,
    /// There is a request: its head was read.
    pub is_asked: Cell<bool>,
    /// Index in `Config::routes`.
    pub route: Cell<Option<u32>>,
    /// Index in `Config::upstreams`, and of the endpoint that was called last.
    endpoint: Cell<Option<(u32, u32)>>,
    /// That call had a connection which had served others before.
    is_reused: Cell<bool>,
    /// It had an answer.
    pub is_answered: Cell<bool>,
    pub retries: Cell<u32>,
    /// Of the request's body, and of the response's.
    pub received_bytes: Cell<u64>,
    pub sent_bytes: Cell<u64>,
    /// When the spans of [`NOTED`] ended: microseconds since the beginning, or [`NEVER`].
    ends_us: [Cell<u32>; NOTED.len()],
}

/// What a connection took before its first exchange.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening {
    pub accept_us: u32,
    pub tls_us: Option<u32>,
}

/// Spans whose ends are noted. Each begins where the one before it ended.
const NOTED: [Span; 4] = [Span::Head, Span::Route, Span::Connect, Span::FirstByte];
const NEVER: u32 = u32::MAX;

impl Notes {
    /// Of an exchange that begins now.
    pub fn new(snapshot: &Snapshot) -> Self {
        Self {
            started: net::now(),
            is_timed: snapshot.config.access_log.is_some(),
            ends_us: [const { Cell::new(NEVER) }; NOTED.len()],
            ..Self::default()
        }
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    /// A part of the exchange has ended now.
    pub fn end(&self, span: Span) {
        if self.is_timed {
            let took = net::now().since(self.started);
            let noted = NOTED.iter().zip(&self.ends_us);
            for (_, end) in noted.filter(|(noted, _)| **noted == span) {
                end.set(microseconds(took).min(NEVER - 1));
            }
        }
    }

    /// A call has begun: to this endpoint, on a connection that served others before or not.
    pub fn call(&self, upstream: usize, endpoint: usize, is_reused: bool) {
        self.endpoint.set(Some((upstream as u32, endpoint as u32)));
        self.is_reused.set(is_reused);
        self.is_answered.set(false);
    }

    /// By span, how long each took.
    fn durations_us(&self, opening: Option<Opening>) -> [Option<u32>; Span::COUNT] {
        let mut durations = [None; Span::COUNT];
        durations[Span::Accept as usize] = opening.map(|opening| opening.accept_us);
        durations[Span::Tls as usize] = opening.and_then(|opening| opening.tls_us);
        let mut before = 0;
        let total = microseconds(net::now().since(self.started));
        for (span, end) in NOTED.iter().zip(&self.ends_us) {
            if end.get() != NEVER {
                durations[*span as usize] = Some(end.get().saturating_sub(before));
                before = end.get();
            }
        }
        if durations[Span::FirstByte as usize].is_some() {
            durations[Span::Body as usize] = Some(total.saturating_sub(before));
        }
        durations[Span::Total as usize] = Some(total);
        durations
    }
}

/// Of more than an hour nobody asks how much more.
pub fn microseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// One exchange, until its end, however that comes: then it has its line in the access log.
pub(super) struct Logged<'e> {
    pub gateway: &'e Gateway,
    pub snapshot: &'e Snapshot,
    pub client: &'e mut Client,
    /// Index in `Config::listeners`.
    pub listener: usize,
    pub notes: &'e Notes,
}

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        if let Some(access_log) = &self.snapshot.config.access_log {
            self.log(access_log);
        }
    }
}

impl Logged<'_> {
    fn log(&self, access_log: &AccessLog) {
        let (config, notes) = (&self.snapshot.config, self.notes);
        let tunables = &self.snapshot.tunables.log;
        // A connection that ended before a request has none.
        if !notes.is_asked.get() && notes.status.get() == 0 {
            return;
        }
        if !self.is_logged(config) {
            return;
        }
        let went_well = notes.reason.get().is_empty() && (1..500).contains(&notes.status.get());
        let sample = u64::from(access_log.sample.unwrap_or(tunables.sample));
        if went_well && sample > 1 && !self.gateway.caller().random().is_multiple_of(sample) {
            return;
        }
        let entry = self.entry(config);
        let buffers_max = tunables.buffers_max as usize;
        self.gateway.access_log().add(
            &access_log.fields,
            &entry,
            tunables.buffer_bytes,
            buffers_max,
        );
    }

    /// The route has the last word, where there is one.
    fn is_logged(&self, config: &Config) -> bool {
        let route = self.notes.route.get();
        let of_route = route.and_then(|route| config.routes.get(route as usize)?.is_logged);
        let listener = config.listeners.get(self.listener);
        of_route.unwrap_or_else(|| listener.is_none_or(|listener| listener.is_logged))
    }

    fn entry<'e>(&'e self, config: &'e Config) -> Entry<'e> {
        let (client, notes) = (&*self.client, self.notes);
        let route = notes.route.get();
        let route = route.and_then(|route| config.routes.get(route as usize));
        let upstream = notes.endpoint.get().and_then(|(upstream, endpoint)| {
            let upstream = self.snapshot.upstreams.get(upstream as usize)?;
            Some((upstream, upstream.endpoints.get(endpoint as usize)?))
        });
        let listener = config.listeners.get(self.listener);
        let is_cut_off = notes.reason.get().is_empty() && notes.status.get() == 0;
        Entry {
            listener: listener.map_or("", |listener| &listener.name),
            route: route.map_or("", |route| &route.name),
            upstream: upstream.map_or("", |(upstream, _)| &upstream.name),
            endpoint: upstream.map(|(_, endpoint)| endpoint.address),
            client: client.request.client(),
            peer: &client.origin.text,
            scheme: client.origin.scheme,
            tls: client
                .wire
                .transport()
                .tls()
                .map_or("", |tls| tls.protocol_version()),
            request: &client.request,
            response: notes.is_answered.get().then_some(&client.response),
            status: notes.status.get(),
            // Nobody has ended it but who ended its connection: a stop, or a ban.
            reason: if is_cut_off {
                "cut_off"
            } else {
                notes.reason.get()
            },
            received_bytes: notes.received_bytes.get(),
            sent_bytes: notes.sent_bytes.get(),
            retries: notes.retries.get(),
            is_reused: upstream.map(|_| notes.is_reused.get()),
            durations_us: notes.durations_us((client.exchanges <= 1).then_some(client.opening)),
        }
    }
}
