//! Where connections go: to endpoints that can be reached, to the worker of their CPU.

use std::net::TcpStream;
use std::thread::available_parallelism;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::client::{self, Tally, tcp_echo};
use rig::field::{L4_V4, WEB_V4};
use rig::harness::Skip;
use rig::sluice::PATIENCE;
use rig::world::socket;
use rig::{process, wait};
use serde_json::Value;

use crate::stage::{CONFIGURATION, Stage};

pub fn an_endpoint_whose_link_is_down_gets_no_new_flows_until_it_is_back(
    stage: &mut Stage,
) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    let tally = |rounds: u8| {
        let mut tally = Tally::default();
        let to = socket(L4_V4, 7000)?;
        for number in 0..rounds {
            tally.count(stage.field.client.inside(|| tcp_echo(to, 100, number)));
        }
        anyhow::Ok(tally)
    };
    ensure!(tally(40)?.per_endpoint.len() == 2);
    let origin = &stage.field.origins[0];
    origin.ip("link set eth0 down")?;
    let resolved = |wanted: bool| {
        wait::until_true("what the neighbour's state is to show", PATIENCE, || {
            let status = sluice.status().unwrap_or_default();
            let endpoint = status.pointer("/upstreams/0/endpoints/0/resolved");
            endpoint.and_then(Value::as_bool) == Some(wanted)
        })
    };
    resolved(false)?;
    let alone = tally(40)?;
    alone.expect_no_failure()?;
    ensure!(alone.per_endpoint.len() == 1, "{:?}", alone.per_endpoint);
    // What the link took with it: its routes and its IPv6 address.
    origin.ip("link set eth0 up\nroute add default via 10.77.1.1\naddress replace fd77:1::2/64 dev eth0 nodad\nroute add default via fd77:1::1")?;
    resolved(true)?;
    let both = tally(40)?;
    both.expect_no_failure()?;
    ensure!(both.per_endpoint.len() == 2, "{:?}", both.per_endpoint);
    stage.end(sluice)
}

pub fn a_connection_goes_to_the_worker_of_the_cpu_that_took_it(stage: &mut Stage) -> Result<()> {
    const CONNECTIONS: u64 = 20;
    if available_parallelism()?.get() < 2 {
        return Err(Skip("there is one CPU".to_owned()).into());
    }
    let sluice = stage.start(CONFIGURATION, &["--workers", "2"])?;
    // Nobody accepts, so that each socket's queue shows what came to it.
    let daemon = Pid::from_raw(sluice.daemon()? as i32);
    kill(daemon, Signal::SIGSTOP)?;
    wait::until_true("the daemon to stand still", PATIENCE, || {
        process::stands_still(daemon.as_raw() as u32)
    })?;
    let mut taken_before = vec![0, 0];
    let mut open = Vec::new();
    for cpu in 0..2 {
        open.extend(stage.field.client.inside(|| -> Result<Vec<TcpStream>> {
            let mut set = CpuSet::new();
            set.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &set).context("run on one CPU")?;
            let to = socket(WEB_V4, 8080)?;
            (0..CONNECTIONS)
                .map(|_| client::connect(None, to))
                .collect()
        })?);
        let taken = stage.queues(8080)?;
        let mut new: Vec<u64> = taken
            .iter()
            .zip(&taken_before)
            .map(|(a, b)| a - b)
            .collect();
        new.sort_unstable();
        ensure!(
            new == [0, CONNECTIONS],
            "CPU {cpu}: {taken_before:?}, then {taken:?}"
        );
        taken_before = taken;
    }
    kill(daemon, Signal::SIGCONT)?;
    ensure!(
        taken_before == [CONNECTIONS, CONNECTIONS],
        "{taken_before:?}"
    );
    drop(open);
    stage.end(sluice)
}
