//! `[[upstream]]`: a named set of endpoints, how one is chosen, how their health is asked.

use std::collections::HashMap;

use super::address::parse_endpoint_address;
use super::context::Context;
use super::problem::Spot;
use super::resolver::{parse_name, parse_named};
use super::table::{Section, Value};
use super::{Balance, Endpoint, EndpointName, Upstream, health, probe};

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
    let (endpoints, names) = endpoints?;
    Some(Upstream {
        name: name?.to_owned(),
        balance: balance.unwrap_or(Some(Balance::RoundRobin))?,
        endpoints,
        names,
        probe: match probe {
            Some(probe) => Some(probe?),
            None => None,
        },
        health: health?,
        at: section.spot.origin(),
    })
}

fn endpoints(value: &Value<'_>) -> Option<(Vec<Endpoint>, Vec<EndpointName>)> {
    let items = value.items()?;
    if items.is_empty() {
        let help =
            "nobody could answer; to keep an upstream idle, give an endpoint weight = 0".to_owned();
        return value
            .spot
            .refuse("an upstream without endpoints", "", Some(help));
    }
    let mut first: HashMap<_, Spot<'_>> = HashMap::new();
    let (mut endpoints, mut names, mut is_good) = (Vec::new(), Vec::new(), true);
    for item in &items {
        if let Some(name) = named(item) {
            is_good &= name.is_some();
            names.extend(name);
            continue;
        }
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
    is_good.then_some((endpoints, names))
}

/// `"app.internal:8080"`, the same as `address` of a table, or `{ srv = "_http._tcp.app.internal" }`; `None` for all else.
fn named(item: &Value<'_>) -> Option<Option<EndpointName>> {
    if let Some(text) = item.as_text() {
        let parsed = parse_named(text)?;
        let host = item.parsed(|_| parsed);
        return Some(host.map(|(host, port)| EndpointName::Host {
            host,
            port,
            weight: 1,
        }));
    }
    let mut section = item.is_table().then(|| item.section())??;
    section.name = "an endpoint".to_owned();
    if let Some(service) = section.find("srv") {
        let name = service.parsed(parse_name);
        section.finish();
        return Some(name.map(|name| EndpointName::Service { name }));
    }
    let address = section.find("address")?;
    let parsed = parse_named(address.as_text()?)?;
    let host = address.parsed(|_| parsed);
    let weight = weight(&section);
    section.finish();
    let (Some((host, port)), Some(weight)) = (host, weight) else {
        return Some(None);
    };
    Some(Some(EndpointName::Host { host, port, weight }))
}

fn weight(section: &Section<'_>) -> Option<u32> {
    let weight = section.find("weight");
    weight.map_or(Some(1), |value| value.number(0..=WEIGHT_MAX))
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
    let weight = weight(&section);
    section.finish();
    Some(Endpoint::new(address?, weight?))
}
