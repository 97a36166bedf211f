//! The kernel half seen from the user half: loaded and attached by the keeper, written and read by control.

mod attach;
mod map;
mod neighbour;
pub mod network;
mod plan;
mod wanted;
mod writer;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use proxy_ebpf::abi;
use serde::{Deserialize, Serialize};

pub use attach::{Interface, Kernel, Status, capabilities_missing, down, obstacles, status};
pub use plan::Names;
pub use writer::{Ban, Counts, Writer};

/// How XDP runs on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the network stack, after the driver made a socket buffer: works everywhere, and is slow.
    Generic,
}

/// A map has too little room for what is wanted. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Full {
    /// Which limit: the tunable is `datapath.<what>_max`.
    pub what: &'static str,
    /// How many there is room for.
    pub capacity: u32,
    /// How many would be needed, where that is known.
    pub needed: Option<u64>,
}

impl Full {
    const fn new(what: &'static str, capacity: u32) -> Self {
        Self {
            what,
            capacity,
            needed: None,
        }
    }
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            capacity,
            needed,
        } = self;
        match needed {
            Some(needed) => write!(
                f,
                "the kernel half has room for {capacity} {what}, not for {needed}"
            )?,
            None => write!(
                f,
                "the kernel half has no room for more {what}: there are {capacity}"
            )?,
        }
        write!(
            f,
            "; raise datapath.{what}_max, run `sluice datapath down` and start again"
        )
    }
}

impl std::error::Error for Full {}

/// Where the pins of an instance are.
pub fn pin_folder(instance: &str) -> PathBuf {
    PathBuf::from("/sys/fs/bpf/sluice").join(instance)
}

/// An address as the kernel half has it.
fn address(ip: IpAddr) -> abi::Address {
    match ip.to_canonical() {
        IpAddr::V4(v4) => abi::Address::v4(v4.octets()),
        IpAddr::V6(v6) => abi::Address(v6.octets()),
    }
}

/// An address of the kernel half as the rest of us has it.
fn ip(address: abi::Address) -> IpAddr {
    if address.is_v4() {
        IpAddr::from(address.as_v4())
    } else {
        IpAddr::from(address.0)
    }
}

/// A port as the kernel half has it.
fn port(port: u16) -> [u8; 2] {
    port.to_be_bytes()
}
