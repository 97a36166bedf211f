//! What the demo found, as `--json` prints it and as a reader sees it.

use std::collections::BTreeMap;

use anyhow::Result;
use rig::ledger::Account;
use serde::Serialize;

use crate::say;

/// How many each endpoint answered.
pub type PerEndpoint = BTreeMap<String, u64>;

/// The object of `--json`. Its names are used by scripts of others.
#[derive(Serialize)]
pub struct Report {
    /// `native`, `generic`, or both with a comma.
    pub xdp_mode: String,
    pub l4: Layer4,
    pub l7: Layer7,
    pub ledger: Books,
    pub ban: Ban,
    pub sysctl: Sysctl,
    pub reload: Reload,
}

/// Connections and datagrams to the `forward` listener.
#[derive(Serialize)]
pub struct Layer4 {
    pub connections: u64,
    /// Bytes of payload that came back right.
    pub bytes: u64,
    pub failed: u64,
    pub per_endpoint: PerEndpoint,
}

/// Requests to the HTTPS listener. One that was refused as it should be has not failed.
#[derive(Default, Serialize)]
pub struct Layer7 {
    pub requests: u64,
    pub failed: u64,
    pub per_endpoint: PerEndpoint,
    pub tls_version: String,
}

/// Packets of all interfaces of the edge, by two witnesses and by Sluice.
#[derive(Serialize)]
pub struct Books {
    /// By the drivers' statistics.
    pub received: u64,
    /// By the statistics of the interfaces that sent them.
    pub sent: u64,
    pub verdicts: BTreeMap<String, u64>,
    /// All three are equal.
    pub balanced: bool,
}

#[derive(Serialize)]
pub struct Ban {
    pub rule: String,
    /// Packets that XDP dropped by this rule while a SYN of the banned client stayed unanswered; 0 if it was answered.
    pub syn_dropped: u64,
    pub ended_after_s: f64,
    pub others_failed: u64,
}

#[derive(Serialize)]
pub struct Sysctl {
    pub key: String,
    pub before: String,
    pub after: String,
    /// Status of one and the same request.
    pub observed_before: u16,
    pub observed_after: u16,
}

#[derive(Serialize)]
pub struct Reload {
    pub generation_before: u64,
    pub generation_after: u64,
    pub failed: u64,
}

impl Layer7 {
    /// Counts one request: who answered it, if an origin did, and whether the answer was right.
    pub fn count(&mut self, origin: Option<&str>, good: bool) {
        self.requests += 1;
        self.failed += u64::from(!good);
        if let Some(origin) = origin {
            *self.per_endpoint.entry(origin.to_owned()).or_default() += 1;
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        for (endpoint, count) in &other.per_endpoint {
            *self.per_endpoint.entry(endpoint.clone()).or_default() += count;
        }
    }
}

impl From<Account> for Books {
    fn from(account: Account) -> Self {
        Self {
            received: account.received,
            sent: account.sent,
            verdicts: account.verdicts,
            balanced: account.balanced,
        }
    }
}

impl Books {
    pub fn say(&self) {
        say::step(
            "received",
            &format!(
                "{} packets by the drivers, {} by the senders",
                self.received, self.sent
            ),
        );
        for (verdict, count) in &self.verdicts {
            say::step("", &format!("{count:>9}  {verdict}"));
        }
        say::step(
            "sum",
            &format!(
                "{} verdicts: {}",
                self.verdicts.values().sum::<u64>(),
                if self.balanced {
                    "balanced"
                } else {
                    "NOT BALANCED"
                }
            ),
        );
    }
}

impl Report {
    /// Whatever is not as it should be, in words.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |good: bool, fault: String| {
            if !good {
                faults.push(fault);
            }
        };
        let l4_endpoints = self.l4.per_endpoint.len();
        check(
            self.xdp_mode == "native",
            format!("XDP is {}", self.xdp_mode),
        );
        check(
            self.l4.connections > 0 && self.l4.failed == 0,
            format!(
                "{} of {} connections failed at layer 4",
                self.l4.failed, self.l4.connections
            ),
        );
        check(
            l4_endpoints == 3,
            format!("{l4_endpoints} of 3 endpoints answered at layer 4"),
        );
        check(
            self.l7.requests > 0 && self.l7.failed == 0,
            format!(
                "{} of {} requests failed at layer 7",
                self.l7.failed, self.l7.requests
            ),
        );
        check(
            self.l7.tls_version == "TLSv1.3",
            format!("TLS is {}", self.l7.tls_version),
        );
        check(
            self.ledger.balanced && self.ledger.received > 0,
            "the ledger is not balanced".into(),
        );
        check(
            self.ban.rule == "fair-use",
            format!("the rule is {}", self.ban.rule),
        );
        check(
            self.ban.syn_dropped > 0,
            "the SYN of a banned client was not dropped".into(),
        );
        check(
            self.ban.others_failed == 0,
            format!(
                "{} requests of others failed during the ban",
                self.ban.others_failed
            ),
        );
        let observed = (self.sysctl.observed_before, self.sysctl.observed_after);
        check(
            observed == (200, 414),
            format!("the tunable's effect was {observed:?}"),
        );
        check(
            self.reload.generation_after > self.reload.generation_before,
            "the reload made no generation".into(),
        );
        check(
            self.reload.failed == 0,
            format!("{} requests failed during the reload", self.reload.failed),
        );
        faults
    }

    /// One object on standard output, or one line for each part.
    pub fn print(&self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
            return Ok(());
        }
        say::section("What happened");
        println!(
            "  packets   {} received, {} verdicts, {}",
            self.ledger.received,
            self.ledger.verdicts.values().sum::<u64>(),
            if self.ledger.balanced {
                "balanced"
            } else {
                "NOT BALANCED"
            }
        );
        println!(
            "  layer 4   {} connections and datagrams, {} MiB, {} failed, XDP {}",
            self.l4.connections,
            self.l4.bytes >> 20,
            self.l4.failed,
            self.xdp_mode
        );
        println!(
            "  layer 7   {} requests, {} failed, {}",
            self.l7.requests, self.l7.failed, self.l7.tls_version
        );
        println!(
            "  ban       by {}, {} packets dropped in XDP, over after {:.1} s, {} others failed",
            self.ban.rule, self.ban.syn_dropped, self.ban.ended_after_s, self.ban.others_failed
        );
        println!(
            "  sysctl    {} {} -> {}: status {} -> {}",
            self.sysctl.key,
            self.sysctl.before,
            self.sysctl.after,
            self.sysctl.observed_before,
            self.sysctl.observed_after
        );
        println!(
            "  reload    generation {} -> {}, {} requests failed",
            self.reload.generation_before, self.reload.generation_after, self.reload.failed
        );
        Ok(())
    }
}
