//! `sluice status`.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::Value;

use super::{Common, client};
use crate::control::status::{Endpoint, Name, Status, Upstream};

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
    let overload = status.overload.iter().map(|signal| {
        let stage = match signal.stage.as_str() {
            "none" => String::new(),
            stage => format!(", stage {stage}"),
        };
        format!("{} {} %{stage}", signal.signal, signal.used_percent)
    });
    writeln!(text, "used: {}", joined(overload))?;
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
    let waits = match (upstream.calls_max, upstream.pending) {
        (Some(max), pending) => format!(" at most {max} calls, {pending} wait"),
        (None, 0) => String::new(),
        (None, pending) => format!(" {pending} wait"),
    };
    let panics = if upstream.panics {
        " too few endpoints are healthy, so health is ignored"
    } else {
        ""
    };
    let breaker = upstream.breaker.as_ref();
    let breaker = breaker.map_or_else(String::new, |state| format!(" (breaker {state})"));
    writeln!(text, "upstream {}{breaker}:{panics}{waits}", upstream.name)?;
    for endpoint in &upstream.endpoints {
        let (address, weight) = (endpoint.address, endpoint.weight);
        writeln!(text, "  {address} weight {weight}, {}", state(endpoint))?;
    }
    for Name {
        name,
        addresses,
        failure,
    } in &upstream.names
    {
        match failure {
            None => writeln!(text, "  {name} has {addresses} addresses")?,
            Some(failure) => writeln!(
                text,
                "  {name} had {addresses} addresses; the DNS does not know it now: {failure}"
            )?,
        }
    }
    for address in &upstream.removed {
        writeln!(text, "  {address} removed at run time")?;
    }
    Ok(())
}

/// What is known of an endpoint, in words.
fn state(endpoint: &Endpoint) -> String {
    let health = match (endpoint.probed, endpoint.healthy, endpoint.ejected_s) {
        (_, _, Some(left_s)) => format!("ejected for {left_s}s more, because calls failed"),
        (false, ..) => "not probed".to_owned(),
        (true, true, _) => "healthy".to_owned(),
        (true, false, _) => "unhealthy".to_owned(),
    };
    let share = endpoint.share_percent;
    let share = share.map(|percent| format!("starts slowly, at {percent}% of its weight"));
    let neighbour = (endpoint.resolved == Some(false)).then(|| "neighbour not resolved".to_owned());
    let origin = match endpoint.origin.as_str() {
        "runtime" => Some("set at run time".to_owned()),
        "dns" => Some("by its name".to_owned()),
        _ => None,
    };
    let backup = endpoint.backup.then(|| "backup".to_owned());
    let calls = match endpoint.calls_max {
        Some(max) => format!("{} of {max} calls", endpoint.calls_active),
        None => format!("{} calls", endpoint.calls_active),
    };
    let all = [backup, Some(health), Some(calls), share, neighbour, origin];
    joined(all.into_iter().flatten())
}

fn joined(items: impl Iterator<Item = impl ToString>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
