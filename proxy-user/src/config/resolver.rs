//! `[resolver]`, and endpoints that are names: the DNS says which addresses they have.

use std::net::{IpAddr, SocketAddr};

use super::pattern::parse_host;
use super::table::{Section, Value};
use super::{Endpoint, HostMatch};
use crate::tunable::unit::shown;

/// Most servers; more than a few only make waiting longer.
const SERVERS_MAX: usize = 8;

/// Where servers of the DNS listen.
const DNS_PORT: u16 = 53;

/// Who is asked for names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolver {
    /// None: those of this host, by /etc/resolv.conf.
    pub servers: Vec<SocketAddr>,
}

/// An endpoint, or several, by a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EndpointName {
    /// Every address of this host, with this port, and each like this.
    Host {
        host: String,
        port: u16,
        traits: Traits,
    },
    /// Every target of its SRV records, with their ports, weights and priorities (RFC 2782).
    Service {
        name: String,
        calls_max: Option<u32>,
    },
}

/// What is said of an endpoint beside its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Traits {
    pub weight: u32,
    pub is_backup: bool,
    pub calls_max: Option<u32>,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            weight: 1,
            is_backup: false,
            calls_max: None,
        }
    }
}

impl Traits {
    /// An endpoint like this.
    pub fn at(self, address: SocketAddr) -> Endpoint {
        Endpoint {
            is_backup: self.is_backup,
            calls_max: self.calls_max,
            ..Endpoint::new(address, self.weight)
        }
    }
}

impl EndpointName {
    /// The name that is asked for.
    pub fn name(&self) -> &str {
        match self {
            Self::Host { host, .. } => host,
            Self::Service { name, .. } => name,
        }
    }

    /// Calls under way at a time to each of its endpoints.
    pub fn calls_max(&self) -> Option<u32> {
        match self {
            Self::Host { traits, .. } => traits.calls_max,
            Self::Service { calls_max, .. } => *calls_max,
        }
    }
}

pub(super) fn resolver(section: &Section<'_>) -> Option<Resolver> {
    let servers = section.find("servers").map(|value| servers(&value));
    section.finish();
    Some(Resolver {
        servers: servers.unwrap_or(Some(Vec::new()))?,
    })
}

fn servers(value: &Value<'_>) -> Option<Vec<SocketAddr>> {
    let items = value.one_or_more()?;
    if items.len() > SERVERS_MAX {
        let message = format!("there are more than {SERVERS_MAX} servers");
        return value.spot.refuse(message, "", None);
    }
    let servers: Vec<_> = items.iter().map(|item| item.parsed(server)).collect();
    servers.into_iter().collect()
}

/// `10.0.0.53` or `10.0.0.53:5353`.
fn server(text: &str) -> Result<SocketAddr, String> {
    let with_port = text.parse::<IpAddr>().map(|ip| (ip, DNS_PORT).into());
    match with_port.or_else(|_| text.parse::<SocketAddr>()) {
        Ok(server) if server.port() > 0 && !server.ip().is_unspecified() => Ok(server),
        _ => Err(format!(
            "`{}` is no server of the DNS: write it like 10.0.0.53 or [2001:db8::53]:5353",
            shown(text)
        )),
    }
}

/// `app.internal:8080`, if it looks like a name with a port at all and not like an address.
pub(super) fn parse_named(text: &str) -> Option<Result<(String, u16), String>> {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let is_name = host.contains(|c: char| c.is_ascii_alphabetic()) && !host.contains([':', '/']);
    is_name.then(|| {
        let port = port.parse().ok().filter(|port| *port > 0);
        let port = port.ok_or_else(|| {
            format!(
                "`{}` has no port from 1 to 65535 behind its name: write it like app.internal:8080",
                shown(text)
            )
        });
        Ok((parse_name(host)?, port?))
    })
}

/// A name that the DNS can have: what a host may be, and `_service._tcp` before it.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    match parse_host(text.strip_suffix('.').unwrap_or(text)) {
        Ok(HostMatch::Exact(name)) if !name.starts_with('[') => {
            let dot = if text.ends_with('.') { "." } else { "" };
            Ok(name + dot)
        }
        _ => Err(format!(
            "`{}` is no name: write it like app.internal",
            shown(text)
        )),
    }
}
