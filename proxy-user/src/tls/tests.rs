//! Handshakes and streams against rustls' own client on a plain socket in another thread.

use std::{
    future::Future,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, NamedGroup, RootCertStore, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
};

use super::*;
use crate::net::{self, Instant, Settings};

type Outcome = Result<(), Box<dyn std::error::Error>>;
type Fault = Box<dyn std::error::Error + Send + Sync>;
type Client = StreamOwned<ClientConnection, TcpStream>;

/// A self-signed certificate, its own root, and both as PEM.
struct Made {
    certificate: Certificate,
    root: CertificateDer<'static>,
    chain_pem: String,
    key_pem: String,
}

fn make_with(names: &[&str], key: KeyPair) -> Result<Made, Box<dyn std::error::Error>> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let certificate = CertificateParams::new(names)?.self_signed(&key)?;
    let (chain_pem, key_pem) = (certificate.pem(), key.serialize_pem());
    Ok(Made {
        certificate: Certificate::parse(chain_pem.as_bytes(), key_pem.as_bytes())?,
        root: certificate.der().clone(),
        chain_pem,
        key_pem,
    })
}

fn make(names: &[&str]) -> Result<Made, Box<dyn std::error::Error>> {
    make_with(names, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

fn acceptor(made: &[&Made]) -> Result<Acceptor, Box<dyn std::error::Error>> {
    let certificates: Vec<_> = made.iter().map(|made| made.certificate.clone()).collect();
    Ok(Acceptor::new(
        &certificates,
        &Tickets::new()?,
        &[b"http/1.1"],
    )?)
}

fn client_config(
    made: &[&Made],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Result<ClientConfig, Box<dyn std::error::Error>> {
    let mut roots = RootCertStore::empty();
    for made in made {
        roots.add(made.root.clone())?;
    }
    Ok(
        ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)?
            .with_root_certificates(roots)
            .with_no_client_auth(),
    )
}

/// Runs a TLS client in a thread of its own; the handshake is made by its first read or write.
fn client<T: Send + 'static>(
    config: &Arc<ClientConfig>,
    name: &'static str,
    to: SocketAddr,
    talk: impl FnOnce(&mut Client) -> Result<T, Fault> + Send + 'static,
) -> JoinHandle<Result<T, Fault>> {
    let config = config.clone();
    std::thread::spawn(move || {
        let socket = TcpStream::connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        let connection = ClientConnection::new(config, ServerName::try_from(name)?)?;
        talk(&mut StreamOwned::new(connection, socket))
    })
}

/// Gives each of `count` connections to `serve`, one after the other, on a worker in this thread.
fn serve<F: Future<Output = Outcome>>(
    count: usize,
    listener: TcpListener,
    serve: impl Fn(net::Stream) -> F,
) -> Outcome {
    net::run(&Settings::default(), async move {
        let listener = net::Listener::from_fd(listener.into())?;
        for _ in 0..count {
            let deadline = Instant::read() + Duration::from_secs(20);
            net::timeout(deadline, async { serve(listener.accept().await?).await }).await??;
        }
        Ok(())
    })?
}

fn listen() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn joined<T>(thread: JoinHandle<Result<T, Fault>>) -> Result<T, Box<dyn std::error::Error>> {
    thread
        .join()
        .map_err(|_| "the client panicked")?
        .map_err(|fault| fault as Box<dyn std::error::Error>)
}

async fn echo(stream: &Stream) -> io::Result<()> {
    while let Some(chunk) = stream.recv().await? {
        stream.send(chunk).await?;
    }
    stream.shutdown().await
}

fn hello(client: &mut Client) -> Result<(), Fault> {
    client.write_all(b"hello")?;
    let mut answer = [0; 5];
    client.read_exact(&mut answer)?;
    assert_eq!(&answer, b"hello");
    Ok(())
}

fn bye(client: &mut Client) -> Result<(), Fault> {
    client.conn.send_close_notify();
    client.flush()?;
    assert_eq!(
        client.read(&mut [0; 1])?,
        0,
        "the server ends its session too"
    );
    Ok(())
}

#[test]
fn either_version_shakes_hands_and_the_newer_one_with_post_quantum_keys() -> Outcome {
    for (version, name) in [
        (&rustls::version::TLS13, "TLSv1.3"),
        (&rustls::version::TLS12, "TLSv1.2"),
    ] {
        let made = make(&["one.test"])?;
        let acceptor = acceptor(&[&made])?;
        let mut config = client_config(&[&made], &[version])?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let (listener, address) = listen()?;
        let client = client(&Arc::new(config), "one.test", address, |client| {
            hello(client)?;
            bye(client)?;
            Ok(client
                .conn
                .negotiated_key_exchange_group()
                .map(|group| group.name()))
        });
        serve(1, listener, async |stream| {
            let stream = acceptor.accept(stream).await?;
            assert_eq!(stream.server_name(), Some("one.test"));
            assert_eq!(stream.alpn(), Some(&b"http/1.1"[..]));
            assert_eq!(stream.protocol_version(), name);
            assert!(!stream.resumed());
            Ok(echo(&stream).await?)
        })?;
        let group = joined(client)?;
        if name == "TLSv1.3" {
            assert_eq!(group, Some(NamedGroup::X25519MLKEM768));
        }
    }
    Ok(())
}

#[test]
fn the_name_chooses_the_certificate() -> Outcome {
    let first = make(&["first.test"])?;
    let exact = make(&["a.wild.test"])?;
    let wild = make(&["*.wild.test"])?;
    let acceptor = acceptor(&[&first, &exact, &wild])?;
    let all = [&first, &exact, &wild];
    // What the client asks for, and which certificate it must be shown: it trusts that one only.
    let cases = [
        ("first.test", Some(&first)),
        ("a.wild.test", Some(&exact)),
        ("b.wild.test", Some(&wild)),
        ("a.b.wild.test", None),
        ("wild.test", None),
        ("unknown.test", None),
    ];
    for (name, expected) in cases {
        let trusted = expected.map_or(all.to_vec(), |expected| vec![expected]);
        let config = Arc::new(client_config(&trusted, rustls::ALL_VERSIONS)?);
        let (listener, address) = listen()?;
        let client = client(&config, name, address, |client| {
            let failed = hello(client).err().map(|error| error.to_string());
            Ok((failed, client.conn.peer_certificates().map(<[_]>::to_vec)))
        });
        serve(1, listener, async |stream| {
            if let Ok(stream) = acceptor.accept(stream).await {
                let _ = echo(&stream).await;
            }
            Ok(())
        })?;
        let (failed, _) = joined(client)?;
        match expected {
            Some(_) => assert_eq!(failed, None, "{name}"),
            None => assert!(
                failed.is_some_and(|error| error.contains("not valid for name")),
                "{name} gets the first certificate, which is not its own"
            ),
        }
    }
    Ok(())
}

#[test]
fn a_client_without_a_name_gets_the_first_certificate() -> Outcome {
    let first = make(&["127.0.0.1", "first.test"])?;
    let other = make(&["other.test"])?;
    let acceptor = acceptor(&[&first, &other])?;
    let config = Arc::new(client_config(&[&first], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    // An address is never sent as a name (RFC 6066 section 3).
    let client = client(&config, "127.0.0.1", address, hello);
    serve(1, listener, async |stream| {
        let stream = acceptor.accept(stream).await?;
        assert_eq!(stream.server_name(), None);
        assert_eq!(stream.alpn(), None);
        let _ = echo(&stream).await;
        Ok(())
    })?;
    joined(client)
}

#[test]
fn of_two_kinds_of_key_for_one_name_the_client_gets_one_it_can_use() -> Outcome {
    let ecdsa = make(&["both.test"])?;
    let rsa = make_with(&["both.test"], KeyPair::generate_for(&PKCS_RSA_SHA256)?)?;
    let acceptor = acceptor(&[&ecdsa, &rsa])?;
    // A verifier that knows RSA only makes the client offer RSA only.
    let mut provider = aws_lc_rs::default_provider();
    let algorithms = &mut provider.signature_verification_algorithms;
    algorithms.mapping = algorithms
        .mapping
        .iter()
        .position(|(scheme, _)| format!("{scheme:?}").starts_with("RSA"))
        .map_or(&[], |first| &algorithms.mapping[first..]);
    let mut roots = RootCertStore::empty();
    roots.add(rsa.root.clone())?;
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS12])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (listener, address) = listen()?;
    let client = client(&Arc::new(config), "both.test", address, hello);
    serve(1, listener, async |stream| {
        let _ = echo(&acceptor.accept(stream).await?).await;
        Ok(())
    })?;
    joined(client)
}

#[test]
fn a_session_is_resumed_also_by_an_acceptor_made_anew() -> Outcome {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let made = make(&["again.test"])?;
        let tickets = Tickets::new()?;
        let certificates = [made.certificate.clone()];
        let config = Arc::new(client_config(&[&made], &[version])?);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let acceptor = Acceptor::new(&certificates, &tickets, &[b"http/1.1"])?;
            let (listener, address) = listen()?;
            let client = client(&config, "again.test", address, |client| {
                hello(client)?;
                bye(client)?;
                Ok(client.conn.handshake_kind())
            });
            serve(1, listener, async |stream| {
                let stream = acceptor.accept(stream).await?;
                assert_eq!(stream.resumed(), kind == HandshakeKind::Resumed);
                assert_eq!(stream.server_name(), Some("again.test"));
                Ok(echo(&stream).await?)
            })?;
            assert_eq!(joined(client)?, Some(kind));
        }
    }
    Ok(())
}

#[test]
fn ten_mebibytes_go_either_way_unchanged() -> Outcome {
    const BYTES: usize = 10 << 20;
    let made = make(&["bulk.test"])?;
    let acceptor = acceptor(&[&made])?;
    let config = Arc::new(client_config(&[&made], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    let pattern = |index: usize| (index.wrapping_mul(0x9e37_79b1) >> 13) as u8;
    let client = client(&config, "bulk.test", address, move |client| {
        let sent: Vec<u8> = (0..BYTES).map(pattern).collect();
        client.write_all(&sent)?;
        client.conn.send_close_notify();
        client.flush()?;
        let mut received = Vec::new();
        client.read_to_end(&mut received)?;
        Ok(received == sent)
    });
    serve(1, listener, async |stream| {
        let stream = acceptor.accept(stream).await?;
        let mut all = Vec::new();
        while let Some(chunk) = stream.recv().await? {
            all.extend_from_slice(&chunk);
        }
        assert!(all.len() == BYTES && all.iter().enumerate().all(|(i, &b)| b == pattern(i)));
        // In odd pieces, of several records each, after the client's end: a half-close inside TLS.
        let mut rest = &all[..];
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(rest.len().min(70_001));
            rest = tail;
            let parts = [head[..1].to_vec().into(), head[1..].to_vec().into()];
            stream.send_vectored(parts).await?;
        }
        Ok(stream.shutdown().await?)
    })?;
    assert!(joined(client)?);
    Ok(())
}

#[test]
fn two_senders_do_not_mix_their_records() -> Outcome {
    let made = make(&["two.test"])?;
    let acceptor = acceptor(&[&made])?;
    let config = Arc::new(client_config(&[&made], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    let client = client(&config, "two.test", address, |client| {
        hello(client)?;
        let mut received = Vec::new();
        client.read_to_end(&mut received)?;
        Ok(received)
    });
    serve(1, listener, async |stream| {
        let stream = acceptor.accept(stream).await?;
        if let Some(chunk) = stream.recv().await? {
            stream.send(chunk).await?;
        }
        let sender = async |byte: u8| {
            for _ in 0..200 {
                stream.send(vec![byte; 10_000]).await?;
            }
            Ok::<(), io::Error>(())
        };
        let (left, right) = net::join(sender(b'l'), sender(b'r')).await;
        left.and(right)?;
        Ok(stream.shutdown().await?)
    })?;
    let received = joined(client)?;
    let runs: Vec<usize> = received.chunk_by(u8::eq).map(<[u8]>::len).collect();
    assert_eq!(received.len(), 4_000_000);
    assert!(runs.iter().all(|len| len % 10_000 == 0));
    Ok(())
}

#[test]
fn an_end_without_close_notify_is_told_apart() -> Outcome {
    let made = make(&["cut.test"])?;
    let acceptor = acceptor(&[&made])?;
    let config = Arc::new(client_config(&[&made], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    let client = client(&config, "cut.test", address, |client| {
        hello(client)?;
        client.sock.shutdown(Shutdown::Write)?;
        Ok(())
    });
    serve(1, listener, async |stream| {
        let stream = acceptor.accept(stream).await?;
        let error = echo(&stream).await.err().ok_or("a proper end")?;
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        Ok(())
    })?;
    joined(client)
}

#[test]
fn a_changed_record_fails_the_session_and_the_peer_is_told() -> Outcome {
    let made = make(&["forged.test"])?;
    let acceptor = acceptor(&[&made])?;
    let config = Arc::new(client_config(&[&made], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    let client = client(&config, "forged.test", address, |client| {
        hello(client)?;
        client.sock.write_all(&[
            23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
        ])?;
        let error = client.read(&mut [0; 1]).err().ok_or("no error")?;
        Ok(error.to_string())
    });
    serve(1, listener, async |stream| {
        let stream = acceptor.accept(stream).await?;
        let error = echo(&stream).await.err().ok_or("a proper end")?;
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        let error = stream.recv().await.err().ok_or("a failure stays")?;
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(stream.send(b"no more").await.is_err());
        Ok(())
    })?;
    let seen = joined(client)?;
    assert!(seen.contains("BadRecordMac"), "{seen}");
    Ok(())
}

#[test]
fn what_is_no_tls_is_refused_at_the_first_byte() -> Outcome {
    let made = make(&["one.test"])?;
    let acceptor = acceptor(&[&made])?;
    let cases: [(&[u8], bool); 4] = [
        (b"GET / HTTP/1.1\r\nHost: one.test\r\n\r\n", true),
        (&[0; 100], true),
        (&[22, 3, 1, 0, 5, 1, 0, 0, 1, 0], false),
        (&[22, 255, 255, 255, 255, 0, 0, 0], false),
    ];
    for (bytes, not_tls) in cases {
        let (listener, address) = listen()?;
        let mut socket = TcpStream::connect(address)?;
        socket.write_all(bytes)?;
        serve(1, listener, async |stream| {
            let error = acceptor.accept(stream).await.err().ok_or("accepted")?;
            assert_eq!(matches!(error, HandshakeError::NotTls), not_tls, "{error}");
            assert_eq!(matches!(error, HandshakeError::Refused(_)), !not_tls);
            Ok(())
        })?;
    }
    let (listener, address) = listen()?;
    drop(TcpStream::connect(address)?);
    serve(1, listener, async |stream| {
        let error = acceptor.accept(stream).await.err().ok_or("accepted")?;
        assert!(matches!(error, HandshakeError::Closed), "{error}");
        Ok(())
    })
}

#[test]
fn a_hello_in_single_bytes_is_understood() -> Outcome {
    let made = make(&["slow.test"])?;
    let acceptor = acceptor(&[&made])?;
    let config = Arc::new(client_config(&[&made], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    let client = client(&config, "slow.test", address, |client| {
        client.sock.set_nodelay(true)?;
        let mut flight = Vec::new();
        client.conn.write_tls(&mut flight)?;
        for byte in flight {
            client.sock.write_all(&[byte])?;
        }
        hello(client)?;
        bye(client)
    });
    serve(1, listener, async |stream| {
        Ok(echo(&acceptor.accept(stream).await?).await?)
    })?;
    joined(client)
}

#[test]
fn a_client_with_only_other_protocols_is_refused() -> Outcome {
    let made = make(&["one.test"])?;
    let acceptor = acceptor(&[&made])?;
    let mut config = client_config(&[&made], rustls::ALL_VERSIONS)?;
    config.alpn_protocols = vec![b"spdy/1".to_vec()];
    let (listener, address) = listen()?;
    let client = client(&Arc::new(config), "one.test", address, |client| {
        Ok(hello(client).err().map(|error| error.to_string()))
    });
    serve(1, listener, async |stream| {
        let error = acceptor.accept(stream).await.err().ok_or("accepted")?;
        assert!(matches!(error, HandshakeError::Refused(_)), "{error}");
        Ok(())
    })?;
    let seen = joined(client)?.ok_or("no error")?;
    assert!(seen.contains("NoApplicationProtocol"), "{seen}");
    Ok(())
}

#[test]
fn many_handshakes_at_once_all_succeed() -> Outcome {
    const CLIENTS: usize = 24;
    let made = make(&["many.test"])?;
    let acceptor = acceptor(&[&made])?;
    let config = Arc::new(client_config(&[&made], rustls::ALL_VERSIONS)?);
    let (listener, address) = listen()?;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| client(&config, "many.test", address, hello))
        .collect();
    net::run(&Settings::default(), async move {
        let listener = net::Listener::from_fd(listener.into())?;
        let (bell, ended) = net::doorbell()?;
        let ends = std::rc::Rc::new(std::cell::Cell::new(0));
        for _ in 0..CLIENTS {
            let (stream, acceptor) = (listener.accept().await?, acceptor.clone());
            let (ends, bell) = (ends.clone(), bell.clone());
            net::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    let _ = echo(&stream).await;
                }
                ends.set(ends.get() + 1);
                bell.ring();
            });
        }
        while ends.get() < CLIENTS {
            net::timeout(Instant::read() + Duration::from_secs(20), ended.wait()).await??;
        }
        Ok::<(), Box<dyn std::error::Error>>(())
    })??;
    clients.into_iter().try_for_each(joined)
}

#[test]
fn what_a_certificate_says_is_read() -> Outcome {
    let made = make(&["Upper.Test", "*.wild.test", "127.0.0.1"])?;
    assert_eq!(made.certificate.names(), ["upper.test", "*.wild.test"]);
    assert!(made.certificate.not_before_s() < made.certificate.not_after_s());
    Ok(())
}

#[test]
fn a_pair_that_cannot_serve_is_refused_with_the_reason() -> Outcome {
    let (one, other) = (make(&["one.test"])?, make(&["other.test"])?);
    let why = |chain: &str, key: &str| {
        Certificate::parse(chain.as_bytes(), key.as_bytes())
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    let key = &one.key_pem;
    assert!(why(&one.chain_pem, &other.key_pem).contains("is not the one of the certificate"));
    assert!(why("", key).contains("holds no certificate"));
    assert!(why(key, key).contains("holds no certificate"));
    assert!(why(&one.chain_pem, &one.chain_pem).contains("holds no private key"));
    assert!(why(&one.chain_pem[..200], key).contains("broken PEM"));
    let wrong_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(why(wrong_der, key).contains("certificate 1 of the chain"));
    let second = [&one.chain_pem, wrong_der].concat();
    assert!(why(&second, key).contains("certificate 2 of the chain"));
    let wrong_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    assert!(why(&one.chain_pem, wrong_key).contains("cannot be used"));
    assert!(Acceptor::new(&[], &Tickets::new()?, &[]).is_err());
    Ok(())
}
