//! Whole workers on real sockets: raw clients on one side, scripted origins on the other.

mod answer;
mod balance;
mod client;
mod deadline;
mod early;
mod exchange;
mod fault;
mod hedge;
mod hop;
mod life;
mod limit;
mod log;
mod origin;
mod origin_fault;
mod overload;
mod retry;
mod sluice;
mod splice;
mod tls;
mod trailer;
mod upload;

use std::time::{Duration, Instant};

use client::{Client, End};
use origin::Origin;
use sluice::Sluice;

/// How long a test waits for what must come; far more than it takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until it is so.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that differ from place to place: what is lost, doubled or moved shows.
fn patterned(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}
