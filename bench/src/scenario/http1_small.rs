//! `http1-small`: answers of 128 bytes, where nothing but the proxy's own work per request counts.

use super::{Case, paced, saturated};

const BODY_BYTES: usize = 128;

pub fn cases(rate: u32) -> Vec<Case> {
    [saturated(BODY_BYTES), paced(rate, BODY_BYTES)].concat()
}
