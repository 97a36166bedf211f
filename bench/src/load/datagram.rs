//! UDP: each client sends a datagram, the origin sends each back, and so on. One thread does all of it with plain sockets: what counts is
//! what packets cost on their way, and nobody waits.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Outcome, Plan};
use crate::histogram::Histogram;
use crate::sample::{self, Sample};

const DATAGRAM_BYTES: usize = 64;
/// A datagram that is away for so long is lost; none may be.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// Makes the thread that calls it the load.
pub fn datagrams(plan: &Plan, warm_up: Duration, window: Duration) -> Result<Outcome> {
    let bind = || UdpSocket::bind(plan.origin);
    let origin = match &plan.origin_namespace {
        Some(namespace) => namespace.inside(bind),
        None => bind(),
    };
    let origin = origin.with_context(|| format!("take {} for the origin", plan.origin))?;
    origin.set_nonblocking(true)?;
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let mut clients = Vec::new();
    for _ in 0..plan.connections {
        let client = UdpSocket::bind(any).context("make a client's socket")?;
        client
            .connect(plan.proxy)
            .context("connect a client's socket")?;
        client.set_nonblocking(true)?;
        clients.push(client);
    }

    let mut number = 0;
    run(&origin, &clients, &mut number, warm_up)?;
    if let Some(pid) = plan.proxy_pid {
        sample::expect_on_core(pid, plan.cores.proxy)?;
    }
    let before = Sample::take(plan.proxy_pid, plan.cores)?;
    let answers = run(&origin, &clients, &mut number, window)?;
    let after = Sample::take(plan.proxy_pid, plan.cores)?;
    ensure!(answers > 0, "not one datagram came back");
    Ok(Outcome {
        span: before.until(&after),
        answers,
        bytes: answers * DATAGRAM_BYTES as u64,
        latencies: Histogram::new(),
    })
}

/// Rounds of one datagram for each client, for a time: how many came back.
fn run(origin: &UdpSocket, clients: &[UdpSocket], number: &mut u64, time: Duration) -> Result<u64> {
    let (start, mut answers) = (Instant::now(), 0);
    while start.elapsed() < time {
        let first = *number;
        for client in clients {
            let mut datagram = [0; DATAGRAM_BYTES];
            datagram[..8].copy_from_slice(&number.to_be_bytes());
            client.send(&datagram).context("send a datagram")?;
            *number += 1;
        }
        for _ in clients {
            let mut datagram = [0; DATAGRAM_BYTES];
            let (_, from) = wait_for(|| origin.recv_from(&mut datagram)).context("the origin")?;
            origin.send_to(&datagram, from).context("send one back")?;
        }
        for (client, sent) in clients.iter().zip(first..) {
            let mut datagram = [0; DATAGRAM_BYTES];
            let bytes = wait_for(|| client.recv(&mut datagram)).context("a client")?;
            ensure!(
                bytes == DATAGRAM_BYTES && datagram[..8] == sent.to_be_bytes(),
                "a client got another datagram than its own"
            );
            answers += 1;
        }
    }
    Ok(answers)
}

fn wait_for<T>(mut receive: impl FnMut() -> std::io::Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match receive() {
            Ok(received) => return Ok(received),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if start.elapsed() > LOST_AFTER {
                    bail!("a datagram was lost on its way here");
                }
                std::hint::spin_loop();
            }
            Err(error) => return Err(error.into()),
        }
    }
}
