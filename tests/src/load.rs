//! Load that goes on in the background while a test does something to the proxy, and counts what it cost.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::client::{self, Tally};
use crate::http::KeepAlive;
use crate::namespace::Namespace;
use crate::scripted::BYSTANDER;
use crate::wait;

/// No load runs longer than this, whatever its test forgets.
const LIMIT: Duration = Duration::from_secs(60);

/// A running load.
pub struct Load {
    ending: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Tally>>,
}

/// What one client of a load does: rounds until told to end.
struct Rounds {
    ending: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    until: Instant,
}

impl Rounds {
    fn go_on(&self) -> bool {
        !self.ending.load(Ordering::Relaxed) && Instant::now() < self.until
    }

    fn count(&self, tally: &mut Tally, result: Result<(String, u64)>) {
        tally.count(result);
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

impl Load {
    /// `clients` long-lived TCP connections through an echo, each sending one message after the other. One that breaks stays broken.
    pub fn streams(namespace: &Namespace, to: SocketAddr, clients: usize) -> Result<Self> {
        Self::start(namespace, clients, move |number, rounds| {
            stream_rounds(to, number, rounds)
        })
    }

    /// `clients` UDP sockets that each send a numbered datagram every millisecond and hear the echo of each.
    pub fn datagrams(namespace: &Namespace, to: SocketAddr, clients: usize) -> Result<Self> {
        Self::start(namespace, clients, move |_, rounds| {
            datagram_rounds(to, rounds)
        })
    }

    /// `clients` keep-alive HTTP connections that GET one path after the other. A connection that the server closed between
    /// two exchanges is opened again, as any client does; one that breaks within an exchange is a failure.
    pub fn requests(
        namespace: &Namespace,
        to: SocketAddr,
        clients: usize,
        host: &str,
        path: &str,
    ) -> Result<Self> {
        let (host, path) = (host.to_owned(), path.to_owned());
        Self::start(namespace, clients, move |_, rounds| {
            request_rounds(to, &host, &path, rounds)
        })
    }

    /// `clients` keep-alive HTTP connections to a scripted origin that ask for another path each time, and hear of it.
    pub fn echoes(namespace: &Namespace, to: SocketAddr, clients: usize) -> Result<Self> {
        Self::start(namespace, clients, move |number, rounds| {
            let (mut tally, mut connection) = (Tally::default(), None);
            while rounds.go_on() {
                let path = format!("{BYSTANDER}{number}/{}", tally.tried);
                let result =
                    request_round(&mut connection, to, "bystander.test", &path, |response| {
                        ensure!(response.text() == path, "{path} got {response:?}");
                        Ok((String::new(), response.body.len() as u64))
                    });
                if result.is_err() {
                    connection = None;
                }
                rounds.count(&mut tally, result);
                thread::sleep(Duration::from_millis(2));
            }
            tally
        })
    }

    /// `clients` that open a new connection for each request.
    pub fn connections(
        namespace: &Namespace,
        to: SocketAddr,
        clients: usize,
        host: &str,
        path: &str,
    ) -> Result<Self> {
        let (host, path) = (host.to_owned(), path.to_owned());
        Self::start(namespace, clients, move |_, rounds| {
            let mut tally = Tally::default();
            while rounds.go_on() {
                let result = KeepAlive::connect(None, to)
                    .and_then(|mut connection| {
                        connection.get(&host, &path, "Connection: close\r\n")
                    })
                    .and_then(|response| accepted(&response));
                rounds.count(&mut tally, result);
                thread::sleep(Duration::from_millis(2));
            }
            tally
        })
    }

    /// Rounds done so far, failed ones too.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until `rounds` more have been done.
    pub fn wait_for(&self, rounds: u64) -> Result<()> {
        let goal = self.done() + rounds;
        wait::until_true("the load to go on", Duration::from_secs(20), || {
            self.done() >= goal
        })
    }

    /// Ends it and gives what it came to.
    pub fn stop(mut self) -> Result<Tally> {
        self.ending.store(true, Ordering::Relaxed);
        let mut sum = Tally::default();
        for thread in self.threads.drain(..) {
            sum.add(
                &thread
                    .join()
                    .map_err(|_| anyhow!("a client of the load panicked"))?,
            );
        }
        Ok(sum)
    }

    fn start(
        namespace: &Namespace,
        clients: usize,
        body: impl Fn(usize, &Rounds) -> Tally + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut load = Self {
            ending: Arc::default(),
            done: Arc::default(),
            threads: Vec::new(),
        };
        let body = Arc::new(body);
        for number in 0..clients {
            let rounds = Rounds {
                ending: Arc::clone(&load.ending),
                done: Arc::clone(&load.done),
                until: Instant::now() + LIMIT,
            };
            let body = Arc::clone(&body);
            load.threads
                .push(namespace.thread("load", move || body(number, &rounds))?);
        }
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
    }
}

fn stream_rounds(to: SocketAddr, number: usize, rounds: &Rounds) -> Tally {
    let mut tally = Tally::default();
    let opened = client::connect(None, to).and_then(|stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut name = String::new();
        reader
            .read_line(&mut name)
            .context("read the endpoint's name")?;
        Ok((stream, reader, name.trim_end().to_owned()))
    });
    let (mut stream, mut reader, name) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            rounds.count(&mut tally, Err(error));
            return tally;
        }
    };
    let message = vec![number as u8; 512];
    let mut back = vec![0; message.len()];
    while rounds.go_on() {
        let result = stream
            .write_all(&message)
            .and_then(|()| reader.read_exact(&mut back))
            .context("a stream broke")
            .and_then(|()| {
                ensure!(back == message, "a stream's echo differs");
                Ok((name.clone(), message.len() as u64))
            });
        let broken = result.is_err();
        rounds.count(&mut tally, result);
        if broken {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    tally
}

fn datagram_rounds(to: SocketAddr, rounds: &Rounds) -> Tally {
    let mut tally = Tally::default();
    let socket = match client::udp_socket(to) {
        Ok(socket) => socket,
        Err(error) => {
            tally.count(Err(error));
            return tally;
        }
    };
    let mut number = 0_u64;
    while rounds.go_on() {
        number += 1;
        let result = client::exchange_datagram(&socket, &number.to_be_bytes())
            .with_context(|| format!("datagram {number}"));
        rounds.count(&mut tally, result);
        thread::sleep(Duration::from_millis(1));
    }
    tally
}

fn request_rounds(to: SocketAddr, host: &str, path: &str, rounds: &Rounds) -> Tally {
    let mut tally = Tally::default();
    let mut connection: Option<KeepAlive> = None;
    while rounds.go_on() {
        let result = request_round(&mut connection, to, host, path, accepted);
        if result.is_err() {
            connection = None;
        }
        rounds.count(&mut tally, result);
    }
    tally
}

fn request_round(
    connection: &mut Option<KeepAlive>,
    to: SocketAddr,
    host: &str,
    path: &str,
    accepted: impl Fn(&crate::http::Response) -> Result<(String, u64)>,
) -> Result<(String, u64)> {
    if connection.is_none() {
        *connection = Some(KeepAlive::connect(None, to)?);
    }
    let Some(open) = connection else {
        return Err(anyhow!("no connection"));
    };
    let response = open.get(host, path, "")?;
    if response
        .field("connection")
        .is_some_and(|value| value.eq_ignore_ascii_case("close"))
    {
        *connection = None;
    }
    accepted(&response)
}

fn accepted(response: &crate::http::Response) -> Result<(String, u64)> {
    ensure!(
        response.status == 200,
        "status {}: {}",
        response.status,
        response.text().trim()
    );
    Ok((
        response.origin().unwrap_or("?").to_owned(),
        response.body.len() as u64,
    ))
}

/// How many each endpoint answered, sorted: for a sentence.
pub fn shares(per_endpoint: &BTreeMap<String, u64>) -> String {
    per_endpoint
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect::<Vec<_>>()
        .join(", ")
}
