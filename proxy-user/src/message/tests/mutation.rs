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

#[test]
fn what_is_taken_of_a_mutilated_request_is_forwarded_as_one_request_of_the_same_meaning() {
    let mut random = Random(1);
    let taken = (0..60_000)
        .map(|round| mutilate(REQUESTS[round % REQUESTS.len()], &mut random))
        .filter(|bytes| fuzz::check_request(bytes, &Limits::default()).is_some())
        .count();
    assert!(
        taken > 10_000,
        "the wounds are too deep to tell anything: {taken}"
    );
}

#[test]
fn what_is_taken_of_a_mutilated_response_is_answered_as_one_response_of_the_same_meaning() {
    let mut random = Random(2);
    let asked = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let taken = (0..60_000)
        .map(|round| mutilate(RESPONSES[round % RESPONSES.len()], &mut random))
        .filter(|bytes| fuzz::check_response(bytes, asked, &Limits::default()).is_some())
        .count();
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
