//! What must hold of any bytes taken for a head: fed by fuzzing, by mutilated messages, and by the corpus that fuzzing left.

use super::{
    EncodedSlash, Fields, Forward, Framing, Limits, Method, Parse, RequestHead, ResponseHead, Told,
    UnderscoreFields, is_field_name,
};

const FORWARD: Forward<'static> = Forward {
    peer: "192.0.2.1",
    scheme: "http",
    port: 80,
    told: Told::XForwarded,
    via: None,
    passes_trailers: false,
    fallback_authority: "192.0.2.9:80",
};

/// A target of fuzzing: the first byte chooses settings, the second where the head is cut in two, the rest is the head.
pub fn request(data: &[u8]) {
    let [settings, cut, head @ ..] = data else {
        return;
    };
    let limits = Limits {
        underscore_fields: match settings % 3 {
            0 => UnderscoreFields::Drop,
            1 => UnderscoreFields::Keep,
            _ => UnderscoreFields::Refuse,
        },
        encoded_slash: match settings / 3 % 3 {
            0 => EncodedSlash::Refuse,
            1 => EncodedSlash::Keep,
            _ => EncodedSlash::Decode,
        },
        head_bytes_max: 400,
        field_bytes_max: 120,
        fields_max: 12,
        target_bytes_max: 100,
        ..Limits::default()
    };
    let whole = check_request(head, &limits);
    // Which fault is met first may differ where a head comes in pieces; whether there is one may not.
    let mut slow = RequestHead::default();
    let first = slow.parse(&head[..usize::from(*cut).min(head.len())], &limits);
    let parsed = match first {
        Ok(Parse::Partial) => slow.parse(head, &limits),
        done => done,
    };
    assert_eq!(matches!(parsed, Ok(Parse::Complete(_))), whole.is_some());
    if let Some(whole) = whole {
        assert_eq!(Meaning::of(&slow), Meaning::of(&whole));
    }
}

/// Parses a head; one that is taken is written as exactly one request that means the same, to us and to a simple reader.
pub(super) fn check_request(bytes: &[u8], limits: &Limits) -> Option<RequestHead> {
    let mut head = RequestHead::default();
    let Ok(Parse::Complete(len)) = head.parse(bytes, limits) else {
        return None;
    };
    assert!(bytes[..len].ends_with(b"\r\n\r\n"));
    let encoded = encode(&head);
    let lines = lines_of(&encoded);
    let count = |name: &str| {
        let of_name = |line: &&&[u8]| line.starts_with(name.as_bytes());
        lines.iter().filter(of_name).count()
    };
    assert_eq!(count("host:"), 1);
    assert!(count("content-length:") + count("transfer-encoding:") <= 1);
    for hop in ["connection:", "upgrade:", "te:", "trailer:", "keep-alive:"] {
        assert_eq!(count(hop), 0, "{hop}");
    }

    // What was written anew is ours: no limit of a client's bytes is for it.
    let own = Limits {
        head_bytes_max: 1 << 20,
        field_bytes_max: 1 << 20,
        fields_max: 200,
        target_bytes_max: 1 << 20,
        ..*limits
    };
    let mut again = RequestHead::default();
    let parsed = again.parse(&encoded, &own);
    assert_eq!(parsed, Ok(Parse::Complete(encoded.len())));
    let (first, second) = (Meaning::of(&head), Meaning::of(&again));
    assert_eq!(first.path, second.path, "a path in its one form has one");
    let host = match first.authority.is_empty() {
        true => FORWARD.fallback_authority,
        false => first.authority,
    };
    // A body without bytes and none are the same to an origin.
    let length = |framing| match framing {
        Framing::None => Framing::Length(0),
        framing => framing,
    };
    assert_eq!(length(first.framing), length(second.framing));
    let expected = Meaning {
        authority: host,
        framing: second.framing,
        ..first
    };
    assert_eq!(second, expected);
    if !head.authority().is_empty() {
        assert_eq!(encode(&again), encoded, "once written anew it stays");
    }
    Some(head)
}

/// A target of fuzzing: the first byte says what is answered, the second where the head is cut in two, the rest is the head.
pub fn response(data: &[u8]) {
    let [asked, cut, head @ ..] = data else {
        return;
    };
    let method = if asked & 1 == 0 { "GET" } else { "HEAD" };
    let minor = asked >> 1 & 1;
    let limits = Limits {
        head_bytes_max: 400,
        field_bytes_max: 120,
        fields_max: 12,
        ..Limits::default()
    };
    let asked = format!("{method} / HTTP/1.{minor}\r\nHost: a\r\nConnection: keep-alive\r\n\r\n");
    let whole = check_response(head, asked.as_bytes(), &limits);
    let mut slow = ResponseHead::default();
    let method = match method {
        "HEAD" => Method::Head,
        _ => Method::Get,
    };
    let first = slow.parse(&head[..usize::from(*cut).min(head.len())], method, &limits);
    let parsed = match first {
        Ok(Parse::Partial) => slow.parse(head, method, &limits),
        done => done,
    };
    assert_eq!(matches!(parsed, Ok(Parse::Complete(_))), whole.is_some());
    if let Some(whole) = whole {
        assert_eq!(list(slow.fields()), list(whole.fields()));
        let what = |head: &ResponseHead| (head.status(), head.framing(), head.keep_alive());
        assert_eq!(what(&slow), what(&whole));
    }
}

/// Parses a response to the request `asked`; one that is taken goes to the client as exactly one that means the same.
pub(super) fn check_response(bytes: &[u8], asked: &[u8], limits: &Limits) -> Option<ResponseHead> {
    let mut request = RequestHead::default();
    assert!(request.parse(asked, &Limits::default()).is_ok());
    let mut head = ResponseHead::default();
    match head.parse(bytes, request.method(), limits) {
        Ok(Parse::Complete(len)) => assert!(bytes[..len].ends_with(b"\r\n\r\n")),
        Ok(Parse::Partial) => return None,
        Err(reject) => {
            assert_eq!(reject.status, 502, "an origin's fault is no client's");
            return None;
        }
    }
    let mut encoded = Vec::new();
    let answer = head.answer(&request, true);
    head.encode(&mut encoded, &answer, "Thu, 01 Jan 1970 00:00:00 GMT");
    let lines = lines_of(&encoded);
    let is_framing = |line: &&[u8]| {
        line.starts_with(b"content-length:") || line.starts_with(b"transfer-encoding:")
    };
    assert!(lines.into_iter().filter(is_framing).count() <= 1);
    let own = Limits {
        head_bytes_max: 1 << 20,
        field_bytes_max: 1 << 20,
        fields_max: 200,
        ..*limits
    };
    let mut again = ResponseHead::default();
    let parsed = again.parse(&encoded, request.method(), &own);
    assert_eq!(parsed, Ok(Parse::Complete(encoded.len())));
    assert_eq!(
        (again.status(), again.framing()),
        (head.status(), answer.framing)
    );
    let without_date = |head: &ResponseHead| {
        let mut fields = list(head.fields());
        fields.retain(|(name, _)| name != b"date");
        fields
    };
    assert_eq!(without_date(&again), without_date(&head));
    Some(head)
}

/// All that a request means to whoever comes after us.
#[derive(Debug, PartialEq)]
struct Meaning<'h> {
    method: &'h str,
    path: &'h str,
    query: Option<&'h str>,
    authority: &'h str,
    framing: Framing,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<'h> Meaning<'h> {
    fn of(head: &'h RequestHead) -> Self {
        Self {
            method: head.method_name(),
            path: head.path(),
            query: head.query(),
            authority: head.authority(),
            framing: head.framing(),
            fields: list(head.fields()),
        }
    }
}

fn list(fields: &Fields) -> Vec<(Vec<u8>, Vec<u8>)> {
    let owned = |(name, value): (&[u8], &[u8])| (name.to_vec(), value.to_vec());
    fields.iter().map(owned).collect()
}

fn encode(head: &RequestHead) -> Vec<u8> {
    let mut out = Vec::new();
    head.encode(&mut out, &FORWARD);
    out
}

/// The lines of an encoded head, read by the simplest reader there can be.
fn lines_of(encoded: &[u8]) -> Vec<&[u8]> {
    let head = encoded.strip_suffix(b"\r\n\r\n");
    assert!(head.is_some(), "an empty line at the end");
    let mut lines = Vec::new();
    let mut rest = head.unwrap_or_default();
    while let Some(at) = rest.windows(2).position(|pair| pair == b"\r\n") {
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    for line in &lines {
        let is_visible = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
        let is_fine = !line.is_empty() && line.iter().all(is_visible);
        assert!(is_fine, "{:?}", String::from_utf8_lossy(encoded));
    }
    for line in &lines[1..] {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(0);
        let is_fine = is_field_name(&line[..colon]) && line[colon + 1] == b' ';
        assert!(is_fine, "{:?}", String::from_utf8_lossy(line));
    }
    lines
}

/// Runs a target over the corpus that fuzzing left it in `tests/fuzz`.
#[cfg(test)]
pub(crate) fn replay(target: &str, run: fn(&[u8])) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus");
    let entries = std::fs::read_dir(format!("{folder}/{target}")).expect("a corpus");
    let mut count = 0;
    for entry in entries {
        let path = entry.expect("an entry").path();
        println!("{}", path.display());
        run(&std::fs::read(&path).expect("an input"));
        count += 1;
    }
    assert!(count >= 20, "{count} inputs are no corpus");
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_fuzzing_left_of_heads_keeps_the_rules() {
        super::replay("request", super::request);
        super::replay("response", super::response);
    }
}
