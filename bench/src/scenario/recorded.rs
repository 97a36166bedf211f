//! `recorded`: what no noise changes, so that any difference is a change. Verified instructions and machine code of the kernel half's
//! programs; instructions of the pure rooms, counted by valgrind; the size of a connection's future.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use aya::EbpfLoader;
use aya::programs::Program;
use proxy_ebpf::object;
use rig::namespace::output;
use rig::sandbox;

use super::Bench;
use crate::metric::Metric;
use crate::report::{Report, Row};
use crate::rooms;

/// Calls of the shorter and of the longer run: their difference is without what start and end of a process take.
const TIMES: [u32; 2] = [2_000, 12_000];

pub fn measure(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    if !bench.has("sluice") {
        return Ok(());
    }
    programs(bench, report)?;
    for room in rooms::ROOMS {
        if !bench.wants(room) {
            continue;
        }
        let counts = TIMES.map(|times| instructions(room, times));
        match counts {
            [Ok(few), Ok(many)] => {
                let each = (many - few) / f64::from(TIMES[1] - TIMES[0]);
                let row = Row::new("sluice", room, Metric::InstructionsPerCall, vec![each]);
                report.rows.push(row);
            }
            [Err(error), _] | [_, Err(error)] => report.fail(format!("{room}: {error:#}")),
        }
    }
    if bench.wants("connection") {
        let bytes = sluice::connection::future_bytes() as f64;
        let row = Row::new("sluice", "connection", Metric::FutureBytes, vec![bytes]);
        report.rows.push(row);
    }
    Ok(())
}

/// The kernel half as it is shipped, and what the kernel says of it.
fn programs(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let mut ebpf = EbpfLoader::new()
        .load(object::KERNEL)
        .context("load the kernel half")?;
    for (name, program) in ebpf.programs_mut() {
        if !bench.wants(name) {
            continue;
        }
        match program {
            Program::Xdp(program) => program.load(),
            Program::SkReuseport(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            _ => continue,
        }
        .with_context(|| format!("load {name}"))?;
        let info = program
            .info()
            .with_context(|| format!("ask about {name}"))?;
        let instructions = info.verified_instruction_count().map(f64::from);
        for (metric, value) in [
            (Metric::VerifiedInstructions, instructions),
            (Metric::JitBytes, Some(f64::from(info.size_jitted()))),
        ] {
            report.rows.push(Row::new(
                "sluice",
                name,
                metric,
                value.into_iter().collect(),
            ));
        }
    }
    Ok(())
}

/// Instructions of a whole process of ours that does a room's work so often.
fn instructions(room: &str, times: u32) -> Result<f64> {
    let own = std::env::current_exe().context("find our own program")?;
    let file = sandbox::folder("valgrind")?.join(format!("{room}-{times}"));
    output(
        Command::new("valgrind")
            .arg("--tool=callgrind")
            .arg(format!("--callgrind-out-file={}", file.display()))
            .arg(own)
            .args(["--room", room, "--times", &times.to_string()]),
    )
    .context("count instructions (package valgrind)")?;
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let total = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("summary: ")
                .or(line.strip_prefix("totals: "))
        })
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
        .context("valgrind wrote no sum")?;
    ensure!(total > 0.0, "valgrind counted nothing");
    Ok(total)
}
