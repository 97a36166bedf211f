//! One round: clients and an origin of our own around a proxy, on one uring, checked and counted.
//!
//! Clients and origin share a thread: the proxy has a core of its own, they have the other one, and need less of it
//! together than any proxy needs, because they do nothing but send what was made before and compare what comes.

mod answer;
mod client;
mod origin;
mod pace;
mod tally;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice::net::{self, Instant};

pub use self::pace::Pace;
use self::pace::Schedule;
use self::tally::Tally;
use crate::histogram::Histogram;
use crate::machine::Cores;
use crate::sample::{self, Sample, Span};

/// How long connections may take to be made, and exchanges in flight to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one round does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the proxy listens, and where it expects its origin.
    pub proxy: SocketAddr,
    pub origin: SocketAddr,
    /// Process id of the proxy, all of whose descendants count.
    pub proxy_pid: u32,
    pub cores: Cores,
    pub exchange: Exchange,
    pub connections: usize,
    pub pace: Pace,
    /// A connection serves many exchanges, else one.
    pub reuse: bool,
    /// Before anything counts.
    pub warm_up: Duration,
    pub window: Duration,
}

/// What is asked and answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub path: String,
    pub body_bytes: usize,
}

/// What a round came to.
pub struct Outcome {
    pub span: Span,
    /// Exchanges that ended within the span.
    pub answers: u64,
    /// From the moment at which a request was meant to be sent to the last byte of its answer; of paced rounds only.
    pub latencies: Histogram,
}

/// Makes the thread that calls it the load, until the round is over.
///
/// An answer that is not what the origin sent, or a connection that ends too early, is an error: a fast wrong answer is worth nothing.
pub fn run(plan: Plan) -> Result<Outcome> {
    let settings = net::Settings {
        buffers: 4096,
        polls_per_turn: 2048,
        ..net::Settings::default()
    };
    net::run(&settings, drive(Rc::new(plan))).context("make a uring for the load")?
}

async fn drive(plan: Rc<Plan>) -> Result<Outcome> {
    let tally = Rc::new(Tally::new());
    let body: Arc<[u8]> = body(plan.exchange.body_bytes).into();
    origin::serve(&plan, &body, &tally)?;
    let schedule = match plan.pace {
        Pace::Saturated => None,
        Pace::PerSecond(rate) => Some(Schedule::start(rate, plan.connections, &tally)),
    };
    for number in 0..plan.connections {
        let talk = client::talk(
            plan.clone(),
            client::expectation(&plan, &body),
            schedule.as_ref().map(|schedule| schedule.turns(number)),
            tally.clone(),
        );
        tally.spawn(talk);
    }

    net::sleep_until(Instant::read() + plan.warm_up).await;
    sample::expect_on_core(plan.proxy_pid, plan.cores.proxy)?;
    let before = Sample::take(plan.proxy_pid, plan.cores)?;
    tally.begin();
    net::sleep_until(Instant::read() + plan.window).await;
    let (answers, latencies) = tally.end();
    let after = Sample::take(plan.proxy_pid, plan.cores)?;

    tally.stop();
    if let Some(schedule) = &schedule {
        schedule.stop();
    }
    let deadline = Instant::read() + PATIENCE;
    while tally.is_running() && Instant::read() < deadline {
        net::sleep_until(Instant::read() + Duration::from_millis(2)).await;
    }
    tally.verdict()?;
    ensure!(answers > 0, "not one exchange ended within the round");
    Ok(Outcome {
        span: before.until(&after),
        answers,
        latencies,
    })
}

/// Bytes in which a lost, doubled or swapped piece shows.
fn body(len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8)
        .collect()
}
