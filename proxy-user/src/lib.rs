//! The rooms of the user half, in the order in which they may use each other (each only those below it).

pub mod config;
pub mod metric;
pub mod offload;
pub mod report;
