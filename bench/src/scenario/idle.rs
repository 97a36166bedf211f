//! `idle`: what a connection costs in memory that has had an exchange and now waits for the next one.

use super::{Case, Work, saturated};

/// Fewer where this process may not have so many descriptors; each round says how many there were.
const CONNECTIONS: usize = 20_000;

pub fn cases(_: u32) -> Vec<Case> {
    let mut cases: Vec<Case> = saturated(128).into_iter().take(1).collect();
    cases[0].name = "clear".into();
    cases[0].connections = CONNECTIONS;
    cases[0].work = Work::Idle;
    let mut over_tls = cases[0].clone();
    over_tls.name = "tls".into();
    over_tls.site.tls = true;
    cases.push(over_tls);
    cases
}
