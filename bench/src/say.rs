//! Progress on standard error, one line per round; standard output is left to results.

use std::io::{IsTerminal, stderr};
use std::time::Instant;

use crate::campaign::{Discard, Figures};
use crate::load::Outcome;

/// The title of a part of the work.
pub fn section(title: &str) {
    eprintln!("\n{}", tinted("1", title));
}

/// A fact.
pub fn note(what: &str) {
    eprintln!("  {}", tinted("2", what));
}

/// Why it did not work.
pub fn failed(what: &str) {
    eprintln!("  {} {what}", tinted("1;31", "failed:"));
}

/// One round, and whether it counts.
pub fn round(
    peer: &str,
    case: &str,
    figures: &Figures,
    outcome: &Outcome,
    discard: Option<Discard>,
    start: Instant,
) {
    let figures: Vec<String> = figures
        .iter()
        .map(|(metric, value)| format!("{}={value:.1}", metric.name()))
        .collect();
    let span = &outcome.span;
    let percent = |share: f64| (share * 100.0).round();
    let verdict = match discard {
        None => tinted("32", "counts"),
        Some(why) => tinted("33", &format!("discarded: {}", why.words())),
    };
    eprintln!(
        "  {peer:<15} {case:<14} {}  cores {} % and {} %, strangers {} %, steal {} %, {:.1} s  {verdict}",
        figures.join(" "),
        percent(span.proxy_core_busy),
        percent(span.load_core_busy),
        percent(span.strangers),
        percent(span.steal),
        start.elapsed().as_secs_f32(),
    );
}

fn tinted(code: &str, text: &str) -> String {
    if !stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some() {
        return text.to_owned();
    }
    format!("\x1b[{code}m{text}\x1b[0m")
}
