//! The same over TLS: what is encrypted is served, torn and ended as what is not.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, OnceLock};

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::client::{find_head_end, get, value_of};
use super::origin::ok;
use super::*;

/// A certificate for `web.test` that is its own root.
pub struct Made {
    /// The chain and its key.
    pub pem: String,
    root: CertificateDer<'static>,
}

pub fn certificate() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let parameters = rcgen::CertificateParams::new(vec!["web.test".to_owned()]);
        let certificate = parameters
            .and_then(|parameters| parameters.self_signed(&key))
            .expect("a certificate");
        Made {
            pem: certificate.pem() + &key.serialize_pem(),
            root: certificate.der().clone(),
        }
    })
}

type Secure = StreamOwned<ClientConnection, TcpStream>;

fn connect(sluice: &Sluice) -> Secure {
    let mut roots = RootCertStore::empty();
    roots.add(certificate().root.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("web.test").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(sluice.address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    StreamOwned::new(connection, socket)
}

/// The body of a response with a length.
fn answer(client: &mut Secure) -> Vec<u8> {
    let mut head = Vec::new();
    while find_head_end(&head).is_none() {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8(head).unwrap();
    let length = value_of(&head, "content-length").unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    client.read_exact(&mut body).unwrap();
    body
}

#[test]
fn many_exchanges_and_large_bodies_go_through_one_session() {
    let origin = Origin::answering(|request| {
        assert!(request.head.contains("\r\nx-forwarded-proto: https\r\n"));
        ok(&request.body)
    });
    let sluice = Sluice::start_secure(&[origin.address], "");
    let mut client = connect(&sluice);
    for len in [0, 1, 20_000, 1_000_000, 5] {
        let body = patterned(len);
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {len}\r\n\r\n");
        client.write_all(head.as_bytes()).unwrap();
        client.write_all(&body).unwrap();
        assert!(answer(&mut client) == body, "{len} bytes");
    }
    client.write_all(get("/").repeat(3).as_bytes()).unwrap();
    client.conn.send_close_notify();
    for _ in 0..3 {
        assert_eq!(answer(&mut client), b"");
    }
    // Whoever has said all is answered, and then the session ends in order.
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(origin.connections(), 1);
}

#[test]
fn a_torn_answer_does_not_end_its_session_in_order() {
    let origin = Origin::start(|peer| {
        if peer.request().is_some() {
            peer.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsome\r\n");
        }
    });
    let sluice = Sluice::start_secure(&[origin.address], "");
    let mut client = connect(&sluice);
    client.write_all(get("/").as_bytes()).unwrap();
    let mut seen = Vec::new();
    assert!(
        client.read_to_end(&mut seen).is_err(),
        "a close_notify came"
    );
    assert!(!seen.ends_with(b"0\r\n\r\n"));
}

#[test]
fn a_client_that_is_reset_or_asked_to_go_frees_its_origin() {
    for is_banned in [false, true] {
        let origin = Origin::start(|peer| {
            peer.request();
            peer.wait_for_end();
        });
        let sluice = Sluice::start_secure(&[origin.address], "");
        let mut client = connect(&sluice);
        client.write_all(get("/").as_bytes()).unwrap();
        wait_until("the origin is asked", || origin.requests().len() == 1);
        if is_banned {
            sluice.close_source([127, 0, 0, 1].into());
        } else {
            Client::of(client.sock.try_clone().unwrap()).reset();
            drop(client);
        }
        origin.wait_until_gone(1);
        sluice.wait_until_all_clients_are_gone();
    }
}

#[test]
fn a_handshake_that_does_not_end_is_ended() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"tls.handshake_timeout\" = \"100ms\"\n";
    let sluice = Sluice::start_secure(&[origin.address], more);
    let (_, end) = Client::connect(&sluice).rest();
    assert_eq!(end, End::Finished);
    let mut clear = Client::connect(&sluice);
    clear.send(get("/"));
    assert!(!clear.rest().0.starts_with(b"HTTP"));
    sluice.wait_until_all_clients_are_gone();
    assert_eq!(sluice.metric("sluice_tls_handshakes_failed_total"), 2.0);
    assert_eq!(origin.connections(), 0);
}

#[test]
fn the_first_line_of_a_session_says_what_its_handshake_took() {
    let origin = Origin::echoing();
    let sluice = Sluice::start_secure(&[origin.address], "[log]\naccess = \"stdout\"\n");
    let mut client = connect(&sluice);
    for path in ["/first", "/second"] {
        client.write_all(get(path).as_bytes()).unwrap();
        answer(&mut client);
    }
    let lines = sluice.log(2);
    assert_eq!(
        (&lines[0]["tls"], &lines[1]["tls"]),
        (&"TLSv1.3".into(), &"TLSv1.3".into())
    );
    assert!(
        lines[0]["tls_us"].as_u64().is_some_and(|us| us > 0),
        "{}",
        lines[0]
    );
    assert!(lines[1]["tls_us"].is_null() && lines[1]["accept_us"].is_null());
}
