//! A server of the DNS that says what a test wants: the truth, nothing, or nonsense.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hickory_resolver::proto::op::{Message, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

use super::*;
use crate::config::Origin;

/// Records by name and type; `Err` is a code, `None` no answer at all.
type Zone =
    Box<dyn FnMut(&str, RecordType) -> Option<Result<Vec<(u32, RData)>, ResponseCode>> + Send>;

struct Server {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    asked: Arc<Mutex<Vec<(String, RecordType)>>>,
}

impl Server {
    /// On a thread that ends with the process.
    fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let silent: Zone = Box::new(|_, _| None);
        let server = Self {
            address: socket.local_addr().unwrap(),
            zone: Arc::new(Mutex::new(silent)),
            asked: Arc::default(),
        };
        let (zone, asked) = (Arc::clone(&server.zone), Arc::clone(&server.asked));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok((length, peer)) = socket.recv_from(&mut bytes) {
                let Ok(question) = Message::from_vec(&bytes[..length]) else {
                    continue;
                };
                let query: Query = question.queries[0].clone();
                let name = query.name().to_ascii().to_ascii_lowercase();
                let key = (name.clone(), query.query_type());
                asked.lock().unwrap().push(key);
                let said = (zone.lock().unwrap())(&name, query.query_type());
                let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
                answer.metadata.recursion_available = true;
                answer.add_query(query.clone());
                match said {
                    None => continue,
                    Some(Err(code)) => answer.metadata.response_code = code,
                    Some(Ok(records)) => {
                        for (ttl, data) in records {
                            answer.add_answer(Record::from_rdata(query.name().clone(), ttl, data));
                        }
                    }
                }
                let _ = socket.send_to(&answer.to_vec().unwrap(), peer);
            }
        });
        server
    }

    fn say(
        &self,
        zone: impl FnMut(&str, RecordType) -> Option<Result<Vec<(u32, RData)>, ResponseCode>>
        + Send
        + 'static,
    ) {
        *self.zone.lock().unwrap() = Box::new(zone);
    }

    fn asked(&self, kind: RecordType) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(_, asked)| *asked == kind).count()
    }
}

fn a(last: u8) -> RData {
    RData::A(A::new(192, 0, 2, last))
}

fn aaaa(last: u16) -> RData {
    RData::AAAA(AAAA::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last))
}

fn ip(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

/// Looks one name up as long as `test` goes on, with these tunables.
fn with_answers<T>(
    server: &Server,
    question: Question,
    tunables: &[(&str, &str)],
    test: impl AsyncFnOnce(mpsc::Receiver<Answer>) -> T,
) -> T {
    let mut values = Tunables::default();
    for (key, value) in tunables {
        values.assign(key, value, Origin::Runtime).unwrap();
    }
    let resolver = config::Resolver {
        servers: vec![server.address],
    };
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (sender, answers) = mpsc::channel(16);
        let mut names = Names::new(sender, &Vec::new());
        names.set([question].into(), &resolver, &values);
        test(answers).await
    })
}

fn host() -> Question {
    Question::Host("app.test.".to_owned())
}

fn ips(answer: &Answer) -> Vec<IpAddr> {
    let targets = answer.targets.as_ref().expect("a good answer");
    targets.iter().map(|target| target.ip).collect()
}

#[test]
fn a_host_has_the_addresses_of_both_families() {
    let server = Server::start();
    server.say(|name, kind| {
        assert_eq!(name, "app.test.");
        Some(Ok(match kind {
            RecordType::A => vec![(300, a(2)), (300, a(1)), (300, a(1))],
            _ => vec![(300, aaaa(7))],
        }))
    });
    let answer = with_answers(&server, host(), &[], async |mut answers| {
        answers.recv().await.unwrap()
    });
    let v6: IpAddr = "2001:db8::7".parse().unwrap();
    assert_eq!(ips(&answer), [ip(1), ip(2), v6], "sorted, and each once");
}

#[test]
fn one_family_alone_is_an_answer_and_no_address_at_all_is_none() {
    let server = Server::start();
    server.say(|_, kind| {
        Some(Ok(match kind {
            RecordType::A => vec![(300, a(1))],
            _ => Vec::new(),
        }))
    });
    let answer = with_answers(&server, host(), &[], async |mut answers| {
        answers.recv().await.unwrap()
    });
    assert_eq!(ips(&answer), [ip(1)]);
    for code in [ResponseCode::NXDomain, ResponseCode::ServFail] {
        server.say(move |_, _| Some(Err(code)));
        let answer = with_answers(&server, host(), &[], async |mut answers| {
            answers.recv().await.unwrap()
        });
        assert!(answer.targets.is_err(), "{answer:?}");
    }
}

#[test]
fn a_name_is_looked_up_again_when_its_ttl_says_so_but_not_all_the_time() {
    let server = Server::start();
    let mut last = 0;
    server.say(move |_, kind| {
        Some(Ok(match kind {
            RecordType::A => {
                last += 1;
                // That nobody may keep it is no reason to ask without a pause.
                vec![(0, a(last))]
            }
            _ => Vec::new(),
        }))
    });
    let start = Instant::now();
    let answers = with_answers(&server, host(), &[], async |mut answers| {
        [
            answers.recv().await.unwrap(),
            answers.recv().await.unwrap(),
            answers.recv().await.unwrap(),
        ]
    });
    assert_eq!(
        answers.map(|answer| ips(&answer)),
        [[ip(1)], [ip(2)], [ip(3)]]
    );
    // Twice dns_ttl_min.
    assert!(start.elapsed() >= Duration::from_millis(1990));
    assert_eq!(server.asked(RecordType::A), 3);
}

#[test]
fn a_long_ttl_is_cut_to_what_the_tunable_says() {
    let server = Server::start();
    let mut last = 0;
    server.say(move |_, kind| {
        last += u8::from(kind == RecordType::A);
        Some(Ok(match kind {
            RecordType::A => vec![(86_400, a(last))],
            _ => Vec::new(),
        }))
    });
    let tunables = [("upstream.dns_ttl_max", "1s")];
    let (first, second) = with_answers(&server, host(), &tunables, async |mut answers| {
        let first = answers.recv().await.unwrap();
        let second = tokio::time::timeout(Duration::from_secs(10), answers.recv()).await;
        (first, second)
    });
    let second = second.expect("it is asked for again").unwrap();
    assert_ne!(ips(&second), ips(&first));
}

#[test]
fn of_a_family_that_nothing_is_learned_of_the_last_addresses_stay() {
    let server = Server::start();
    let mut round = 0;
    server.say(move |_, kind| match kind {
        RecordType::A => {
            round += 1;
            Some(Ok(vec![(0, a(round))]))
        }
        _ if round < 2 => Some(Ok(vec![(0, aaaa(7))])),
        _ => Some(Err(ResponseCode::ServFail)),
    });
    let v6: IpAddr = "2001:db8::7".parse().unwrap();
    let answers = with_answers(&server, host(), &[], async |mut answers| {
        [answers.recv().await.unwrap(), answers.recv().await.unwrap()]
    });
    assert_eq!(ips(&answers[0]), [ip(1), v6]);
    assert!(ips(&answers[1]).contains(&v6), "{answers:?}");
}

#[test]
fn a_server_that_says_nothing_is_given_up_in_time() {
    let server = Server::start();
    let start = Instant::now();
    let tunables = [("upstream.dns_timeout", "300ms")];
    let answer = with_answers(&server, host(), &tunables, async |mut answers| {
        answers.recv().await.unwrap()
    });
    assert!(answer.targets.is_err(), "{answer:?}");
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn what_nobody_could_answer_at_is_left_out_and_no_more_than_allowed_is_taken() {
    let server = Server::start();
    server.say(|_, kind| {
        Some(Ok(match kind {
            RecordType::A => {
                let nobody = [[0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255]];
                let nobody = nobody.map(|[p, q, r, s]| (300, RData::A(A::new(p, q, r, s))));
                let many = (1..=30).map(|last| (300, a(last)));
                nobody.into_iter().chain(many).collect()
            }
            _ => Vec::new(),
        }))
    });
    let tunables = [("upstream.dns_addresses_max", "10")];
    let answer = with_answers(&server, host(), &tunables, async |mut answers| {
        answers.recv().await.unwrap()
    });
    assert_eq!(ips(&answer), (1..=10).map(ip).collect::<Vec<_>>());
    server.say(|_, _| Some(Ok(vec![(300, RData::A(A::new(0, 0, 0, 0)))])));
    let answer = with_answers(&server, host(), &[], async |mut answers| {
        answers.recv().await.unwrap()
    });
    assert!(answer.targets.is_err(), "{answer:?}");
}

#[test]
fn a_service_has_targets_with_ports_weights_and_priorities() {
    let server = Server::start();
    server.say(|name, kind| {
        let srv = |priority, weight, port, target: &str| {
            let target = Name::from_ascii(target).unwrap();
            (300, RData::SRV(SRV::new(priority, weight, port, target)))
        };
        Some(Ok(match (name, kind) {
            ("_http._tcp.app.test.", RecordType::SRV) => vec![
                srv(10, 60, 8080, "one.test."),
                srv(10, 0, 8081, "two.test."),
                srv(20, 5, 9090, "spare.test."),
                srv(10, 1, 1, "."),
            ],
            ("one.test.", RecordType::A) => vec![(300, a(1)), (300, a(2))],
            ("two.test.", RecordType::A) => vec![(300, a(3))],
            ("spare.test.", RecordType::A) => vec![(300, a(4))],
            _ => Vec::new(),
        }))
    });
    let question = Question::Service("_http._tcp.app.test.".to_owned());
    let answer = with_answers(&server, question, &[], async |mut answers| {
        answers.recv().await.unwrap()
    });
    let target = |last, port, weight, priority| Target {
        ip: ip(last),
        port,
        weight,
        priority,
    };
    let expected = vec![
        target(1, 8080, 30, 10),
        target(2, 8080, 30, 10),
        target(3, 8081, 0, 10),
        target(4, 9090, 5, 20),
    ];
    assert_eq!(answer.targets, Ok(expected));
}

/// Names with what is known of them; nobody is asked.
fn names(known: &[(Question, Vec<Target>)]) -> Names {
    let (sender, _) = mpsc::channel(1);
    Names::new(sender, &known.to_vec())
}

fn upstream(endpoints: Vec<Endpoint>, names: Vec<EndpointName>) -> config::Upstream {
    config::Upstream {
        names,
        ..config::Upstream::new("app", endpoints)
    }
}

fn target(last: u8, port: u16, weight: u32, priority: u16) -> Target {
    Target {
        ip: ip(last),
        port,
        weight,
        priority,
    }
}

#[test]
fn endpoints_are_those_with_addresses_and_those_of_names_each_once() {
    let names = names(&[(host(), vec![target(1, 0, 1, 0), target(2, 0, 1, 0)])]);
    let of_host = EndpointName::Host {
        host: "app.test.".to_owned(),
        port: 8080,
        traits: Traits {
            weight: 7,
            is_backup: true,
            calls_max: Some(5),
        },
    };
    let by_address = Endpoint::new((ip(1), 8080).into(), 3);
    let gone = Endpoint {
        is_named: true,
        ..Endpoint::new((ip(9), 8080).into(), 1)
    };
    let upstream = upstream(vec![by_address, gone], vec![of_host]);
    let endpoints = names.endpoints(&upstream, |_| true);
    let named = Endpoint {
        is_named: true,
        is_backup: true,
        calls_max: Some(5),
        ..Endpoint::new((ip(2), 8080).into(), 7)
    };
    assert_eq!(endpoints, [by_address, named]);
    let usable = names.endpoints(&upstream, |address| address.ip() != ip(2));
    assert_eq!(usable, [by_address]);
}

#[test]
fn weights_of_services_fit_into_ours_and_all_but_the_first_priority_stand_in() {
    let service = EndpointName::Service {
        name: "_http._tcp.app.test".to_owned(),
        calls_max: None,
    };
    let weights = |targets: &[Target]| -> Vec<(u16, u32, bool)> {
        let names = names(&[(Question::from(&service), targets.to_vec())]);
        let upstream = upstream(Vec::new(), vec![service.clone()]);
        let endpoints = names.endpoints(&upstream, |_| true);
        let seen = endpoints
            .iter()
            .map(|one| (one.address.port(), one.weight, one.is_backup));
        seen.collect()
    };
    let small = [target(1, 1, 3, 0), target(1, 2, 0, 0), target(1, 3, 7, 5)];
    assert_eq!(
        weights(&small),
        [(1, 3, false), (2, 1, false), (3, 7, true)]
    );
    let large = [target(1, 1, 60_000, 0), target(1, 2, 30_000, 0)];
    assert_eq!(weights(&large), [(1, 1000, false), (2, 500, false)]);
}

#[test]
fn the_last_good_answer_stays_until_there_is_another() {
    let mut names = names(&[]);
    let answer = |targets| Answer {
        question: host(),
        targets,
    };
    assert!(!names.all_answered(&[host()]));
    assert!(!names.learn(answer(Err("late".to_owned()))));
    assert!(names.all_answered(&[host()]), "a bad one, but an answer");
    let one = vec![target(1, 0, 1, 0)];
    assert!(names.learn(answer(Ok(one.clone()))));
    assert!(!names.learn(answer(Ok(one.clone()))), "the same again");
    assert!(!names.learn(answer(Err("late".to_owned()))));
    assert_eq!(names.facts(), [("app.test.".to_owned(), 1, false)]);
    assert_eq!(names.remembered(), [(host(), one)]);
    assert!(names.learn(answer(Ok(vec![target(2, 0, 1, 0)]))));
    names.keep(&BTreeSet::new());
    assert_eq!(names.remembered(), []);
}
