//! `cargo xtask tidy`: the rules that keep the source in order, each in a file of its own.

mod caption;
mod door;
mod forbidden;
mod map;
mod order;
mod shape;
mod source;

use std::fs;

use anyhow::{Context, Result, bail};

use self::source::Source;
use crate::{say, tree};

#[derive(clap::Args)]
pub struct Arguments {
    /// Rewrites what can be rewritten: the map in README.md
    #[arg(long)]
    fix: bool,
}

impl Arguments {
    /// Only looks.
    pub fn check() -> Self {
        Self { fix: false }
    }
}

/// A place where a rule is broken.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    path: String,
    /// From 1; 0 = the file as a whole.
    line: usize,
    what: String,
    /// What to do about it.
    instead: String,
}

/// A rule: its name, and what looks for breaches in all sources.
struct Rule {
    name: &'static str,
    check: fn(&[Source]) -> Vec<Finding>,
}

const RULES: &[Rule] = &[
    Rule {
        name: "each file opens with a caption",
        check: caption::check,
    },
    Rule {
        name: "a room uses only rooms below its own line",
        check: order::check,
    },
    Rule {
        name: "one door per foreign library",
        check: door::check,
    },
    Rule {
        name: "nothing half done, nothing that panics in data paths",
        check: forbidden::check,
    },
    Rule {
        name: "files have names that say something, and a length that can be read",
        check: shape::check,
    },
];

/// Checks all rules; an error says how many places break one.
pub fn run(arguments: &Arguments) -> Result<()> {
    let sources = source::read_all(&tree::root())?;
    let readme_path = tree::root().join("README.md");
    let readme = fs::read_to_string(&readme_path).context("read README.md")?;
    if arguments.fix {
        let fixed = map::rewrite(&readme, &sources)?;
        if fixed != readme {
            fs::write(&readme_path, fixed).context("write README.md")?;
            say::note("README.md: map rewritten");
        }
        return run(&Arguments::check());
    }

    let mut count = 0;
    for rule in RULES {
        count += report(rule.name, &(rule.check)(&sources));
    }
    count += report(
        "the map in README.md is made from the captions",
        &map::check(&readme, &sources),
    );
    if count > 0 {
        bail!("{count} places are not tidy");
    }
    Ok(())
}

fn report(rule: &str, findings: &[Finding]) -> usize {
    if findings.is_empty() {
        say::step("ok", rule);
    } else {
        say::failed(rule);
    }
    for finding in findings {
        let place = if finding.line == 0 {
            finding.path.clone()
        } else {
            format!("{}:{}", finding.path, finding.line)
        };
        eprintln!("    {place}: {}\n        {}", finding.what, finding.instead);
    }
    findings.len()
}
