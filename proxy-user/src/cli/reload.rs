//! `sluice reload`.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Common, client, colour};
use crate::config::{Diagnostic, diagnostic};

pub fn perform(common: &Common) -> Result<ExitCode> {
    let answer =
        client::ask(common, "POST", "/reload", None)?.ok_or_else(|| client::nobody(common))?;
    let said: Value = answer.json()?;
    if answer.status == 200 {
        match common.json {
            true => println!("{said}"),
            false => println!("generation {} is in force", said["generation"]),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let diagnostics: Vec<Diagnostic> =
        serde_json::from_value(said["diagnostics"].clone()).unwrap_or_default();
    if common.json {
        println!("{}", json!({ "diagnostics": diagnostics }));
    } else {
        eprint!(
            "{}",
            diagnostic::render(&diagnostics, colour(&std::io::stderr()))
        );
        eprintln!("refused; the generation before goes on");
    }
    Ok(ExitCode::FAILURE)
}
