//! rooms

pub mod net;
