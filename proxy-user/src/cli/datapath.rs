//! `sluice datapath`: the kernel half without a daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Subcommand;
use serde_json::json;

use super::{Common, colour, main_file};
use crate::config::{Disk, diagnostic};
use crate::control::configuration::{self, Flags};
use crate::datapath::{self, Interface, Kernel};
use crate::keeper;

#[derive(Debug, clap::Args)]
pub struct Datapath {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Load, attach and pin; a daemon that is started later adopts it
    Up {
        /// Configuration [default: /etc/sluice/sluice.toml]
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// auto, native or generic, over the file
        #[arg(long, value_name = "MODE", value_parser = ["auto", "native", "generic"])]
        datapath: Option<String>,
    },
    /// Detach and remove what is ours, and nothing else
    Down,
    /// Show where it is attached
    Status,
}

impl Datapath {
    pub fn perform(self, common: &Common) -> Result<ExitCode> {
        match self.command {
            Command::Up { config, datapath } => return up(common, config.as_ref(), datapath),
            Command::Down => {
                let removed = datapath::down(&common.instance)?;
                let what = if removed.pins.is_some() {
                    "detached and removed"
                } else {
                    "there was nothing"
                };
                show(common, &removed.interfaces, removed.pins, what);
                if keeper::runs(&common.instance) {
                    eprintln!(
                        "sluice: instance {} runs on without its kernel half; restart it to have it back",
                        common.instance
                    );
                }
            }
            Command::Status => {
                let status = datapath::status(&common.instance)?;
                let what = if status.pins.is_some() { "up" } else { "down" };
                show(common, &status.interfaces, status.pins, what);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn up(common: &Common, config: Option<&PathBuf>, datapath: Option<String>) -> Result<ExitCode> {
    let main = main_file(config)?;
    let loaded = match configuration::load(
        &Disk,
        &main,
        &Flags {
            set: Vec::new(),
            datapath,
        },
    ) {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            eprint!(
                "{}",
                diagnostic::render(&diagnostics, colour(&std::io::stderr()))
            );
            return Ok(ExitCode::FAILURE);
        }
    };
    if !configuration::has_datapath(&loaded.config) {
        bail!(
            "{} names no interface in [datapath], or its mode is off",
            main.display()
        );
    }
    let _instance = keeper::hold_instance(&common.instance)?;
    let wanted = &loaded.config.datapath;
    let mut kernel = Kernel::up(&common.instance, wanted, &loaded.tunables)?;
    kernel.keep();
    for note in &kernel.notes {
        eprintln!("sluice: {note}");
    }
    show(
        common,
        &kernel.interfaces,
        Some(datapath::pin_folder(&common.instance)),
        "up",
    );
    Ok(ExitCode::SUCCESS)
}

fn show(common: &Common, interfaces: &[Interface], pins: Option<PathBuf>, what: &str) {
    if common.json {
        println!(
            "{}",
            json!({ "state": what, "interfaces": interfaces, "pins": pins })
        );
        return;
    }
    println!("datapath of instance {}: {what}", common.instance);
    for interface in interfaces {
        println!(
            "  {} {} program {}",
            interface.name,
            format!("{:?}", interface.mode).to_lowercase(),
            interface.program
        );
    }
}
