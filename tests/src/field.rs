//! The field: a client, the edge where Sluice runs, and three origins, joined by veth pairs.
//!
//! ```text
//!  client  eth0 ---- client0  edge  origin1 ---- eth0  origin1      10.77.1.2  fd77:1::2
//!  10.77.0.2               10.77.0.1 origin2 ---- eth0  origin2      10.77.2.2  fd77:2::2
//!  fd77::2   + attackers   fd77::1  origin3 ---- eth0  origin3      10.77.3.2  fd77:3::2
//! ```
//!
//! Listeners' addresses and the sources of NAT stand on the edge's loopback; everybody routes to them through the edge.
//! There is no link-local address and no duplicate address detection: a quiet field sends no packet at all.

use std::net::IpAddr;

use anyhow::{Context, Result};

use crate::namespace::Namespace;
use crate::pass::Pass;

/// The edge's interfaces, where the kernel half attaches.
pub const EDGE_INTERFACES: [&str; 4] = ["client0", "origin1", "origin2", "origin3"];
/// The well-behaved client.
pub const CLIENT_V4: &str = "10.77.0.2";
pub const CLIENT_V6: &str = "fd77::2";
/// Another source behind the same interface: who misbehaves, so that the ban hits nobody else.
pub const ATTACKER_V4: &str = "10.77.0.66";
/// The same in IPv6, in a /64 of its own, for bans of IPv6 sources are that wide.
pub const ATTACKER_V6: &str = "fd77:0:0:66::66";
/// Addresses for listeners.
pub const WEB_V4: &str = "203.0.113.10";
pub const WEB_V6: &str = "2001:db8::10";
pub const L4_V4: &str = "203.0.113.20";
pub const L4_V6: &str = "2001:db8::20";
/// Where NAT sends from.
pub const NAT_V4: &str = "10.77.9.1";
pub const NAT_V6: &str = "fd77:9::1";
/// How many origins there are.
pub const ORIGINS: usize = 3;

/// The namespaces and what holds them together.
pub struct Field {
    pub client: Namespace,
    pub edge: Namespace,
    pub origins: Vec<Namespace>,
    /// The client's, then those of the origins.
    passes: Vec<Pass>,
}

/// The address of origin `number` (from 1).
pub fn origin_v4(number: usize) -> String {
    format!("10.77.{number}.2")
}

/// The IPv6 address of origin `number` (from 1).
pub fn origin_v6(number: usize) -> String {
    format!("fd77:{number}::2")
}

/// `address:port`, with brackets where the family wants them.
pub fn at(address: &str, port: u16) -> String {
    match address.parse() {
        Ok(IpAddr::V6(_)) => format!("[{address}]:{port}"),
        _ => format!("{address}:{port}"),
    }
}

impl Field {
    /// Lays everything out. Takes about a quarter of a second.
    pub fn build() -> Result<Self> {
        let edge = Namespace::create("edge")?;
        let client = Namespace::create("client")?;
        for settings in ["ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"] {
            edge.set(settings, "0")?;
        }
        for address in [WEB_V4, L4_V4, NAT_V4, WEB_V6, L4_V6, NAT_V6] {
            edge.ip(&format!("address add {address} dev lo nodad"))?;
        }

        let mut passes = vec![join(&edge, "client0", &client)?];
        edge.ip("address add 10.77.0.1/24 dev client0
             address add fd77::1/64 dev client0 nodad
             route add fd77:0:0:66::/64 dev client0")?;
        client.ip(&format!(
            "address add {CLIENT_V4}/24 dev eth0
             address add {ATTACKER_V4}/24 dev eth0
             address add {CLIENT_V6}/64 dev eth0 nodad
             address add {ATTACKER_V6}/128 dev eth0 nodad
             route add default via 10.77.0.1
             route add default via fd77::1 src {CLIENT_V6}",
        ))?;

        let mut origins = Vec::new();
        for number in 1..=ORIGINS {
            let origin = Namespace::create(&format!("origin{number}"))?;
            passes.push(join_origin(&edge, &origin, number)?);
            origins.push(origin);
        }
        Ok(Self {
            client,
            edge,
            origins,
            passes,
        })
    }

    /// The namespaces that the edge's links lead to.
    pub fn far_ends(&self) -> impl Iterator<Item = &Namespace> {
        std::iter::once(&self.client).chain(&self.origins)
    }

    /// Joins an origin to the edge again, after its veth pair was deleted. Counts from 1.
    pub fn rejoin(&mut self, number: usize) -> Result<()> {
        let origin = &self.origins[number - 1];
        self.passes[number] = join_origin(&self.edge, origin, number)?;
        Ok(())
    }

    /// Takes the programs off the origins' ends: somebody has others for them.
    pub fn clear_origins(&mut self) {
        self.passes.truncate(1);
    }
}

/// The link between the edge and an origin, with its addresses and routes.
fn join_origin(edge: &Namespace, origin: &Namespace, number: usize) -> Result<Pass> {
    let interface = format!("origin{number}");
    let pass = join(edge, &interface, origin)?;
    edge.ip(&format!(
        "address add 10.77.{number}.1/24 dev {interface}
         address add fd77:{number}::1/64 dev {interface} nodad"
    ))?;
    origin.ip(&format!(
        "address add {}/24 dev eth0
         address add {}/64 dev eth0 nodad
         route add default via 10.77.{number}.1
         route add default via fd77:{number}::1",
        origin_v4(number),
        origin_v6(number)
    ))?;
    Ok(pass)
}

/// A veth pair from `interface` of the edge to `eth0` of `far`, ready to be sent into by XDP.
fn join(edge: &Namespace, interface: &str, far: &Namespace) -> Result<Pass> {
    // Two queues each way, as a small NIC has; XDP wants no fewer receive queues than the peer has to send.
    edge.ip(&format!(
        "link add {interface} numrxqueues 2 numtxqueues 2 type veth peer name eth0 numrxqueues 2 numtxqueues 2 netns {}",
        far.name()
    ))
    .with_context(|| format!("make the veth pair of {}", far.label()))?;
    for (end, name) in [(edge, interface), (far, "eth0")] {
        end.ip(&format!(
            "link set {name} addrgenmode none\nlink set {name} up"
        ))?;
        // A packet that is rewritten on its way must have its whole checksum: nobody after us completes a partial one.
        end.run(&["ethtool", "-K", name, "tx", "off"])?;
    }
    Pass::attach(far, "eth0")
}
