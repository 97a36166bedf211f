//! `cargo xtask bench`: builds Sluice as it is released, installs the proxies that it is held against, and measures.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{say, setup, tree};

/// All words are the bench's own: `cargo xtask bench --help` says which.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Arguments {
    /// NAME [--peers a,b] [--quick] [--json] and more
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Builds, installs, and becomes the bench.
pub fn run(arguments: &Arguments) -> Result<()> {
    let only_looks = ["--help", "-h", "--list", "--readme", "--from"]
        .iter()
        .any(|word| arguments.words.iter().any(|other| other == word));
    setup::run()?;
    say::section("Build");
    build()?;
    if !only_looks {
        install(&arguments.words)?;
    }
    // Signals and the exit code are the bench's own from here on.
    let error = bench().args(&arguments.words).exec();
    Err(error).context("start the bench")
}

/// What is measured is what is released, with all optimisations.
fn build() -> Result<()> {
    let start = Instant::now();
    say::begin(
        "cargo",
        "build --release --package proxy-user --package bench (minutes the first time)",
    );
    tree::run(&mut tree::cargo(&[
        "build",
        "--quiet",
        "--release",
        "--package",
        "proxy-user",
        "--package",
        "bench",
    ]))?;
    say::step("built", &say::since(start));
    Ok(())
}

/// The bench knows which packages its peers are in.
fn install(words: &[String]) -> Result<()> {
    let asked = bench()
        .args(words)
        .arg("--packages")
        .output()
        .context("ask the bench which packages it needs")?;
    if !asked.status.success() {
        bail!("{}", String::from_utf8_lossy(&asked.stderr).trim());
    }
    let text = String::from_utf8_lossy(&asked.stdout);
    let packages: Vec<setup::Package> = text
        .lines()
        .map(|name| setup::Package {
            name,
            purpose: "a proxy that Sluice is measured beside",
        })
        .collect();
    // A peer that cannot be installed is reported as missing by the bench: the others are measured all the same.
    if let Err(error) = setup::install(&packages) {
        say::failed(&format!("{error:#}"));
    }
    Ok(())
}

fn bench() -> Command {
    Command::new(tree::root().join("target/release/bench"))
}
