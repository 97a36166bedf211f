//! The simplest readers there can be of what Sluice writes, to either side.

use anyhow::{Context, Result, bail, ensure};
use rig::scripted::{Heard, chunks_end, data_of, field, in_one_chunk};

/// What a proxy says of the client it speaks for, and of itself: beside these a request goes on as the client meant it.
const CLAIMS: [&str; 8] = [
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-real-ip",
    "forwarded",
    "via",
    "x-request-id",
];

/// What differs from answer to answer.
const OF_THE_MOMENT: [&str; 2] = ["date", "x-request-id"];

/// One response as it came.
#[derive(Debug, Default)]
pub struct Response {
    pub status: u16,
    /// As it came, but for what is of the moment.
    pub bytes: Vec<u8>,
    /// It came to its end.
    pub is_whole: bool,
}

/// The responses, one after the other; the first final one may be to a HEAD.
pub fn responses(bytes: &[u8], is_head: bool) -> Result<Vec<Response>> {
    let mut found: Vec<Response> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = position(rest, b"\r\n\r\n").context("a head without an end")? + 4;
        let head = &rest[..end];
        let text = String::from_utf8_lossy(head);
        ensure!(text.starts_with("HTTP/1.1 "), "no response: {text:?}");
        let status: u16 = text
            .get(9..12)
            .and_then(|code| code.parse().ok())
            .context("no status")?;
        let is_first = !found.iter().any(|response| response.status >= 200);
        let has_none = status < 200 || matches!(status, 204 | 304) || (is_head && is_first);
        let length = field(head, "content-length");
        let body = &rest[end..];
        let length = match (length, field(head, "transfer-encoding").as_deref()) {
            _ if has_none => Some(0),
            (Some(length), None) => Some(length.parse().context("no length")?),
            (None, Some("chunked")) => chunks_end(body),
            (None, None) => None,
            both => bail!("two framings: {both:?}"),
        };
        let length = length.filter(|length| *length <= body.len());
        let length_there = length.unwrap_or(body.len());
        at += end + length_there;
        let mut bytes = without_moment(head);
        bytes.extend(in_one_chunk(head, &body[..length_there]));
        found.push(Response {
            status,
            bytes,
            is_whole: length.is_some(),
        });
    }
    Ok(found)
}

/// What was heard, without the claims of a proxy, which are there once each at most and hold nothing of what the client claimed.
pub fn without_claims(heard: &Heard) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for line in lines(&heard.head) {
        match CLAIMS.iter().find(|claim| is_named(line, claim)) {
            Some(claim) => {
                let text = String::from_utf8_lossy(line);
                ensure!(
                    field(&heard.head, claim).is_some(),
                    "{claim} is there twice"
                );
                ensure!(!text.contains("evil"), "the client's own claim: {text}");
            }
            None => bytes.extend([line, b"\r\n"].concat()),
        }
    }
    let client = field(&heard.head, "x-forwarded-for");
    ensure!(
        client.as_deref() == Some(rig::field::CLIENT_V4),
        "for {client:?}"
    );
    bytes.extend_from_slice(b"\r\n");
    bytes.extend(in_one_chunk(&heard.head, &heard.body));
    Ok(bytes)
}

/// A response's head without what is of the moment.
fn without_moment(head: &[u8]) -> Vec<u8> {
    let is_kept = |line: &&[u8]| !OF_THE_MOMENT.iter().any(|name| is_named(line, name));
    let lines = lines(head).into_iter().filter(is_kept);
    let mut kept: Vec<u8> = lines.flat_map(|line| [line, b"\r\n"].concat()).collect();
    kept.extend_from_slice(b"\r\n");
    kept
}

/// A request as whoever serves it understands it.
#[derive(Debug, PartialEq)]
pub struct Meaning {
    pub start: String,
    /// Names in lower case, sorted by name; of one name in the order in which they came.
    pub fields: Vec<(String, String)>,
    pub data: Vec<u8>,
}

/// Fields of one hop, and those by which a proxy frames anew what it means the same.
const OF_THE_HOP: [&str; 4] = [
    "connection",
    "content-length",
    "transfer-encoding",
    "keep-alive",
];

pub fn meaning(heard: &Heard) -> Result<Meaning> {
    let mut lines = lines(&heard.head).into_iter();
    let start = lines.next().unwrap_or_default();
    let mut fields = Vec::new();
    for line in lines {
        let text: String = line.iter().map(|byte| char::from(*byte)).collect();
        let (name, value) = text.split_once(':').context("a line without a colon")?;
        let name = name.to_ascii_lowercase();
        if !OF_THE_HOP.contains(&name.as_str()) && !CLAIMS.contains(&name.as_str()) {
            fields.push((name, value.trim().to_owned()));
        }
    }
    fields.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(Meaning {
        start: start.iter().map(|byte| char::from(*byte)).collect(),
        fields,
        data: data_of(&heard.head, &heard.body),
    })
}

fn lines(head: &[u8]) -> Vec<&[u8]> {
    let mut rest = head.strip_suffix(b"\r\n\r\n").unwrap_or(head);
    let mut lines = Vec::new();
    while let Some(end) = position(rest, b"\r\n") {
        lines.push(&rest[..end]);
        rest = &rest[end + 2..];
    }
    lines.push(rest);
    lines
}

fn is_named(line: &[u8], name: &str) -> bool {
    line.get(..name.len())
        .is_some_and(|found| found.eq_ignore_ascii_case(name.as_bytes()))
        && line.get(name.len()) == Some(&b':')
}

fn position(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
