//! `sluice check`: everything that `run` would refuse, at once.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::{Common, assignment, colour, main_file};
use crate::config::{Diagnostic, Disk, diagnostic};
use crate::control::configuration::{self, Flags};
use crate::keeper::{host, ports_in_use};

#[derive(Debug, clap::Args)]
pub struct Check {
    /// Configuration [default: /etc/sluice/sluice.toml, else one that is built in]
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A tunable as `run` would get it; may be given again
    #[arg(long, value_name = "KEY=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// As `run` would get it
    #[arg(long, value_name = "MODE", value_parser = ["auto", "native", "generic", "off"])]
    datapath: Option<String>,
}

impl Check {
    pub fn perform(self, common: &Common) -> Result<ExitCode> {
        let main = main_file(self.config.as_ref())?;
        let flags = Flags {
            set: self.set,
            datapath: self.datapath,
        };
        let found: Vec<Diagnostic> = match configuration::load(&Disk, &main, &flags) {
            Ok(loaded) => {
                let mut found = loaded.warnings;
                found.extend(host::faults(
                    &loaded.config,
                    &loaded.tunables,
                    &common.instance,
                ));
                found.extend(host::second_choice(&loaded.tunables));
                found.extend(ports_in_use(&loaded.config, &common.instance));
                found
            }
            Err(diagnostics) => diagnostics,
        };
        let bad = found.iter().any(Diagnostic::is_error);
        if common.json {
            println!("{}", diagnostic::to_json(&found));
        } else {
            eprint!("{}", diagnostic::render(&found, colour(&std::io::stderr())));
            if bad {
                eprintln!("{}", diagnostic::summary(&found));
            } else {
                println!("{} is good, and so is this host", main.display());
            }
        }
        Ok(if bad {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}
