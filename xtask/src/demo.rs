//! `cargo xtask demo`: the whole of Sluice on real traffic in one minute, in network namespaces that vanish afterwards.

mod guard;
mod layer4;
mod layer7;
mod live;
mod report;
mod stage;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rig::ledger::Ledger;
use rig::sandbox::{self, Interrupt};

use self::report::Report;
use self::stage::Stage;
use crate::{build, say, setup};

#[derive(clap::Args)]
pub struct Arguments {
    /// Leaves everything up until Ctrl-C, and prints commands to play with
    #[arg(long)]
    keep: bool,
    /// How long each of the loads goes on
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    seconds: u64,
    /// Prints one JSON object on standard output, and nothing else there
    #[arg(long)]
    json: bool,
}

/// Sets the stage, drives the traffic, tells what happened. An error names whatever was not as it should be.
pub fn run(arguments: &Arguments) -> Result<()> {
    setup::run()?;
    say::section("Build");
    build::sluice()?;
    // From here on this is another process, and all that it makes ends with it.
    sandbox::enter(Interrupt::IsNoted)?;

    let start = Instant::now();
    let stage = Stage::set()?;
    let report = play(&stage, Duration::from_secs(arguments.seconds)).map_err(|error| {
        error.context(format!(
            "Sluice's last words:\n{}",
            stage.sluice.last_words()
        ))
    })?;
    report.print(arguments.json)?;
    if arguments.keep {
        stage.keep();
    }
    say::section("Cleaning up");
    stage.strike()?;
    say::step(
        "done",
        &format!(
            "in {}; nothing is left: namespaces, programs and files were this process's own",
            say::since(start)
        ),
    );

    if sandbox::interrupted() && !arguments.keep {
        bail!("interrupted");
    }
    let faults = report.faults();
    if !faults.is_empty() {
        bail!("not as it should be: {}", faults.join("; "));
    }
    Ok(())
}

/// The traffic, from the packet to the operator.
fn play(stage: &Stage, span: Duration) -> Result<Report> {
    let ledger = Ledger::open(&stage.field, &stage.sluice)?;
    let layer4 = layer4::play(stage, span)?;
    let mut layer7 = layer7::play(stage)?;
    let ban = guard::play(stage, &mut layer7)?;
    let sysctl = live::sysctl(stage, &mut layer7)?;
    let reload = live::reload(stage, span, &mut layer7)?;

    say::section("The ledger: every packet has one verdict");
    let ledger = ledger.close(&stage.field, &stage.sluice)?.into();
    let report = Report {
        xdp_mode: stage.xdp_mode()?,
        l4: layer4,
        l7: layer7,
        ledger,
        ban,
        sysctl,
        reload,
    };
    report.ledger.say();
    Ok(report)
}
