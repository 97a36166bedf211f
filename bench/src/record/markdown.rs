//! A record as a page: what is bad first, then how it was measured, then every figure.

use std::fmt::Write;

use super::{Record, losses, verdicts};
use crate::report::{Report, shown};

/// The page; `charts` are scenario and path of each.
pub fn write(record: &Record, charts: &[(String, String)]) -> String {
    let mut text = String::new();
    let Some(first) = record.reports.first() else {
        return text;
    };
    let date = &first.machine.date;
    let _ = writeln!(text, "# Bench of {date}\n");
    judgement(record, &mut text);
    method(record, &mut text);
    for report in &record.reports {
        let charts = charts.iter().filter(|(of, _)| *of == report.scenario);
        scenario(
            record,
            report,
            charts.map(|(_, path)| path.as_str()),
            &mut text,
        );
    }
    if !record.not_yet.is_empty() {
        let _ = writeln!(
            text,
            "## Not yet\n\nScenarios whose feature does not exist: {}.",
            record.not_yet.join(", ")
        );
    }
    text
}

fn judgement(record: &Record, text: &mut String) {
    let (met, missed): (Vec<_>, Vec<_>) = verdicts(record).into_iter().partition(|(met, _)| *met);
    list(
        text,
        "Where Sluice misses a goal",
        missed.iter().map(|(_, line)| line.as_str()),
    );
    let losses = losses(record);
    list(
        text,
        "Where Sluice loses to a peer, beyond the spread of both",
        losses.iter().map(String::as_str),
    );
    list(
        text,
        "Goals that are met",
        met.iter().map(|(_, line)| line.as_str()),
    );
}

fn list<'a>(text: &mut String, title: &str, lines: impl Iterator<Item = &'a str>) {
    let _ = writeln!(text, "## {title}\n");
    let mut none = true;
    for line in lines {
        none = false;
        let _ = writeln!(text, "- {line}");
    }
    text.push_str(if none { "Nowhere.\n\n" } else { "\n" });
}

fn method(record: &Record, text: &mut String) {
    let Some(machine) = record.reports.first().map(|report| &report.machine) else {
        return;
    };
    let _ = writeln!(
        text,
        "## Machine, versions, settings\n\n\
         {} cores, {}, Linux {}, TCP congestion control {}. At least {} rounds of {} s for each proxy and case; the run took {} minutes. \
         The proxy has one core, clients and origin the other; only ratios of one run mean anything. \
         The configurations are in `bench/peers`; the method is told at the top of `bench/src/main.rs`.\n\n\
         | proxy | version |\n|---|---|",
        machine.cores,
        machine.cpu,
        machine.kernel,
        machine.congestion_control,
        machine.rounds,
        machine.round_s,
        record.took_s.div_ceil(60)
    );
    // A scenario of packets has other peers than one of requests.
    let mut versions = std::collections::BTreeMap::new();
    for report in &record.reports {
        versions.extend(report.machine.peers.iter());
    }
    for (peer, version) in versions {
        let _ = writeln!(text, "| {peer} | {version} |");
    }
    text.push('\n');
}

fn scenario<'a>(
    record: &Record,
    report: &Report,
    charts: impl Iterator<Item = &'a str>,
    text: &mut String,
) {
    let _ = writeln!(text, "## {}\n", report.scenario);
    for path in charts {
        let _ = writeln!(text, "![{}]({path})\n", report.scenario);
    }
    let _ = writeln!(
        text,
        "| case | proxy | metric | median | min | max | unit | rounds | discarded |\n|---|---|---|---:|---:|---:|---|---:|---:|"
    );
    for row in &report.rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            row.case,
            row.proxy,
            row.metric,
            shown(row.median),
            shown(row.min),
            shown(row.max),
            row.unit,
            row.rounds,
            row.discarded
        );
    }
    text.push('\n');
    for remark in record.remarks.get(&report.scenario).into_iter().flatten() {
        let one_line: Vec<&str> = remark.lines().map(str::trim).collect();
        let _ = writeln!(text, "- {}", one_line.join(" / "));
    }
    text.push('\n');
}
