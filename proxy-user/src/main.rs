//! The `sluice` program: arguments to one command, and its exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    sluice::cli::run()
}
