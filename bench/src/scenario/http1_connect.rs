//! `http1-connect`: each exchange has a connection of its own; those to the origin are kept. Latencies begin with the connection.

use super::{Case, paced};

/// At half the rate, and never saturated: to open connections costs clients more than it costs a proxy to take them, so with a core
/// for each, no proxy is ever busy.
pub fn cases(rate: u32) -> Vec<Case> {
    let mut cases = paced((rate / 2).max(1), 128);
    for case in &mut cases {
        case.reuse = false;
    }
    cases
}
