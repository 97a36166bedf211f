//! `sluice ban`.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use serde_json::json;

use super::{Common, client};
use crate::admin::BanRequest;
use crate::control::BanStatus;

#[derive(Debug, clap::Args)]
pub struct Ban {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Refuse an address (IPv6: its /64) for a time
    Add {
        source: IpAddr,
        /// How long: 60s, 10m, 1h
        #[arg(long = "for", default_value = "10m", value_name = "DURATION")]
        duration: String,
    },
    /// Lift a ban
    Del { source: IpAddr },
    /// Show every ban, until when, and which rule said so (the default)
    List,
}

impl Ban {
    pub fn perform(self, common: &Common) -> Result<ExitCode> {
        match self.command.unwrap_or(Command::List) {
            Command::Add { source, duration } => {
                let body = serde_json::to_value(BanRequest {
                    source,
                    duration: duration.clone(),
                })?;
                client::ask_running(common, "POST", "/bans", Some(&body))?;
                say(common, source, &format!("banned for {duration}"));
            }
            Command::Del { source } => {
                client::ask_running(common, "DELETE", &format!("/bans/{source}"), None)?;
                say(common, source, "not banned any more");
            }
            Command::List => list(common)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn say(common: &Common, source: IpAddr, what: &str) {
    match common.json {
        true => println!("{}", json!({ "source": source })),
        false => println!("{source} is {what}"),
    }
}

fn list(common: &Common) -> Result<()> {
    let bans: Vec<BanStatus> = client::ask_running(common, "GET", "/bans", None)?.json()?;
    if common.json {
        println!("{}", serde_json::to_value(bans)?);
        return Ok(());
    }
    if bans.is_empty() {
        println!("nobody is banned");
    }
    for ban in bans {
        let network = if ban.source.is_ipv6() { "/64" } else { "" };
        let dropped = ban
            .packets_dropped
            .map(|packets| format!(", {packets} packets dropped"))
            .unwrap_or_default();
        println!(
            "{}{network} by {} for another {:.1}s{dropped}",
            ban.source,
            ban.rule,
            ban.ends_in_ms as f64 / 1000.0
        );
    }
    Ok(())
}
