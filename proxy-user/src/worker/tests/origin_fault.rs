//! Origins that die, stall, lie or are not there: nobody gets a fake end, or somebody else's answer.

use super::client::get;
use super::origin::ok;
use super::*;
use crate::report::Report;

#[test]
fn an_origin_that_dies_in_the_head_is_a_502() {
    for said in ["", "HTTP/1.1 200", "HTTP/1.1 200 OK\r\ncontent-le"] {
        for resets in [false, true] {
            let origin = Origin::start(move |peer| {
                peer.request();
                peer.send(said);
                if resets {
                    peer.reset();
                }
            });
            let sluice = Sluice::start(&[origin.address], "");
            let mut client = Client::connect(&sluice);
            let response = client.get("/");
            assert_eq!(
                (response.status, response.closes()),
                (502, false),
                "{said:?}"
            );
            assert_eq!(origin.connections(), 2, "a GET is tried once more");
            client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
            assert_eq!(client.response().status, 502);
            assert_eq!(origin.connections(), 3, "a POST is not");
            sluice.wait_until_nothing_is_open_to(origin.address);
        }
    }
}

/// The beginning of a head that came to no end must not be taken for the beginning of the next one.
#[test]
fn a_head_that_was_cut_short_leaves_nothing_behind_for_the_next_try() {
    let origin = Origin::start(|peer| {
        if peer.number == 0 {
            peer.request();
            peer.send("HTTP/1.1 200 OK\r\nx: a\r\ny: b\r\n");
            return;
        }
        while peer.request().is_some() {
            peer.send("HTTP/1.1 201 Created\r\ncontent-length: 3\r\nx-second: yes\r\n\r\nend");
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    let response = client.get("/");
    assert_eq!((response.status, response.text()), (201, "end"));
    assert_eq!(response.value("x-second"), Some("yes"));
    assert_eq!(response.value("x"), None);
}

/// As above, where a deadline cut the head short, and the next exchange of the client follows.
#[test]
fn a_head_that_came_too_late_leaves_nothing_behind_for_the_next_exchange() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.request() {
            if request.path() == "/late" {
                peer.send("HTTP/1.1 200 OK\r\nx: a\r\ny: b\r\n");
                return peer.wait_for_end();
            }
            peer.send("HTTP/1.1 201 Created\r\ncontent-length: 3\r\nx-second: yes\r\n\r\nend");
        }
    });
    let more = "[tunables]\n\"upstream.head_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/late").status, 504);
    let response = client.get("/next");
    assert_eq!((response.status, response.text()), (201, "end"));
    assert_eq!(response.value("x-second"), Some("yes"));
}

#[test]
fn an_origin_that_dies_in_the_body_gives_nobody_a_fake_end() {
    let cases = [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsome\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n64\r\nsome",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsome\r\n0\r\n",
    ];
    for answer in cases {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let released = std::sync::Mutex::new(released);
        let origin = Origin::start(move |peer| {
            peer.request();
            peer.send(answer);
            // What it says arrives before it dies, else there would be nothing to be torn.
            let _ = released.lock().unwrap().recv();
        });
        let sluice = Sluice::start(&[origin.address], "");
        for version in ["1.1", "1.0"] {
            let mut client = Client::connect(&sluice);
            client.send(format!("GET / HTTP/{version}\r\nhost: a\r\n\r\n"));
            assert_eq!(client.head().status, 200);
            release.send(()).unwrap();
            let (rest, end) = client.rest();
            assert_eq!(end, End::Reset, "{answer:?} over {version}");
            assert!(!rest.ends_with(b"0\r\n\r\n"), "{rest:?}");
        }
        sluice.wait_until_nothing_is_open_to(origin.address);
    }
}

/// Without a length, the end of the connection is the end of the body; but a reset is none.
#[test]
fn an_origin_that_is_reset_before_it_closes_gives_no_fake_end_either() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let origin = Origin::start(move |peer| {
        peer.request();
        peer.send("HTTP/1.1 200 OK\r\n\r\nsome");
        let _ = released.lock().unwrap().recv();
        peer.reset();
    });
    let sluice = Sluice::start(&[origin.address], "");
    for version in ["1.1", "1.0"] {
        let mut client = Client::connect(&sluice);
        client.send(format!("GET / HTTP/{version}\r\nhost: a\r\n\r\n"));
        assert_eq!(client.head().status, 200);
        release.send(()).unwrap();
        let (rest, end) = client.rest();
        assert_eq!(end, End::Reset, "{version}");
        assert!(!rest.ends_with(b"0\r\n\r\n"), "{rest:?}");
    }
}

/// Takes one request on each connection, and ends it when the next one is there.
fn dying_when_reused() -> Origin {
    Origin::start(|peer| {
        if peer.request().is_some() {
            peer.send(ok("first"));
            peer.head();
            peer.reset();
        }
    })
}

#[test]
fn a_pooled_connection_that_dies_is_replaced_for_a_get_and_costs_a_post_its_answer() {
    let origin = dying_when_reused();
    let more = "[tunables]\n\"upstream.retries\" = 0\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/a").text(), "first");
    assert_eq!(client.get("/b").text(), "first");
    assert_eq!(origin.paths(), ["/a", "/b", "/b"]);
    client.send("POST /c HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
    assert_eq!(client.response().status, 502);
    assert_eq!(
        origin.paths(),
        ["/a", "/b", "/b", "/c"],
        "it may have been served"
    );
    client.send("DELETE /d HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n");
    assert_eq!(client.response().text(), "first");
    client.send("DELETE /e HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n");
    assert_eq!(
        client.response().text(),
        "first",
        "a body of no bytes can be sent again"
    );
}

#[test]
fn a_pooled_connection_that_its_origin_closed_is_not_used_again() {
    let origin = Origin::start(|peer| {
        peer.request();
        peer.send(ok("bye"));
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    for n in 1..=5 {
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
        assert_eq!(client.response().text(), "bye");
        assert_eq!(origin.connections(), n);
        wait_until("the end is seen", || sluice.open_to(origin.address) == 0);
    }
}

#[test]
fn when_a_pooled_connection_dies_with_its_origin_another_endpoint_is_asked() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 1024];
        let _ = std::io::Read::read(&mut stream, &mut buffer);
        std::io::Write::write_all(&mut stream, &ok("dying")).unwrap();
        // The next request finds nobody, neither on this connection nor on a new one.
        drop(listener);
        let _ = std::io::Read::read(&mut stream, &mut buffer);
    });
    let other = Origin::echoing();
    let sluice = Sluice::start(&[address, other.address], "");
    let mut client = Client::connect(&sluice);
    let answers: Vec<String> = (0..6).map(|_| client.get("/x").text().to_owned()).collect();
    let (dying, others): (Vec<&str>, Vec<&str>) = answers
        .iter()
        .map(String::as_str)
        .partition(|answer| *answer == "dying");
    assert_eq!((dying.len(), others), (1, vec!["/x"; 5]));
    server.join().unwrap();
}

#[test]
fn whoever_says_more_than_was_asked_loses_his_connection_and_nobody_hears_it() {
    let twice = [ok("mine"), ok("stolen")].concat();
    let late = ok("stolen");
    for (answer, behind) in [
        (twice, Vec::new()),
        ([ok("mine"), b"\r\n".to_vec()].concat(), Vec::new()),
        ([ok("mine"), b"garbage".to_vec()].concat(), Vec::new()),
        (ok("mine"), late),
    ] {
        let origin = Origin::start(move |peer| {
            while peer.request().is_some() {
                peer.send(&answer);
                if !behind.is_empty() {
                    std::thread::sleep(Duration::from_millis(20));
                    peer.send(&behind);
                }
            }
        });
        let sluice = Sluice::start(&[origin.address], "");
        let (mut one, mut other) = (Client::connect(&sluice), Client::connect(&sluice));
        for n in 1..=3 {
            for client in [&mut one, &mut other] {
                assert_eq!(client.get("/").text(), "mine");
                origin.wait_until_gone(origin.connections());
            }
            assert_eq!(origin.connections(), 2 * n);
        }
    }
}

#[test]
fn an_answer_that_is_none_is_a_502_and_its_connection_is_dropped() {
    for answer in [
        "garbage\r\n\r\n",
        "SSH-2.0-OpenSSH_9.6\r\n",
        "\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\ncontent-length: 0\n\n",
        "HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 99 Low\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        // The fault is seen before anything was sent on.
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    ] {
        let origin = Origin::start(move |peer| {
            while peer.request().is_some() {
                peer.send(answer);
            }
        });
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        for _ in 0..2 {
            let response = client.get("/");
            assert_eq!(response.status, 502, "{answer:?}");
            assert!(!response.closes(), "it is not the client's fault");
        }
        sluice.wait_until_nothing_is_open_to(origin.address);
        assert_eq!(origin.connections(), 2, "nobody else is asked: {answer:?}");
    }
}

#[test]
fn an_origin_that_goes_on_with_interim_responses_is_cut_off() {
    let origin = Origin::start(|peer| {
        if peer.request().is_some() {
            while peer.send("HTTP/1.1 102 Processing\r\n\r\n") {}
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send(get("/"));
    let last = (0..1000)
        .map(|_| client.response().status)
        .find(|status| *status != 102);
    assert_eq!(last, Some(502));
    assert_eq!(sluice.rejected("interim_too_many"), 1.0);
}

#[test]
fn an_endpoint_that_refuses_is_left_out_and_any_request_goes_to_the_next() {
    let origin = Origin::answering(|request| ok(&request.body));
    let nowhere = Origin::nowhere();
    let sluice = Sluice::start(&[nowhere, origin.address], "");
    let mut client = Client::connect(&sluice);
    for _ in 0..6 {
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody");
        let response = client.response();
        assert_eq!((response.status, response.text()), (200, "body"));
    }
    let connects =
        format!("sluice_upstream_calls_total{{upstream=\"app\",endpoint=\"{nowhere}\"}}");
    assert_eq!(
        sluice.metric(&connects),
        1.0,
        "it is on hold after the first failure"
    );
    let reports = sluice.reports.take();
    assert_eq!(reports, [Report::EndpointFailed { address: nowhere }]);
}

#[test]
fn where_nobody_listens_there_is_a_503_at_once() {
    let sluice = Sluice::start(&[Origin::nowhere(), Origin::nowhere()], "");
    let mut client = Client::connect(&sluice);
    for _ in 0..2 {
        let response = client.get("/");
        assert_eq!(
            (response.status, response.value("retry-after")),
            (503, Some("1"))
        );
    }
    assert_eq!(sluice.rejected("origin_unreachable"), 2.0);
}

#[test]
fn without_an_endpoint_there_is_a_503_that_says_when_to_come_back() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    sluice.believe(0, false);
    let mut client = Client::connect(&sluice);
    let response = client.get("/");
    assert_eq!(
        (response.status, response.value("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(origin.connections(), 0);
    sluice.believe(0, true);
    assert_eq!(client.get("/back").text(), "/back");
}
