//! Faults from either side that must leave nothing behind: half-closed and reset connections, panics, origins that come back.

use std::net::SocketAddr;

use super::client::get;
use super::origin::ok;
use super::*;
use crate::exchange::{PANICS_IN, PANICS_WITH};

/// Descriptors of this process that are sockets to or from this port, whichever end.
fn sockets_at(port: u16) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    let is_at = |fd: &i32| {
        // SAFETY: the descriptor may be anybody's and close at any time; it is asked for its addresses only, which fails then.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
        let socket = socket2::SockRef::from(&fd);
        let local = socket
            .local_addr()
            .ok()
            .and_then(|address| address.as_socket());
        local.is_some_and(|address| address.port() == port) && socket.peer_addr().is_ok()
    };
    entries.filter_map(number).filter(is_at).count()
}

#[test]
fn storms_of_resets_leak_neither_descriptors_nor_places() {
    let origin = Origin::answering(|request| ok(vec![b'x'; request.path().len() * 50_000]));
    let sluice = Sluice::start(&[origin.address], "");
    for round in 0..300 {
        let mut client = Client::connect(&sluice);
        match round % 4 {
            // Before a byte, in the head, while the answer is awaited, in the answer.
            0 => {}
            1 => client.send("GET / HTTP/1.1\r\nho"),
            2 => client.send(get("/answer")),
            _ => {
                client.send(get("/answer"));
                client.head();
            }
        }
        client.reset();
    }
    sluice.wait_until_all_clients_are_gone();
    wait_until("all descriptors are closed", || {
        sockets_at(sluice.address.port()) == 0
    });
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/").body.len(), 50_000);
    assert_eq!(sluice.open(), 1);
}

#[test]
fn storms_of_resets_by_the_origin_leak_nothing_either() {
    let origin = Origin::start(|peer| {
        if let Some(request) = peer.request() {
            if request.path() == "/begun" {
                peer.send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nsome");
            }
            peer.reset();
        }
    });
    let sluice = Sluice::start(&[origin.address], "[tunables]\n\"upstream.retries\" = 0\n");
    for _ in 0..50 {
        assert_eq!(Client::connect(&sluice).get("/").status, 502);
        let mut client = Client::connect(&sluice);
        client.send(get("/begun"));
        client.rest();
    }
    sluice.wait_until_all_clients_are_gone();
    sluice.wait_until_nothing_is_open_to(origin.address);
}

/// Who has said all still listens, and so does whoever answers.
#[test]
fn half_closed_connections_of_either_side_are_served_to_their_end() {
    let origin = Origin::start(|peer| {
        while let Some(request) = peer.request() {
            peer.send(ok(&request.body));
            if request.path() == "/last" {
                return peer.shutdown_and_wait();
            }
        }
    });
    let sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.send("POST /last HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nbody");
    client.shutdown();
    assert_eq!(client.response().text(), "body");
    client.expect_end();
    // The endpoint will say no more: its connection is closed, and not used again.
    origin.wait_until_gone(1);
    let mut client = Client::connect(&sluice);
    client.send("POST /next HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nmore");
    assert_eq!(client.response().text(), "more");
    assert_eq!(origin.connections(), 2);
}

#[test]
fn a_panic_in_the_middle_of_a_relay_costs_its_exchange_and_frees_its_origin() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], "");
    let mut other = Client::connect(&sluice);
    assert_eq!(other.get("/other").text(), "/other");
    // Before anything was sent the client is told; behind the head, its connection breaks.
    let mut client = Client::connect(&sluice);
    let response = client.get(PANICS_WITH);
    assert_eq!((response.status, response.closes()), (500, true));
    client.expect_end();
    let mut client = Client::connect(&sluice);
    client.send(get(PANICS_IN));
    assert_eq!(client.rest().1, End::Reset);
    assert_eq!(other.get("/next").text(), "/next");
    assert_eq!(sluice.metric("sluice_worker_panics_total"), 2.0);
    drop(client);
    wait_until("only the other one's is open", || {
        sluice.open_to(origin.address) == 1 && sluice.open() == 1
    });
}

/// Cases 16 to 18: refused, and served as soon as somebody listens, with no more connections than clients.
#[test]
fn an_origin_that_comes_back_is_used_again_at_once() {
    let nowhere = Origin::nowhere();
    let more = "[tunables]\n\"upstream.failed_hold\" = \"0s\"\n\"upstream.retries\" = 0\n";
    let sluice = Sluice::start(&[nowhere], more);
    let mut clients: Vec<Client> = (0..10).map(|_| Client::connect(&sluice)).collect();
    for client in &mut clients {
        let response = client.get("/");
        assert_eq!(
            (response.status, response.value("retry-after")),
            (503, Some("1"))
        );
    }
    let (connections, _server) = listen_at(nowhere);
    for client in &mut clients {
        assert_eq!(client.get("/").text(), "back");
    }
    assert!(connections.load(std::sync::atomic::Ordering::SeqCst) <= clients.len());
}

/// An origin at an address that was refused before.
fn listen_at(
    address: SocketAddr,
) -> (
    std::sync::Arc<std::sync::atomic::AtomicUsize>,
    std::thread::JoinHandle<()>,
) {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind(address).unwrap();
    let connections = std::sync::Arc::<std::sync::atomic::AtomicUsize>::default();
    let seen = std::sync::Arc::clone(&connections);
    let server = std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).is_ok_and(|n| n > 0) {
                    let _ = stream.write_all(&ok("back"));
                }
            });
        }
    });
    (connections, server)
}
