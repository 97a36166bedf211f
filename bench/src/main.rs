//! The bench: Sluice beside other proxies, measured in one run on the same machine. Run it as `cargo xtask bench`.
//!
//! The proxy has one core, clients and origin have another. Peers take turns, round by round, in rotated order, each started anew, so that
//! what changes on the machine meanwhile meets all of them; only ratios within one run mean anything. The main figure is the processor time
//! of all threads of all processes of the proxy per request. A round does not count if strangers or the hypervisor took time, if it was to
//! saturate the proxy and did not, or if a fixed rate was not kept; what does not count is told, and no number stands in for it. Each answer
//! is compared with what the origin sent, all of it, and answers with the requests that the origin saw: one that differs fails the case.

mod campaign;
mod histogram;
mod load;
mod machine;
mod peer;
mod report;
mod round;
mod sample;
mod say;
mod scenario;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use rig::sandbox::{self, Interrupt};

use self::campaign::{Candidate, Settings, Stage};
use self::machine::{Cores, Machine};
use self::peer::Peer;
use self::report::Report;

#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    about = "Measures Sluice beside other proxies"
)]
struct Arguments {
    /// A scenario; all without one
    name: Option<String>,
    /// Lists the scenarios
    #[arg(long)]
    list: bool,
    /// Measures only these
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Three rounds of two seconds instead of five of four
    #[arg(long)]
    quick: bool,
    /// Prints one JSON object per scenario on standard output, and nothing else there
    #[arg(long)]
    json: bool,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    case: String,
    /// Rounds that must count, for each peer and case
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Length of a round
    #[arg(long)]
    seconds: Option<f64>,
    /// Requests per second of paced cases
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Counts rounds that other processes disturbed, too: for looking at the bench, not at the proxies
    #[arg(long)]
    noisy: bool,
    /// Prints the Debian packages that bring the peers, one a line
    #[arg(long)]
    packages: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::failed(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let peers = peer::choose(&arguments.peers)?;
    let scenarios = scenario::choose(arguments.name.as_deref())?;
    let settings = arguments.settings()?;
    if arguments.packages {
        for package in peer::packages(&peers) {
            println!("{package}");
        }
        return Ok(());
    }
    if arguments.list {
        for scenario in scenarios {
            let state = if scenario.cases.is_some() {
                ""
            } else {
                " (not yet)"
            };
            println!("{:<16} {}{state}", scenario.name, scenario.what);
        }
        return Ok(());
    }

    let cores = Cores::choose()?;
    let descriptors = machine::raise_limits()?;
    for peer in &peers {
        if let Err(error) = peer.install() {
            say::failed(&format!("install {}: {error:#}", peer.name));
        }
    }
    // From here on this is another process, and all that it starts ends with it, also by a signal.
    sandbox::enter(Interrupt::Ends)?;
    cores.settle()?;
    let (peers, versions) = look_for(&peers);
    let stage = Stage::set(cores, descriptors)?;
    let mut failed = 0;
    for scenario in scenarios {
        say::section(&format!("{}: {}", scenario.name, scenario.what));
        let machine = Machine::describe(
            settings.rounds,
            settings.window.as_secs_f64(),
            versions.clone(),
        )?;
        let mut report = Report::new(scenario.name, machine);
        let Some(cases) = scenario.cases else {
            say::note("not yet");
            arguments.print(&report)?;
            continue;
        };
        let mut cases = cases(arguments.rate);
        cases.retain(|case| case.name.contains(&arguments.case));
        for case in &cases {
            report.add(case, &stage.play(case, &peers, settings)?);
        }
        failed += report.failed();
        arguments.print(&report)?;
    }
    if failed > 0 {
        bail!("{failed} cases failed: see above");
    }
    Ok(())
}

/// Each peer with the reason why it is missing, if it is; and a line about each.
fn look_for(peers: &[Peer]) -> (Vec<Candidate>, BTreeMap<String, String>) {
    let mut found = Vec::new();
    let mut versions = BTreeMap::new();
    for peer in peers {
        let (line, missing) = match peer.version() {
            Ok(version) => (version, None),
            Err(error) => (format!("missing: {error:#}"), Some(format!("{error:#}"))),
        };
        say::note(&format!("{:<15} {line}", peer.name));
        versions.insert(peer.name.to_owned(), line);
        found.push(Candidate {
            peer: *peer,
            missing,
        });
    }
    (found, versions)
}

impl Arguments {
    fn settings(&self) -> Result<Settings> {
        let (rounds, seconds) = if self.quick { (3, 2.0) } else { (5, 4.0) };
        let seconds = self.seconds.unwrap_or(seconds);
        ensure!(
            (0.1..=600.0).contains(&seconds),
            "--seconds must be within 0.1 and 600"
        );
        Ok(Settings {
            rounds: self.rounds.map_or(rounds, |rounds| rounds as usize),
            window: Duration::from_secs_f64(seconds),
            noisy: self.noisy,
        })
    }

    fn print(&self, report: &Report) -> Result<()> {
        if self.json {
            println!("{}", report.json().context("write JSON")?);
        } else if report.has_rows() {
            println!("\n{}", report.table());
        }
        Ok(())
    }
}
