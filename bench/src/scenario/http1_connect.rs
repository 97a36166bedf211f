//! `http1-connect`: each exchange has a connection of its own; those to the origin are kept.

use super::{Case, fast_and_paced};
use crate::load::Pace;

pub fn cases(rate: u32) -> Vec<Case> {
    let mut cases = fast_and_paced(rate, 128);
    // A new connection costs several times as much as an exchange: no proxy reaches the rate.
    cases.retain(|case| case.pace == Pace::Saturated);
    for case in &mut cases {
        case.reuse = false;
    }
    cases
}
