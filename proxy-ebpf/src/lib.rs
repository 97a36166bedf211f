//! What both halves agree on: map layouts, the packet parser, checksums, the Maglev ring, the rate cell, verdicts.
#![cfg_attr(not(test), no_std)]

pub mod abi;
#[cfg(not(target_arch = "bpf"))]
pub mod bucket;
pub mod checksum;
pub mod maglev;
pub mod measure;
#[cfg(feature = "object")]
pub mod object;
pub mod packet;
pub mod verdict;
