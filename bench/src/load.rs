//! One round: clients and an origin of our own around a proxy, on one uring, checked and counted.
//!
//! Clients and origin share a thread: the proxy has a core of its own, they have the other one, and need less of it
//! together than any proxy needs, because they do nothing but send what was made before and compare what comes.

mod answer;
mod client;
mod datagram;
mod origin;
mod pace;
mod tally;
mod transfer;
mod wire;

use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::namespace::Namespace;
use rustls::ClientConfig;
use sluice::net::{self, Instant};

use self::client::Expectation;
pub use self::datagram::datagrams;
pub use self::origin::listen;
pub use self::pace::Pace;
use self::pace::Schedule;
use self::tally::Tally;
pub use self::transfer::{Direction, transfer};
pub use self::wire::{SERVER_NAME, trusting};
use crate::histogram::Histogram;
use crate::machine::Cores;
use crate::sample::{self, Sample, Span};

/// How long connections may take to be made, and exchanges in flight to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that are to be idle are opened by so many clients at once.
const OPENERS: usize = 64;
/// After which memory that was only passing is free again.
const SETTLE: Duration = Duration::from_secs(1);

/// What one round does.
#[derive(Clone)]
pub struct Plan {
    /// Where the proxy listens, and where it expects its origin.
    pub proxy: SocketAddr,
    pub origin: SocketAddr,
    /// Where the origin's sockets are, if not where the clients' are.
    pub origin_namespace: Option<Namespace>,
    /// Process id of the proxy, all of whose descendants count; None where the kernel does the work.
    pub proxy_pid: Option<u32>,
    pub cores: Cores,
    /// Clients speak TLS, and trust what this says.
    pub tls: Option<Arc<ClientConfig>>,
    pub exchange: Exchange,
    pub connections: usize,
    /// A connection serves many exchanges, else one.
    pub reuse: bool,
    /// Handshakes are to be resumed ones.
    pub resumes: bool,
}

/// What is asked and answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub path: String,
    pub body_bytes: usize,
    /// Further fields of the request, each with its end of line.
    pub fields: &'static str,
}

/// What a round came to.
pub struct Outcome {
    pub span: Span,
    /// Exchanges that ended within the span.
    pub answers: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// From the moment at which a request was meant to be sent to the last byte of its answer; of paced rounds only.
    pub latencies: Histogram,
}

/// What connections cost that do nothing.
pub struct Held {
    pub connections: usize,
    /// Resident memory of all processes of the proxy, without connections and with them.
    pub before_bytes: u64,
    pub after_bytes: u64,
}

/// Makes the thread that calls it the load: exchanges, counted for a while after they have gone on for another.
///
/// An answer that is not what the origin sent, or a connection that ends too early, is an error: a fast wrong answer is worth nothing.
pub fn exchange(plan: Plan, pace: Pace, warm_up: Duration, window: Duration) -> Result<Outcome> {
    on_a_uring(async {
        let plan = Rc::new(plan);
        let (tally, expectation) = set_up(&plan)?;
        // A proxy may listen before it serves: a round begins when it has answered once.
        drop(client::open(&plan, &expectation, &tally, 1, 1).await);
        tally.verdict()?;
        let schedule = match pace {
            Pace::Saturated => None,
            Pace::PerSecond(rate) => Some(Schedule::start(rate, plan.connections, &tally)),
        };
        for number in 0..plan.connections {
            tally.spawn(client::talk(
                plan.clone(),
                expectation.clone(),
                schedule.as_ref().map(|schedule| schedule.turns(number)),
                tally.clone(),
            ));
        }

        net::sleep_until(Instant::read() + warm_up).await;
        if let Some(pid) = plan.proxy_pid {
            sample::expect_on_core(pid, plan.cores.proxy)?;
        }
        let before = Sample::take(plan.proxy_pid, plan.cores)?;
        tally.begin();
        net::sleep_until(Instant::read() + window).await;
        let (answers, latencies) = tally.end();
        let after = Sample::take(plan.proxy_pid, plan.cores)?;

        tally.stop();
        if let Some(schedule) = &schedule {
            schedule.stop();
        }
        tally.wait_for_clients(PATIENCE).await;
        tally.verdict()?;
        ensure!(answers > 0, "not one exchange ended within the round");
        if plan.resumes {
            let (shaken, resumed) = tally.handshakes();
            ensure!(
                resumed * 20 >= shaken * 19,
                "of {shaken} handshakes within the round {resumed} were resumed"
            );
        }
        Ok(Outcome {
            span: before.until(&after),
            answers,
            bytes: answers * plan.exchange.body_bytes as u64,
            latencies,
        })
    })
}

/// Makes the thread that calls it the load: connections that have one exchange each, and then wait.
pub fn hold(plan: Plan) -> Result<Held> {
    on_a_uring(async {
        let pid = plan.proxy_pid.context("memory is a process's own")?;
        let plan = Rc::new(plan);
        let (tally, expectation) = set_up(&plan)?;
        // What the first exchanges make in the proxy is not theirs: buffers, connections to the origin.
        let first = client::open(&plan, &expectation, &tally, OPENERS, OPENERS).await;
        net::sleep_until(Instant::read() + SETTLE).await;
        let before_bytes = sample::resident_bytes(pid)?;
        let count = plan.connections.saturating_sub(OPENERS);
        let rest = client::open(&plan, &expectation, &tally, OPENERS, count).await;
        net::sleep_until(Instant::read() + SETTLE).await;
        let after_bytes = sample::resident_bytes(pid)?;
        tally.verdict()?;
        let connections = rest.borrow().len();
        ensure!(
            connections == count,
            "the proxy kept {connections} of {count} connections"
        );
        drop((first, rest));
        // They are closed turn by turn, while the loop still has turns.
        net::sleep_until(Instant::read() + SETTLE).await;
        Ok(Held {
            connections,
            before_bytes,
            after_bytes,
        })
    })
}

fn on_a_uring<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let settings = net::Settings {
        buffers: 4096,
        polls_per_turn: 2048,
        ..net::Settings::default()
    };
    net::run(&settings, work).context("make a uring for the load")?
}

/// An origin that answers, and what clients must send and get.
fn set_up(plan: &Plan) -> Result<(Rc<Tally>, Expectation)> {
    let tally = Rc::new(Tally::new());
    let body: Arc<[u8]> = body(plan.exchange.body_bytes).into();
    origin::serve(plan, &body, &tally)?;
    Ok((tally, client::expectation(plan, &body)))
}

/// Bytes in which a lost, doubled or swapped piece shows.
fn body(len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8)
        .collect()
}
