//! Everything that waits ends: heads, bodies and readers that are slow, connections that say nothing.

use super::client::get;
use super::origin::ok;
use super::*;

/// A listening socket whose queue is full: the next connection to it is neither accepted nor refused.
fn full_queue() -> (socket2::Socket, Vec<socket2::Socket>, std::net::SocketAddr) {
    use socket2::{Domain, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    listener.bind(&any.into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let fill = (0..4).map(|_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&address);
        socket
    });
    let fill = fill.collect();
    std::thread::sleep(Duration::from_millis(50));
    (listener, fill, address.as_socket().unwrap())
}

#[test]
fn an_endpoint_that_does_not_answer_a_connect_is_a_504_or_another_is_asked() {
    let (_listener, _fill, stuck) = full_queue();
    let more = "[tunables]\n\"upstream.connect_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start(&[stuck], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/").status, 504);
    assert_eq!(sluice.rejected("origin_connect_timeout"), 1.0);
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[stuck, origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/a").text(), "/a");
    assert_eq!(client.get("/b").text(), "/b");
}

/// Keeps its connection and says nothing, or stops in the middle.
fn stalling(said: &'static str) -> Origin {
    Origin::start(move |peer| {
        peer.request();
        peer.send(said);
        peer.wait_for_end();
    })
}

#[test]
fn a_response_that_does_not_come_in_time_is_a_504_and_its_origin_is_told() {
    for said in [
        "",
        "HTTP/1.1 200 OK\r\n",
        "HTTP/1.1 103 Early Hints\r\n\r\n",
    ] {
        let origin = stalling(said);
        let more = "[tunables]\n\"upstream.head_timeout\" = \"100ms\"\n";
        let sluice = Sluice::start(&[origin.address], more);
        let mut client = Client::connect(&sluice);
        let mut response = client.get("/");
        if response.status == 103 {
            response = client.response();
        }
        assert_eq!((response.status, response.closes()), (504, false));
        origin.wait_until_gone(1);
        assert_eq!(origin.connections(), 1, "a slow origin is not asked twice");
        assert_eq!(sluice.rejected("origin_head_timeout"), 1.0);
    }
}

#[test]
fn a_body_that_does_not_go_on_is_torn_and_its_origin_is_told() {
    let origin = stalling("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nsome");
    let more = "[tunables]\n\"upstream.body_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send(get("/"));
    assert_eq!(client.head().status, 200);
    assert_eq!(client.rest().1, End::Reset);
    origin.wait_until_gone(1);
    assert_eq!(sluice.rejected("origin_body_timeout"), 1.0);
}

#[test]
fn a_route_s_deadline_covers_the_whole_exchange() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.request() {
            if request.path() == "/timed/head" {
                return peer.wait_for_end();
            }
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
            let mut lives = peer.send(head);
            while lives {
                lives = peer.send("1\r\nx\r\n");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    });
    let more = "[[route]]\nname = \"timed\"\nmatch = { path = \"/timed/*\" }\nupstream = \"app\"\ntimeout = { exchange = \"200ms\" }\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/timed/head").status, 504);
    client.send(get("/timed/body"));
    assert_eq!(client.head().status, 200);
    assert_eq!(client.rest().1, End::Reset, "it goes on, but not for ever");
    assert_eq!(sluice.rejected("exchange_timeout"), 2.0);
    sluice.wait_until_nothing_is_open_to(origin.address);
}

#[test]
fn a_slow_head_is_a_408_however_steadily_it_comes() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"http.head_timeout\" = \"300ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/").status, 200);
    client
        .stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let started = Instant::now();
    let mut byte = [0];
    // One more byte every 20 ms; the deadline does not move.
    for piece in get("/slow").into_bytes().iter().cycle() {
        assert!(started.elapsed() < PATIENCE);
        client.send([if *piece == b'\n' { b'x' } else { *piece }]);
        if client.stream.peek(&mut byte).is_ok() {
            break;
        }
    }
    assert!(started.elapsed() >= Duration::from_millis(300));
    client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let response = client.response();
    assert_eq!((response.status, response.closes()), (408, true));
    assert_eq!(sluice.rejected("head_timeout"), 1.0);
}

#[test]
fn an_empty_line_behind_a_body_is_no_head_that_is_late() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"http.head_timeout\" = \"300ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nok\r\n");
    assert_eq!(client.response().status, 200);
    // Whoever has asked nothing takes a 408 for the answer to what it asks next.
    client.expect_end();
    assert_eq!(sluice.rejected("head_timeout"), 0.0);
}

#[test]
fn a_body_that_does_not_come_is_a_408() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"http.body_timeout\" = \"1s\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nsome");
    let response = client.response();
    assert_eq!((response.status, response.closes()), (408, true));
    client.expect_end();
    origin.wait_until_gone(1);
    assert_eq!(sluice.rejected("body_timeout"), 1.0);
}

#[test]
fn a_body_that_comes_below_the_slowest_rate_is_a_408_and_one_above_lives() {
    let origin = Origin::answering(|request| ok(request.body.len().to_string()));
    let more = "[tunables]\n\"http.body_timeout\" = \"1s\"\n\"http.body_rate_min\" = \"1000B/s\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    // 50 bytes each 50 ms are as slow as allowed, 5 are not; the grace is one second.
    for (bytes, status) in [(5, 408), (250, 200)] {
        let mut client = Client::connect(&sluice);
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10000\r\n\r\n");
        client
            .stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let mut byte = [0];
        for _ in 0..10_000 / bytes {
            client.try_send(vec![b'x'; bytes]);
            if client.stream.peek(&mut byte).is_ok() {
                break;
            }
        }
        client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.response().status, status);
    }
}

#[test]
fn a_reader_that_takes_nothing_is_closed_and_its_origin_is_free() {
    let origin = Origin::start(|peer| {
        while peer.request().is_some() {
            peer.send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n");
            while peer.send([b'x'; 64 << 10]) {}
        }
    });
    let more = "[tunables]\n\"net.send_timeout\" = \"1s\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect_with_buffer(&sluice, 4096);
    client.send(get("/"));
    wait_until("the origin is asked", || origin.connections() == 1);
    sluice.wait_until_nothing_is_open_to(origin.address);
    sluice.wait_until_all_clients_are_gone();
    assert_eq!(client.rest().1, End::Reset);
    assert_eq!(sluice.rejected("client_send_timeout"), 1.0);
}

/// Each of the many answers that it asks for would wait anew for the one before.
#[test]
fn a_client_that_asks_and_asks_and_takes_nothing_is_closed() {
    let origin = Origin::echoing();
    let body = "x".repeat(100_000);
    let more = format!(
        "[[route]]\nmatch = {{ path = \"/fixed\" }}\nrespond = {{ status = 200, body = \"{body}\" }}\n\
         [tunables]\n\"net.send_timeout\" = \"1s\"\n"
    );
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect_with_buffer(&sluice, 4096);
    client.send(get("/fixed").repeat(200));
    wait_until("it is there", || sluice.open() == 1);
    sluice.wait_until_all_clients_are_gone();
    assert_eq!(client.rest().1, End::Reset);
}

#[test]
fn slow_readers_take_no_receive_buffer_from_the_others() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.request() {
            if request.path() == "/small" {
                peer.send(ok("small"));
                continue;
            }
            peer.send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n");
            while peer.send([b'x'; 64 << 10]) {}
        }
    });
    let settings = crate::net::Settings {
        buffers: 32,
        ..Default::default()
    };
    let sluice = Sluice::start_with(settings, &[origin.address], "");
    let slow: Vec<Client> = (0..40)
        .map(|_| {
            let mut client = Client::connect_with_buffer(&sluice, 4096);
            client.send(get("/large"));
            client
        })
        .collect();
    wait_until("all are being sent to", || {
        origin.connections() == slow.len()
    });
    std::thread::sleep(Duration::from_millis(200));
    let mut client = Client::connect(&sluice);
    for _ in 0..20 {
        assert_eq!(client.get("/small").text(), "small");
    }
}

#[test]
fn a_connection_that_says_nothing_is_closed() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"http.idle_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    Client::connect(&sluice).expect_end();
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/a").text(), "/a");
    client.expect_end();
    sluice.wait_until_all_clients_are_gone();
}

#[test]
fn an_idle_connection_to_an_endpoint_is_closed_after_its_time() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"upstream.idle_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/a").text(), "/a");
    origin.wait_until_gone(1);
    assert_eq!(client.get("/b").text(), "/b");
    assert_eq!(origin.connections(), 2);
}

/// A route `/own/*` with times of its own.
fn with_times(times: &str) -> String {
    format!(
        "[[route]]\nname = \"own\"\nmatch = {{ path = \"/own/*\" }}\nupstream = \"app\"\n\
         retry = {{ retries = 0 }}\ntimeout = {{ {times} }}\n"
    )
}

#[test]
fn a_route_has_its_own_time_for_a_connection() {
    let (_listener, _fill, stuck) = full_queue();
    let sluice = Sluice::start(&[stuck], &with_times("connect = \"100ms\""));
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/own/").status, 504);
    assert_eq!(sluice.rejected("origin_connect_timeout"), 1.0);
}

#[test]
fn a_route_has_its_own_time_for_the_first_byte_and_for_the_next() {
    let origin = stalling("");
    let sluice = Sluice::start(&[origin.address], &with_times("first_byte = \"100ms\""));
    assert_eq!(Client::connect(&sluice).get("/own/").status, 504);
    assert_eq!(sluice.rejected("origin_head_timeout"), 1.0);
    let origin = stalling("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nsome");
    let sluice = Sluice::start(&[origin.address], &with_times("idle = \"100ms\""));
    let mut client = Client::connect(&sluice);
    client.send(get("/own/"));
    assert_eq!(client.head().status, 200);
    assert_eq!(client.rest().1, End::Reset);
    assert_eq!(sluice.rejected("origin_body_timeout"), 1.0);
    let mut client = Client::connect(&sluice);
    client.send("POST /own/ HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nsome");
    assert_eq!(client.response().status, 408);
    assert_eq!(sluice.rejected("body_timeout"), 1.0);
}

#[test]
fn an_exchange_has_a_deadline_where_the_tunable_sets_one() {
    let origin = stalling("");
    let more = "[tunables]\n\"http.exchange_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    assert_eq!(Client::connect(&sluice).get("/").status, 504);
    assert_eq!(sluice.rejected("exchange_timeout"), 1.0);
    origin.wait_until_gone(1);
    assert_eq!(origin.connections(), 1, "no try goes on beyond it");
    let blamed = sluice.reports.take();
    assert_eq!(blamed.len(), 1, "whoever stalls is to blame: {blamed:?}");
}

#[test]
fn a_response_that_comes_below_the_slowest_rate_is_torn_and_one_above_lives() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.request() {
            let bytes: usize = request.path()[1..].parse().unwrap_or(1);
            peer.send("HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n");
            for _ in 0..10_000 / bytes {
                if !peer.send(vec![b'x'; bytes]) {
                    return peer.wait_for_end();
                }
                std::thread::sleep(Duration::from_millis(25));
            }
        }
    });
    let more = "[tunables]\n\"upstream.body_timeout\" = \"300ms\"\n\"upstream.body_rate_min\" = \"1000B/s\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    // 25 bytes each 25 ms are as slow as allowed.
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/500").body.len(), 10_000);
    client.send(get("/5"));
    assert_eq!(client.head().status, 200);
    assert_eq!(client.rest().1, End::Reset);
    assert_eq!(sluice.rejected("origin_body_timeout"), 1.0);
}
