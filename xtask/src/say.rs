//! How xtask speaks: one line per step on standard error, colour on a terminal only, standard output left to results.

use std::io::{IsTerminal, stderr};
use std::time::Instant;

/// What colours mean here.
#[derive(Clone, Copy)]
enum Tint {
    Bold,
    Faint,
    Good,
    Bad,
}

/// The title of a part of the work.
pub fn section(title: &str) {
    eprintln!("\n{}", tinted(Tint::Bold, title));
}

/// A step that is done, or a fact.
pub fn step(name: &str, what: &str) {
    eprintln!("  {} {what}", tinted(Tint::Good, &format!("{name:<11}")));
}

/// A step that begins and may take a while.
pub fn begin(name: &str, what: &str) {
    eprintln!(
        "  {} {}",
        tinted(Tint::Faint, &format!("{name:<11}")),
        tinted(Tint::Faint, what)
    );
}

/// Something worth knowing that is no failure.
pub fn note(what: &str) {
    eprintln!("  {}", tinted(Tint::Faint, what));
}

/// Why it did not work.
pub fn failed(what: &str) {
    eprintln!("{} {what}", tinted(Tint::Bad, "failed:"));
}

/// `1.5 s` or `2 min 5 s` since then.
pub fn since(start: Instant) -> String {
    let seconds = start.elapsed().as_secs_f32();
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {} s", seconds as u32 / 60, seconds as u32 % 60)
    }
}

fn tinted(tint: Tint, text: &str) -> String {
    if !stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some() {
        return text.to_owned();
    }
    let code = match tint {
        Tint::Bold => "1",
        Tint::Faint => "2",
        Tint::Good => "32",
        Tint::Bad => "1;31",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}
