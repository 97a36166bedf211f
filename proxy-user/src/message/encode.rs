//! Heads as bytes for the next hop: nothing but what our own parse understood.

use super::authority::push_decimal;
use super::reply::push_status_line;
use super::{Forward, Framing, Method, RequestHead, ResponseHead};

impl RequestHead {
    /// Appends the head for an HTTP/1.1 origin, framed as [`RequestHead::framing`] says.
    ///
    /// What a client says in `X-Forwarded-*`, `Forwarded`, `X-Real-IP` and `X-Request-Id` goes no further: we tell it,
    /// unless a policy does. There is a `Via` only where the listener names us, though RFC 9110 section 7.6.3 asks gateways
    /// for it: nginx as an origin stops compressing where it sees one, and HAProxy and nginx leave it out too.
    pub fn encode(&self, out: &mut Vec<u8>, forward: &Forward<'_>) {
        out.reserve(
            self.fields.encoded_len() + self.path().len() + self.query().map_or(0, str::len) + 512,
        );
        out.extend_from_slice(self.method_name().as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.path().as_bytes());
        if let Some(query) = self.query() {
            out.push(b'?');
            out.extend_from_slice(query.as_bytes());
        }
        out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
        let asked = self.authority();
        let host = match self.host_override {
            Some(span) => span.text(&self.fields.arena),
            None if asked.is_empty() => forward.fallback_authority,
            None => asked,
        };
        out.extend_from_slice(host.as_bytes());
        out.extend_from_slice(b"\r\n");
        self.fields.encode(out);
        match self.framing() {
            // A method that usually has a body says that it has none (RFC 9110 section 8.6).
            Framing::None
                if matches!(self.method(), Method::Post | Method::Put | Method::Patch) =>
            {
                push_length(out, 0)
            }
            framing => push_framing(out, framing),
        }
        self.encode_forwarding(out, forward);
        out.extend_from_slice(b"\r\n");
    }
}

/// How a response goes to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How the body is framed towards the client: what a `codec::h1::BodyEncoder` is made with.
    pub framing: Framing,
    /// The connection lives on.
    pub keep_alive: bool,
    /// The client spoke HTTP/1.0.
    pub is_http10: bool,
}

impl ResponseHead {
    /// How this response goes to the client that sent `request`; `keep_alive` is whether we would let its connection live.
    pub fn answer(&self, request: &RequestHead, keep_alive: bool) -> Answer {
        let is_http10 = request.is_http10();
        let framing = match self.framing() {
            Framing::Chunked | Framing::UntilClose if is_http10 => Framing::UntilClose,
            Framing::UntilClose => Framing::Chunked,
            framing => framing,
        };
        let keep_alive = keep_alive && request.keep_alive() && framing != Framing::UntilClose;
        Answer {
            framing,
            keep_alive,
            is_http10,
        }
    }

    /// Appends the head for the client; `date` (IMF-fixdate) stands in where the origin gave none (RFC 9110 section 6.6.1).
    pub fn encode(&self, out: &mut Vec<u8>, answer: &Answer, date: &str) {
        out.reserve(self.fields.encoded_len() + 256);
        push_status_line(out, self.status());
        self.fields.encode(out);
        if !self.has_date && !self.is_interim() && self.fields.value("date").is_none() {
            push_field(out, "date", date.as_bytes());
        }
        match self.length_told {
            Some(length) => push_length(out, length),
            None => push_framing(out, answer.framing),
        }
        if !self.is_interim() {
            push_connection(out, answer.keep_alive, answer.is_http10);
        }
        out.extend_from_slice(b"\r\n");
    }
}

pub(super) fn push_connection(out: &mut Vec<u8>, keep_alive: bool, is_http10: bool) {
    if !keep_alive {
        out.extend_from_slice(b"connection: close\r\n");
    } else if is_http10 {
        out.extend_from_slice(b"connection: keep-alive\r\n");
    }
}

pub(super) fn push_length(out: &mut Vec<u8>, length: u64) {
    out.extend_from_slice(b"content-length: ");
    push_decimal(out, length);
    out.extend_from_slice(b"\r\n");
}

pub(super) fn push_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn push_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::Length(length) => push_length(out, length),
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Framing::None | Framing::UntilClose => {}
    }
}
