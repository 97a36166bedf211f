//! `http1-16k`: answers of 16 KiB, where copying begins to count.

use super::{Case, paced, saturated};

const BODY_BYTES: usize = 16 << 10;

pub fn cases(rate: u32) -> Vec<Case> {
    [saturated(BODY_BYTES), paced(rate, BODY_BYTES)].concat()
}
