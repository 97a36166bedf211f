//! The ledger: what the edge's interfaces received is what the kernel half gave a verdict on, packet by packet.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::field::{EDGE_INTERFACES, Field};
use crate::namespace::Namespace;
use crate::sluice::Sluice;
use crate::wait;

/// XDP_ATTACHED_SKB of include/uapi/linux/if_link.h.
const XDP_GENERIC: u64 = 2;

/// The three counts of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Reading {
    received: u64,
    sent: u64,
    verdicts: BTreeMap<String, u64>,
}

/// An open account: what had been counted when it was opened.
pub struct Ledger {
    opened: Reading,
}

/// A closed account.
#[derive(Clone, Debug)]
pub struct Account {
    /// Packets that the edge's interfaces received, by their drivers' own statistics (`ethtool -S`).
    pub received: u64,
    /// Packets that the far ends of these interfaces sent, by their statistics.
    pub sent: u64,
    /// Packets by verdict, from Sluice's metrics; only verdicts that occurred.
    pub verdicts: BTreeMap<String, u64>,
    /// Whether all three agree.
    pub balanced: bool,
}

impl Ledger {
    /// Opens an account. Sluice must be attached already.
    pub fn open(field: &Field, sluice: &Sluice) -> Result<Self> {
        Ok(Self {
            opened: quiet(field, sluice)?,
        })
    }

    /// Waits until no packet is on its way and closes the account.
    pub fn close(&self, field: &Field, sluice: &Sluice) -> Result<Account> {
        let closed = quiet(field, sluice)?;
        let received = closed.received - self.opened.received;
        let sent = closed.sent - self.opened.sent;
        let verdicts: BTreeMap<String, u64> = closed
            .verdicts
            .iter()
            .map(|(verdict, count)| {
                (
                    verdict.clone(),
                    count - self.opened.verdicts.get(verdict).copied().unwrap_or(0),
                )
            })
            .filter(|(_, count)| *count > 0)
            .collect();
        let balanced = received == sent && received == verdicts.values().sum::<u64>();
        Ok(Account {
            received,
            sent,
            verdicts,
            balanced,
        })
    }
}

/// Two equal readings, one after the other: nothing moved between them.
fn quiet(field: &Field, sluice: &Sluice) -> Result<Reading> {
    let mut last = read(field, sluice)?;
    wait::until("the field to fall quiet", Duration::from_secs(10), || {
        let now = match read(field, sluice) {
            Ok(now) => now,
            Err(error) => return Some(Err(error)),
        };
        let same = now == last;
        last = now;
        same.then(|| Ok(last.clone()))
    })?
}

fn read(field: &Field, sluice: &Sluice) -> Result<Reading> {
    let mut reading = Reading::default();
    for interface in EDGE_INTERFACES {
        reading.received += received(&field.edge, interface)?;
    }
    for far in std::iter::once(&field.client).chain(&field.origins) {
        reading.sent += sent(far, "eth0")?;
    }
    reading.verdicts = sluice
        .metrics()?
        .by_label("sluice_datapath_packets_total", "verdict");
    Ok(reading)
}

/// What was given to the XDP hook of an interface: by the driver's own count, or in generic mode, of which the driver knows
/// nothing, all that the interface received.
fn received(namespace: &Namespace, interface: &str) -> Result<u64> {
    let link = link(namespace, interface)?;
    match link.pointer("/0/xdp/mode").and_then(Value::as_u64) {
        Some(XDP_GENERIC) => packets(&link, "rx"),
        _ => driver_received(namespace, interface),
    }
}

/// What the driver says its XDP hook was given on all queues.
fn driver_received(namespace: &Namespace, interface: &str) -> Result<u64> {
    let text = namespace.run(&["ethtool", "-S", interface])?;
    let counts = text.lines().filter_map(|line| line.trim().split_once(": "));
    let packets =
        counts.filter(|(name, _)| name.starts_with("rx_queue_") && name.ends_with("_xdp_packets"));
    packets
        .map(|(_, count)| {
            count
                .parse::<u64>()
                .with_context(|| format!("read {count:?}"))
        })
        .sum()
}

/// What the interface says it has sent.
pub fn sent(namespace: &Namespace, interface: &str) -> Result<u64> {
    packets(&link(namespace, interface)?, "tx")
}

fn link(namespace: &Namespace, interface: &str) -> Result<Value> {
    let text = namespace.run(&["ip", "-json", "-stats", "link", "show", "dev", interface])?;
    serde_json::from_str(&text).context("read what ip says")
}

/// Packets of a direction, `rx` or `tx`.
fn packets(link: &Value, direction: &str) -> Result<u64> {
    link.pointer(&format!("/0/stats64/{direction}/packets"))
        .and_then(Value::as_u64)
        .with_context(|| format!("no statistics in {link}"))
}
