//! Request bodies: whole, however framed and however large, and never more of them in memory than a few buffers.

use super::client::encode_chunked;
use super::origin::ok;
use super::*;

const LARGE: usize = 3 << 20;

#[test]
fn large_bodies_arrive_whole_and_come_back_whole() {
    let origin = Origin::answering(|request| ok(&request.body));
    let sluice = Sluice::start(&[origin.address], "");
    let body = patterned(LARGE);
    let length = format!("content-length: {LARGE}\r\n");
    let chunked = "transfer-encoding: chunked\r\n".to_owned();
    for (field, bytes) in [
        (&length, body.clone()),
        (&chunked, encode_chunked(&body, 100_000)),
        (&chunked, encode_chunked(&body, 1000)),
        (&chunked, encode_chunked(&body[..50_000], 1)),
        (&length, body.clone()),
    ] {
        let mut client = Client::connect(&sluice);
        for _ in 0..2 {
            let mut sender = client.stream.try_clone().unwrap();
            let head = format!("POST / HTTP/1.1\r\nhost: a\r\n{field}\r\n");
            let bytes = [head.as_bytes(), &bytes].concat();
            let sending =
                std::thread::spawn(move || std::io::Write::write_all(&mut sender, &bytes));
            let response = client.response();
            sending.join().unwrap().unwrap();
            assert!(body.starts_with(&response.body) && response.body.len() >= 50_000);
        }
    }
    let bodies: Vec<usize> = origin
        .requests()
        .iter()
        .map(|request| request.body.len())
        .collect();
    assert_eq!(
        bodies,
        [
            LARGE, LARGE, LARGE, LARGE, LARGE, LARGE, 50_000, 50_000, LARGE, LARGE
        ]
    );
}

#[test]
fn a_body_without_bytes_is_framed_and_the_next_request_follows_at_once() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send("POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n");
    client.send("POST /b HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n");
    client.send("POST /c HTTP/1.1\r\nhost: a\r\n\r\n");
    for path in ["/a", "/b", "/c"] {
        assert_eq!(client.response().text(), path);
    }
    assert!(
        origin
            .requests()
            .iter()
            .all(|request| request.body.is_empty())
    );
}

#[test]
fn a_slow_origin_stops_the_sender() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let origin = Origin::start(move |peer| {
        let Some(request) = peer.head() else { return };
        let _ = released.lock().unwrap().recv();
        let body = peer.body(&request.head).expect("a whole body");
        peer.send(ok(body.len().to_string()));
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    // Far beyond what the kernel keeps for both connections.
    let body = vec![b'x'; 64 << 20];
    client.send(format!(
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
        body.len()
    ));
    client.stream.set_nonblocking(true).unwrap();
    let (mut sent, mut still) = (0, 0);
    while still < 100 {
        match std::io::Write::write(&mut client.stream, &body[sent..]) {
            Ok(n) => (sent, still) = (sent + n, 0),
            Err(_) => {
                still += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        assert!(sent < body.len(), "nothing stops the sender");
    }
    release.send(()).unwrap();
    client.stream.set_nonblocking(false).unwrap();
    client.send(&body[sent..]);
    assert_eq!(client.response().text(), body.len().to_string());
}

#[test]
fn a_body_that_is_too_large_is_refused_at_the_head_or_where_it_goes_beyond() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"http.body_bytes_max\" = \"1KiB\"\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    client.send("POST /told HTTP/1.1\r\nhost: a\r\ncontent-length: 1025\r\n\r\n");
    let response = client.response();
    assert_eq!(response.status, 413);
    client.send(vec![b'x'; 1025]);
    assert_eq!(
        client.get("/next").text(),
        "/next",
        "a short body is read over"
    );

    let bytes = encode_chunked(&patterned(1025), 100);
    client.send("POST /grown HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send(bytes);
    let response = client.response();
    assert_eq!((response.status, response.closes()), (413, true));
    client.expect_end();
    assert_eq!(sluice.rejected("body_too_large"), 2.0);
    sluice.wait_until_nothing_is_open_to(origin.address);
    let fits = encode_chunked(&patterned(1024), 100);
    let mut client = Client::connect(&sluice);
    client.send("POST /fits HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send(fits);
    assert_eq!(client.response().text(), "/fits");
}

#[test]
fn a_body_with_broken_framing_is_refused_and_nothing_behind_it_is_read() {
    for (framing, body) in [
        (
            "transfer-encoding: chunked",
            "3\r\nabcGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
        ),
        (
            "transfer-encoding: chunked",
            "+3\r\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
        ),
        (
            "transfer-encoding: chunked",
            "3\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
        ),
    ] {
        let origin = Origin::echoing();
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        client.send(format!(
            "POST /bad HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n{body}"
        ));
        let response = client.response();
        assert_eq!(
            (response.status, response.closes()),
            (400, true),
            "{body:?}"
        );
        client.expect_end();
        sluice.wait_until_all_clients_are_gone();
        sluice.wait_until_nothing_is_open_to(origin.address);
        assert!(!origin.paths().contains(&"/smuggled".to_owned()));
    }
}

#[test]
fn a_body_that_its_client_cuts_short_does_not_look_whole_to_the_origin() {
    for field in ["content-length: 100", "transfer-encoding: chunked"] {
        let (tell, told) = std::sync::mpsc::channel();
        let origin = Origin::start(move |peer| {
            let Some(request) = peer.head() else { return };
            let _ = tell.send(peer.body(&request.head));
        });
        let sluice = Sluice::start(&[origin.address], "");
        let mut client = Client::connect(&sluice);
        client.send(format!(
            "POST / HTTP/1.1\r\nhost: a\r\n{field}\r\n\r\n5\r\nabcde\r\n"
        ));
        wait_until("the request arrives", || origin.requests().len() == 1);
        client.shutdown();
        let response = client.response();
        assert_eq!((response.status, response.closes()), (400, true));
        client.expect_end();
        assert_eq!(told.recv_timeout(PATIENCE), Ok(None), "{field}");
        sluice.wait_until_nothing_is_open_to(origin.address);
    }
}
