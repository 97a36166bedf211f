//! `endpoint-change`: the only endpoint is replaced by another one; the time until a new connection reaches that.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::sandbox;

use super::Bench;
use super::life::SETTLE;
use crate::metric::Metric;
use crate::peer::{Layer, Peer, Site};
use crate::report::{Report, Row};
use crate::say;

const LIMIT: Duration = Duration::from_secs(10);
const CASE: &str = "1-upstream";

pub fn measure(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let origin = &bench.stage.field()?.origins[0];
    for second in [false, true] {
        let address = site(second).origin();
        let name = u8::from(second);
        origin.thread("origin", move || {
            // It answers until the bench ends; who measures twice has it already.
            let Ok(listener) = TcpListener::bind(address) else {
                return;
            };
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(&[name]);
            }
        })?;
    }
    let measured = bench
        .candidates
        .iter()
        .filter(|candidate| !candidate.peer.is_floor());
    let mut courses: Vec<_> = measured
        .map(|candidate| (candidate, Vec::new(), candidate.missing.is_some()))
        .collect();
    for round in 0..bench.settings.rounds {
        for number in 0..courses.len() {
            let at = (number + round) % courses.len();
            let (candidate, values, over) = &mut courses[at];
            if *over {
                continue;
            }
            match one(bench, &candidate.peer) {
                Ok(time) => {
                    let ms = time.as_secs_f64() * 1e3;
                    say::note(&format!(
                        "{:<15} {CASE:<14} {ms:.2} ms",
                        candidate.peer.name
                    ));
                    values.push(ms);
                }
                Err(error) => {
                    *over = true;
                    let why = format!("{} in {CASE}: {error:#}", candidate.peer.name);
                    say::failed(&why);
                    report.fail(why);
                }
            }
        }
    }
    for (candidate, values, _) in courses {
        report.rows.push(Row::new(
            candidate.peer.name,
            CASE,
            Metric::ChangeMs,
            values,
        ));
    }
    Ok(())
}

fn site(second: bool) -> Site {
    Site {
        layer: Layer::Packets,
        second,
        ..Site::default()
    }
}

fn one(bench: &Bench<'_>, peer: &Peer) -> Result<Duration> {
    let folder = sandbox::folder("bench")?;
    let running = peer.start(bench.stage, &folder, site(false))?;
    let clients = bench.stage.clients(Layer::Packets)?;
    clients.inside(|| reaches(0, Instant::now()))?;
    peer.configure(bench.stage, &folder, site(true))?;
    thread::sleep(SETTLE);
    let begun = Instant::now();
    if peer.is_rules() {
        peer.apply(bench.stage, &folder)?;
    } else {
        running.signal(peer.reload_signal())?;
    }
    clients
        .inside(|| reaches(1, begun))
        .with_context(|| running.last_words())
}

/// Connects until it is this origin that answers: how long that took since `begun`.
fn reaches(name: u8, begun: Instant) -> Result<Duration> {
    loop {
        if ask().is_ok_and(|answered| answered == name) {
            return Ok(begun.elapsed());
        }
        ensure!(
            begun.elapsed() < LIMIT,
            "the other endpoint was not reached within {LIMIT:?}"
        );
        thread::sleep(Duration::from_micros(50));
    }
}

fn ask() -> Result<u8> {
    let mut stream = TcpStream::connect_timeout(&site(false).listen(), Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut name = [0];
    stream.read_exact(&mut name)?;
    Ok(name[0])
}
