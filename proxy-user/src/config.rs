//! What the operator wrote, checked: plain data that knows no runtime type; each object knows where it stands.

mod action;
mod address;
mod balance;
mod certificate;
mod check;
mod consumer;
mod context;
mod datapath;
pub mod diagnostic;
mod error_page;
mod field;
mod forwarding;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod health;
mod hops;
mod listener;
mod load;
mod log;
mod names;
mod pattern;
mod policy;
mod prefix;
mod probe;
mod problem;
mod resilience;
mod resolver;
mod route;
mod settings;
mod source;
mod sticky;
mod table;
#[cfg(test)]
mod tests;
mod upstream;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

pub use address::parse_endpoint_address;
pub use balance::{Attribute, Balance, Hashing};
pub use context::CertificateCheck;
pub use diagnostic::{Diagnostic, Place, Severity};
pub use error_page::ErrorPages;
pub use health::{Eject, Health, Statuses};
pub use hops::{Network, Trusted};
pub use load::{Loaded, load, load_checked};
pub use log::{AccessLog, LogField, LogTarget};
pub use prefix::{Nearness, prefixes, shares};
pub use probe::{CaPem, HttpProbe, Probe, ProbeKind, Trust};
pub use resilience::{Breaker, Hedge, HedgeAfter, Retry, RetryOn, Timeout};
pub use resolver::{EndpointName, Resolver, Traits};
pub use source::{Bundle, Disk, FILE_BYTES_MAX, Reader, RecordingReader};
pub use sticky::{SameSite, Sticky};
pub use upstream::WEIGHT_MAX as ENDPOINT_WEIGHT_MAX;

pub use crate::message::{Claim, Page};
pub use crate::tunable::Origin;

/// The path of the configuration that is built in, for `load`.
pub const EMBEDDED: &str = "(built-in)/default.toml";
const EMBEDDED_FOLDER: &str = "(built-in)";
const EMBEDDED_FILES: [(&str, &str); 2] = [
    ("default.toml", include_str!("config/default.toml")),
    ("welcome.html", include_str!("config/welcome.html")),
];

/// The text of the configuration that is built in: what `sluice run` starts without a file.
pub fn embedded() -> &'static str {
    EMBEDDED_FILES[0].1
}

/// Everything configured, checked as a whole: every name resolves, every value is in its range.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub datapath: Datapath,
    pub access_log: Option<AccessLog>,
    pub listeners: Vec<Listener>,
    /// In the order written; precedence is `route`'s matter.
    pub routes: Vec<Route>,
    pub policies: Vec<Policy>,
    pub upstreams: Vec<Upstream>,
    pub resolver: Resolver,
    /// `[tunables]`, not yet applied: key, value as written, place.
    pub tunables: Vec<(String, String, Origin)>,
}

/// Where and how the kernel half attaches.
#[derive(Clone, Debug, PartialEq)]
pub struct Datapath {
    /// Interfaces; none = no kernel half.
    pub interfaces: Vec<String>,
    pub mode: DatapathMode,
    pub nat: Option<Nat>,
    pub tunnel: Option<Tunnel>,
    /// What flows are hashed with, the same on all nodes of a fleet; none: made at random and kept with the pins.
    pub hash_key: Option<HashKey>,
    pub at: Origin,
}

/// Keys of the flow hash, derived from a secret that the operator gave. No message shows them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u64; 11]);

impl HashKey {
    /// Words of SHA-256 over a counter and the secret: every version and every machine derives the same.
    pub fn derive(secret: &str) -> Self {
        let blocks = (0..3_u8).flat_map(|block| {
            let mut hash = Sha256::new();
            hash.update([block]);
            hash.update(secret);
            <[u8; 32]>::from(hash.finalize())
        });
        let bytes: Vec<u8> = blocks.collect();
        let mut keys = [0; 11];
        for (key, word) in keys.iter_mut().zip(bytes.as_chunks().0) {
            *key = u64::from_le_bytes(*word);
        }
        Self(keys)
    }
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey")
    }
}

/// `datapath.mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatapathMode {
    /// Native, else generic, said aloud.
    Auto,
    Native,
    Generic,
    Off,
}

/// Addresses and ports that NAT flows leave from.
#[derive(Clone, Debug, PartialEq)]
pub struct Nat {
    pub source: Vec<IpAddr>,
    /// First and last port, both included.
    pub ports: (u16, u16),
    pub at: Origin,
}

/// Addresses that packets inside others leave from.
#[derive(Clone, Debug, PartialEq)]
pub struct Tunnel {
    /// One of a family at most.
    pub source: Vec<IpAddr>,
    pub at: Origin,
}

/// An address on which traffic is accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    pub name: String,
    pub addresses: Vec<ListenAddress>,
    pub mode: ListenerMode,
    /// Hops that are believed when they say who asked them.
    pub trusted: Option<Trusted>,
    /// What `Via` calls us towards origins; `None`: there is none.
    pub via: Option<String>,
    /// Its exchanges stand in the access log, unless their route says otherwise.
    pub is_logged: bool,
    pub at: Origin,
}

/// Transport protocol of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// One address of a listener, or many: of a prefix, with several ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenAddress {
    /// The address, or the first of a prefix; and the port, or the first of several, or 0 for all.
    pub socket: SocketAddr,
    /// How many leading bits all its addresses have in common: 32 or 128 where it is a single one.
    pub prefix_bits: u8,
    /// The last of its ports; 0 for all.
    pub port_last: u16,
    pub protocol: Protocol,
}

/// What a listener does with its traffic.
#[derive(Clone, Debug, PartialEq)]
pub enum ListenerMode {
    /// L7: HTTP, over TLS where `tls` is there.
    Serve { tls: Option<ListenerTls> },
    /// L4, in the kernel, to the upstream of this index.
    Forward {
        upstream: usize,
        via: Via,
        fragments: Fragments,
        udp: UdpFlows,
        all_down: AllDown,
    },
}

/// How a packet that is forwarded reaches its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Via {
    /// Addresses and ports written anew, and the answers too.
    Nat,
    /// As it came, to the endpoint's MAC. The endpoint has the listener's address and answers the client by itself.
    Direct,
    /// The same inside another IP packet (RFC 2003, RFC 2473).
    Ipip,
    /// The same inside UDP, by generic UDP encapsulation.
    Gue,
}

/// What becomes of fragments of a listener that forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragments {
    /// Later ones follow the first.
    Follow,
    /// To Linux.
    Pass,
    Drop,
}

/// Where UDP flows belong whose slot got another endpoint: UDP has no first packet that would tell old from new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpFlows {
    /// With the endpoint that the slot had before.
    Stay,
    /// With the new one, at once.
    Move,
}

/// What becomes of packets when no endpoint is healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AllDown {
    /// They go to Linux, which refuses them.
    Refuse,
    /// They go where they would go if all endpoints were healthy: whoever asks may be the one who is ill.
    LastKnown,
}

impl Via {
    /// The word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Direct => "direct",
            Self::Ipip => "ipip",
            Self::Gue => "gue",
        }
    }

    /// Whether packets travel inside others, which leave from the addresses of `datapath.tunnel`.
    pub const fn wraps(self) -> bool {
        matches!(self, Self::Ipip | Self::Gue)
    }

    /// Whether the endpoint may be of another family than the packet: all but NAT leave it as it is.
    pub const fn crosses_families(self) -> bool {
        !matches!(self, Self::Nat)
    }
}

/// TLS of a `serve = "https"` listener.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenerTls {
    /// Each entry: PEM of a chain and its key, already read; the first is used where no name matches.
    pub certificates: Vec<CertificatePem>,
}

/// A certificate chain and its private key as read from files.
#[derive(Clone, PartialEq)]
pub struct CertificatePem {
    /// The file(s) it came from, for messages.
    pub path: PathBuf,
    pub chain: Vec<u8>,
    /// Secret: never printed (`Debug` leaves it out).
    pub key: Vec<u8>,
}

/// How a request finds what answers it.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// As given, else the name of its first upstream, else `route-N` (N counts from 1 in the order written).
    pub name: String,
    /// Index of its listener; `None` = all that serve.
    pub listener: Option<usize>,
    pub host: HostMatch,
    pub path: PathMatch,
    /// Indices into `Config::policies`, in the order in which they run.
    pub policies: Vec<usize>,
    pub action: Action,
    pub timeout: Timeout,
    pub retry: Retry,
    /// Only with an action that asks an upstream.
    pub hedge: Option<Hedge>,
    /// Trailers that pass, either way, lower case; all others are dropped.
    pub trailers: Vec<String>,
    /// What clients get in place of our own answers to what was refused.
    pub errors: ErrorPages,
    /// Its exchanges stand in the access log; `None` = as the listener says.
    pub is_logged: Option<bool>,
    pub at: Origin,
}

/// `match.host`; lower case, without port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostMatch {
    Any,
    Exact(String),
    /// `*.example.com`, kept as `example.com`: one or more labels before it.
    Wildcard(String),
}

/// `match.path`, normalised.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathMatch {
    /// `/a/b`
    Exact(String),
    /// `/a/*`, kept as `/a/`: all below, by segment. `/*` is every path.
    Prefix(String),
    /// `/a/{id}/b`: segments, `None` = a capture of one segment; names in order of their captures.
    Template {
        segments: Vec<Option<String>>,
        captures: Vec<String>,
    },
}

/// What answers a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Upstreams by index with weights (one with weight 1 in the short form).
    Upstream(Vec<(usize, u32)>),
    /// A fixed answer.
    Respond {
        status: u16,
        headers: Vec<(String, String)>,
        body: Arc<[u8]>,
    },
    /// 301, 302, 303, 307 or 308 to a location.
    Redirect { status: u16, location: String },
}

/// What is checked or changed on the way.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub name: String,
    pub kind: PolicyKind,
    pub at: Origin,
}

#[derive(Clone, Debug, PartialEq)]
pub enum PolicyKind {
    Headers {
        request: HeaderEdit,
        response: HeaderEdit,
    },
    ApiKey(ApiKey),
    RateLimit(RateLimit),
}

/// Changes to fields, in this order: remove, set, add. Names are lower case.
#[derive(Clone, Default, PartialEq)]
pub struct HeaderEdit {
    pub remove: Vec<String>,
    pub set: Vec<(String, String)>,
    pub add: Vec<(String, String)>,
}

/// A key in a header field names a consumer.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiKey {
    /// Field name, lower case.
    pub header: String,
    pub consumers: Vec<Consumer>,
}

/// Who may call: the key itself is not kept, only its SHA-256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consumer {
    pub name: String,
    pub key_sha256: [u8; 32],
}

/// A rate per key, spent from a shared cell.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimit {
    pub key: RateKey,
    /// Nanoseconds per request: 10 000 000 for `100/s`.
    pub interval_ns: u64,
    /// Requests beyond the rate that may come at once; at least 1.
    pub burst: u32,
    pub ban: Option<BanRule>,
}

/// What a rate is counted by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RateKey {
    /// The consumer an `api_key` policy before it found, else the address.
    Consumer,
    /// The peer's address (IPv6: its /64).
    Address,
    /// The value of a header field (lower case name), else the address.
    Header(String),
    /// One cell for all.
    All,
}

/// A source that goes on after its limit is refused by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BanRule {
    /// Refused requests of one address within `duration` before it is banned.
    pub after: u32,
    pub duration: Duration,
}

/// A named set of endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    pub name: String,
    pub balance: Balance,
    /// Calls under way at a time, over all workers; `None`: as many as come.
    pub calls_max: Option<u32>,
    /// The same to each endpoint that has no limit of its own.
    pub endpoint_calls_max: Option<u32>,
    pub queue: Queue,
    pub sticky: Option<Sticky>,
    /// Sorted and without duplicates.
    pub endpoints: Vec<Endpoint>,
    /// Endpoints that the DNS is asked for.
    pub names: Vec<EndpointName>,
    pub probe: Option<Probe>,
    pub health: Health,
    pub breaker: Option<Breaker>,
    pub at: Origin,
}

#[cfg(test)]
impl Upstream {
    /// These endpoints, and all else as it is where nobody says.
    pub fn new(name: &str, endpoints: Vec<Endpoint>) -> Self {
        Self {
            name: name.to_owned(),
            balance: Balance::RoundRobin,
            calls_max: None,
            endpoint_calls_max: None,
            queue: Queue::default(),
            sticky: None,
            endpoints,
            names: Vec::new(),
            probe: None,
            health: Health::default(),
            breaker: None,
            at: Origin::Default,
        }
    }
}

/// Requests that wait where all room is taken; `None` = the tunables `upstream.pending_max` and `upstream.pending_timeout`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    pub pending_max: Option<u32>,
    pub wait: Option<Duration>,
}

/// One address in an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// 1 to 1000; 0 = takes no new work.
    pub weight: u32,
    /// It is asked only while no other can be.
    pub is_backup: bool,
    /// Calls under way at a time, over all workers; `None`: `Upstream::endpoint_calls_max`.
    pub calls_max: Option<u32>,
    /// It came from a name, by the DNS.
    pub is_named: bool,
}

impl Endpoint {
    /// An address with a weight, and all else as it is where nobody says.
    pub const fn new(address: SocketAddr, weight: u32) -> Self {
        Self {
            address,
            weight,
            is_backup: false,
            calls_max: None,
            is_named: false,
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let (ip, port) = (self.socket.ip(), self.socket.port());
        match ip {
            IpAddr::V4(ip) => write!(f, "{ip}")?,
            IpAddr::V6(ip) => write!(f, "[{ip}]")?,
        }
        if self.prefix_bits < self.bits() {
            write!(f, "/{}", self.prefix_bits)?;
        }
        match self.port_last {
            0 => write!(f, ":*/{protocol}"),
            last if last == port => write!(f, ":{port}/{protocol}"),
            last => write!(f, ":{port}-{last}/{protocol}"),
        }
    }
}

impl ListenAddress {
    fn bits(&self) -> u8 {
        if self.socket.is_ipv4() { 32 } else { 128 }
    }

    /// It is one address and one port: what a socket can be bound to.
    pub fn is_single(&self) -> bool {
        self.prefix_bits == self.bits()
            && self.port_last == self.socket.port()
            && self.port_last > 0
    }

    /// Its ports, one by one; 0 alone stands for all.
    pub fn ports(&self) -> std::ops::RangeInclusive<u16> {
        self.socket.port()..=self.port_last
    }

    /// Whether a port is one of its.
    pub fn has_port(&self, port: u16) -> bool {
        self.port_last == 0 || self.ports().contains(&port)
    }

    /// Whether an address is one of its.
    pub fn has_ip(&self, ip: IpAddr) -> bool {
        let network = Network {
            first: self.socket.ip(),
            prefix_bits: self.prefix_bits,
        };
        network.contains(ip)
    }

    /// How many addresses with how many ports it stands for: entries of the kernel half's.
    pub fn entries(&self) -> u128 {
        let addresses = 1_u128.checked_shl(u32::from(self.bits() - self.prefix_bits));
        let ports = u128::from(self.port_last - self.socket.port()) + 1;
        addresses.unwrap_or(u128::MAX).saturating_mul(ports)
    }

    /// Its addresses, one by one.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        let (first, ip) = (number(self.socket.ip()), self.socket.ip());
        let count = self.entries() / (u128::from(self.port_last - self.socket.port()) + 1);
        (first..first.saturating_add(count)).map(move |number| match ip {
            IpAddr::V4(_) => IpAddr::from((number as u32).to_be_bytes()),
            IpAddr::V6(_) => IpAddr::from(number.to_be_bytes()),
        })
    }
}

/// An address as a number.
fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

/// Names only: a value may be a secret.
impl fmt::Debug for HeaderEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |fields: &[(String, String)]| {
            fields
                .iter()
                .map(|(name, _)| name.clone())
                .collect::<Vec<_>>()
        };
        let mut edit = f.debug_struct("HeaderEdit");
        edit.field("remove", &self.remove)
            .field("set", &names(&self.set))
            .field("add", &names(&self.add))
            .finish()
    }
}

impl fmt::Debug for CertificatePem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificatePem")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
