//! Progress on standard error, one line per round; standard output is left to results.

use std::io::{IsTerminal, stderr};
use std::time::Instant;

use crate::round::Round;

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
pub fn round(peer: &str, case: &str, round: &Round, start: Instant) {
    let figures: Vec<String> = round
        .figures
        .iter()
        .map(|(metric, value)| format!("{}={value:.1}", metric.name()))
        .collect();
    let verdict = match round.discard {
        None => tinted("32", "counts"),
        Some(why) => tinted("33", &format!("discarded: {}", why.words())),
    };
    eprintln!(
        "  {peer:<15} {case:<14} {}  {}, {:.1} s  {verdict}",
        figures.join(" "),
        round.facts,
        start.elapsed().as_secs_f32(),
    );
}

fn tinted(code: &str, text: &str) -> String {
    if !stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some() {
        return text.to_owned();
    }
    format!("\x1b[{code}m{text}\x1b[0m")
}
