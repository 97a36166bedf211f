//! What is tried again, how often, and what never is; and upstreams that are left alone for a while.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};

use super::origin::ok;
use super::*;

/// A route `/r/*` with these lines.
fn route(lines: &str) -> String {
    format!("[[route]]\nname = \"r\"\nmatch = {{ path = \"/r/*\" }}\nupstream = \"app\"\n{lines}\n")
}

const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno";

/// Answers 503 so many times, and then with the path and the body.
fn unavailable(times: usize) -> Origin {
    let answered = AtomicUsize::new(0);
    Origin::answering(move |request| {
        if answered.fetch_add(1, SeqCst) < times {
            return UNAVAILABLE.into();
        }
        ok([request.path().as_bytes(), &request.body].concat())
    })
}

#[test]
fn a_server_error_is_tried_again_where_the_route_says_so() {
    let origin = unavailable(2);
    let more = route("retry = { retries = 2, on = [\"5xx\"], backoff = \"1ms\" }");
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/r/a").text(), "/r/a");
    assert_eq!(origin.paths(), ["/r/a"; 3]);
    assert_eq!(origin.connections(), 1, "its connection lives on");
    let retries = format!(
        "sluice_upstream_retries_total{{upstream=\"app\",endpoint=\"{}\"}}",
        origin.address
    );
    assert_eq!(sluice.metric(&retries), 2.0);
}

#[test]
fn a_server_error_is_shown_after_the_last_try_and_to_whoever_may_not_ask_twice() {
    let origin = unavailable(usize::MAX);
    let more = route("retry = { retries = 1, on = [\"5xx\"], backoff = \"0s\" }");
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    let response = client.get("/r/a");
    assert_eq!((response.status, response.text()), (503, "no"));
    assert_eq!(origin.paths(), ["/r/a"; 2]);
    client.send("POST /r/b HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
    assert_eq!(client.response().text(), "no");
    assert_eq!(client.get("/elsewhere").text(), "no");
    assert_eq!(origin.paths(), ["/r/a", "/r/a", "/r/b", "/elsewhere"]);
    assert_eq!(origin.connections(), 1);
}

/// Takes a whole request on its first connection, and resets it; then answers with bodies.
fn dying_once() -> Origin {
    Origin::start(|peer| {
        while let Some(request) = peer.request() {
            if peer.number == 0 {
                return peer.reset();
            }
            peer.send(ok(&request.body));
        }
    })
}

#[test]
fn a_body_that_was_kept_is_sent_again_whole() {
    let body = patterned(60_000);
    let chunked = [
        b"PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
        format!("{:x}\r\n", body.len()).as_bytes(),
        &body,
        b"\r\n0\r\n\r\n",
    ]
    .concat();
    let head = format!(
        "PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    for request in [[head.as_bytes(), &body].concat(), chunked] {
        let origin = dying_once();
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        client.send(&request);
        let response = client.response();
        assert_eq!(response.status, 200);
        assert!(response.body == body, "it came whole, and once");
        assert_eq!(client.get("/next").status, 200, "and the next is found");
        assert_eq!(origin.connections(), 2);
    }
}

#[test]
fn a_body_that_is_too_long_to_be_kept_is_sent_once() {
    let chunked = "PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n5\r\nfghij\r\n0\r\n\r\n";
    let sized = "PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabcdefghij";
    for request in [chunked, sized] {
        let origin = dying_once();
        let more = "[tunables]\n\"upstream.replay_bytes_max\" = \"9B\"\n";
        let sluice = Sluice::start(&[origin.address], more);
        let mut client = Client::connect(&sluice);
        client.send(request);
        assert_eq!(client.response().status, 502);
        assert_eq!(origin.connections(), 1);
    }
}

#[test]
fn a_body_that_is_still_on_its_way_goes_on_behind_what_was_kept() {
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let origin = Origin::start(move |peer| {
        if peer.number == 0 {
            peer.head();
            assert!(peer.wait_for(&released));
            return peer.reset();
        }
        while let Some(request) = peer.request() {
            peer.send(ok(&request.body));
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send("PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nfirst");
    wait_until("the head is there", || origin.requests().len() == 1);
    release.send(()).unwrap();
    wait_until("it is tried again", || origin.connections() == 2);
    client.send("-last");
    assert_eq!(client.response().text(), "first-last");
}

#[test]
fn a_try_that_takes_long_is_given_up_for_another_endpoint() {
    let stalling = Origin::start(|peer| {
        peer.request();
        peer.wait_for_end();
    });
    let origin = Origin::echoing();
    let more = route(
        "retry = { retries = 1, on = [\"timeout\"], per_try = \"100ms\", backoff = \"1ms\" }",
    );
    let sluice = Sluice::start(&[stalling.address, origin.address], &more);
    let mut client = Client::connect(&sluice);
    for n in 0..4 {
        let path = format!("/r/{n}");
        assert_eq!(client.get(&path).text(), path);
    }
    assert!(stalling.connections() >= 1);
    stalling.wait_until_gone(stalling.connections());
    assert_eq!(sluice.rejected("origin_head_timeout"), 0.0);
}

#[test]
fn what_the_route_does_not_name_is_not_tried_again() {
    let stalling = Origin::start(|peer| {
        peer.request();
        peer.wait_for_end();
    });
    let dying = Origin::start(|peer| {
        peer.request();
        peer.reset();
    });
    let cases = [
        (
            stalling.address,
            "on = [\"connect\", \"reset\", \"5xx\"], per_try = \"50ms\"",
            504,
        ),
        (
            dying.address,
            "on = [\"connect\", \"timeout\", \"5xx\"]",
            502,
        ),
        (
            Origin::nowhere(),
            "on = [\"reset\", \"timeout\", \"5xx\"]",
            503,
        ),
    ];
    for (address, lines, status) in cases {
        let more = route(&format!("retry = {{ retries = 3, {lines} }}"));
        let sluice = Sluice::start(&[address], &more);
        assert_eq!(Client::connect(&sluice).get("/r/").status, status);
        let retries =
            format!("sluice_upstream_retries_total{{upstream=\"app\",endpoint=\"{address}\"}}");
        assert_eq!(sluice.metric(&retries), 0.0, "{lines}");
    }
    assert_eq!((stalling.connections(), dying.connections()), (1, 1));
}

#[test]
fn retries_end_with_their_budget() {
    let origin = unavailable(usize::MAX);
    let more = route("retry = { retries = 3, on = [\"5xx\"], backoff = \"0s\" }")
        + "[tunables]\n\"upstream.retry_budget_percent\" = 20\n\"upstream.retries_per_second_min\" = 0\n";
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    for _ in 0..50 {
        assert_eq!(client.get("/r/").status, 503);
    }
    assert_eq!(origin.requests().len(), 60, "20 of a hundred, and no more");
    let denied = format!(
        "sluice_upstream_retries_denied_total{{upstream=\"app\",endpoint=\"{}\"}}",
        origin.address
    );
    assert_eq!(sluice.metric(&denied), 50.0);
}

#[test]
fn nothing_is_tried_again_once_the_client_has_a_byte() {
    let (release, released) = mpsc::channel();
    let released = Mutex::new(released);
    let origin = Origin::start(move |peer| {
        peer.request();
        peer.send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nsome");
        peer.wait_for(&released);
        peer.reset();
    });
    let more = route("retry = { retries = 3, on = [\"reset\", \"5xx\", \"timeout\"] }");
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    client.send(client::get("/r/"));
    assert_eq!(client.head().status, 200);
    release.send(()).unwrap();
    assert_eq!(client.rest().1, End::Reset);
    assert_eq!(origin.connections(), 1);
}

/// An upstream `weak` behind `/weak/*`, whose breaker opens after four calls, half of them failed, for 300 ms.
fn weak(origin: &Origin) -> String {
    format!(
        "[[route]]\nname = \"weak\"\nmatch = {{ path = \"/weak/*\" }}\nupstream = \"weak\"\nretry = {{ retries = 0 }}\n\
         [[upstream]]\nname = \"weak\"\nendpoints = [\"{}\"]\n\
         breaker = {{ share = \"50%\", calls_min = 4, window = \"1m\", open = \"300ms\" }}\n",
        origin.address
    )
}

#[test]
fn an_upstream_that_fails_is_left_alone_until_one_call_succeeds() {
    let is_well = Arc::new(AtomicBool::new(false));
    let well = Arc::clone(&is_well);
    let origin = Origin::answering(move |request| match well.load(SeqCst) {
        true => ok(request.path()),
        false => "HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n".into(),
    });
    let other = Origin::echoing();
    let sluice = Sluice::start(&[other.address], &weak(&origin));
    let mut client = Client::connect(&sluice);
    for _ in 0..4 {
        assert_eq!(client.get("/weak/").status, 500);
    }
    let response = client.get("/weak/");
    assert_eq!(
        (response.status, response.value("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(sluice.rejected("circuit_open"), 1.0);
    assert_eq!(origin.requests().len(), 4, "nobody is asked");
    assert_eq!(client.get("/a").text(), "/a", "other upstreams are");
    wait_until("one is let through", || client.get("/weak/").status == 500);
    assert_eq!(origin.requests().len(), 5, "and it has failed");
    assert_eq!(client.get("/weak/").status, 503);
    is_well.store(true, SeqCst);
    wait_until("one is let through", || client.get("/weak/").status == 200);
    for _ in 0..10 {
        assert_eq!(client.get("/weak/").status, 200);
    }
}

#[test]
fn when_an_upstream_comes_back_it_meets_no_herd() {
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let asked = AtomicUsize::new(0);
    let origin = Origin::start(move |peer| {
        while peer.request().is_some() {
            if asked.fetch_add(1, SeqCst) < 4 {
                peer.send("HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n");
            } else if peer.wait_for(&released) {
                peer.send(ok("back"));
            }
        }
    });
    let other = Origin::echoing();
    // One call decides for as long as the upstream stays open, which is longer than this test.
    let more = weak(&origin).replace("300ms", "3s");
    let sluice = Sluice::start(&[other.address], &more);
    let mut client = Client::connect(&sluice);
    for _ in 0..4 {
        assert_eq!(client.get("/weak/").status, 500);
    }
    let mut clients: Vec<Client> = (0..20).map(|_| Client::connect(&sluice)).collect();
    std::thread::sleep(Duration::from_millis(3100));
    for client in &mut clients {
        client.send(client::get("/weak/"));
    }
    wait_until("all others are refused", || {
        sluice.rejected("circuit_open") == 19.0
    });
    wait_until("one call decides", || origin.requests().len() == 5);
    release.send(()).unwrap();
    let statuses: Vec<u16> = clients.iter_mut().map(|c| c.response().status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1);
    drop(release);
}
