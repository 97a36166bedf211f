//! Builds the program under test, both halves of it.

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
