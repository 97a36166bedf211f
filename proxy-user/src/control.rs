//! The only code that changes a running daemon.
pub mod channel;
pub mod offences;
