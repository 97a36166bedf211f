//! `tls-small`: answers of 128 bytes over kept TLS 1.3 connections: what records cost, handshakes apart.

use super::{Case, paced, saturated};

const BODY_BYTES: usize = 128;

pub fn cases(rate: u32) -> Vec<Case> {
    let mut cases = [saturated(BODY_BYTES), paced(rate, BODY_BYTES)].concat();
    for case in &mut cases {
        case.site.tls = true;
    }
    cases
}
