//! Large clear bodies, which the kernel moves from one socket to the other: nothing lost, doubled, or left behind for somebody else.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;

use super::client::get;
use super::origin::ok;
use super::*;

/// Small, so that much is moved in little time.
const MIN: usize = 16 << 10;
const TUNED: &str = "[tunables]\n\"net.splice_bytes_min\" = \"16KiB\"\n";

/// Sends while the caller reads.
fn send_aside(stream: &TcpStream, bytes: Vec<u8>) -> thread::JoinHandle<bool> {
    let mut stream = stream.try_clone().unwrap();
    thread::spawn(move || stream.write_all(&bytes).is_ok())
}

fn post(path: &str, length: usize) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n")
}

#[test]
fn bodies_of_all_sizes_around_the_threshold_pass_both_ways_on_one_connection() {
    let origin = Origin::answering(|request| ok(&request.body));
    let sluice = Sluice::start(&[origin.address], TUNED);
    let mut client = Client::connect(&sluice);
    let sizes = [
        MIN - 1,
        MIN,
        MIN + 1,
        2 * MIN,
        5 * MIN + 7,
        (1 << 20) - 1,
        (4 << 20) + 3,
        1,
        3 << 20,
    ];
    for size in sizes {
        let body = patterned(size);
        let sent = [post("/", size).as_bytes(), &body].concat();
        let sending = send_aside(&client.stream, sent);
        let response = client.response();
        assert!(sending.join().unwrap());
        assert_eq!(response.status, 200);
        assert!(response.body == body, "{size} bytes came back otherwise");
    }
    assert_eq!(origin.connections(), 1, "the connection lives on");
}

#[test]
fn off_means_off_and_all_passes_the_same() {
    let origin = Origin::answering(|_| ok(patterned(3 << 20)));
    let mut sluice = Sluice::start(&[origin.address], TUNED);
    for value in ["0", "16KiB", "1GiB"] {
        sluice.set("net.splice_bytes_min", value);
        let mut client = Client::connect(&sluice);
        assert!(client.get("/").body == patterned(3 << 20));
    }
}

/// The request behind an upload is there before the upload has gone on.
#[test]
fn what_is_pipelined_behind_a_body_is_the_next_request() {
    let origin =
        Origin::answering(|request| ok(format!("{} {}", request.path(), request.body.len())));
    let sluice = Sluice::start(&[origin.address], TUNED);
    let mut client = Client::connect(&sluice);
    let mut sent = Vec::new();
    for number in 0..8_usize {
        let body = patterned((1 << 20) + number);
        sent.extend_from_slice(post(&format!("/{number}"), body.len()).as_bytes());
        sent.extend_from_slice(&body);
        sent.extend_from_slice(get(&format!("/{number}/next")).as_bytes());
    }
    let sending = send_aside(&client.stream, sent);
    for number in 0..8 {
        let length = (1 << 20) + number;
        assert_eq!(client.response().text(), format!("/{number} {length}"));
        assert_eq!(client.response().text(), format!("/{number}/next 0"));
    }
    assert!(sending.join().unwrap());
    let requests = origin.requests();
    assert!(
        requests
            .iter()
            .all(|request| patterned(request.body.len()) == request.body)
    );
}

#[test]
fn a_body_until_the_end_of_the_connection_passes_whole() {
    let origin = Origin::start(|peer| {
        peer.request();
        peer.send("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n");
        peer.send(patterned(5 << 20));
    });
    let sluice = Sluice::start(&[origin.address], TUNED);
    let mut client = Client::connect(&sluice);
    client.send("GET / HTTP/1.0\r\nhost: a\r\n\r\n");
    let response = client.response();
    assert!(response.body == patterned(5 << 20));
}

/// In the middle, and then the same worker serves others with the same pipes.
#[test]
fn a_body_that_its_origin_cuts_short_does_not_look_whole_and_leaves_nothing_for_others() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.request() {
            if request.path() == "/whole" {
                peer.send(ok(patterned(1 << 20)));
                continue;
            }
            let answer = ok(vec![b'x'; 4 << 20]);
            peer.send(&answer[..answer.len() - 1]);
            if request.path() == "/reset" {
                peer.reset();
            }
            return;
        }
    });
    let sluice = Sluice::start(&[origin.address], TUNED);
    for path in ["/closed", "/reset", "/closed"] {
        let mut client = Client::connect(&sluice);
        client.send(get(path));
        let head = client.head();
        assert_eq!(head.status, 200);
        let (body, end) = client.rest();
        assert!(body.len() < 4 << 20, "{path}");
        assert_eq!(end, End::Reset, "{path}");
        let mut client = Client::connect(&sluice);
        assert!(client.get("/whole").body == patterned(1 << 20));
    }
}

#[test]
fn a_client_that_goes_in_the_middle_leaves_nothing_for_others() {
    let origin = Origin::answering(|request| {
        if request.path() == "/whole" {
            ok(patterned(1 << 20))
        } else {
            ok(vec![b'x'; 64 << 20])
        }
    });
    let sluice = Sluice::start(&[origin.address], TUNED);
    for resets in [true, false, true] {
        // It takes the head and no more, so that there are bytes in the pipe.
        let mut client = Client::connect_with_buffer(&sluice, 4096);
        client.send(get("/large"));
        assert_eq!(client.head().status, 200);
        thread::sleep(Duration::from_millis(50));
        if resets {
            client.reset();
        } else {
            drop(client);
        }
        let mut client = Client::connect(&sluice);
        assert!(client.get("/whole").body == patterned(1 << 20));
        drop(client);
        sluice.wait_until_all_clients_are_gone();
    }
}

#[test]
fn an_upload_that_its_client_cuts_short_does_not_look_whole() {
    for resets in [false, true] {
        let (tell, told) = channel();
        let origin = Origin::start(move |peer| {
            let Some(request) = peer.head() else { return };
            let _ = tell.send(peer.body(&request.head));
        });
        let sluice = Sluice::start(&[origin.address], TUNED);
        let mut client = Client::connect(&sluice);
        client.send(post("/", 4 << 20));
        client.send(patterned((4 << 20) - 1));
        wait_until("the request arrives", || origin.requests().len() == 1);
        if resets {
            client.reset();
        } else {
            client.shutdown();
            assert_eq!(client.response().status, 400);
            client.expect_end();
        }
        assert_eq!(told.recv_timeout(PATIENCE), Ok(None));
        sluice.wait_until_nothing_is_open_to(origin.address);
    }
}

#[test]
fn an_origin_that_answers_in_the_middle_of_an_upload_is_heard() {
    let origin = Origin::start(|peer| {
        let Some(_) = peer.head() else { return };
        peer.send("HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n");
        peer.wait_for_end();
    });
    let sluice = Sluice::start(&[origin.address], TUNED);
    let mut client = Client::connect(&sluice);
    let sent = [post("/", 64 << 20).into_bytes(), vec![b'x'; 1 << 20]].concat();
    let sending = send_aside(&client.stream, sent);
    assert_eq!(client.response().status, 413);
    let _ = sending.join();
    drop(client);
    sluice.wait_until_nothing_is_open_to(origin.address);
}

#[test]
fn a_slow_reader_stops_the_origin_and_gets_all() {
    let size = 48 << 20;
    let (release, released) = channel();
    let (sent, is_sent) = channel();
    let (released, sent) = (Mutex::new(released), Mutex::new(sent));
    let origin = Origin::start(move |peer| {
        peer.request();
        peer.send(ok(patterned(size)));
        let _ = sent.lock().unwrap().send(());
        peer.wait_for(&released);
    });
    let sluice = Sluice::start(&[origin.address], TUNED);
    let mut client = Client::connect_with_buffer(&sluice, 64 << 10);
    client.send(get("/"));
    wait_until("the origin is asked", || origin.requests().len() == 1);
    let early = is_sent.recv_timeout(Duration::from_millis(500));
    assert!(early.is_err(), "nothing stopped the origin");
    assert!(client.response().body == patterned(size));
    assert_eq!(is_sent.recv_timeout(PATIENCE), Ok(()));
    release.send(()).unwrap();
}

#[test]
fn an_origin_that_stalls_in_the_middle_is_given_up_in_time() {
    let origin = Origin::start(|peer| {
        peer.request();
        let answer = ok(patterned(4 << 20));
        peer.send(&answer[..2 << 20]);
        peer.wait_for_end();
    });
    let more = format!("{TUNED}\"upstream.body_timeout\" = \"200ms\"\n");
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    client.send(get("/"));
    assert_eq!(client.head().status, 200);
    assert_eq!(client.rest().1, End::Reset);
    assert_eq!(sluice.rejected("origin_body_timeout"), 1.0);
}

#[test]
fn a_client_that_stalls_in_the_middle_of_its_upload_is_told_in_time() {
    let origin = Origin::echoing();
    let more = format!("{TUNED}\"http.body_timeout\" = \"1s\"\n");
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    client.send(post("/", 4 << 20));
    client.send(patterned(2 << 20));
    let response = client.response();
    assert_eq!((response.status, response.closes()), (408, true));
    client.expect_end();
}

#[test]
fn a_reader_that_takes_a_little_now_and_then_is_patiently_served() {
    let size = 6 << 20;
    let origin = Origin::answering(move |_| ok(patterned(size)));
    let more = format!("{TUNED}\"net.send_timeout\" = \"1s\"\n");
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect_with_buffer(&sluice, 64 << 10);
    client.send(get("/"));
    let mut read = Vec::new();
    // Longer than the time for a whole pipe would be.
    for _ in 0..12 {
        let mut part = vec![0; 128 << 10];
        std::io::Read::read_exact(&mut client.stream, &mut part).unwrap();
        read.extend_from_slice(&part);
        thread::sleep(Duration::from_millis(200));
    }
    let head = client::find_head_end(&read).unwrap();
    let mut rest = vec![0; head + size - read.len()];
    std::io::Read::read_exact(&mut client.stream, &mut rest).unwrap();
    read.extend_from_slice(&rest);
    assert!(read[head..] == patterned(size));
}

#[test]
fn bytes_that_were_moved_are_counted() {
    let origin = Origin::answering(|_| ok(patterned(3 << 20)));
    let sluice = Sluice::start(&[origin.address], TUNED);
    let mut client = Client::connect(&sluice);
    client.get("/");
    drop(client);
    sluice.wait_until_all_clients_are_gone();
    let counted = sluice.metric("sluice_listener_sent_bytes_total{listener=\"web\"}");
    assert!((3_145_728.0..3_150_000.0).contains(&counted), "{counted}");
}
