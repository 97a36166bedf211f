//! The commands, one file each. Exit codes: 0 done, 1 failed, 2 wrong use.

mod check;
mod sysctl;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "sluice",
    version,
    about = "An eBPF/XDP-accelerated L4/L7 proxy and API gateway"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Reads a configuration and tells every error in it, and what on this host stands in its way
    Check(check::Arguments),
    /// Prints tunables: their defaults
    Sysctl(sysctl::Arguments),
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    // clap ends the process with 2 on wrong use, and with 0 after --help.
    match Arguments::parse().command {
        Command::Check(arguments) => check::run(&arguments),
        Command::Sysctl(arguments) => sysctl::run(arguments),
    }
}

/// Whether standard error may have colour: a terminal, and NO_COLOR (no-color.org) not set.
fn has_colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}
