//! The commands of `sluice`, one file each.

mod ban;
mod check;
mod client;
mod datapath;
mod endpoint;
mod log;
mod reload;
mod run;
mod status;
mod sysctl;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Where the configuration is looked for when nobody says.
const DEFAULT_FILE: &str = "/etc/sluice/sluice.toml";

/// L4/L7 proxy and API gateway: an XDP half in the kernel, an io_uring daemon above it.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every command knows.
#[derive(Debug, clap::Args)]
struct Common {
    /// The admin socket [default: /run/sluice/INSTANCE/admin.sock, below $XDG_RUNTIME_DIR without root]
    #[arg(long, global = true, value_name = "PATH")]
    admin: Option<PathBuf>,
    /// One of several on this host
    #[arg(long, global = true, default_value = "main", value_name = "NAME", value_parser = instance)]
    instance: String,
    /// Print facts as JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run keeper and daemon in the foreground
    Run(run::Run),
    /// Find everything that `run` would refuse, in the files and on this host
    Check(check::Check),
    /// Show what runs: generation, listeners, endpoints, datapath, limits
    Status,
    /// Read and set tunables
    Sysctl(sysctl::Sysctl),
    /// Refuse sources, and show who is refused
    Ban(ban::Ban),
    /// Add, remove, drain and weigh endpoints until the next reload, and show them
    Endpoint(endpoint::Endpoint),
    /// Read the configuration again; a bad one changes nothing
    Reload,
    /// Load, show or remove the kernel half
    Datapath(datapath::Datapath),
    /// The child of `run`
    #[command(hide = true)]
    Daemon,
}

/// The whole program.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    log::start(matches!(arguments.command, Command::Daemon));
    match perform(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sluice: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(arguments: Arguments) -> Result<ExitCode> {
    let Arguments { common, command } = arguments;
    match command {
        Command::Run(run) => run.perform(&common),
        Command::Check(check) => check.perform(&common),
        Command::Status => status::perform(&common),
        Command::Sysctl(sysctl) => sysctl.perform(&common),
        Command::Ban(ban) => ban.perform(&common),
        Command::Endpoint(endpoint) => endpoint.perform(&common),
        Command::Reload => reload::perform(&common),
        Command::Datapath(datapath) => datapath.perform(&common),
        Command::Daemon => crate::control::run(crate::admin::serve),
    }
}

impl Common {
    /// The admin socket.
    fn admin(&self) -> PathBuf {
        self.admin
            .clone()
            .unwrap_or_else(|| crate::keeper::runtime_folder(&self.instance).join("admin.sock"))
    }
}

/// The configuration file: the one that was named, else the usual one where it is there, else what is built in.
fn main_file(named: Option<&PathBuf>) -> Result<PathBuf> {
    match named {
        Some(path) => Ok(std::path::absolute(path)?),
        None if std::path::Path::new(DEFAULT_FILE).exists() => Ok(PathBuf::from(DEFAULT_FILE)),
        None => Ok(PathBuf::from(crate::config::EMBEDDED)),
    }
}

/// Whether what goes to people may be coloured.
fn colour(terminal: &impl IsTerminal) -> bool {
    terminal.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A name that can be a folder's.
fn instance(name: &str) -> Result<String, String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() || name.len() > 64 || !name.bytes().all(good) {
        return Err("letters, digits, - and _, at most 64 of them".to_owned());
    }
    Ok(name.to_owned())
}

/// `KEY=VALUE`
fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE is wanted")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_make_sense() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_instance_is_a_plain_name() {
        assert!(instance("edge-2").is_ok());
        for bad in ["", "../x", "a/b", "a.b", "ä"] {
            assert!(instance(bad).is_err(), "{bad}");
        }
    }
}
