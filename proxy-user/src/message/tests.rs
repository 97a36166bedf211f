//! What a message may be, row by row, and what becomes of mutilated ones.

mod faults;
mod forward;
mod hops;
mod mutation;

use super::*;

/// Parses a request, all at once and byte by byte: both must come to the same.
fn request_within(bytes: &[u8], limits: &Limits) -> Result<RequestHead, Reject> {
    let mut head = RequestHead::default();
    let parsed = head.parse(bytes, limits);
    let mut slow = RequestHead::default();
    let mut trickled = Ok(Parse::Partial);
    for len in 1..=bytes.len() {
        trickled = slow.parse(&bytes[..len], limits);
        if trickled != Ok(Parse::Partial) {
            break;
        }
    }
    match (parsed, trickled) {
        (Ok(Parse::Complete(len)), _) => {
            assert_eq!(trickled, parsed, "{:?}", text(bytes));
            assert_eq!(summary(&slow), summary(&head));
            assert!(len <= bytes.len());
            Ok(head)
        }
        (Err(reject), Err(_)) => Err(reject),
        _ => panic!(
            "{parsed:?} at once, {trickled:?} byte by byte: {:?}",
            text(bytes)
        ),
    }
}

fn request(bytes: impl AsRef<[u8]>) -> Result<RequestHead, Reject> {
    request_within(bytes.as_ref(), &Limits::default())
}

/// A GET with these field lines beside a good `Host`.
fn request_with(lines: &str) -> Result<RequestHead, Reject> {
    request(format!("GET / HTTP/1.1\r\nHost: a.example\r\n{lines}\r\n"))
}

fn response_to(method: Method, bytes: &[u8]) -> Result<ResponseHead, Reject> {
    let mut head = ResponseHead::default();
    let parsed = head.parse(bytes, method, &Limits::default());
    let mut slow = ResponseHead::default();
    let mut trickled = Ok(Parse::Partial);
    for len in 1..=bytes.len() {
        trickled = slow.parse(&bytes[..len], method, &Limits::default());
        if trickled != Ok(Parse::Partial) {
            break;
        }
    }
    match (parsed, trickled) {
        (Ok(Parse::Complete(_)), _) => {
            assert_eq!(trickled, parsed, "{:?}", text(bytes));
            assert_eq!(list(slow.fields()), list(head.fields()));
            assert_eq!(
                (slow.status(), slow.framing()),
                (head.status(), head.framing())
            );
            Ok(head)
        }
        (Err(reject), Err(_)) => Err(reject),
        _ => panic!(
            "{parsed:?} at once, {trickled:?} byte by byte: {:?}",
            text(bytes)
        ),
    }
}

fn response(bytes: impl AsRef<[u8]>) -> Result<ResponseHead, Reject> {
    response_to(Method::Get, bytes.as_ref())
}

/// All that a request means to whoever comes after us: method, path, query, authority, framing, fields.
type Summary = (
    String,
    String,
    Option<String>,
    String,
    Framing,
    Vec<(String, String)>,
);

fn summary(head: &RequestHead) -> Summary {
    (
        head.method_name().to_owned(),
        head.path().to_owned(),
        head.query().map(str::to_owned),
        head.authority().to_owned(),
        head.framing(),
        list(head.fields()),
    )
}

fn list(fields: &Fields) -> Vec<(String, String)> {
    fields
        .iter()
        .map(|(name, value)| (text(name), text(value)))
        .collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The head as an origin gets it.
fn forwarded(head: &RequestHead) -> String {
    let mut out = Vec::new();
    head.encode(&mut out, &FORWARD);
    text(&out)
}

const FORWARD: Forward<'_> = Forward {
    peer: "192.0.2.1",
    scheme: "https",
    port: 443,
    told: Told::XForwarded,
    via: None,
    passes_trailers: false,
    fallback_authority: "192.0.2.9:80",
};
