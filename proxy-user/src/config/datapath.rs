//! `[datapath]`: interfaces and mode of the kernel half, and what its ways of forwarding leave from.

use std::net::IpAddr;

use proxy_ebpf::abi::size::NAT_SOURCES;

use super::context::Context;
use super::problem::Spot;
use super::table::{Section, Value};
use super::{Datapath, DatapathMode, HashKey, Nat, Origin, Tunnel};
use crate::tunable::unit::shown;

/// Most interfaces, and the longest name of one (IFNAMSIZ without its end).
const INTERFACES_MAX: usize = 256;
const INTERFACE_BYTES_MAX: usize = 15;

/// A secret that can be guessed lets anybody aim flows at one endpoint.
const HASH_KEY_BYTES_MIN: usize = 16;

/// What the section says, with the places that later checks point at.
pub(super) struct DatapathDraft<'s> {
    pub datapath: Datapath,
    pub mode: Option<Spot<'s>>,
    pub nat: Option<Spot<'s>>,
    pub tunnel: Option<Spot<'s>>,
    pub section: Option<Spot<'s>>,
}

/// No section: no kernel half.
pub(super) fn absent<'s>() -> DatapathDraft<'s> {
    let datapath = Datapath {
        interfaces: Vec::new(),
        mode: DatapathMode::Auto,
        nat: None,
        tunnel: None,
        hash_key: None,
        at: Origin::Default,
    };
    DatapathDraft {
        datapath,
        mode: None,
        nat: None,
        tunnel: None,
        section: None,
    }
}

pub(super) fn datapath<'s>(
    section: &Section<'s>,
    context: &Context<'_>,
) -> Option<DatapathDraft<'s>> {
    let interfaces = section
        .find("interfaces")
        .map_or(Some(Vec::new()), |value| interfaces(&value));
    let mode = section.find("mode");
    let words = [
        ("auto", DatapathMode::Auto),
        ("native", DatapathMode::Native),
        ("generic", DatapathMode::Generic),
        ("off", DatapathMode::Off),
    ];
    let parsed_mode = mode
        .as_ref()
        .map_or(Some(DatapathMode::Auto), |value| value.word(&words, &[]));
    let nat = section.find("nat");
    let parsed_nat = nat.as_ref().map(self::nat);
    let tunnel = section.find("tunnel");
    let parsed_tunnel = tunnel.as_ref().map(self::tunnel);
    let hash_key = section
        .find("hash_key")
        .map(|value| hash_key(&value, context));
    section.finish();
    let datapath = Datapath {
        interfaces: interfaces?,
        mode: parsed_mode?,
        nat: match parsed_nat {
            Some(nat) => Some(nat?),
            None => None,
        },
        tunnel: match parsed_tunnel {
            Some(tunnel) => Some(tunnel?),
            None => None,
        },
        hash_key: match hash_key {
            Some(key) => Some(key?),
            None => None,
        },
        at: section.spot.origin(),
    };
    let spot = |value: Option<Value<'s>>| value.map(|value| value.spot);
    Some(DatapathDraft {
        datapath,
        mode: spot(mode),
        nat: spot(nat),
        tunnel: spot(tunnel),
        section: Some(section.spot),
    })
}

/// A secret that all nodes of a fleet have: what the kernel half hashes flows with is derived from it.
fn hash_key(value: &Value<'_>, context: &Context<'_>) -> Option<HashKey> {
    let secret = context.secret(value)?;
    if secret.len() < HASH_KEY_BYTES_MIN {
        return value.spot.refuse_unseen(format!(
            "`hash_key` is shorter than {HASH_KEY_BYTES_MIN} bytes: make one with `openssl rand -hex 32`"
        ));
    }
    Some(HashKey::derive(&secret))
}

fn interfaces(value: &Value<'_>) -> Option<Vec<String>> {
    let items = value.items()?;
    if items.len() > INTERFACES_MAX {
        return value
            .spot
            .refuse(format!("more than {INTERFACES_MAX} interfaces"), "", None);
    }
    let (mut names, mut is_good) = (Vec::<String>::new(), true);
    for item in &items {
        let name = item.parsed(|text| {
            let bad = |byte: u8| byte == b'/' || byte <= b' ' || byte >= 0x7f;
            let is_name = (1..=INTERFACE_BYTES_MAX).contains(&text.len())
                && !text.bytes().any(bad)
                && text != "."
                && text != "..";
            if is_name {
                Ok(text)
            } else {
                Err(format!(
                    "`{}` is no name of an interface: write it like eth0",
                    shown(text)
                ))
            }
        });
        match name {
            Some(name) if names.iter().any(|known| known == name) => {
                is_good = false;
                item.spot
                    .refuse::<()>(format!("the interface `{name}` is named twice"), "", None);
            }
            Some(name) => names.push(name.to_owned()),
            None => is_good = false,
        }
    }
    is_good.then_some(names)
}

fn nat(value: &Value<'_>) -> Option<Nat> {
    let section = value.section()?;
    let source = section
        .need("source", "source = [\"10.0.0.1\"]")
        .and_then(|value| sources(&value, NAT_SOURCES));
    let ports = section
        .need("ports", "ports = \"20000-59999\"")
        .and_then(|value| value.parsed(parse_ports));
    section.finish();
    Some(Nat {
        source: source?,
        ports: ports?,
        at: value.spot.origin(),
    })
}

/// `tunnel = { source = [...] }`: a packet inside another leaves from the address of its endpoint's family.
fn tunnel(value: &Value<'_>) -> Option<Tunnel> {
    let section = value.section()?;
    let found = section.need("source", "source = [\"10.0.0.1\"]");
    let source = found.as_ref().and_then(|value| sources(value, 2));
    section.finish();
    let (source, found) = (source?, found?);
    if source.len() == 2 && source[0].is_ipv4() == source[1].is_ipv4() {
        let message = "`tunnel` has two sources of the same family, and packets leave from one";
        return found.spot.refuse(message, "", None);
    }
    Some(Tunnel {
        source,
        at: value.spot.origin(),
    })
}

fn sources(value: &Value<'_>, max: usize) -> Option<Vec<IpAddr>> {
    let items = value.one_or_more()?;
    if items.is_empty() || items.len() > max {
        return value
            .spot
            .refuse(format!("`source` is 1 to {max} addresses"), "", None);
    }
    let (mut sources, mut is_good) = (Vec::new(), true);
    for item in &items {
        match item.parsed(parse_source) {
            Some(ip) if sources.contains(&ip) => {
                is_good = false;
                item.spot
                    .refuse::<()>(format!("the address {ip} is named twice"), "", None);
            }
            Some(ip) => sources.push(ip),
            None => is_good = false,
        }
    }
    is_good.then_some(sources)
}

fn parse_source(text: &str) -> Result<IpAddr, String> {
    let ip: Option<IpAddr> = text.parse().ok();
    let mapped = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    let usable = ip.filter(|ip| {
        !ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback() && !mapped(ip)
    });
    usable.ok_or_else(|| {
        format!(
            "`{}` is no address that packets can leave from: write it like 10.0.0.1 or 2001:db8::1",
            shown(text)
        )
    })
}

fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port >= 1024);
    let range = text
        .split_once('-')
        .and_then(|(first, last)| Some((port(first)?, port(last)?)));
    let range = range.filter(|(first, last)| first <= last);
    range.ok_or_else(|| {
        format!(
            "`{}` is no range of ports from 1024 to 65535: write it like 20000-59999",
            shown(text)
        )
    })
}
