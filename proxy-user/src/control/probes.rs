//! Active probes: one task for each endpoint that is asked how it is.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::config::{HttpProbe, Probe, ProbeKind, Statuses, Trust};
use crate::metric::Registry;
use crate::tls::{Connector, PeerName};

/// Bytes of an answer that are looked at, its first line; and those that are read all the same, so that a server is not
/// cut off in the middle of a small answer.
const STATUS_LINE_BYTES: usize = 512;
const ANSWER_BYTES_MAX: usize = 64 << 10;
const ANSWER_PATIENCE: Duration = Duration::from_millis(100);

/// How much shorter than its interval a pause between two questions may be: nodes of a fleet do not ask in step.
const JITTER: f64 = 0.1;

/// How long the first questions are spread over.
const FIRST_SPREAD: Duration = Duration::from_millis(100);

/// An answer, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub upstream: String,
    pub address: SocketAddr,
    pub good: bool,
    /// Why not.
    pub reason: String,
}

/// The probes that run.
pub struct Probes {
    running: HashMap<(String, SocketAddr), (Probe, JoinHandle<()>)>,
    answers: mpsc::Sender<Answer>,
    registry: Arc<Registry>,
}

impl Probes {
    /// None yet; what is found out comes to `answers`.
    pub fn new(answers: mpsc::Sender<Answer>, registry: Arc<Registry>) -> Self {
        Self {
            running: HashMap::new(),
            answers,
            registry,
        }
    }

    /// Lets exactly these probes run. One that runs already goes on undisturbed.
    pub fn set(&mut self, wanted: impl Iterator<Item = (String, SocketAddr, Probe)>) {
        let (mut next, mut connectors) = (HashMap::new(), HashMap::new());
        for (upstream, address, probe) in wanted {
            let key = (upstream, address);
            let kept = self.running.remove(&key).and_then(|(running, task)| {
                if running == probe {
                    return Some(task);
                }
                task.abort();
                None
            });
            let task = kept.unwrap_or_else(|| {
                let question = Question::new(address, &probe.kind, &mut connectors);
                self.start(key.0.clone(), address, probe.clone(), question)
            });
            next.insert(key, (probe, task));
        }
        for (_, task) in self.running.values() {
            task.abort();
        }
        self.running = next;
    }

    fn start(
        &self,
        upstream: String,
        address: SocketAddr,
        probe: Probe,
        question: Result<Question, String>,
    ) -> JoinHandle<()> {
        let answers = self.answers.clone();
        let registry = Arc::clone(&self.registry);
        let hashes = RandomState::new();
        tokio::task::spawn_local(async move {
            let mut next =
                Instant::now() + FIRST_SPREAD.min(probe.interval).mul_f64(chance(&hashes, 0));
            for round in 1.. {
                sleep_until(next).await;
                next = Instant::now() + pause(probe.interval, chance(&hashes, round));
                let outcome = match &question {
                    Ok(question) => timeout(probe.timeout, question.ask(address))
                        .await
                        .unwrap_or_else(|_| Err("no answer in time".to_owned())),
                    Err(error) => Err(error.clone()),
                };
                let failed = u64::from(outcome.is_err());
                registry.control.probes.fetch_add(1, Relaxed);
                registry.control.probes_failed.fetch_add(failed, Relaxed);
                let answer = Answer {
                    upstream: upstream.clone(),
                    address,
                    good: outcome.is_ok(),
                    reason: outcome.err().unwrap_or_default(),
                };
                if answers.send(answer).await.is_err() {
                    return;
                }
            }
        })
    }
}

/// Any number from 0 to 1.
fn chance(hashes: &RandomState, round: u64) -> f64 {
    hashes.hash_one(round) as f64 / u64::MAX as f64
}

/// From one question to the next: never more than the interval, so that `fall` bad answers come within as many of them.
fn pause(interval: Duration, chance: f64) -> Duration {
    interval.mul_f64(1.0 - JITTER * chance)
}

/// What is asked of one endpoint.
enum Question {
    Connect,
    Get {
        request: String,
        good: Statuses,
        tls: Option<(Connector, PeerName)>,
    },
}

impl Question {
    fn new(
        address: SocketAddr,
        kind: &ProbeKind,
        connectors: &mut HashMap<Trust, Result<Connector, String>>,
    ) -> Result<Self, String> {
        let ProbeKind::Http(http) = kind else {
            return Ok(Self::Connect);
        };
        let tls = match &http.tls {
            Some(trust) => {
                // To read the authorities of a host takes milliseconds, and there may be thousands of endpoints.
                let known = connectors.entry(trust.clone());
                let connector = known.or_insert_with(|| Connector::new(trust)).clone()?;
                Some((connector, peer_name(address, http, trust)?))
            }
            None => None,
        };
        let host = http.host.clone().unwrap_or_else(|| address.to_string());
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: sluice-probe\r\nConnection: close\r\n\r\n",
            http.path
        );
        Ok(Self::Get {
            request,
            good: http.good.clone(),
            tls,
        })
    }

    /// Asks once.
    async fn ask(&self, address: SocketAddr) -> Result<(), String> {
        let said = |error: std::io::Error| error.to_string();
        let stream = TcpStream::connect(address).await.map_err(said)?;
        let Self::Get { request, good, tls } = self else {
            return Ok(());
        };
        let Some((connector, name)) = tls else {
            return get(stream, request, good).await;
        };
        let (client, name) = connector.client(name);
        let stream = client.connect(name, stream).await.map_err(said)?;
        get(stream, request, good).await
    }
}

/// The name that an endpoint must show.
fn peer_name(address: SocketAddr, http: &HttpProbe, trust: &Trust) -> Result<PeerName, String> {
    if let Some(name) = &trust.server_name {
        return PeerName::parse(name);
    }
    let Some(host) = &http.host else {
        return Ok(address.ip().into());
    };
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) => name,
        _ => host,
    };
    PeerName::parse(name.trim_matches(['[', ']']))
}

/// Sends a request and judges the status of the answer.
async fn get<S>(mut stream: S, request: &str, good: &Statuses) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let said = |error: std::io::Error| error.to_string();
    stream.write_all(request.as_bytes()).await.map_err(said)?;
    stream.flush().await.map_err(said)?;
    let mut line = Vec::new();
    let mut some = [0; STATUS_LINE_BYTES];
    while !line.contains(&b'\n') && line.len() < STATUS_LINE_BYTES {
        match stream.read(&mut some).await.map_err(said)? {
            0 => return Err("closed without an answer".to_owned()),
            count => line.extend_from_slice(&some[..count]),
        }
    }
    let judgement = judge(&line, good);
    let mut rest = stream.take(ANSWER_BYTES_MAX as u64);
    let _ = timeout(ANSWER_PATIENCE, copy(&mut rest, &mut sink())).await;
    judgement
}

fn judge(line: &[u8], good: &Statuses) -> Result<(), String> {
    let status = line
        .strip_prefix(b"HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse::<u16>().ok());
    match status {
        Some(status) if good.has(status) => Ok(()),
        Some(status) => Err(format!("status {status}")),
        None => Err("no HTTP answer".to_owned()),
    }
}

#[cfg(test)]
mod tests;
