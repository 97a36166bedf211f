//! `http1-gateway`: what a gateway does to each request: an API key, a rate limit that is never reached, three header rules.

use super::{Case, paced, saturated};

/// The key whose SHA-256 the configurations hold, where they hold that.
const KEY: &str = "X-Api-Key: open-sesame\r\n";

pub fn cases(rate: u32) -> Vec<Case> {
    let mut cases = [saturated(128), paced(rate, 128)].concat();
    cases.retain(|case| case.connections == 64);
    for case in &mut cases {
        case.site.gateway = true;
        case.exchange.fields = KEY;
    }
    cases
}
