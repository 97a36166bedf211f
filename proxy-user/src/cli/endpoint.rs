//! `sluice endpoint`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Subcommand, value_parser};

use super::{Common, client, status};
use crate::config::{ENDPOINT_WEIGHT_MAX, parse_endpoint_address};
use crate::control::status::Upstream;
use crate::control::{EndpointAct, EndpointChange, EndpointRequest};
use crate::tunable::unit;

#[derive(Debug, clap::Args)]
pub struct Endpoint {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One more endpoint: it gets its share of new flows and requests at once
    Add {
        #[command(flatten)]
        of: Of,
        /// Its share, as in the file
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = weight())]
        weight: u32,
    },
    /// Remove an endpoint, as a reload without it would
    Del {
        #[command(flatten)]
        of: Of,
    },
    /// Nothing new for an endpoint; what has begun goes on (the same as weight 0)
    Drain {
        #[command(flatten)]
        of: Of,
    },
    /// Change the share of an endpoint
    Weight {
        #[command(flatten)]
        of: Of,
        #[arg(long, value_name = "N", value_parser = weight())]
        weight: u32,
    },
    /// Show endpoints, of all upstreams or of one (the default)
    List { upstream: Option<String> },
}

#[derive(Debug, clap::Args)]
struct Of {
    upstream: String,
    /// Like 10.0.0.11:8080 or [2001:db8::11]:8080
    #[arg(value_parser = address)]
    address: String,
}

fn weight() -> clap::builder::RangedI64ValueParser<u32> {
    value_parser!(u32).range(0..=i64::from(ENDPOINT_WEIGHT_MAX))
}

fn address(text: &str) -> Result<String, String> {
    parse_endpoint_address(text).map(|address| address.to_string())
}

impl Endpoint {
    pub fn perform(self, common: &Common) -> Result<ExitCode> {
        let (of, act) = match self.command.unwrap_or(Command::List { upstream: None }) {
            Command::Add { of, weight } => (of, EndpointAct::Add { weight }),
            Command::Del { of } => (of, EndpointAct::Del),
            Command::Drain { of } => (of, EndpointAct::Drain),
            Command::Weight { of, weight } => (of, EndpointAct::Weight { weight }),
            Command::List { upstream } => {
                list(common, upstream.as_deref())?;
                return Ok(ExitCode::SUCCESS);
            }
        };
        let body = serde_json::to_value(EndpointRequest {
            upstream: of.upstream,
            address: of.address,
            act,
        })?;
        let change: EndpointChange =
            client::ask_running(common, "POST", "/endpoints", Some(&body))?.json()?;
        if common.json {
            println!("{}", serde_json::to_value(change)?);
            return Ok(ExitCode::SUCCESS);
        }
        let EndpointChange {
            upstream, address, ..
        } = &change;
        let what = match change.weight {
            None => format!("is no endpoint of {upstream} any more"),
            Some(0) => format!("of {upstream} gets nothing new"),
            Some(weight) => format!("of {upstream} has weight {weight}"),
        };
        println!("{address} {what}; the next reload reads the file again");
        Ok(ExitCode::SUCCESS)
    }
}

fn list(common: &Common, of: Option<&str>) -> Result<()> {
    let answer = client::ask_running(common, "GET", "/endpoints", None)?;
    let mut upstreams: Vec<Upstream> = answer.json()?;
    if let Some(name) = of {
        if !upstreams.iter().any(|upstream| upstream.name == name) {
            let names = upstreams.iter().map(|upstream| upstream.name.as_str());
            let meant = unit::nearest(name, names)
                .map_or_else(String::new, |meant| format!("; did you mean `{meant}`?"));
            bail!("there is no upstream `{name}`{meant}");
        }
        upstreams.retain(|upstream| upstream.name == name);
    }
    if common.json {
        println!("{}", serde_json::to_value(upstreams)?);
        return Ok(());
    }
    let mut text = String::new();
    for upstream in &upstreams {
        status::write_upstream(&mut text, upstream)?;
    }
    print!("{text}");
    Ok(())
}
