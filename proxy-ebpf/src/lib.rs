//! What both halves agree on: map layouts, the packet parser, checksums, the Maglev ring, the rate cell, verdicts.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod bucket;
pub mod maglev;
pub mod verdict;
