//! The bench: Sluice beside other proxies, measured in one run on the same machine. Run it as `cargo xtask bench`.
//!
//! The proxy has one core, clients and origin have another. Peers take turns, round by round, in rotated order, each started anew, so that
//! what changes on the machine meanwhile meets all of them; only ratios within one run mean anything. The main figure is the processor time
//! of all threads of all processes of the proxy per request. A round does not count if strangers or the hypervisor took time, if it was to
//! saturate the proxy and did not, or if a fixed rate was not kept; what does not count is told, and no number stands in for it. Each answer
//! is compared with what the origin sent, all of it, and answers with the requests that the origin saw: one that differs fails the case.
//! Where the kernel forwards packets no process has the work on its account: the busy time of both cores is told then, clients and origin
//! included, with rows in which nothing stands between them as its floor.

mod arguments;
mod campaign;
mod histogram;
mod load;
mod machine;
mod metric;
mod peer;
mod record;
mod relay;
mod report;
mod rooms;
mod round;
mod sample;
mod say;
mod scenario;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rig::sandbox::{self, Interrupt};

use self::arguments::Arguments;
use self::campaign::{Candidate, Settings, Stage};
use self::machine::{Cores, Machine};
use self::peer::Peer;
use self::record::Record;
use self::report::Report;
use self::scenario::{Bench, Scenario, Way};

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
    if let Some(room) = &arguments.room {
        return rooms::enter(room, arguments.times);
    }
    if let Some([listen, origin]) = arguments.relay.as_deref() {
        return relay::serve(*listen, *origin);
    }
    let peers = peer::choose(&arguments.peers)?;
    let scenarios = scenario::choose(arguments.name.as_deref())?;
    let settings = arguments.settings()?;
    if arguments.packages {
        for package in peer::packages(&peers).iter().chain(scenario::PACKAGES) {
            println!("{package}");
        }
        return Ok(());
    }
    if arguments.list {
        list(&scenarios);
        return Ok(());
    }
    if arguments.readme {
        return renew_readme();
    }
    // An old record that cannot be read should not be found out after the run.
    let old = arguments.compare.as_deref().map(Record::read).transpose()?;
    let record = match &arguments.from {
        Some(path) => {
            let record = Record::read(path)?;
            for report in &record.reports {
                arguments.print(report)?;
            }
            record
        }
        None => measure(arguments, &peers, &scenarios, settings)?,
    };
    if let Some(old) = old {
        say::section("What changed");
        eprintln!("{}", record::compare(&old, &record));
    }
    Ok(())
}

fn list(scenarios: &[Scenario]) {
    for scenario in scenarios {
        let state = match scenario.way {
            Way::NotYet => " (not yet)",
            _ => "",
        };
        println!("{:<16} {}{state}", scenario.name, scenario.what);
    }
}

fn renew_readme() -> Result<()> {
    let (path, record) = Record::newest(&record::folder())?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("find the README")?;
    let page = path.with_extension("md");
    let page = page.strip_prefix(root).unwrap_or(&page);
    let readme = root.join("README.md");
    record::renew(&readme, &record, &page.display().to_string())?;
    say::note(&format!(
        "{} has the figures of {}",
        readme.display(),
        path.display()
    ));
    Ok(())
}

/// Installs, sets the stage, and plays all scenarios. A run of all of them is recorded as it goes on.
fn measure(
    arguments: &Arguments,
    peers: &[Peer],
    scenarios: &[Scenario],
    settings: Settings,
) -> Result<Record> {
    let cores = Cores::choose()?;
    let descriptors = machine::raise_limits()?;
    for peer in peers {
        if let Err(error) = peer.install() {
            say::failed(&format!("install {}: {error:#}", peer.name));
        }
    }
    // From here on this is another process, and all that it starts ends with it, also by a signal.
    sandbox::enter(Interrupt::Ends)?;
    cores.settle()?;
    let (candidates, versions) = look_for(peers);
    let minutes = scenario::estimate_s(scenarios, peers, settings, arguments.rate).div_ceil(60);
    say::note(&format!(
        "about {minutes} min on a quiet machine; rounds that others disturb take longer, up to {} tries each",
        campaign::ATTEMPTS
    ));
    let stage = Stage::set(cores, descriptors)?;
    let (start, mut record, mut failed) = (Instant::now(), Record::default(), 0);
    for scenario in scenarios {
        let ours = candidates
            .iter()
            .filter(|candidate| candidate.peer.layer == scenario.layer);
        let ours: Vec<Candidate> = ours.cloned().collect();
        let named = |name: &String| ours.iter().any(|candidate| candidate.peer.name == name);
        let versions = versions.clone().into_iter();
        let machine = Machine::describe(
            settings.rounds,
            settings.window.as_secs_f64(),
            versions.filter(|(name, _)| named(name)).collect(),
        )?;
        say::section(&format!("{}: {}", scenario.name, scenario.what));
        let mut report = Report::new(scenario.name, machine);
        let bench = Bench {
            stage: &stage,
            candidates: &ours,
            settings,
            case: &arguments.case,
        };
        play(scenario, &bench, arguments.rate, &mut report);
        if let Way::NotYet = scenario.way {
            record.not_yet.push(scenario.name.to_owned());
        } else {
            record.add(&report);
        }
        failed += report.failed();
        record.took_s = start.elapsed().as_secs();
        arguments.print(&report)?;
        // Whatever comes later, what was measured so far is kept.
        if arguments.is_recorded() && !record.reports.is_empty() {
            let page = record.write(&record::folder())?;
            say::note(&format!("recorded in {}", page.display()));
        }
    }
    judge(&record);
    if failed > 0 {
        bail!("{failed} cases failed: see above");
    }
    Ok(record)
}

fn play(scenario: &Scenario, bench: &Bench<'_>, rate: u32, report: &mut Report) {
    match scenario.way {
        Way::NotYet => say::note("not yet"),
        Way::Cases(cases) => {
            for case in cases(rate).iter().filter(|case| bench.wants(&case.name)) {
                match bench.stage.play(case, bench.candidates, bench.settings) {
                    Ok(courses) => report.add(case, &courses),
                    Err(error) => report.fail(format!("{}: {error:#}", case.name)),
                }
            }
        }
        Way::Own(measure, _) => {
            if let Err(error) = measure(bench, report) {
                say::failed(&format!("{error:#}"));
                report.fail(format!("{error:#}"));
            }
        }
    }
}

/// What the record comes to, for whoever watched.
fn judge(record: &Record) {
    say::section("Sluice beside its goals and its peers");
    for (met, line) in record::verdicts(record) {
        match met {
            true => say::note(&format!("met: {line}")),
            false => say::failed(&line),
        }
    }
    for line in record::losses(record) {
        say::failed(&line);
    }
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
        let is_new = versions
            .insert(peer.name.to_owned(), line.clone())
            .is_none();
        if is_new {
            say::note(&format!("{:<15} {line}", peer.name));
        }
        found.push(Candidate {
            peer: *peer,
            missing,
        });
    }
    (found, versions)
}
