//! `start`, `reload`: the time until a proxy serves, and until a changed configuration is in force, with few and many routes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::namespace::Namespace;
use rig::sandbox;

use super::Bench;
use crate::campaign::Candidate;
use crate::metric::Metric;
use crate::peer::{Feature, Layer, Running, Site};
use crate::report::{Report, Row};
use crate::say;

const ROUTES: [usize; 3] = [10, 1_000, 10_000];
/// The slowest reads ten thousand routes in seconds.
const LIMIT: Duration = Duration::from_secs(60);
/// Until a proxy that has just begun to serve takes signals: the master of HAProxy loses one that comes while it forks.
pub const SETTLE: Duration = Duration::from_millis(300);
/// Between two looks: what is shorter is not seen.
const LOOK: Duration = Duration::from_micros(500);
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

pub fn start(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    measure(bench, report, None, Metric::StartMs)
}

pub fn reload(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    measure(bench, report, Some(Feature::Reload), Metric::ReloadMs)
}

fn measure(
    bench: &Bench<'_>,
    report: &mut Report,
    needs: Option<Feature>,
    metric: Metric,
) -> Result<()> {
    let namespace = bench.stage.namespace(Layer::Requests)?;
    let origin = Site::default().origin();
    namespace.thread("origin", move || serve(origin))?;
    for routes in ROUTES {
        let case = routes.to_string();
        if !bench.wants(&case) {
            continue;
        }
        let mut courses: Vec<(Vec<f64>, Option<String>)> = bench
            .candidates
            .iter()
            .map(|candidate| (Vec::new(), candidate.missing.clone()))
            .collect();
        for round in 0..bench.settings.rounds {
            for number in 0..courses.len() {
                let at = (number + round) % courses.len();
                let candidate = &bench.candidates[at];
                let (values, failure) = &mut courses[at];
                if failure.is_some() {
                    continue;
                }
                if let Some(why) = candidate.peer.lacks(needs) {
                    *failure = Some(format!("not measured: {why}"));
                    report.remarks.push(format!(
                        "{} in {case}: not measured: {why}",
                        candidate.peer.name
                    ));
                    continue;
                }
                match one(bench, candidate, routes, metric) {
                    Ok(time) => {
                        say::note(&format!(
                            "{:<15} {case:<14} {:.1} ms",
                            candidate.peer.name,
                            time.as_secs_f64() * 1e3
                        ));
                        values.push(time.as_secs_f64() * 1e3);
                    }
                    Err(error) => {
                        let why = format!("{} in {case}: {error:#}", candidate.peer.name);
                        say::failed(&why);
                        *failure = Some(why.clone());
                        report.fail(why);
                    }
                }
            }
        }
        for (candidate, (values, _)) in bench.candidates.iter().zip(courses) {
            report
                .rows
                .push(Row::new(candidate.peer.name, &case, metric, values));
        }
    }
    Ok(())
}

fn one(
    bench: &Bench<'_>,
    candidate: &Candidate,
    routes: usize,
    metric: Metric,
) -> Result<Duration> {
    let (stage, peer) = (bench.stage, &candidate.peer);
    let folder = sandbox::folder("bench")?;
    let site = |routes| Site {
        routes,
        ..Site::default()
    };
    let namespace = stage.namespace(Layer::Requests)?.clone();
    let last = format!("/route{}/answer", routes - 1);
    if metric == Metric::StartMs {
        peer.configure(stage, &folder, site(routes))?;
        let command = peer.command(stage, &folder, site(routes))?;
        let begun = Instant::now();
        let running = Running::start(peer.name, command)?;
        return served(&namespace, &last, begun).with_context(|| running.last_words());
    }
    let running = peer.start(stage, &folder, site(routes))?;
    served(&namespace, &last, Instant::now())?;
    let next = format!("/route{routes}/answer");
    let before = namespace.inside(|| ask(&next));
    ensure!(
        !before.unwrap_or(false),
        "it answers for a route that is not there"
    );
    peer.configure(stage, &folder, site(routes + 1))?;
    thread::sleep(SETTLE);
    let begun = Instant::now();
    running.signal(peer.reload_signal())?;
    served(&namespace, &next, begun).with_context(|| running.last_words())
}

/// Asks until it is answered: how long that took since `begun`.
fn served(namespace: &Namespace, path: &str, begun: Instant) -> Result<Duration> {
    namespace.inside(|| {
        loop {
            if ask(path).unwrap_or(false) {
                return Ok(begun.elapsed());
            }
            ensure!(
                begun.elapsed() < LIMIT,
                "{path} was not served within {LIMIT:?}"
            );
            thread::sleep(LOOK);
        }
    })
}

/// Whether a path is answered with 200.
fn ask(path: &str) -> Result<bool> {
    let mut stream = TcpStream::connect_timeout(&Site::default().listen(), LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: bench.test\r\nConnection: close\r\n\r\n"
    )?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    // The rest is taken too: a reset would have the proxy believe that its client is gone.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    Ok(head == *b"HTTP/1.1 200")
}

/// Answers everything, until the bench ends.
fn serve(address: SocketAddr) {
    // Who measures both scenarios has an origin already.
    let Ok(listener) = TcpListener::bind(address) else {
        return;
    };
    for mut stream in listener.incoming().flatten() {
        let mut request = [0; 4096];
        // A connection that fails is the proxy's to complain of.
        let _ = stream.read(&mut request);
        let _ = stream.write_all(ANSWER);
    }
}
