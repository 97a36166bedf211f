//! `[[upstream]]`: a named set of endpoints, how one is chosen, how their health is asked.

use std::collections::HashMap;

use super::address::parse_endpoint_address;
use super::context::Context;
use super::problem::Spot;
use super::table::{Section, Value};
use super::{Balance, Endpoint, Upstream, health, probe};

/// Highest weight of an endpoint.
pub const WEIGHT_MAX: u32 = 1000;

pub(super) fn upstream(section: &Section<'_>, context: &Context<'_>) -> Option<Upstream> {
    let name = section.find("name").and_then(|value| value.as_text());
    let balance = section.find("balance").map(|value| {
        let words = [
            ("round_robin", Balance::RoundRobin),
            ("random", Balance::Random),
        ];
        value.word(&words, &["least_request", "ewma", "maglev"])
    });
    let endpoints = section
        .need("endpoints", "endpoints = [\"10.0.0.11:8080\"]")
        .and_then(|value| endpoints(&value));
    let probe = section
        .find("probe")
        .map(|value| probe::probe(&value, context));
    let health = health::health(section);
    section.later("tls");
    section.finish();
    Some(Upstream {
        name: name?.to_owned(),
        balance: balance.unwrap_or(Some(Balance::RoundRobin))?,
        endpoints: endpoints?,
        probe: match probe {
            Some(probe) => Some(probe?),
            None => None,
        },
        health: health?,
        at: section.spot.origin(),
    })
}

fn endpoints(value: &Value<'_>) -> Option<Vec<Endpoint>> {
    let items = value.items()?;
    if items.is_empty() {
        let help =
            "nobody could answer; to keep an upstream idle, give an endpoint weight = 0".to_owned();
        return value
            .spot
            .refuse("an upstream without endpoints", "", Some(help));
    }
    let mut first: HashMap<_, Spot<'_>> = HashMap::new();
    let (mut endpoints, mut is_good) = (Vec::new(), true);
    for item in &items {
        let Some(endpoint) = endpoint(item) else {
            is_good = false;
            continue;
        };
        if let Some(other) = first.get(&endpoint.address) {
            is_good = false;
            let message = format!("the endpoint {} is named twice", endpoint.address);
            item.spot
                .refuse_with::<()>(message, "named again", *other, "named first");
            continue;
        }
        first.insert(endpoint.address, item.spot);
        endpoints.push(endpoint);
    }
    endpoints.sort_unstable();
    is_good.then_some(endpoints)
}

/// `"10.0.0.11:8080"` or `{ address = "...", weight = 2 }`.
fn endpoint(item: &Value<'_>) -> Option<Endpoint> {
    if !item.is_table() {
        let address = item.parsed(parse_endpoint_address)?;
        return Some(Endpoint::new(address, 1));
    }
    let mut section = item.section()?;
    section.name = "an endpoint".to_owned();
    let address = section
        .need("address", "address = \"10.0.0.11:8080\"")
        .and_then(|value| value.parsed(parse_endpoint_address));
    let weight = section
        .find("weight")
        .map_or(Some(1), |value| value.number(0..=WEIGHT_MAX));
    section.finish();
    Some(Endpoint {
        address: address?,
        weight: weight?,
    })
}
