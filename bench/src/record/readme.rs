//! The README's figures: taken from a record and put between two marks, so that nobody types them.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Record, verdicts};
use crate::report::{Report, Row, shown};

const BEGIN: &str =
    "<!-- The figures are made by `cargo xtask bench --readme` from the newest record. -->";
const END: &str = "<!-- End of the figures. -->";

/// The cases that a reader of the README wants first, with their main metric.
const SHOWN: &[(&str, &str, &str)] = &[
    ("http1-small", "64-saturated", "cpu_us_per_request"),
    ("http1-16k", "64-saturated", "cpu_us_per_request"),
    ("http1-connect", "64-at-10000", "cpu_us_per_request"),
    ("tls-small", "64-saturated", "cpu_us_per_request"),
    ("tls-handshake", "full", "cpu_us_per_request"),
    ("http1-gateway", "64-saturated", "cpu_us_per_request"),
    ("download", "clear", "cpu_s_per_gib"),
    ("download", "tls", "cpu_s_per_gib"),
    ("idle", "clear", "rss_bytes_per_connection"),
];

/// Writes the section of a README anew.
pub fn renew(readme: &Path, record: &Record, page: &str) -> Result<()> {
    let text = fs::read_to_string(readme).with_context(|| format!("read {}", readme.display()))?;
    let renewed = between_marks(&text, &section(record, page)).with_context(|| {
        format!(
            "{} has no place for the figures: it needs the lines\n{BEGIN}\n{END}",
            readme.display()
        )
    })?;
    fs::write(readme, renewed).with_context(|| format!("write {}", readme.display()))
}

fn between_marks(text: &str, section: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{section}{END}{after}"))
}

fn section(record: &Record, page: &str) -> String {
    let mut text = String::new();
    let Some(first) = record.reports.first() else {
        return text;
    };
    let machine = &first.machine;
    let _ = writeln!(
        text,
        "Measured {} on {} cores of {}, Linux {}: [the whole record, with charts]({page}).\n",
        machine.date, machine.cores, machine.cpu, machine.kernel
    );
    requests(record, &mut text);
    packets(record, &mut text);
    let verdicts = verdicts(record);
    let met = verdicts.iter().filter(|(met, _)| *met).count();
    let _ = writeln!(
        text,
        "Of {} goals that were measured, {met} are met; the record names the others, and each peer that did better, at its top.\n",
        verdicts.len()
    );
    text
}

/// A table of scenarios by proxies.
fn requests(record: &Record, text: &mut String) {
    let mut proxies: Vec<&str> = Vec::new();
    for (scenario, case, metric) in SHOWN {
        for row in record.report(scenario).iter().flat_map(|of| &of.rows) {
            let counts = row.case == *case && row.metric == *metric && row.median.is_some();
            if counts && !proxies.contains(&row.proxy.as_str()) {
                proxies.push(&row.proxy);
            }
        }
    }
    if proxies.is_empty() {
        return;
    }
    let _ = writeln!(text, "| scenario | figure | {} |", proxies.join(" | "));
    let _ = writeln!(text, "|---|---|{}", "---|".repeat(proxies.len()));
    for (scenario, case, metric) in SHOWN {
        let Some(report) = record.report(scenario) else {
            continue;
        };
        let cells: Vec<String> = proxies
            .iter()
            .map(|proxy| figure(report, proxy, case, metric))
            .collect();
        if cells.iter().any(|cell| cell != "-") {
            let _ = writeln!(
                text,
                "| {scenario} {case} | {metric} | {} |",
                cells.join(" | ")
            );
        }
    }
    text.push('\n');
}

/// One flow and many, of TCP over IPv4: what UDP, IPv6 and some flows cost stands in the record.
fn packets(record: &Record, text: &mut String) {
    let Some(report) = record.report("packet") else {
        return;
    };
    let _ = writeln!(text, "| packet | ns, raw |\n|---|---|");
    let is_shown = |row: &&Row| {
        let beside = ["-udp", "-tcp6", "/4096"].iter();
        row.metric == "ns_per_packet" && !beside.into_iter().any(|part| row.case.contains(part))
    };
    for row in report.rows.iter().filter(is_shown) {
        let _ = writeln!(text, "| {} | {} |", row.case, shown(row.median));
    }
    text.push('\n');
}

fn figure(report: &Report, proxy: &str, case: &str, metric: &str) -> String {
    let row = report
        .rows
        .iter()
        .find(|row| row.proxy == proxy && row.case == case && row.metric == metric);
    shown(row.and_then(|row| row.median))
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn only_what_stands_between_the_marks_is_written_anew() {
        let text = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let section = section(&record("http1-small", &[10.0], &[20.0]), "results/x.md");
        let renewed = between_marks(&text, &section).unwrap();
        assert!(
            renewed.starts_with("before\n") && renewed.ends_with("-->\nafter\n"),
            "{renewed}"
        );
        assert!(
            renewed.contains("| http1-small 64-saturated | cpu_us_per_request | 10.00 | 20.00 |"),
            "{renewed}"
        );
        assert!(!renewed.contains("old"), "{renewed}");
        assert_eq!(between_marks("no marks", &section), None);
    }
}
