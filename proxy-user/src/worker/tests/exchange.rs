//! Exchanges that go well: one after the other, many at once, and every kind of end that a message can have.

use super::client::{encode_chunked, get};
use super::origin::ok;
use super::*;

#[test]
fn one_connection_on_each_side_serves_many_exchanges() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    for n in 0..50 {
        let path = format!("/{n}");
        let response = client.get(&path);
        assert_eq!((response.status, response.text()), (200, &*path));
        assert!(!response.closes());
    }
    assert_eq!(origin.connections(), 1);
    // An exchange is counted when it is over, which the client may know a moment before the worker does.
    let series = "sluice_http_requests_total{listener=\"web\",route=\"all\",code=\"200\"}";
    wait_until("all are counted", || sluice.metric(series) == 50.0);
}

#[test]
fn requests_sent_at_once_are_answered_in_their_order() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    // With bodies between them, so that where a request ends is not where its head ends; and cut into pieces anywhere.
    let requests: Vec<u8> = (0..200)
        .map(|n| match n % 3 {
            0 => get(&format!("/{n}")),
            1 => format!("POST /{n} HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nGET / HTT"),
            _ => format!("PUT /{n} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nGET\r\n0\r\n\r\n"),
        })
        .collect::<String>()
        .into_bytes();
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        for piece in requests.chunks(777) {
            std::io::Write::write_all(&mut sender, piece).unwrap();
        }
    });
    for n in 0..200 {
        assert_eq!(client.response().text(), format!("/{n}"));
    }
    sending.join().unwrap();
    assert_eq!(
        origin.connections(),
        1,
        "an origin gets one request at a time"
    );
    let bodies: Vec<usize> = origin
        .requests()
        .iter()
        .map(|request| request.body.len())
        .collect();
    assert!(
        bodies.chunks(3).all(|three| [0, 9, 3].starts_with(three)),
        "{bodies:?}"
    );
}

#[test]
fn nobody_gets_the_answer_of_another_client() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    std::thread::scope(|scope| {
        for client in 0..16 {
            let address = sluice.address;
            scope.spawn(move || {
                let mut connection = Client::of(std::net::TcpStream::connect(address).unwrap());
                for n in 0..100 {
                    let path = format!("/{client}/{n}");
                    assert_eq!(connection.get(&path).text(), path);
                }
            });
        }
    });
    assert!(origin.connections() <= 16);
}

/// What an origin sends, and the head fields, body and end that clients of 1.1 and of 1.0 get of it.
#[test]
fn every_framing_of_an_origin_becomes_one_that_the_client_understands() {
    let body = patterned(40_000);
    let plain = |head: &str| {
        [
            format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n").as_bytes(),
            &body,
        ]
        .concat()
    };
    let answers = [
        plain("content-length: 40000"),
        [
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            &encode_chunked(&body, 7)[..],
        ]
        .concat(),
        plain("connection: close"),
    ];
    for (index, answer) in answers.into_iter().enumerate() {
        let is_closing = index == 2;
        let origin =
            Origin::start(
                move |peer| {
                    while peer.request().is_some() && peer.send(&answer) && !is_closing {}
                },
            );
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        for _ in 0..2 {
            let response = client.get("/");
            assert_eq!((response.status, response.body == body), (200, true));
            let length = response.value("content-length");
            assert_eq!(length, (index == 0).then_some("40000"));
            assert!(!response.closes());
        }
        // HTTP/1.0 knows no chunks: there the end of the connection is the end of the body.
        let mut old = Client::connect(&sluice);
        old.send("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
        let response = old.response();
        assert_eq!((response.status, response.body == body), (200, true));
        assert_eq!(response.closes(), index != 0);
        assert_eq!(response.value("transfer-encoding"), None);
        let connections = if is_closing { 3 } else { 1 };
        assert_eq!(origin.connections(), connections);
    }
}

#[test]
fn an_http_1_0_client_keeps_its_connection_only_if_it_asks() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send("GET /a HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
    let response = client.response();
    assert_eq!(response.value("connection"), Some("keep-alive"));
    client.send("GET /b HTTP/1.0\r\n\r\n");
    let response = client.response();
    assert_eq!((response.text(), response.closes()), ("/b", true));
    client.expect_end();
}

#[test]
fn a_client_that_says_close_is_closed_behind_its_answer() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    let closing = "GET /a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    client.send([closing, &get("/b")].concat());
    assert!(client.response().closes());
    client.expect_end();
    assert_eq!(origin.paths(), ["/a"]);
}

#[test]
fn responses_that_have_no_body_leave_both_connections_usable() {
    let origin = Origin::answering(|request| {
        let head = match request.path() {
            "/204" => "204 No Content\r\n",
            "/304" => "304 Not Modified\r\ncontent-length: 77\r\n",
            "/chunked" => "200 OK\r\ntransfer-encoding: chunked\r\n",
            "/close" => "200 OK\r\n",
            _ => "200 OK\r\ncontent-length: 77\r\n",
        };
        format!("HTTP/1.1 {head}\r\n").into_bytes()
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    for (method, path, length) in [
        ("GET", "/204", None),
        ("GET", "/304", Some("77")),
        ("HEAD", "/length", Some("77")),
        ("HEAD", "/chunked", None),
        ("HEAD", "/close", None),
        ("HEAD", "/304", Some("77")),
        ("GET", "/204", None),
    ] {
        client.send(format!("{method} {path} HTTP/1.1\r\nhost: a\r\n\r\n"));
        let response = client.head();
        assert_eq!(response.value("content-length"), length, "{method} {path}");
        assert_eq!(response.value("transfer-encoding"), None, "{method} {path}");
        assert!(!response.closes(), "{method} {path}");
    }
    assert_eq!(origin.connections(), 1);
}

#[test]
fn answers_of_our_own_to_a_head_have_no_body() {
    let more = "[[route]]\nmatch = { path = \"/hello\" }\nrespond = { status = 200, body = \"hello\" }\n\
                [[route]]\nmatch = { path = \"/away\" }\nredirect = { status = 302, to = \"/hello\" }\n";
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send(
        [
            "HEAD /hello HTTP/1.1\r\nhost: a\r\n\r\n",
            &get("/away"),
            &get("/hello"),
        ]
        .concat(),
    );
    assert_eq!(client.head().value("content-length"), Some("5"));
    let away = client.response();
    assert_eq!((away.status, away.value("location")), (302, Some("/hello")));
    assert_eq!(client.response().text(), "hello");
    assert_eq!(origin.connections(), 0);
}

#[test]
fn interim_responses_go_on_to_whom_they_concern() {
    let origin = Origin::start(|peer| {
        while peer.request().is_some() {
            peer.send(
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n",
            );
            peer.send("HTTP/1.1 102 Processing\r\n\r\n");
            peer.send(ok("end"));
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    for _ in 0..2 {
        let hints = client.get("/");
        assert_eq!((hints.status, hints.value("link")), (103, Some("</a>")));
        assert_eq!(hints.value("connection"), None);
        assert_eq!(client.response().status, 102);
        assert_eq!(client.response().text(), "end");
    }
    // HTTP/1.0 knows no interim responses (RFC 9110 section 15.2).
    client.send("GET / HTTP/1.0\r\n\r\n");
    assert_eq!(client.response().text(), "end");
    assert_eq!(origin.connections(), 1);
}

#[test]
fn a_connection_has_no_more_exchanges_than_allowed() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"http.exchanges_per_connection_max\" = 3\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send(get("/").repeat(4));
    let closes: Vec<bool> = (0..3).map(|_| client.response().closes()).collect();
    assert_eq!(closes, [false, false, true]);
    client.expect_end();
    assert_eq!(origin.requests().len(), 3);
}

#[test]
fn a_client_that_has_said_all_is_still_answered() {
    let origin = Origin::start(|peer| {
        while peer.request().is_some() {
            std::thread::sleep(Duration::from_millis(50));
            peer.send(ok("late"));
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send(get("/").repeat(2));
    client.shutdown();
    assert_eq!(client.response().text(), "late");
    assert_eq!(client.response().text(), "late");
    client.expect_end();
    sluice.wait_until_all_clients_are_gone();
}

#[test]
fn a_request_without_a_route_is_told_so_and_the_next_one_is_found_behind_its_body() {
    let origin = Origin::echoing();
    let more = "[[route]]\nname = \"other\"\nmatch = { host = \"b\", path = \"/only\" }\nupstream = \"app\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send("POST /nowhere HTTP/1.1\r\nhost: b\r\ncontent-length: 5\r\n\r\nGET /");
    client.send(get("/found"));
    let first = client.response();
    // Whether a host's routes fall back to those of all hosts is the route room's; here it only must not mix bodies up.
    assert!(matches!(first.status, 200 | 404));
    assert_eq!(client.response().text(), "/found");
}
