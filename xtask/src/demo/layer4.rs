//! Layer 4 in the kernel: many connections and datagrams to one address, answered by three origins.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rig::client::{Tally, tcp_echo, udp_echo};
use rig::field::{L4_V4, L4_V6, at};
use rig::origin::ECHO_PORT;
use rig::sandbox;

use super::report::Layer4;
use super::stage::Stage;
use crate::say;

/// Clients at a time, each with one connection after the other.
const CLIENTS: usize = 4;
/// Bytes that each connection sends and gets back.
const BYTES: usize = 32 * 1024;
/// Connections of one client, at most: the load is bounded in count as in time.
const CONNECTIONS_MAX: u64 = 5_000;

/// Drives TCP and UDP over both families for `span`.
pub fn play(stage: &Stage, span: Duration) -> Result<Layer4> {
    say::section("Layer 4: one address, three origins, balanced by XDP (NAT, Maglev)");
    let mut sum = Tally::default();
    for (family, address) in [("IPv4", L4_V4), ("IPv6", L4_V6)] {
        let to: SocketAddr = at(address, ECHO_PORT).parse()?;
        let tcp = drive(stage, span / 2, move |seed| tcp_echo(to, BYTES, seed as u8))?;
        tell(&format!("TCP {family}"), "connections", &tcp);
        let udp = drive(stage, span / 6, move |seed| {
            udp_echo(to, format!("datagram {seed}").as_bytes())
        })?;
        tell(&format!("UDP {family}"), "datagrams", &udp);
        sum.add(&tcp);
        sum.add(&udp);
    }
    Ok(Layer4 {
        connections: sum.tried,
        bytes: sum.bytes,
        failed: sum.failures.len() as u64,
        per_endpoint: sum.per_endpoint,
    })
}

fn drive(
    stage: &Stage,
    span: Duration,
    round: impl Fn(u64) -> Result<(String, u64)> + Copy + Send + 'static,
) -> Result<Tally> {
    let end = Instant::now() + span;
    let mut clients = Vec::new();
    for client in 0..CLIENTS {
        clients.push(stage.field.client.thread("client", move || {
            let mut tally = Tally::default();
            while Instant::now() < end && tally.tried < CONNECTIONS_MAX && !sandbox::interrupted() {
                tally.count(round(tally.tried + client as u64));
            }
            tally
        })?);
    }
    let mut sum = Tally::default();
    for client in clients {
        sum.add(
            &client
                .join()
                .map_err(|_| anyhow!("a client panicked"))
                .context("layer 4")?,
        );
    }
    Ok(sum)
}

fn tell(name: &str, what: &str, tally: &Tally) {
    let failed = match tally.failures.first() {
        Some(first) => format!("{} FAILED, the first: {first}", tally.failures.len()),
        None => "none failed".to_owned(),
    };
    let shares = rig::load::shares(&tally.per_endpoint);
    say::step(
        name,
        &format!(
            "{} {what}, {} KiB checked byte by byte, {failed} ({shares})",
            tally.tried,
            tally.bytes / 1024
        ),
    );
}
