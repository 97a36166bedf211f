//! `endpoint-change`: another endpoint comes, by a reload and by a command; the time until it gets new connections.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{http, sandbox};

use super::Bench;
use super::life::SETTLE;
use crate::metric::Metric;
use crate::peer::{Layer, Peer, Site};
use crate::report::{Report, Row};
use crate::say;

const LIMIT: Duration = Duration::from_secs(10);
const ADMIN: &str = "/run/sluice/main/admin.sock";

/// The configuration is read again, until a new connection reaches the other endpoint: all peers can do that.
const BY_RELOAD: &str = "by-reload";
/// Two commands on the admin socket, until a new connection reaches the other endpoint.
const BY_COMMAND: &str = "by-command";
/// One command, from its arrival in the daemon to the last slot of a ring that was written, as the daemon says.
const IN_DAEMON: &str = "in-daemon";
/// The same beside 4 000 listeners, and in an upstream of 2 000 endpoints beside these.
const BESIDE_THOUSANDS: &str = "in-daemon/4000";
const IN_THOUSANDS: &str = "in-upstream/2000";

/// What the second one stands for: listeners, upstreams, endpoints of each of these, and of the largest.
const THOUSANDS: [usize; 4] = [4000, 200, 20, 2000];

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
        .flat_map(|candidate| {
            let cases: &[&str] = match candidate.peer.name {
                "sluice" => &[
                    BY_RELOAD,
                    BY_COMMAND,
                    IN_DAEMON,
                    BESIDE_THOUSANDS,
                    IN_THOUSANDS,
                ],
                _ => &[BY_RELOAD],
            };
            let cases = cases.iter().filter(|case| bench.wants(case));
            cases.map(move |case| (candidate, *case, Vec::new(), candidate.missing.is_some()))
        })
        .collect();
    for round in 0..bench.settings.rounds {
        for number in 0..courses.len() {
            let at = (number + round) % courses.len();
            let (candidate, case, values, over) = &mut courses[at];
            if *over {
                continue;
            }
            match one(bench, &candidate.peer, case) {
                Ok(time) => {
                    let ms = time.as_secs_f64() * 1e3;
                    say::note(&format!(
                        "{:<15} {case:<24} {ms:.2} ms",
                        candidate.peer.name
                    ));
                    values.push(ms);
                }
                Err(error) => {
                    *over = true;
                    let why = format!("{} in {case}: {error:#}", candidate.peer.name);
                    say::failed(&why);
                    report.fail(why);
                }
            }
        }
    }
    for (candidate, case, values, _) in courses {
        report.rows.push(Row::new(
            candidate.peer.name,
            case,
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

fn one(bench: &Bench<'_>, peer: &Peer, case: &str) -> Result<Duration> {
    let folder = sandbox::folder("bench")?;
    let running = peer.start(bench.stage, &folder, site(false))?;
    let clients = bench.stage.clients(Layer::Packets)?;
    clients.inside(|| reaches(0, Instant::now()))?;
    let took = match case {
        BY_RELOAD => {
            peer.configure(bench.stage, &folder, site(true))?;
            thread::sleep(SETTLE);
            let begun = Instant::now();
            if peer.is_rules() {
                peer.apply(bench.stage, &folder)?;
            } else {
                running.signal(peer.reload_signal())?;
            }
            clients.inside(|| reaches(1, begun))
        }
        BY_COMMAND => {
            thread::sleep(SETTLE);
            let begun = Instant::now();
            change("origin", site(true).origin(), "add")?;
            change("origin", site(false).origin(), "del")?;
            clients.inside(|| reaches(1, begun))
        }
        IN_DAEMON => change("origin", site(true).origin(), "add"),
        _ => {
            let path = folder.join("sluice.toml");
            let text = fs::read_to_string(&path)?;
            fs::write(&path, text + &thousands())?;
            running.signal(peer.reload_signal())?;
            let admin = Path::new(ADMIN);
            rig::wait::until_true("thousands of listeners", LIMIT * 3, || {
                let status = http::get_unix(admin, "/endpoints");
                status.is_ok_and(|status| status.text().contains("\"largest\""))
            })?;
            let upstream = if case == IN_THOUSANDS {
                "largest"
            } else {
                "origin"
            };
            change(upstream, site(true).origin(), "add")
        }
    };
    took.with_context(|| running.last_words())
}

/// One command, as the command line gives it: how long the daemon says that it took.
fn change(upstream: &str, address: SocketAddr, act: &str) -> Result<Duration> {
    let body = format!(r#"{{"upstream":"{upstream}","address":"{address}","act":"{act}"}}"#);
    let response = http::post_unix(Path::new(ADMIN), "/endpoints", &body)?;
    let answer: serde_json::Value = serde_json::from_slice(&response.body)?;
    let took_us = answer["took_us"].as_u64();
    took_us
        .map(Duration::from_micros)
        .with_context(|| format!("{act} {address} was answered with {answer}"))
}

/// Listeners and upstreams that nobody uses, beside those that are measured.
fn thousands() -> String {
    let [listeners, upstreams, endpoints, most] = THOUSANDS;
    let named = |first: usize, count: usize| {
        let each = (first..first + count).map(|number| {
            let port = 10_000 + number;
            format!("\"10.77.1.2:{port}\"")
        });
        each.collect::<Vec<_>>().join(", ")
    };
    let mut text = String::new();
    for number in 0..upstreams {
        let of = (0..listeners).filter(|listener| listener % upstreams == number);
        let addresses = of.map(|one| format!("\"198.18.{}.{}:80\"", one / 250, one % 250 + 1));
        text += &format!(
            "[[listener]]\nname = \"l{number}\"\naddress = [{}]\nforward = {{ upstream = \"u{number}\", via = \"nat\" }}\n\
             [[upstream]]\nname = \"u{number}\"\nendpoints = [{}]\n",
            addresses.collect::<Vec<_>>().join(", "),
            named(number * endpoints, endpoints)
        );
    }
    text += &format!(
        "[[listener]]\nname = \"largest\"\naddress = \"198.19.0.1:80\"\nforward = {{ upstream = \"largest\", via = \"nat\" }}\n\
         [[upstream]]\nname = \"largest\"\nendpoints = [{}]\n",
        named(upstreams * endpoints, most)
    );
    text
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
