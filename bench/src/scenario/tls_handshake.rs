//! `tls-handshake`: a new TLS 1.3 connection for each exchange, with a full handshake or a resumed one. Latencies begin with the connection.

use super::{Case, paced};

/// At a fortieth of the rate, and never saturated: a handshake costs clients as much as the proxy.
pub fn cases(rate: u32) -> Vec<Case> {
    let mut cases = paced((rate / 40).max(1), 128);
    for (case, (name, resumes)) in cases.iter_mut().zip([("full", false), ("resumed", true)]) {
        case.name = name.into();
        case.connections = 64;
        case.reuse = false;
        case.site.tls = true;
        case.resumes = resumes;
    }
    cases
}
