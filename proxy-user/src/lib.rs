//! rooms

pub mod net;
pub mod tls;
