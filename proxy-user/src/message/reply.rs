//! Answers of our own: errors, refusals, redirects, fixed bodies.

use super::encode::{push_connection, push_field, push_length};
use super::{Form, Reject, authority::push_decimal};
use std::sync::Arc;

/// What lets a client go on that holds its body back.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// An answer that no origin gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    /// Beside date, content-type, content-length and connection, which are written by `encode`.
    pub fields: Vec<(&'static str, String)>,
    /// Why, as a metric's label, in the log, and to the client.
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

/// What the configuration has in place of a body of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub content_type: String,
    pub body: Arc<[u8]>,
}

impl Reply {
    pub fn new(status: u16, reason: &'static str) -> Self {
        Self {
            status,
            fields: Vec::new(),
            reason,
        }
    }

    /// Adds a field; the name is lower case.
    #[must_use]
    pub fn field(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    /// Appends the whole answer, with a body in this form, or with this page: how many bytes of body that are.
    ///
    /// No cache keeps it: its request's id is of no other's interest.
    pub fn encode(
        &self,
        out: &mut Vec<u8>,
        delivery: &Delivery<'_>,
        form: Form,
        page: Option<&Page>,
    ) -> usize {
        let made;
        let (content_type, body): (&str, &[u8]) = match page {
            Some(page) => (&page.content_type, &page.body),
            None => {
                made = self.body(form, delivery.request_id);
                (form.content_type(), made.as_bytes())
            }
        };
        let fields = self
            .fields
            .iter()
            .map(|(name, value)| (*name, value.as_str()));
        let fields = [
            ("cache-control", "no-store"),
            ("content-type", content_type),
        ]
        .into_iter()
        .chain(fields);
        encode_reply(out, self.status, fields, body, delivery)
    }

    /// Reasons and ids are made of letters, digits and a few signs that mean nothing in any of these forms.
    fn body(&self, form: Form, id: &str) -> String {
        let (status, title, reason) = (self.status, reason_phrase(self.status), self.reason);
        match form {
            Form::Text => format!("{status} {title}: {reason}\nrequest {id}\n"),
            Form::Problem => format!(
                "{{\"type\":\"about:blank\",\"title\":\"{title}\",\"status\":{status},\"reason\":\"{reason}\",\"request_id\":\"{id}\"}}\n"
            ),
            Form::Json => format!(
                "{{\"status\":{status},\"title\":\"{title}\",\"reason\":\"{reason}\",\"request_id\":\"{id}\"}}\n"
            ),
            Form::Html => format!(
                "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{status} {title}</title></head>\n\
                 <body><h1>{status} {title}</h1><p>{reason}</p><p>Request <code>{id}</code></p></body></html>\n"
            ),
        }
    }
}

impl From<Reject> for Reply {
    /// What a peer learns of a message that was not taken: the status and the rule it broke.
    fn from(reject: Reject) -> Self {
        let reply = Self::new(reject.status, reject.reason);
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
/// ours to write are not taken from `fields`. Answers how many bytes of body that are.
pub fn encode_reply<'f>(
    out: &mut Vec<u8>,
    status: u16,
    fields: impl Iterator<Item = (&'f str, &'f str)>,
    body: &[u8],
    delivery: &Delivery<'_>,
) -> usize {
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
    if !has_body || delivery.is_head {
        return 0;
    }
    out.extend_from_slice(body);
    body.len()
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
