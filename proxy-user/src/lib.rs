//! The rooms of the user half: the order in which they may use each other is in `xtask/src/tidy`.

pub mod admin;
pub mod call;
pub mod cli;
pub mod codec;
pub mod config;
pub mod connection;
pub mod control;
pub mod datapath;
pub mod drain;
pub mod exchange;
pub mod keeper;
pub mod listener;
pub mod message;
pub mod metric;
pub mod net;
pub mod offload;
pub mod origin;
pub mod overload;
pub mod policy;
pub mod report;
pub mod route;
pub mod snapshot;
pub mod tls;
pub mod tunable;
pub mod upstream;
pub mod worker;
