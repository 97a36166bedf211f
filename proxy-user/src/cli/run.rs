//! `sluice run`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::{Common, assignment, colour, main_file};
use crate::control::configuration::Flags;
use crate::keeper;

#[derive(Debug, clap::Args)]
pub struct Run {
    /// Configuration [default: /etc/sluice/sluice.toml, else one that is built in]
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set a tunable, over the files; may be given again
    #[arg(long, value_name = "KEY=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// Worker threads [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Option<u32>,
    /// auto, native, generic or off, over the file
    #[arg(long, value_name = "MODE", value_parser = ["auto", "native", "generic", "off"])]
    datapath: Option<String>,
    /// Who the daemon runs as [default: sluice, else nobody]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
}

impl Run {
    pub fn perform(self, common: &Common) -> Result<ExitCode> {
        keeper::run(keeper::Settings {
            main: main_file(self.config.as_ref())?,
            flags: Flags {
                set: self.set,
                datapath: self.datapath,
            },
            workers: self.workers,
            user: self.user,
            instance: common.instance.clone(),
            admin: common.admin(),
            colour: colour(&std::io::stderr()),
        })
    }
}
