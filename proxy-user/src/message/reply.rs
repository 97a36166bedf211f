//! Answers of our own: errors, refusals, redirects, fixed bodies.

use super::encode::{push_connection, push_field, push_length};
use super::{Reject, authority::push_decimal};
use std::borrow::Cow;

/// What lets a client go on that holds its body back.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// An answer that no origin gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    /// Beside date, content-type, content-length and connection, which are written by `encode`.
    pub fields: Vec<(&'static str, String)>,
    pub body: Cow<'static, str>,
    /// Why, as a metric's label.
    pub reason: &'static str,
}

/// How a reply goes to the client.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// IMF-fixdate.
    pub date: &'a str,
    /// `X-Request-Id`; empty: there is none.
    pub request_id: &'a str,
    /// The connection lives on.
    pub keep_alive: bool,
    /// The client spoke HTTP/1.0.
    pub is_http10: bool,
    /// The request was a HEAD: all of the head, none of the body.
    pub is_head: bool,
}

impl Reply {
    /// A status whose body is its own phrase.
    pub fn new(status: u16, reason: &'static str) -> Self {
        Self {
            status,
            fields: Vec::new(),
            body: Cow::Borrowed(reason_phrase(status)),
            reason,
        }
    }

    /// Adds a field; the name is lower case.
    #[must_use]
    pub fn field(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    /// Replaces the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Cow<'static, str>>) -> Self {
        self.body = body.into();
        self
    }

    /// Appends the whole answer.
    pub fn encode(&self, out: &mut Vec<u8>, delivery: &Delivery<'_>) {
        let fields = self
            .fields
            .iter()
            .map(|(name, value)| (*name, value.as_str()));
        let fields = [("content-type", "text/plain; charset=utf-8")]
            .into_iter()
            .chain(fields);
        if self.body.is_empty() {
            encode_reply(out, self.status, fields.skip(1), b"", delivery);
        } else {
            // A line for whoever reads it in a terminal.
            let body = [self.body.as_bytes(), b"\n"].concat();
            encode_reply(out, self.status, fields, &body, delivery);
        }
    }
}

impl From<Reject> for Reply {
    /// What a peer learns of a message that was not taken: the status and the rule it broke.
    fn from(reject: Reject) -> Self {
        let reply = Self::new(reject.status, reject.reason).body(format!(
            "{}: {}",
            reason_phrase(reject.status),
            reject.reason
        ));
        match reject.status {
            // Owed to the client (RFC 9110 section 15.5.6); which of them a route takes is its origin's to say.
            405 => reply.field("allow", "GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"),
            _ => reply,
        }
    }
}

/// Fields that `encode_reply` writes.
const OURS: [&str; 5] = [
    "date",
    "content-length",
    "transfer-encoding",
    "connection",
    "x-request-id",
];

/// Appends a whole answer with these fields and this body, as for `respond` and `redirect` actions. Fields that are
/// ours to write (date, content-length, transfer-encoding, connection) are not taken from `fields`.
pub fn encode_reply<'f>(
    out: &mut Vec<u8>,
    status: u16,
    fields: impl Iterator<Item = (&'f str, &'f str)>,
    body: &[u8],
    delivery: &Delivery<'_>,
) {
    out.reserve(256 + body.len());
    push_status_line(out, status);
    push_field(out, "date", delivery.date.as_bytes());
    if !delivery.request_id.is_empty() {
        push_field(out, "x-request-id", delivery.request_id.as_bytes());
    }
    for (name, value) in fields {
        let is_ours = OURS.iter().any(|ours| name.eq_ignore_ascii_case(ours));
        if !is_ours
            && super::is_field_name(name.as_bytes())
            && super::is_field_value(value.as_bytes())
        {
            push_field(out, name, value.as_bytes());
        }
    }
    let has_body = status >= 200 && status != 204 && status != 304;
    if has_body {
        push_length(out, body.len() as u64);
    }
    push_connection(out, delivery.keep_alive, delivery.is_http10);
    out.extend_from_slice(b"\r\n");
    if has_body && !delivery.is_head {
        out.extend_from_slice(body);
    }
}

pub(super) fn push_status_line(out: &mut Vec<u8>, status: u16) {
    if status == 200 {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    out.extend_from_slice(b"HTTP/1.1 ");
    push_decimal(out, u64::from(status));
    out.push(b' ');
    out.extend_from_slice(reason_phrase(status).as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// The phrase of a status (IANA's registry); of an unknown one, that of its class.
pub fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        103 => "Early Hints",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        207 => "Multi-Status",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        451 => "Unavailable For Legal Reasons",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        508 => "Loop Detected",
        511 => "Network Authentication Required",
        _ => match status / 100 {
            1 => "Informational",
            2 => "Success",
            3 => "Redirection",
            4 => "Client Error",
            _ => "Server Error",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_that_is_not_taken_is_told_those_that_are() {
        let fields = |status| Reply::from(Reject::with(status, "method")).fields;
        assert!(matches!(&fields(405)[..], [("allow", methods)] if methods.contains("GET")));
        assert_eq!(fields(400), []);
    }
}
