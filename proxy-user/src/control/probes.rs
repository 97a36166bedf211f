//! Active probes: one task for each endpoint that is asked how it is.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use crate::config::{Probe, ProbeKind};
use crate::metric::Registry;

/// Bytes of an answer that are looked at: its first line.
const STATUS_LINE_BYTES: usize = 512;

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
        let mut next = HashMap::new();
        for (upstream, address, probe) in wanted {
            let key = (upstream, address);
            let kept = self.running.remove(&key).and_then(|(running, task)| {
                if running == probe {
                    return Some(task);
                }
                task.abort();
                None
            });
            let task = kept.unwrap_or_else(|| self.start(key.0.clone(), address, probe.clone()));
            next.insert(key, (probe, task));
        }
        for (_, task) in self.running.values() {
            task.abort();
        }
        self.running = next;
    }

    fn start(&self, upstream: String, address: SocketAddr, probe: Probe) -> JoinHandle<()> {
        let answers = self.answers.clone();
        let registry = Arc::clone(&self.registry);
        // Not all at once: the first question comes somewhere within the first interval, the same place each time.
        let spread = probe
            .interval
            .mul_f64(f64::from(u32::from(address.port()) ^ fold(address)) % 97.0 / 97.0);
        tokio::task::spawn_local(async move {
            let mut ticks = interval_at(
                Instant::now() + spread.min(Duration::from_secs(1)),
                probe.interval,
            );
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let asked = timeout(probe.timeout, ask(address, &probe.kind)).await;
                let outcome = asked.unwrap_or_else(|_| Err("no answer in time".to_owned()));
                registry.control.probes.fetch_add(1, Relaxed);
                registry
                    .control
                    .probes_failed
                    .fetch_add(u64::from(outcome.is_err()), Relaxed);
                let good = outcome.is_ok();
                let reason = outcome.err().unwrap_or_default();
                let answer = Answer {
                    upstream: upstream.clone(),
                    address,
                    good,
                    reason,
                };
                if answers.send(answer).await.is_err() {
                    return;
                }
            }
        })
    }
}

fn fold(address: SocketAddr) -> u32 {
    match address.ip() {
        std::net::IpAddr::V4(v4) => v4.to_bits(),
        std::net::IpAddr::V6(v6) => v6.to_bits() as u32,
    }
}

/// Asks once.
async fn ask(address: SocketAddr, kind: &ProbeKind) -> Result<(), String> {
    let mut stream = TcpStream::connect(address)
        .await
        .map_err(|error| error.to_string())?;
    let ProbeKind::Http { path } = kind else {
        return Ok(());
    };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: sluice-probe\r\nConnection: close\r\n\r\n"
    );
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|error| error.to_string())?;
    let mut line = Vec::new();
    let mut some = [0; STATUS_LINE_BYTES];
    while !line.contains(&b'\n') && line.len() < STATUS_LINE_BYTES {
        match stream.read(&mut some).await {
            Ok(0) => return Err("closed without an answer".to_owned()),
            Ok(count) => line.extend_from_slice(&some[..count]),
            Err(error) => return Err(error.to_string()),
        }
    }
    judge(&line)
}

/// 2xx and 3xx are good.
fn judge(line: &[u8]) -> Result<(), String> {
    let status = line
        .strip_prefix(b"HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse::<u16>().ok());
    match status {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("status {status}")),
        None => Err("no HTTP answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_and_three_hundred_are_good() {
        assert_eq!(judge(b"HTTP/1.1 200 OK\r\n"), Ok(()));
        assert_eq!(judge(b"HTTP/1.0 302 Found\r\n"), Ok(()));
        assert_eq!(judge(b"HTTP/1.1 503 x\r\n"), Err("status 503".to_owned()));
        assert!(judge(b"SSH-2.0-OpenSSH\r\n").is_err());
        assert!(judge(b"HTTP/1.1").is_err());
        assert!(judge(b"").is_err());
    }
}
