//! `cargo xtask test`: everything that must hold, in order, with a count at the end. Continuous integration runs exactly this.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::{build, say, setup, tidy, tree};

/// Test programs without a proxy: packets through the programs, and corpora.
const FIXTURES: [&str; 2] = ["packet", "corpus"];

#[derive(clap::Args)]
pub struct Arguments {
    /// Leaves out the demo at the end
    #[arg(long)]
    without_demo: bool,
}

/// Tests that ran, as their runners count them; a check that is no test runner counts as one.
#[derive(Default)]
struct Count {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Runs all steps, a failed one too does not hide the later ones; an error says that something failed.
pub fn run(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    setup::run()?;
    if let Err(error) = setup::tools() {
        say::failed(&format!("{error:#}"));
    }
    let mut count = Count::default();
    count.check("Formatting", || quiet(&["fmt", "--all", "--check"]));
    count.check("Tidy", || tidy::run(&tidy::Arguments::check()));
    count.check("Clippy, warnings are errors", || {
        quiet(&[
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ])
    });
    count.tests(
        "Unit tests, in cargo's own order",
        &["test", "--workspace", "--lib", "--bins"],
    );
    count.tests(
        "Fixture packets through the loaded XDP program and the model, and what fuzzing left",
        &[
            "test",
            "--package",
            "tests",
            "--test",
            "packet",
            "--test",
            "corpus",
        ],
    );
    count.check("Build", build::sluice);
    // The kernel half that logs its verdicts: never released, so nothing else would notice that it is broken.
    count.check("The trace build", || {
        tree::run(&mut tree::cargo(&[
            "check",
            "--quiet",
            "--package",
            "proxy-user",
            "--features",
            "trace",
        ]))
    });
    let whole = whole_proxies()?;
    let whole: Vec<&str> = whole.iter().map(String::as_str).collect();
    count.tests("Whole proxies in network namespaces", &whole);
    // Everything that makes workers once more, on the back-end for hosts that refuse io_uring; the rooms of `net` run on both anyway.
    count.tests_of(
        "Workers and what they serve, on epoll",
        on_epoll(&[
            "test",
            "--package",
            "proxy-user",
            "--lib",
            "--",
            "worker::",
            "codec::",
            "tls::",
            "origin::",
        ]),
    );
    count.tests_of(
        "Whole proxies in network namespaces, on epoll",
        on_epoll(&whole),
    );
    count.bench();
    if !arguments.without_demo {
        count.check("The demo, by its --json", demo);
    }

    say::section(&format!("Done in {}", say::since(start)));
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed, count.failed, count.skipped
    );
    ensure!(count.failed == 0, "{} failed", count.failed);
    Ok(())
}

impl Count {
    /// One step that is right or wrong as a whole.
    fn check(&mut self, title: &str, step: impl FnOnce() -> Result<()>) {
        say::section(title);
        let start = Instant::now();
        match step() {
            Ok(()) => {
                self.passed += 1;
                say::step("passed", &say::since(start));
            }
            Err(error) => {
                self.failed += 1;
                say::failed(&format!("{title}: {error:#}"));
            }
        }
    }

    /// One step whose runner counts tests.
    fn tests(&mut self, title: &str, arguments: &[&str]) {
        self.tests_of(title, tree::cargo(arguments));
    }

    fn tests_of(&mut self, title: &str, cargo: Command) {
        say::section(title);
        let start = Instant::now();
        match self.run_tests(cargo) {
            Ok(()) => say::step("passed", &say::since(start)),
            Err(error) => say::failed(&format!("{title}: {error:#}")),
        }
    }

    /// The bench measures HAProxy, and sees it when it is slowed down on purpose.
    fn bench(&mut self) {
        self.tests(
            "The bench, from its command line to its report",
            &["test", "--package", "bench", "--test", "end_to_end"],
        );
    }

    fn run_tests(&mut self, mut cargo: Command) -> Result<()> {
        let mut child = cargo
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start cargo")?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let errors = thread::spawn(move || err.map(Tally::read));
        let mut tally = out.map(Tally::read).unwrap_or_default();
        let aloud = errors
            .join()
            .map_err(|_| anyhow!("reading what cargo says panicked"))?
            .unwrap_or_default();
        let status = child.wait().context("wait for cargo")?;

        // A fixture test that finds no root says so on standard error, and libtest takes it for passed.
        let skipped_aloud = aloud.ignored.min(tally.passed);
        tally.passed -= skipped_aloud;
        self.passed += tally.passed;
        self.skipped += tally.skipped + skipped_aloud;
        // What does not compile, or dies, has no count of its own.
        self.failed += if status.success() {
            tally.failed
        } else {
            tally.failed.max(1)
        };
        ensure!(status.success(), "{cargo:?} ({status})");
        ensure!(tally.results > 0, "{cargo:?} ran no test");
        Ok(())
    }
}

/// What runs every test program that is not run before: all that there are, so that none is forgotten.
fn whole_proxies() -> Result<Vec<String>> {
    let folder = tree::root().join("tests/tests");
    let mut names = Vec::new();
    for entry in folder.read_dir().context("list the test programs")? {
        let path = entry.context("list the test programs")?.path();
        let is_program = path.is_file() || path.join("main.rs").is_file();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if is_program && !FIXTURES.contains(&&*name) {
            names.push(name.into_owned());
        }
    }
    names.sort_unstable();
    let mut words: Vec<String> = ["test", "--package", "tests", "--no-fail-fast"]
        .map(str::to_owned)
        .into();
    words.extend(
        names
            .into_iter()
            .flat_map(|name| ["--test".to_owned(), name]),
    );
    Ok(words)
}

/// Cargo with the variable that unit tests and the rig take the back-end from.
fn on_epoll(arguments: &[&str]) -> Command {
    let mut cargo = tree::cargo(arguments);
    cargo.env("SLUICE_NET_BACKEND", "epoll");
    cargo
}

/// What one stream of a test run said.
#[derive(Default)]
struct Tally {
    /// Lines `test result:` seen.
    results: u64,
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Lines `test NAME ... ignored, REASON` seen.
    ignored: u64,
}

impl Tally {
    /// Reads to the end, counting, and shows whatever is more than a test that passed.
    fn read(stream: impl Read) -> Self {
        let mut tally = Self::default();
        for line in BufReader::new(stream).lines().map_while(|line| line.ok()) {
            tally.count(&line);
            let boring = line.is_empty()
                || line.starts_with("running ")
                || (line.starts_with("test ")
                    && (line.ends_with(" ... ok") || line.contains(" ... ok (")));
            if !boring {
                // Whoever reads this may have gone; the count goes on.
                let _ = writeln!(std::io::stderr(), "  {line}");
            }
        }
        tally
    }

    fn count(&mut self, line: &str) {
        if line.starts_with("test ") && line.contains(" ... ignored") {
            self.ignored += 1;
        }
        let Some(rest) = line.strip_prefix("test result: ") else {
            return;
        };
        self.results += 1;
        for part in rest.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(number)), Some(word)) =
                (words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

/// Runs cargo without a word unless it fails.
fn quiet(arguments: &[&str]) -> Result<()> {
    let done = tree::cargo(arguments).output().context("start cargo")?;
    if !done.status.success() {
        eprint!(
            "{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
        bail!("cargo {} ({})", arguments.join(" "), done.status);
    }
    Ok(())
}

/// A short demo, as a script would run it: the object is all there is on standard output, and says that all went well.
fn demo() -> Result<()> {
    let own = std::env::current_exe().context("find our own program")?;
    let done = Command::new(own)
        .args(["demo", "--json", "--seconds", "1"])
        .stdin(Stdio::null())
        .output()
        .context("start the demo")?;
    if !done.status.success() {
        eprint!("{}", String::from_utf8_lossy(&done.stderr));
        bail!("the demo ended with {}", done.status);
    }
    let object: Value =
        serde_json::from_slice(&done.stdout).context("its standard output is one JSON object")?;
    let expected: [(&str, &[&str]); 7] = [
        ("", &["xdp_mode"]),
        ("/l4", &["connections", "bytes", "failed", "per_endpoint"]),
        (
            "/l7",
            &["requests", "failed", "per_endpoint", "tls_version"],
        ),
        ("/ledger", &["received", "verdicts", "balanced"]),
        (
            "/ban",
            &["rule", "syn_dropped", "ended_after_s", "others_failed"],
        ),
        (
            "/sysctl",
            &[
                "key",
                "before",
                "after",
                "observed_before",
                "observed_after",
            ],
        ),
        (
            "/reload",
            &["generation_before", "generation_after", "failed"],
        ),
    ];
    for (place, names) in expected {
        for name in names {
            ensure!(
                object.pointer(&format!("{place}/{name}")).is_some(),
                "{place}/{name} is missing in {object}"
            );
        }
    }
    ensure!(
        object.pointer("/ledger/balanced") == Some(&Value::Bool(true)),
        "the ledger is not balanced: {object}"
    );
    for place in [
        "/l4/failed",
        "/l7/failed",
        "/ban/others_failed",
        "/reload/failed",
    ] {
        ensure!(
            object.pointer(place).and_then(Value::as_u64) == Some(0),
            "{place} is not 0: {object}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_skipped_tests_are_counted() {
        let mut tally = Tally::default();
        for line in [
            "test a ... ok",
            "test b ... ignored, needs root",
            "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 4 filtered out; finished in 0.00s",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        ] {
            tally.count(line);
        }
        assert_eq!(
            (
                tally.results,
                tally.passed,
                tally.failed,
                tally.skipped,
                tally.ignored
            ),
            (2, 13, 2, 3, 1)
        );
    }
}
