//! What developers and continuous integration run: setup, demo, test, bench and tidy, one file per command.

mod bench;
mod build;
mod demo;
mod say;
mod setup;
mod test;
mod tidy;
mod tree;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "What developers and continuous integration run"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what building and testing need and this machine lacks (Debian packages, bpf-linker)
    Setup,
    /// Builds both halves and shows them at work on real traffic, in network namespaces
    Demo(demo::Arguments),
    /// Runs all checks and tests, in order, and counts them; continuous integration runs exactly this
    Test(test::Arguments),
    /// Measures Sluice beside other proxies in one run, and installs those that are missing (--list, --help)
    Bench(bench::Arguments),
    /// Checks the rules that keep the source in order
    Tidy(tidy::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Setup => setup::run().and_then(|()| setup::tools()),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Tidy(arguments) => tidy::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::failed(&format!("{error:#}"));
            // What Ctrl-C cut short neither failed nor passed: 128 + SIGINT, as shells say it.
            if rig::sandbox::interrupted() {
                ExitCode::from(130)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
