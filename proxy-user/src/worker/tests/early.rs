//! Bodies that wait for a 100, and answers that do not wait for bodies.

use super::client::{encode_chunked, get, value_of};
use super::origin::ok;
use super::*;

const EXPECTING: &str =
    "POST /expecting HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";

#[test]
fn a_body_that_waits_is_asked_for_and_never_lost() {
    let origin = Origin::answering(|request| ok(&request.body));
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    for _ in 0..2 {
        client.send(EXPECTING);
        assert_eq!(client.response().status, 100);
        client.send("hello");
        assert_eq!(client.response().text(), "hello");
    }
    // Who does not wait after all is no worse off (RFC 9110 section 10.1.1).
    client.send([EXPECTING, "hello", &get("/next")].concat());
    assert_eq!(client.response().status, 100);
    assert_eq!(client.response().text(), "hello");
    assert_eq!(client.response().text(), "");
    assert_eq!(origin.connections(), 1);
    assert!(
        !origin
            .requests()
            .iter()
            .any(|request| value_of(&request.head, "expect").is_some())
    );
}

#[test]
fn a_body_that_waits_is_refused_without_being_asked_for() {
    let origin = Origin::echoing();
    let more =
        "[[route]]\nmatch = { path = \"/expecting\" }\nrespond = { status = 403, body = \"no\" }\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send(EXPECTING);
    let response = client.response();
    // Whether the body comes after all nobody can know, and so neither where the next request would begin.
    assert_eq!((response.status, response.closes()), (403, true));
    client.send(["hello", &get("/next")].concat());
    client.expect_end();
    assert_eq!(origin.connections(), 0);
}

#[test]
fn no_body_is_asked_for_where_no_endpoint_takes_it() {
    let sluice = Sluice::start(&[Origin::nowhere()], "");
    let mut client = Client::connect(&sluice);
    client.send(EXPECTING);
    let response = client.response();
    assert_eq!((response.status, response.closes()), (503, true));
    client.expect_end();
}

/// Answers with a 413 as soon as the head is there, and reads nothing more.
fn refusing() -> Origin {
    Origin::start(|peer| {
        while let Some(request) = peer.head() {
            if request.path() == "/upload" {
                peer.send("HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno");
                return peer.wait_for_end();
            }
            peer.send(ok(request.path()));
        }
    })
}

#[test]
fn behind_an_early_answer_a_short_rest_of_the_body_is_read_over() {
    let origin = refusing();
    let sluice = Sluice::start(&[origin.address], "");
    let smuggled = get("/smuggled");
    let body = [smuggled.as_bytes(), &patterned(20_000)[..]].concat();
    let mut client = Client::connect(&sluice);
    for field in [
        format!("content-length: {}", body.len()),
        "transfer-encoding: chunked".to_owned(),
    ] {
        let bytes = if field.starts_with('t') {
            encode_chunked(&body, 999)
        } else {
            body.clone()
        };
        client.send(format!(
            "POST /upload HTTP/1.1\r\nhost: a\r\n{field}\r\n\r\n"
        ));
        assert_eq!(client.response().status, 413);
        for piece in bytes.chunks(3000) {
            client.send(piece);
        }
        assert_eq!(client.get("/next").text(), "/next");
    }
    assert_eq!(origin.paths(), ["/upload", "/next", "/upload", "/next"]);
}

#[test]
fn behind_an_early_answer_a_long_rest_of_the_body_ends_the_connection() {
    let origin = refusing();
    let sluice = Sluice::start(&[origin.address], "");
    for field in ["content-length: 1000000", "transfer-encoding: chunked"] {
        let mut client = Client::connect(&sluice);
        client.send(format!(
            "POST /upload HTTP/1.1\r\nhost: a\r\n{field}\r\n\r\n"
        ));
        let response = client.response();
        assert_eq!((response.status, response.text()), (413, "no"));
        let bytes = encode_chunked(&patterned(1_000_000), 64 << 10);
        client.try_send(&bytes);
        client.try_send(get("/smuggled"));
        client.expect_end();
    }
    assert_eq!(origin.paths(), ["/upload", "/upload"]);
    origin.wait_until_gone(2);
}

/// An origin that closes with something unread resets the connection, and its answer is there all the same.
#[test]
fn an_early_answer_survives_the_reset_behind_it() {
    let origin = Origin::start(|peer| {
        if peer.head().is_some() {
            peer.send("HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    for _ in 0..3 {
        let mut client = Client::connect(&sluice);
        client.send("POST /upload HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n");
        client.try_send(patterned(3_000_000));
        let response = client.response();
        assert_eq!((response.status, response.text()), (413, "no"));
    }
}

#[test]
fn an_answer_of_our_own_reads_a_short_body_over_and_ends_behind_a_long_one() {
    let origin = Origin::echoing();
    let more = "[[route]]\nmatch = { path = \"/fixed\" }\nrespond = { status = 200, body = \"fixed\" }\n\
                [tunables]\n\"http.drain_bytes_max\" = \"1000B\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    for (length, lives) in [(1000, true), (1001, false)] {
        let mut client = Client::connect(&sluice);
        client.send(format!(
            "POST /fixed HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n"
        ));
        client.send(vec![b'x'; length]);
        let response = client.response();
        assert_eq!(
            (response.text(), response.closes()),
            ("fixed", !lives),
            "{length}"
        );
        if lives {
            assert_eq!(client.get("/next").text(), "/next");
        } else {
            client.expect_end();
        }
    }
    // How long a chunked body is shows only when it is read.
    for (length, lives) in [(1000, true), (1001, false)] {
        let mut client = Client::connect(&sluice);
        client.send("POST /fixed HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n");
        client.send(encode_chunked(&vec![b'x'; length], 100));
        assert_eq!(client.response().text(), "fixed");
        if lives {
            assert_eq!(client.get("/next").text(), "/next");
        } else {
            client.expect_end();
        }
    }
}

#[test]
fn a_response_may_begin_while_the_body_is_still_on_its_way() {
    let origin = Origin::start(|peer| {
        let Some(request) = peer.head() else { return };
        peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n");
        let Some(body) = peer.body(&request.head) else {
            return;
        };
        peer.send(format!("{:x}\r\n", body.len()));
        peer.send(body);
        peer.send("\r\n0\r\n\r\n");
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\n");
    let response = client.head();
    assert_eq!(response.value("transfer-encoding"), Some("chunked"));
    client.send("second");
    let (body, _) = {
        client.shutdown();
        client.rest()
    };
    assert_eq!(
        String::from_utf8_lossy(&body),
        "5\r\nfirst\r\n6\r\nsecond\r\n0\r\n\r\n"
    );
}
