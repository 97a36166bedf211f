//! `http1-small`: answers of 128 bytes, where nothing but the proxy's own work per request counts.

use super::{Case, fast_and_paced};

pub fn cases(rate: u32) -> Vec<Case> {
    fast_and_paced(rate, 128)
}
