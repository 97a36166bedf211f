//! Trailers by list, and bodies that flow as they come.

use std::sync::Mutex;
use std::sync::mpsc::channel;

use super::client::get;
use super::*;

const LISTED: &str = "[[route]]\nname = \"listed\"\nmatch = { path = \"/listed\" }\nupstream = \"app\"\n\
    trailers = [\"grpc-status\", \"X-Checksum\"]\n";

const TRAILERS: &str = "Grpc-Status: 0\r\nX-Secret: 1\r\nx-checksum:  abc \r\ncontent-length: 9\r\nTransfer-Encoding: x\r\nHost: b\r\n\r\n";

/// What comes behind the last chunk of an answer, and behind it the rest.
fn sections(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let parts = text.split("\r\n0\r\n").skip(1);
    parts
        .map(|part| part.split("HTTP/1.1").next().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn trailers_pass_where_their_route_lists_them_and_nowhere_else() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.head() {
            // A request's own trailers are looked at below.
            let mut body = Vec::new();
            if request.head.contains("chunked") {
                body = peer.raw_chunked();
            }
            let answer = format!(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: grpc-status\r\n\r\n5\r\nhello\r\n0\r\n{TRAILERS}"
            );
            peer.note(&body);
            peer.send(answer);
        }
    });
    let sluice = Sluice::start(&[origin.address], LISTED);
    let mut client = Client::connect(&sluice);
    client.send(get("/listed"));
    client.send(get("/other"));
    for path in ["/listed", "/other"] {
        client.send(format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\nte: Trailers, deflate;q=0.5\r\nconnection: te\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n{TRAILERS}"
        ));
    }
    client.send("GET /listed HTTP/1.0\r\n\r\n");
    let (bytes, end) = client.rest();
    assert_eq!(end, End::Finished);
    let passed = "grpc-status: 0\r\nx-checksum: abc\r\n\r\n";
    assert_eq!(
        sections(&bytes),
        [passed, "\r\n", passed, "\r\n"],
        "HTTP/1.0 has none"
    );
    assert!(bytes.ends_with(b"hello"));
    let requests = origin.requests();
    let told: Vec<_> = requests
        .iter()
        .map(|request| {
            let body = String::from_utf8_lossy(&request.body).into_owned();
            (
                request
                    .head
                    .contains("\r\nte: trailers\r\nconnection: te\r\n"),
                body,
            )
        })
        .collect();
    let sent = |trailers: &str| format!("2\r\nhi\r\n0\r\n{trailers}\r\n");
    assert_eq!(
        told,
        [
            (false, String::new()),
            (false, String::new()),
            (true, sent("grpc-status: 0\r\nx-checksum: abc\r\n")),
            (false, sent("")),
            (false, String::new()),
        ]
    );
    assert_eq!(
        origin.connections(),
        1,
        "the message behind trailers is found"
    );
}

#[test]
fn a_broken_trailer_section_is_refused_on_a_route_that_lists_trailers_too() {
    let origin = Origin::start(|peer| {
        while peer.head().is_some() {
            peer.send(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\ngrpc-status : 0\r\n\r\n",
            );
        }
    });
    let sluice = Sluice::start(&[origin.address], LISTED);
    let mut client = Client::connect(&sluice);
    let answer = client.get("/listed");
    assert_eq!((answer.status, sluice.rejected("trailer")), (502, 1.0));
}

/// Each piece must be with the client before the origin sends the next one: nothing is gathered.
#[test]
fn events_and_bodies_without_a_length_flow_at_once() {
    for head in [
        "content-type: text/event-stream\r\ntransfer-encoding: chunked",
        "content-type: text/event-stream",
        "content-length: 32",
    ] {
        let is_chunked = head.ends_with("chunked");
        let (go, released) = channel();
        let released = Mutex::new(released);
        let origin = Origin::start(move |peer| {
            if peer.head().is_none() {
                return;
            }
            peer.send(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n"));
            for n in 0..4 {
                if !peer.wait_for(&released) {
                    return;
                }
                let event = format!("data: {n}\n");
                if is_chunked {
                    peer.send(format!("{:x}\r\n{event}\r\n", event.len()));
                } else {
                    peer.send(event);
                }
            }
            if is_chunked {
                peer.send("0\r\n\r\n");
            }
        });
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        client.send(get("/events"));
        let response = client.head();
        assert_eq!(response.status, 200, "the head waits for no body");
        for n in 0..4 {
            go.send(()).expect("the origin waits");
            client.read_until(&format!("data: {n}\n"));
        }
    }
}
