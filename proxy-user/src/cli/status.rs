//! `sluice status`.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::Value;

use super::{Common, client};
use crate::control::status::{Status, Upstream};

pub fn perform(common: &Common) -> Result<ExitCode> {
    let answer = client::ask_running(common, "GET", "/status", None)?;
    if common.json {
        println!("{}", answer.json::<Value>()?);
    } else {
        print!("{}", text(&answer.json()?));
    }
    Ok(ExitCode::SUCCESS)
}

fn text(status: &Status) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(&mut text, status);
    text
}

fn write_text(text: &mut String, status: &Status) -> std::fmt::Result {
    let refused = if status.last_reload_success {
        ""
    } else {
        " (the last reload was refused)"
    };
    writeln!(
        text,
        "sluice {}, instance {}, generation {}{refused}",
        status.version, status.instance, status.generation
    )?;
    writeln!(
        text,
        "up {}s, keeper {}, daemon {} ({} restarts), workers on CPUs {} by {}{}",
        status.uptime_s,
        status.keeper_pid,
        status.daemon_pid,
        status.daemon_restarts,
        joined(status.workers.iter()),
        status.net.backend,
        if status.net.refused.is_some() {
            ", for io_uring is refused"
        } else {
            ""
        }
    )?;
    for listener in &status.listeners {
        let to = listener
            .upstream
            .as_ref()
            .map(|name| format!(" to {name}"))
            .unwrap_or_default();
        writeln!(
            text,
            "listener {}: {}{to} on {}",
            listener.name,
            listener.mode,
            listener.addresses.join(", ")
        )?;
    }
    for upstream in &status.upstreams {
        write_upstream(text, upstream)?;
    }
    match status.datapath.interfaces.as_slice() {
        [] => writeln!(text, "datapath {}", status.datapath.state)?,
        interfaces => {
            let each = interfaces
                .iter()
                .map(|one| format!("{} ({:?})", one.name, one.mode).to_lowercase());
            writeln!(
                text,
                "datapath on {}, {} flows",
                joined(each),
                status.datapath.flows.unwrap_or(0)
            )?;
        }
    }
    if !status.datapath.lost.is_empty() {
        writeln!(
            text,
            "datapath lost on {}: restart Sluice to have it back",
            joined(status.datapath.lost.iter())
        )?;
    }
    let limits = &status.limits;
    writeln!(
        text,
        "{} bans; at most {} connections, {} MiB of receive buffers, {} descriptors",
        status.bans,
        limits.connections_max,
        limits.buffer_bytes_max >> 20,
        limits.descriptors_max
    )
}

/// An upstream and its endpoints.
pub(super) fn write_upstream(text: &mut String, upstream: &Upstream) -> std::fmt::Result {
    writeln!(text, "upstream {}:", upstream.name)?;
    for endpoint in &upstream.endpoints {
        let health = match (endpoint.probed, endpoint.healthy) {
            (false, _) => "not probed",
            (true, true) => "healthy",
            (true, false) => "unhealthy",
        };
        let neighbour = match endpoint.resolved {
            Some(false) => ", neighbour not resolved",
            _ => "",
        };
        let origin = match endpoint.origin.as_str() {
            "runtime" => ", set at run time",
            _ => "",
        };
        writeln!(
            text,
            "  {} weight {}, {health}{neighbour}{origin}",
            endpoint.address, endpoint.weight
        )?;
    }
    for address in &upstream.removed {
        writeln!(text, "  {address} removed at run time")?;
    }
    Ok(())
}

fn joined(items: impl Iterator<Item = impl ToString>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
