//! Builds the program under test, both halves of it.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::{say, tree};

/// `target/debug/sluice`, with the kernel half inside.
pub fn sluice() -> Result<()> {
    let start = Instant::now();
    say::begin(
        "cargo",
        "build --package proxy-user (its build compiles the kernel half; minutes the first time)",
    );
    tree::run(&mut tree::cargo(&[
        "build",
        "--quiet",
        "--package",
        "proxy-user",
    ]))?;
    say::step("built", &format!("both halves in {}", say::since(start)));
    Ok(())
}

/// Whether what was built has the command that demo and whole-proxy tests start.
pub fn sluice_runs() -> bool {
    let path = tree::root().join("target/debug/sluice");
    let asked = Command::new(path).args(["run", "--help"]).output();
    asked.is_ok_and(|done| {
        done.status.success() && String::from_utf8_lossy(&done.stdout).contains("--config")
    })
}
