//! `sluice check`: everything wrong with a configuration, in one run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::{self, CertificatePem, Diagnostic, Disk, ListenerMode, Loaded, diagnostic};
use crate::net;
use crate::tls::Certificate;

#[derive(clap::Args)]
pub struct Arguments {
    /// The configuration; without it the embedded default
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print one JSON array of diagnostics and nothing else
    #[arg(long)]
    json: bool,
}

/// Prints what is wrong; 1 when something is an error.
pub fn run(arguments: &Arguments) -> ExitCode {
    let main = arguments
        .config
        .as_deref()
        .unwrap_or(Path::new(config::EMBEDDED));
    let loaded = config::load_checked(&Disk, main, &check_certificate);
    let (mut found, config) = match loaded {
        Ok(Loaded {
            config, warnings, ..
        }) => (warnings, Some(config)),
        Err(errors) => (errors, None),
    };
    let serves = config.as_ref().is_some_and(|config| {
        let serves =
            |listener: &config::Listener| matches!(listener.mode, ListenerMode::Serve { .. });
        config.listeners.iter().any(serves)
    });
    if serves && let Err(error) = net::probe() {
        found.push(Diagnostic::error(error.to_string()));
    }

    if arguments.json {
        println!("{}", diagnostic::to_json(&found));
    } else if !found.is_empty() {
        eprint!("{}", diagnostic::render(&found, super::has_colour()));
    }
    let failed = found.iter().any(Diagnostic::is_error);
    if !failed && !arguments.json {
        println!("{}: right", main.display());
    }
    ExitCode::from(u8::from(failed))
}

fn check_certificate(pem: &CertificatePem) -> Result<(), String> {
    Certificate::parse(&pem.chain, &pem.key)
        .map(drop)
        .map_err(|error| error.to_string())
}
