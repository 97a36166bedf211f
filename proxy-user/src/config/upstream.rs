//! `[[upstream]]`: a named set of endpoints, how one is chosen, how their health is asked.

use std::collections::HashMap;
use std::time::Duration;

use super::address::parse_endpoint_address;
use super::context::Context;
use super::problem::Spot;
use super::resilience::breaker;
use super::resolver::{Traits, parse_name, parse_named};
use super::table::{Section, Value, optional};
use super::{Endpoint, EndpointName, Queue, Upstream, balance, health, probe, sticky};

/// Highest weight of an endpoint.
pub const WEIGHT_MAX: u32 = 1000;
/// Most endpoints of an upstream: a ring names them in 16 bits.
const ENDPOINTS_MAX: usize = 4096;
/// Highest limit of calls, and most requests that wait.
const CALLS_MAX: u32 = 1_000_000;

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);

/// Keys that say how L7 chooses and waits: the kernel half knows nothing of them.
const L7_KEYS: [&str; 8] = [
    "balance",
    "candidates",
    "hash",
    "calls_max",
    "endpoint_calls_max",
    "queue",
    "sticky",
    "breaker",
];

/// What stands there of keys that only L7 knows.
pub(super) fn l7_values<'s>(section: &Section<'s>) -> Vec<Value<'s>> {
    let of_upstream = L7_KEYS.iter().filter_map(|key| section.find(key));
    let endpoints = section.find("endpoints").filter(Value::is_list);
    let endpoints = endpoints
        .and_then(|value| value.items())
        .unwrap_or_default();
    let tables = endpoints.iter().filter(|item| item.is_table());
    let of_endpoints = tables.filter_map(|item| item.section()?.find("calls_max"));
    of_upstream.chain(of_endpoints).collect()
}

pub(super) fn upstream(section: &Section<'_>, context: &Context<'_>) -> Option<Upstream> {
    let name = section.find("name").and_then(|value| value.as_text());
    let balance = balance::balance(section);
    let calls_max = optional(section.find("calls_max").map(|value| limit(&value)));
    let endpoint_calls_max = section.find("endpoint_calls_max");
    let endpoint_calls_max = optional(endpoint_calls_max.map(|value| limit(&value)));
    let queue_value = section.find("queue");
    let queue = queue_value
        .as_ref()
        .map_or(Some(Queue::default()), |value| queue(value));
    let sticky = section.find("sticky");
    let sticky = optional(sticky.map(|value| sticky::sticky(&value, context)));
    let endpoints = section
        .need("endpoints", "endpoints = [\"10.0.0.11:8080\"]")
        .and_then(|value| endpoints(&value));
    let probe = section.find("probe");
    let probe = optional(probe.map(|value| probe::probe(&value, context)));
    let health = health::health(section);
    let breaker = optional(section.find("breaker").map(|value| breaker(&value)));
    section.later("tls");
    section.finish();
    let (endpoints, names) = endpoints?;
    let mut limits = endpoints.iter().map(|endpoint| endpoint.calls_max);
    let mut limits_of_names = names.iter().map(EndpointName::calls_max);
    if let (Some(value), Some(None), Some(None)) = (queue_value, calls_max, endpoint_calls_max)
        && limits.all(|limit| limit.is_none())
        && limits_of_names.all(|limit| limit.is_none())
    {
        let help = "write calls_max = 200, or endpoint_calls_max = 50".to_owned();
        let message = "nobody ever waits in this `queue`: there is no limit";
        return value.spot.refuse(message, "", Some(help));
    }
    Some(Upstream {
        name: name?.to_owned(),
        balance: balance?,
        calls_max: calls_max?,
        endpoint_calls_max: endpoint_calls_max?,
        queue: queue?,
        sticky: sticky?,
        endpoints,
        names,
        probe: probe?,
        health: health?,
        breaker: breaker?,
        at: section.spot.origin(),
    })
}

fn limit(value: &Value<'_>) -> Option<u32> {
    value.number(1..=CALLS_MAX)
}

/// `{ pending_max = 100, wait = "1s" }`.
fn queue(value: &Value<'_>) -> Option<Queue> {
    let section = value.section()?;
    let pending_max = section.find("pending_max");
    let pending_max = optional(pending_max.map(|value| value.number(0..=CALLS_MAX)));
    let wait = section.find("wait");
    let wait = optional(wait.map(|value| value.duration(MS..=HOUR)));
    section.finish();
    Some(Queue {
        pending_max: pending_max?,
        wait: wait?,
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
    if items.len() > ENDPOINTS_MAX {
        let message = format!("an upstream of {} endpoints", items.len());
        return value
            .spot
            .refuse(message, &format!("at most {ENDPOINTS_MAX}"), None);
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
            traits: Traits::default(),
        }));
    }
    let mut section = item.is_table().then(|| item.section())??;
    section.name = "an endpoint".to_owned();
    if let Some(service) = section.find("srv") {
        let name = service.parsed(parse_name);
        let calls_max = optional(section.find("calls_max").map(|value| limit(&value)));
        section.finish();
        let (Some(name), Some(calls_max)) = (name, calls_max) else {
            return Some(None);
        };
        return Some(Some(EndpointName::Service { name, calls_max }));
    }
    let address = section.find("address")?;
    let parsed = parse_named(address.as_text()?)?;
    let host = address.parsed(|_| parsed);
    let traits = traits(&section);
    section.finish();
    let (Some((host, port)), Some(traits)) = (host, traits) else {
        return Some(None);
    };
    Some(Some(EndpointName::Host { host, port, traits }))
}

/// What an endpoint's table says beside its address.
fn traits(section: &Section<'_>) -> Option<Traits> {
    let weight = section
        .find("weight")
        .map_or(Some(1), |value| value.number(0..=WEIGHT_MAX));
    let is_backup = section
        .find("backup")
        .map_or(Some(false), |value| value.truth());
    let calls_max = optional(section.find("calls_max").map(|value| limit(&value)));
    Some(Traits {
        weight: weight?,
        is_backup: is_backup?,
        calls_max: calls_max?,
    })
}

/// `"10.0.0.11:8080"` or `{ address = "...", weight = 2, backup = true, calls_max = 20 }`.
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
    let traits = traits(&section);
    section.finish();
    Some(traits?.at(address?))
}
