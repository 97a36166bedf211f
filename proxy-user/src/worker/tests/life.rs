//! What control asks of a worker while connections are open: reload, drain, ban, end.

use super::client::get;
use super::origin::ok;
use super::*;
use crate::worker::Command;

/// An origin that answers when it is told to.
fn waiting() -> (Origin, std::sync::mpsc::Sender<()>) {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let origin = Origin::start(move |peer| {
        while let Some(request) = peer.request() {
            if peer.wait_for(&released) {
                peer.send(ok(request.path()));
            }
        }
    });
    (origin, release)
}

#[test]
fn a_drain_lets_exchanges_end_and_says_so() {
    let (origin, release) = waiting();
    let sluice = Sluice::start(&[origin.address], "");
    let (mut busy, mut idle) = (Client::connect(&sluice), Client::connect(&sluice));
    busy.send(get("/busy"));
    wait_until("both are there", || {
        sluice.open() == 2 && origin.requests().len() == 1
    });
    sluice.drain(PATIENCE);
    idle.expect_end();
    drop(idle);
    assert!(!sluice.has_ended());
    release.send(()).unwrap();
    let response = busy.response();
    assert_eq!((response.text(), response.closes()), ("/busy", true));
    busy.expect_end();
    drop(busy);
    wait_until("the worker ends", || sluice.has_ended());
}

#[test]
fn a_drain_does_not_wait_for_ever() {
    let (origin, _release) = waiting();
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send(get("/"));
    wait_until("the origin is asked", || origin.requests().len() == 1);
    sluice.drain(Duration::from_millis(50));
    wait_until("the worker ends", || sluice.has_ended());
    origin.wait_until_gone(1);
}

/// Whoever was accepted before the drain is served, even if nobody had looked at him yet.
#[test]
fn a_drain_loses_nobody_who_was_accepted() {
    for _ in 0..10 {
        let origin = Origin::echoing();
        let sluice = Sluice::start(&[origin.address], "");
        assert_eq!(Client::connect(&sluice).get("/").status, 200);
        let mut clients: Vec<Client> = (0..20)
            .map(|_| {
                let mut client = Client::connect(&sluice);
                client.send(get("/last"));
                client
            })
            .collect();
        sluice.drain(PATIENCE);
        // The keeper's socket is still there, so that nobody is refused; who was not accepted waits for the next daemon.
        let mut answered = 0;
        for client in &mut clients {
            client
                .stream
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            answered += u64::from(client.stream.peek(&mut [0]).is_ok_and(|n| n > 0));
        }
        assert_eq!(answered + 1, sluice.accepted());
        drop(clients);
        wait_until("the worker ends", || sluice.has_ended());
    }
}

#[test]
fn the_connections_of_a_banned_source_end_at_once() {
    let (origin, _release) = waiting();
    let sluice = Sluice::start(&[origin.address], "");
    let (mut busy, mut idle) = (Client::connect(&sluice), Client::connect(&sluice));
    busy.send(get("/busy"));
    wait_until("both are there", || {
        sluice.open() == 2 && origin.requests().len() == 1
    });
    sluice.close_source([192, 0, 2, 1].into());
    sluice.close_source([127, 0, 0, 1].into());
    assert_eq!(busy.rest().0, b"");
    assert_eq!(idle.rest().0, b"");
    origin.wait_until_gone(1);
    sluice.wait_until_all_clients_are_gone();
    assert_eq!(sluice.metric("sluice_guard_connections_closed_total"), 2.0);
}

#[test]
fn an_open_connection_follows_a_reload_from_its_next_exchange_on() {
    let (origin, release) = waiting();
    let other = Origin::echoing();
    let mut sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send(get("/before"));
    wait_until("the origin is asked", || origin.requests().len() == 1);
    let more = "[[route]]\nmatch = { path = \"/new\" }\nrespond = { status = 200, body = \"new\" }\n\
                [tunables]\n\"http.idle_timeout\" = \"200ms\"\n";
    sluice.reload(&[other.address], more);
    release.send(()).unwrap();
    assert_eq!(client.response().text(), "/before");
    assert_eq!(client.get("/new").text(), "new");
    assert_eq!(client.get("/after").text(), "/after");
    assert_eq!((origin.requests().len(), other.requests().len()), (1, 1));
    client.expect_end();
}

#[test]
fn a_tunable_set_at_run_time_is_felt_by_the_next_exchange_of_an_open_connection() {
    let origin = Origin::answering(|request| match request.path() {
        "/large-head" => format!(
            "HTTP/1.1 200 OK\r\nx: {}\r\ncontent-length: 0\r\n\r\n",
            "x".repeat(2000)
        )
        .into_bytes(),
        path => ok(path),
    });
    let field = format!("x-large: {}\r\n", "x".repeat(2000));
    let large = format!("GET /large HTTP/1.1\r\nhost: a\r\n{field}\r\n");
    let short = "POST /body HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nabcde".to_owned();
    let score = "GET /score HTTP/1.1\r\nhost: a\r\nx_y: z\r\n\r\n".to_owned();
    for (key, value, request, status) in [
        ("http.head_bytes_max", "1KiB", &large, 431),
        ("http.field_bytes_max", "1KiB", &large, 431),
        ("http.fields_max", "1", &large, 431),
        ("http.body_bytes_max", "4B", &short, 413),
        ("http.underscore_fields", "refuse", &score, 400),
        ("upstream.head_bytes_max", "1KiB", &get("/large-head"), 502),
        ("http.target_bytes_max", "64B", &get(&"/x".repeat(100)), 414),
        ("http.encoded_slash", "keep", &get("/a%2Fb"), 200),
        ("http.exchanges_per_connection_max", "1", &get("/last"), 200),
    ] {
        let mut sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        client.send(request);
        let before = client.response();
        let is_loosened = key == "http.encoded_slash";
        assert_eq!(before.status, if is_loosened { 400 } else { 200 }, "{key}");
        if is_loosened {
            client = Client::connect(&sluice);
            assert_eq!(client.get("/a").status, 200);
        }
        sluice.set(key, value);
        client.send(request);
        let after = client.response();
        assert_eq!(after.status, status, "{key}");
        if key.starts_with("http.exchanges") {
            assert!(after.closes());
        }
    }
}

#[test]
fn where_a_listener_is_removed_a_connection_ends_behind_its_exchange() {
    let (origin, release) = waiting();
    let mut sluice = Sluice::start(&[origin.address], "");
    let (mut busy, mut idle) = (Client::connect(&sluice), Client::connect(&sluice));
    busy.send(get("/busy"));
    wait_until("both are there", || {
        sluice.open() == 2 && origin.requests().len() == 1
    });
    sluice.reload_without_listener();
    idle.expect_end();
    release.send(()).unwrap();
    let response = busy.response();
    assert_eq!((response.text(), response.closes()), ("/busy", true));
    busy.expect_end();
    assert!(!sluice.has_ended());
}

#[test]
fn a_client_that_is_reset_while_it_waits_frees_its_origin() {
    for request in [
        get("/"),
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody".to_owned(),
    ] {
        let (origin, _release) = waiting();
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        client.send(request);
        wait_until("the origin is asked", || origin.requests().len() == 1);
        client.reset();
        origin.wait_until_gone(1);
        sluice.wait_until_all_clients_are_gone();
        sluice.wait_until_nothing_is_open_to(origin.address);
    }
}

#[test]
fn a_client_that_is_reset_in_an_answer_frees_its_origin() {
    let origin = Origin::start(|peer| {
        peer.request();
        peer.send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\nbeginning");
        peer.wait_for_end();
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send(get("/"));
    assert_eq!(client.head().status, 200);
    client.reset();
    origin.wait_until_gone(1);
    sluice.wait_until_all_clients_are_gone();
}

#[test]
fn a_panic_costs_one_exchange() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut other = Client::connect(&sluice);
    assert_eq!(other.get("/").status, 200);
    let mut client = Client::connect(&sluice);
    client.send([get("/first"), get(crate::exchange::PANICS_AT)].concat());
    assert_eq!(client.response().text(), "/first");
    let response = client.response();
    assert_eq!((response.status, response.closes()), (500, true));
    client.expect_end();
    assert_eq!(other.get("/next").text(), "/next");
    assert_eq!(sluice.metric("sluice_worker_panics_total"), 1.0);
    sluice.tell(Command::Stop);
}
