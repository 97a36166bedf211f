//! `[[upstream]]`: a named set of endpoints, how one is chosen, how their health is asked.

use std::collections::HashMap;
use std::time::Duration;

use super::address::parse_endpoint_address;
use super::problem::Spot;
use super::table::{Section, Value};
use super::{Balance, Endpoint, PathMatch, Probe, ProbeKind, Upstream};
use crate::config::pattern::parse_path;

/// Highest weight of an endpoint.
pub const WEIGHT_MAX: u32 = 1000;

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);

pub(super) fn upstream(section: &Section<'_>) -> Option<Upstream> {
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
    let probe = section.find("probe").map(|value| probe(&value));
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

/// `{ http = "/healthz" }` or `{ tcp = true }`, with interval, timeout, rise and fall.
fn probe(value: &Value<'_>) -> Option<Probe> {
    let section = value.section()?;
    let (http, tcp) = (section.find("http"), section.find("tcp"));
    let kind = match (&http, &tcp) {
        (Some(http), None) => http.parsed(probe_path).map(|path| ProbeKind::Http { path }),
        (None, Some(tcp)) => tcp.yes().map(|()| ProbeKind::Tcp),
        _ => {
            let help = "write http = \"/healthz\" or tcp = true".to_owned();
            value.spot.refuse(
                "a probe asks over `http` or over `tcp`, one of both",
                "",
                Some(help),
            )
        }
    };
    let interval_value = section.find("interval");
    let interval = interval_value
        .as_ref()
        .map_or(Some(2000 * MS), |value| value.duration(100 * MS..=HOUR));
    let timeout_value = section.find("timeout");
    let timeout = timeout_value
        .as_ref()
        .map(|value| value.duration(10 * MS..=HOUR));
    let rise = section
        .find("rise")
        .map_or(Some(2), |value| value.number(1..=100));
    let fall = section
        .find("fall")
        .map_or(Some(3), |value| value.number(1..=100));
    section.finish();
    let interval = interval?;
    let timeout = timeout.unwrap_or_else(|| Some(interval.min(1000 * MS)))?;
    if timeout > interval {
        let spot = timeout_value.map_or(value.spot, |value| value.spot);
        return spot.refuse(
            "the `timeout` of a probe is longer than its `interval`",
            "",
            Some("the next probe would overtake it".to_owned()),
        );
    }
    Some(Probe {
        kind: kind?,
        interval,
        timeout,
        rise: rise?,
        fall: fall?,
    })
}

/// A path to ask for, as it is sent: a query may follow.
fn probe_path(text: &str) -> Result<String, String> {
    let (path, query) = text
        .split_once('?')
        .map_or((text, None), |(path, query)| (path, Some(query)));
    match parse_path(path)? {
        PathMatch::Exact(_) => {}
        _ => return Err("a probe asks for one path: write it like /healthz".to_owned()),
    }
    if query.is_some_and(|query| {
        !query
            .bytes()
            .all(|byte| (b'!'..=b'~').contains(&byte) && byte != b'#')
    }) {
        return Err("the query of a probe has a character that stands in no query".to_owned());
    }
    Ok(text.to_owned())
}
