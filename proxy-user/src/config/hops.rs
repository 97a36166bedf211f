//! Hops before a listener: who is trusted to say who asks, and what we are called on the way.

use std::net::IpAddr;

use super::address::parse_network;
use super::field::parse_field_name;
use super::table::Value;
use super::{Claim, number};
use crate::tunable::unit::shown;

/// Most networks that one trusts.
const NETWORKS_MAX: usize = 256;

/// Hops before a listener that say who asked them, and are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trusted {
    pub networks: Vec<Network>,
    pub claim: Claim,
}

impl Trusted {
    /// Whether an address is one of theirs.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(ip))
    }
}

/// Addresses with the same first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    pub first: IpAddr,
    pub prefix_bits: u8,
}

impl Network {
    /// Whether an address is one of its.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let bits = if self.first.is_ipv4() { 32 } else { 128 };
        let shift = u32::from(bits - self.prefix_bits);
        let prefix = |ip| number(ip).checked_shr(shift).unwrap_or(0);
        ip.is_ipv4() == self.first.is_ipv4() && prefix(ip) == prefix(self.first)
    }
}

/// `["10.0.0.0/8"]`, or `{ networks = ["10.0.0.0/8"], field = "forwarded" }`.
pub(super) fn trusted(value: &Value<'_>) -> Option<Trusted> {
    if !value.is_table() {
        return Some(Trusted {
            networks: networks(value)?,
            claim: Claim::XForwardedFor,
        });
    }
    let section = value.section()?;
    let networks = section
        .need("networks", "networks = [\"10.0.0.0/8\"]")
        .and_then(|value| networks(&value));
    let fields = [
        ("x-forwarded-for", Claim::XForwardedFor),
        ("forwarded", Claim::Forwarded),
    ];
    let claim = section
        .find("field")
        .map_or(Some(Claim::XForwardedFor), |value| value.word(&fields, &[]));
    section.finish();
    Some(Trusted {
        networks: networks?,
        claim: claim?,
    })
}

fn networks(value: &Value<'_>) -> Option<Vec<Network>> {
    let items = value.one_or_more()?;
    if items.is_empty() || items.len() > NETWORKS_MAX {
        let message = format!("a listener trusts 1 to {NETWORKS_MAX} networks");
        return value.spot.refuse(message, "", None);
    }
    let parsed: Vec<_> = items
        .iter()
        .map(|item| item.parsed(parse_network))
        .collect();
    parsed.into_iter().collect()
}

/// A token, as `Via` has it (RFC 9110 section 7.6.3).
pub(super) fn parse_pseudonym(text: &str) -> Result<String, String> {
    match parse_field_name(text) {
        Ok(_) if text.len() <= 64 => Ok(text.to_owned()),
        _ => Err(format!(
            "`{}` is no name for `Via`: up to 64 letters, digits and `-`, like edge-1",
            shown(text)
        )),
    }
}
