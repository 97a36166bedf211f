//! Questions to servers of all kinds, good and bad.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;
use crate::config::CaPem;

/// A server that answers every request with the same bytes, on a thread that ends with the process.
struct Server {
    address: SocketAddr,
    /// The heads of the requests.
    seen: Arc<Mutex<Vec<String>>>,
    asked: Arc<AtomicU64>,
}

impl Server {
    fn start(answer: &'static str, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            asked: Arc::default(),
        };
        let (seen, asked) = (Arc::clone(&server.seen), Arc::clone(&server.asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                asked.fetch_add(1, Relaxed);
                let done = match &tls {
                    None => serve(stream, answer, &seen),
                    Some(config) => {
                        let connection = ServerConnection::new(Arc::clone(config)).unwrap();
                        serve(StreamOwned::new(connection, stream), answer, &seen)
                    }
                };
                // Who asks may break off; what he asked was noted before he was answered.
                drop(done);
            }
        });
        server
    }

    /// Shows a certificate for `app.test`, and the file of the authority for it.
    fn start_secure(answer: &'static str) -> (Self, CaPem) {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["app.test".to_owned()]).unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let ca = CaPem {
            path: PathBuf::from("ca.pem"),
            pem: certificate.pem().into_bytes().into(),
        };
        (Self::start(answer, Some(Arc::new(config))), ca)
    }
}

fn serve(
    mut stream: impl Read + Write,
    answer: &str,
    seen: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    seen.lock()
        .unwrap()
        .push(String::from_utf8_lossy(&head).into_owned());
    stream.write_all(answer.as_bytes())?;
    stream.flush()
}

fn http() -> HttpProbe {
    HttpProbe {
        path: "/healthz?deep=1".to_owned(),
        host: None,
        good: Statuses::good(),
        tls: None,
    }
}

fn trust(ca: Option<CaPem>) -> Trust {
    Trust {
        ca,
        server_name: None,
        verify: true,
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, future)
}

fn ask(server: &Server, http: HttpProbe) -> Result<(), String> {
    let kind = ProbeKind::Http(http);
    let question = Question::new(server.address, &kind, &mut HashMap::new())?;
    run(question.ask(server.address))
}

#[test]
fn two_and_three_hundred_are_good_where_nothing_else_is_said() {
    let judge = |line| judge(line, &Statuses::good());
    assert_eq!(judge(b"HTTP/1.1 200 OK\r\n"), Ok(()));
    assert_eq!(judge(b"HTTP/1.0 302 Found\r\n"), Ok(()));
    assert_eq!(judge(b"HTTP/1.1 503 x\r\n"), Err("status 503".to_owned()));
    assert!(judge(b"SSH-2.0-OpenSSH\r\n").is_err());
    assert!(judge(b"HTTP/1.1").is_err());
    assert!(judge(b"").is_err());
}

#[test]
fn what_is_asked_names_the_host_that_is_configured_and_the_address_otherwise() {
    let server = Server::start("HTTP/1.1 204 No Content\r\n\r\n", None);
    assert_eq!(ask(&server, http()), Ok(()));
    let named = HttpProbe {
        host: Some("app.internal".to_owned()),
        ..http()
    };
    assert_eq!(ask(&server, named), Ok(()));
    let seen = server.seen.lock().unwrap();
    assert!(seen[0].starts_with("GET /healthz?deep=1 HTTP/1.1\r\n"));
    assert!(seen[0].contains(&format!("\r\nHost: {}\r\n", server.address)));
    assert!(seen[1].contains("\r\nHost: app.internal\r\n"));
}

#[test]
fn over_tls_a_server_must_show_the_name_that_is_expected_by_an_authority_that_is_trusted() {
    let (server, ca) = Server::start_secure("HTTP/1.1 200 OK\r\n\r\n");
    let secure = |host: Option<&str>, trust| HttpProbe {
        host: host.map(str::to_owned),
        tls: Some(trust),
        ..http()
    };
    let of = |ca: &CaPem| trust(Some(ca.clone()));
    assert_eq!(
        ask(&server, secure(Some("app.test:8443"), of(&ca))),
        Ok(()),
        "by `host`, which may have a port"
    );
    let named = Trust {
        server_name: Some("app.test".to_owned()),
        ..of(&ca)
    };
    assert_eq!(ask(&server, secure(None, named)), Ok(()));
    let error = ask(&server, secure(None, of(&ca))).expect_err("it has no such address");
    assert!(error.contains("not valid for name"), "{error}");
    assert!(ask(&server, secure(Some("other.test"), of(&ca))).is_err());
    let (_, other_ca) = Server::start_secure("");
    let error = ask(&server, secure(Some("app.test"), of(&other_ca))).expect_err("a stranger");
    assert!(error.contains("certificate"), "{error}");
    let any = Trust {
        verify: false,
        ..trust(None)
    };
    assert_eq!(ask(&server, secure(None, any)), Ok(()));
}

#[test]
fn a_file_without_a_usable_authority_is_named() {
    let wrong = CaPem {
        path: PathBuf::from("wrong.pem"),
        pem: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"[..].into(),
    };
    let error = Connector::new(&trust(Some(wrong))).expect_err("no certificate");
    assert!(error.starts_with("wrong.pem: "), "{error}");
}

#[test]
fn an_answer_without_an_end_is_judged_and_left() {
    let endless: &'static str =
        Box::leak(format!("HTTP/1.1 500 x\r\n\r\n{}", "x".repeat(4 << 20)).into());
    let server = Server::start(endless, None);
    assert_eq!(ask(&server, http()), Err("status 500".to_owned()));
}

#[test]
fn the_first_question_comes_at_once_and_pauses_are_never_longer_than_the_interval() {
    let interval = Duration::from_secs(10);
    assert_eq!(pause(interval, 0.0), interval);
    assert_eq!(pause(interval, 1.0), Duration::from_secs(9));
    let server = Server::start("HTTP/1.1 200 OK\r\n\r\n", None);
    run(async {
        let (sender, mut answers) = mpsc::channel(9);
        let mut probes = Probes::new(sender, Arc::new(Registry::new(1)));
        let probe = Probe {
            kind: ProbeKind::Http(http()),
            interval: Duration::from_secs(3600),
            timeout: Duration::from_secs(5),
            rise: 1,
            fall: 1,
        };
        let wanted = || [("app".to_owned(), server.address, probe.clone())].into_iter();
        probes.set(wanted());
        let answer = answers.recv().await.unwrap();
        assert!(answer.good, "{answer:?}");
        probes.set(wanted());
        tokio::task::yield_now().await;
        assert_eq!(
            server.asked.load(Relaxed),
            1,
            "one that runs goes on undisturbed"
        );
    });
}

/// Dead within `fall` intervals, whatever the pauses come to.
#[test]
fn a_dead_server_is_believed_dead_within_as_many_intervals_as_bad_answers() {
    let refused = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    run(async {
        let (sender, mut answers) = mpsc::channel(9);
        let mut probes = Probes::new(sender, Arc::new(Registry::new(1)));
        let interval = Duration::from_millis(400);
        let probe = Probe {
            kind: ProbeKind::Tcp,
            interval,
            timeout: interval,
            rise: 2,
            fall: 3,
        };
        let start = Instant::now();
        probes.set([("app".to_owned(), refused, probe)].into_iter());
        for _ in 0..3 {
            assert!(!answers.recv().await.unwrap().good);
        }
        let took = start.elapsed();
        assert!(took >= interval, "{took:?}: the pauses are too short");
        assert!(took <= interval * 3, "{took:?}");
    });
}
