//! The rig: whole proxies among real clients and origins, in network namespaces that leave nothing behind.
//!
//! A test program starts with `Sandbox::enter`, builds a `Field` (client, edge and three origins joined by veth
//! pairs), starts `Sluice` in it, and drives traffic with what `client` has. The story of one test then reads from top to bottom.

pub mod capture;
pub mod certificate;
pub mod client;
pub mod dice;
pub mod field;
pub mod fuzz;
pub mod generated;
pub mod harness;
pub mod http;
pub mod ledger;
pub mod load;
pub mod message;
pub mod model;
pub mod namespace;
pub mod origin;
pub mod packet;
pub mod pass;
pub mod process;
pub mod return_path;
pub mod sandbox;
pub mod scripted;
pub mod sluice;
pub mod wait;
pub mod world;
