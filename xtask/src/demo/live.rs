//! Changes to a running Sluice: a tunable, and a reload under load.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::process::Process;
use rig::wait;

use super::layer7::{Case, check};
use super::report::{Layer7, Reload, Sysctl};
use super::stage::Stage;
use crate::say;

/// The tunable that is changed, and to what.
const KEY: &str = "http.target_bytes_max";
const VALUE: &str = "64B";
/// Requests of one curl, at most.
const REQUESTS_MAX: usize = 40_000;

/// Changes one limit of a running Sluice, sees it from outside, and changes it back.
pub fn sysctl(stage: &Stage, sum: &mut Layer7) -> Result<Sysctl> {
    say::section("One tunable, changed live");
    let url = format!("https://shop.test/{}", "long/".repeat(40));
    let read = || -> Result<String> {
        Ok(stage
            .sluice
            .command(&["sysctl", "-n", KEY])?
            .trim()
            .to_owned())
    };
    let mut observe = |what: &str, status: u16, origin: &str| -> Result<u16> {
        let case = Case {
            what,
            url: &url,
            fields: &[],
            status,
            origin,
        };
        Ok(check(&stage.curl(), &case, sum)?.map_or(0, |response| response.status))
    };
    let before = read()?;
    let observed_before = observe("a target of 201 bytes", 200, "origin")?;
    stage
        .sluice
        .command(&["sysctl", "-w", &format!("{KEY}={VALUE}")])?;
    let after = read()?;
    say::step("sysctl", &format!("-w {KEY}={VALUE} (it was {before})"));
    let observed_after = observe("the same request", 414, "")?;
    stage
        .sluice
        .command(&["sysctl", "-w", &format!("{KEY}={before}")])?;
    observe("and after changing it back", 200, "origin")?;
    Ok(Sysctl {
        key: KEY.to_owned(),
        before,
        after,
        observed_before,
        observed_after,
    })
}

/// Adds an endpoint to an upstream and sends SIGHUP, while four curls ask for more.
pub fn reload(stage: &Stage, span: Duration, sum: &mut Layer7) -> Result<Reload> {
    say::section("A reload under load");
    let load = Requests::start(stage, "reload", 4)?;
    load.wait_for(200)?;
    let generation_before = stage.sluice.generation()?;

    let path = stage.folder.join("conf.d/shop.toml");
    let text = fs::read_to_string(&path).context("read the upstream")?;
    let grown = text.replace(
        "\"10.77.2.2:8080\"",
        "\"10.77.2.2:8080\", \"10.77.3.2:8080\"",
    );
    ensure!(
        grown != text,
        "{} has no place for a third endpoint",
        path.display()
    );
    fs::write(&path, grown).context("write the upstream")?;
    let generation_after = stage.sluice.reload()?;
    say::step(
        "reload",
        &format!("SIGHUP: generation {generation_before} became {generation_after}"),
    );

    wait::until_true(
        "the new endpoint to answer",
        Duration::from_secs(20),
        || load.so_far().per_endpoint.contains_key("origin3"),
    )?;
    let seen = load.so_far().requests;
    // As long again, with the new one.
    let end = Instant::now() + span;
    wait::until_true("the load to go on", span + Duration::from_secs(20), || {
        Instant::now() >= end && load.so_far().requests > seen + 200
    })?;
    let tally = load.stop()?;
    say::step(
        "answered",
        &format!(
            "{} requests over TLS, {} failed ({})",
            tally.requests,
            tally.failed,
            rig::load::shares(&tally.per_endpoint)
        ),
    );
    let failed = tally.failed;
    sum.add(&tally);
    Ok(Reload {
        generation_before,
        generation_after,
        failed,
    })
}

/// curls that ask for one thing after the other over kept connections, and write down each answer.
pub struct Requests {
    curls: Vec<Process>,
}

impl Requests {
    pub fn start(stage: &Stage, name: &str, curls: usize) -> Result<Self> {
        let mut requests = Self { curls: Vec::new() };
        for number in 0..curls {
            let mut command = stage.curl().command();
            command
                .args([
                    "--rate",
                    "1000/s",
                    "--max-time",
                    "10",
                    "--output",
                    "/dev/null",
                ])
                // Standard error, because curl keeps back what it writes to a file on standard output.
                .args([
                    "--write-out",
                    "%{stderr}%{http_code} %header{x-origin} %{errormsg}\n",
                ])
                .arg(format!("https://shop.test/load/[1-{REQUESTS_MAX}]"));
            requests
                .curls
                .push(Process::start(&format!("curl-{name}-{number}"), command)?);
        }
        Ok(requests)
    }

    pub fn wait_for(&self, count: u64) -> Result<()> {
        wait::until_true("the load to get going", Duration::from_secs(20), || {
            self.so_far().requests >= count
        })
    }

    /// What has been answered so far.
    pub fn so_far(&self) -> Layer7 {
        let mut sum = Layer7::default();
        for curl in &self.curls {
            let text = curl.log();
            // A line without its end is still being written.
            let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
            for line in whole.lines().filter(|line| !line.starts_with("curl:")) {
                let mut words = line.split(' ');
                let good = words.next() == Some("200");
                sum.count(words.next().filter(|origin| !origin.is_empty()), good);
            }
        }
        sum
    }

    /// Ends the curls; a request that is cut off by this is not counted.
    pub fn stop(mut self) -> Result<Layer7> {
        for curl in &mut self.curls {
            curl.expect_running().context("a curl gave up")?;
        }
        let sum = self.so_far();
        if sum.failed > 0 {
            let failed = |log: String| {
                log.lines()
                    .filter(|line| !line.starts_with("200 "))
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            say::failed(
                &self
                    .curls
                    .iter()
                    .flat_map(|curl| failed(curl.log()))
                    .take(5)
                    .collect::<Vec<_>>()
                    .join("; "),
            );
        }
        Ok(sum)
    }
}
