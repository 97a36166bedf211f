//! `http1-16k`: answers of 16 KiB, where copying begins to count.

use super::{Case, fast_and_paced};

pub fn cases(rate: u32) -> Vec<Case> {
    fast_and_paced(rate, 16 << 10)
}
