//! Mutilated messages: nothing panics, and whatever is taken goes on as exactly one message of the same meaning.

use super::*;

const REQUESTS: &[&str] = &[
    "GET /a/b?c=d HTTP/1.1\r\nHost: www.example.com\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nCookie: a=b; c=d\r\n\r\n",
    "POST http://[2001:db8::1]:8080/x/%7e/../y%2c HTTP/1.1\r\nHost: a.example\r\nContent-Length: 12\r\nContent-Type: text/plain\r\nExpect: 100-continue\r\n\r\n",
    "PUT /a//b/./c HTTP/1.0\r\nConnection: keep-alive, x-a\r\nX-A: 1\r\nX_B: 2\r\nContent-Length: 0\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
];

const RESPONSES: &[&str] = &[
    "HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Length: 12\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\n",
    "HTTP/1.0 302 Found\r\nLocation: http://a/\r\nConnection: x-a\r\nX-A:1\r\n\r\n",
    "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nTransfer-Encoding: chunked\r\n\r\n",
];

/// What parsers have stumbled over.
const SPICE: &[&str] = &[
    "\r",
    "\n",
    "\r\n",
    "\r\n\r\n",
    "\0",
    " ",
    "\t",
    ":",
    ",",
    ";",
    "%",
    "%2e",
    "%2f",
    "..",
    "/",
    "\\",
    "?",
    "#",
    "@",
    "[",
    "]",
    "\u{7f}",
    "\u{ff}",
    "+",
    "-",
    "0x",
    "chunked",
    "Transfer-Encoding: chunked\r\n",
    "Content-Length: 5\r\n",
    "Host: b\r\n",
    "Connection: host\r\n",
    " HTTP/1.1",
    "\r\n x",
    "HTTP/1.0",
];

/// SplitMix64.
pub(super) struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ mixed >> 27) % bound as u64) as usize
    }
}

/// Bytes with one to four small wounds.
fn mutilate(bytes: &str, random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.as_bytes().to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(5) {
            0 => bytes[at] = random.below(256) as u8,
            1 => drop(bytes.remove(at)),
            2 => drop(bytes.splice(at..at, SPICE[random.below(SPICE.len())].bytes())),
            3 => bytes[at] ^= 0x20,
            _ => {
                let end = at + random.below((bytes.len() - at).min(20));
                let copied = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, copied));
            }
        }
    }
    bytes.extend_from_slice(b"\r\n\r\n");
    bytes
}

/// The lines of an encoded head, read by the simplest reader there can be.
fn lines_of(encoded: &[u8]) -> Vec<&[u8]> {
    let head = encoded
        .strip_suffix(b"\r\n\r\n")
        .expect("an empty line at the end");
    let mut lines = Vec::new();
    let mut rest = head;
    while let Some(at) = rest.windows(2).position(|pair| pair == b"\r\n") {
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    for line in &lines {
        assert!(
            !line.is_empty()
                && line
                    .iter()
                    .all(|b| *b == b'\t' || (*b >= b' ' && *b != 0x7f)),
            "{:?}",
            text(encoded)
        );
    }
    for line in &lines[1..] {
        let colon = line.iter().position(|b| *b == b':').expect("a colon");
        assert!(
            is_field_name(&line[..colon]) && line[colon + 1] == b' ',
            "{:?}",
            text(line)
        );
    }
    lines
}

#[test]
fn what_is_taken_of_a_mutilated_request_is_forwarded_as_one_request_of_the_same_meaning() {
    let mut random = Random(1);
    let mut taken = 0;
    for round in 0..60_000 {
        let bytes = mutilate(REQUESTS[round % REQUESTS.len()], &mut random);
        let mut head = RequestHead::default();
        let Ok(Parse::Complete(len)) = head.parse(&bytes, &Limits::default()) else {
            continue;
        };
        taken += 1;
        assert!(bytes[..len].ends_with(b"\r\n\r\n"));
        let encoded = forwarded_bytes(&head);
        let lines = lines_of(&encoded);
        let count = |name: &str| {
            lines
                .iter()
                .filter(|line| line.starts_with(name.as_bytes()))
                .count()
        };
        assert_eq!(count("host:"), 1);
        assert!(
            count("content-length:") + count("transfer-encoding:") <= 1
                && count("connection:") == 0
        );

        let mut again = RequestHead::default();
        assert_eq!(
            again.parse(&encoded, &Limits::default()),
            Ok(Parse::Complete(encoded.len())),
            "{:?}",
            text(&encoded)
        );
        let (first, second) = (summary(&head), summary(&again));
        assert_eq!(
            (&first.0, &first.1, &first.2, &first.5),
            (&second.0, &second.1, &second.2, &second.5),
            "{:?}",
            text(&bytes)
        );
        assert_eq!(
            second.3,
            if first.3.is_empty() {
                "192.0.2.9:80"
            } else {
                &first.3
            }
        );
        let length_of = |framing| {
            if framing == Framing::None {
                Framing::Length(0)
            } else {
                framing
            }
        };
        assert_eq!(length_of(first.4), length_of(second.4));
        let once_more = forwarded_bytes(&again);
        if first.3.is_empty() {
            // The host that we put in where there was none now counts as asked for.
            assert!(once_more.starts_with(&encoded[..encoded.len() - 2]));
        } else {
            assert_eq!(
                once_more, encoded,
                "what was written anew once stays as it is"
            );
        }
    }
    assert!(
        taken > 10_000,
        "the wounds are too deep to tell anything: {taken}"
    );
}

fn forwarded_bytes(head: &RequestHead) -> Vec<u8> {
    let mut out = Vec::new();
    head.encode(
        &mut out,
        &Forward {
            peer: "192.0.2.1",
            scheme: "http",
            port: 80,
            told: Told::XForwarded,
            via: None,
            passes_trailers: false,
            fallback_authority: "192.0.2.9:80",
        },
    );
    out
}

#[test]
fn what_is_taken_of_a_mutilated_response_is_answered_as_one_response_of_the_same_meaning() {
    let mut random = Random(2);
    let mut taken = 0;
    let mut request = RequestHead::default();
    assert!(
        request
            .parse(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", &Limits::default())
            .is_ok()
    );
    for round in 0..60_000 {
        let bytes = mutilate(RESPONSES[round % RESPONSES.len()], &mut random);
        let mut head = ResponseHead::default();
        match head.parse(&bytes, Method::Get, &Limits::default()) {
            Ok(Parse::Complete(_)) => taken += 1,
            Ok(Parse::Partial) => continue,
            Err(reject) => {
                assert_eq!(reject.status, 502);
                continue;
            }
        }
        let mut encoded = Vec::new();
        let answer = head.answer(&request, true);
        head.encode(&mut encoded, &answer, "Thu, 01 Jan 1970 00:00:00 GMT");
        lines_of(&encoded);
        let mut again = ResponseHead::default();
        assert_eq!(
            again.parse(&encoded, Method::Get, &Limits::default()),
            Ok(Parse::Complete(encoded.len())),
            "{:?}",
            text(&encoded)
        );
        assert_eq!(
            (again.status(), again.framing()),
            (head.status(), answer.framing),
            "{:?}",
            text(&bytes)
        );
        let without_date = |fields: &Fields| {
            list(fields)
                .into_iter()
                .filter(|(name, _)| name != "date")
                .collect::<Vec<_>>()
        };
        assert_eq!(without_date(again.fields()), without_date(head.fields()));
    }
    assert!(
        taken > 10_000,
        "the wounds are too deep to tell anything: {taken}"
    );
}

#[test]
fn a_mutilated_request_is_judged_alike_however_it_arrives() {
    let mut random = Random(3);
    for round in 0..3000 {
        let bytes = mutilate(REQUESTS[round % REQUESTS.len()], &mut random);
        let mut head = RequestHead::default();
        let at_once = head.parse(&bytes, &Limits::default());
        let mut slow = RequestHead::default();
        let mut len = 0;
        let in_pieces = loop {
            len = (len + 1 + random.below(40)).min(bytes.len());
            match slow.parse(&bytes[..len], &Limits::default()) {
                Ok(Parse::Partial) if len < bytes.len() => {}
                outcome => break outcome,
            }
        };
        // Which fault is met first may differ, whether there is one may not.
        assert_eq!(at_once.is_ok(), in_pieces.is_ok(), "{:?}", text(&bytes));
        if at_once.is_ok() {
            assert_eq!(at_once, in_pieces);
            assert_eq!(summary(&head), summary(&slow));
        }
    }
}

#[test]
fn random_bytes_do_no_harm() {
    let mut random = Random(4);
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..random.below(80))
            .map(|_| b"GET /.%2e:\r\n \0HTP1*[]x"[random.below(22)])
            .collect();
        let _ = RequestHead::default().parse(&bytes, &Limits::default());
        let _ = ResponseHead::default().parse(&bytes, Method::Head, &Limits::default());
    }
}
