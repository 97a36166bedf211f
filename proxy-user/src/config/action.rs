//! What answers a request: upstreams with weights, a fixed response, a redirect.

use std::sync::Arc;

use super::Action;
use super::context::Context;
use super::field::named_values;
use super::table::{Section, Value};
use crate::tunable::unit::shown;

/// Highest weight of an upstream, and most upstreams of one route.
const WEIGHT_MAX: u32 = 1000;
const SHARES_MAX: usize = 256;
const LOCATION_BYTES_MAX: usize = 2048;

/// Exactly one action of a route.
pub(super) fn action(section: &Section<'_>, context: &Context<'_>) -> Option<Action> {
    let actions = ["upstream", "respond", "redirect"].map(|key| section.find(key));
    for key in ["files", "compose"] {
        section.later(key);
    }
    let is_later = section.has("files") || section.has("compose");
    let present: Vec<&Value<'_>> = actions.iter().flatten().collect();
    match present.as_slice() {
        [value] => match value.name.as_str() {
            "upstream" => shares(value, context).map(Action::Upstream),
            "respond" => respond(value, context),
            _ => redirect(value),
        },
        [] if is_later => None,
        [] => {
            let help = "give it upstream = \"app\", respond = {...} or redirect = {...}".to_owned();
            section
                .spot
                .refuse("a route without an action: nothing answers", "", Some(help))
        }
        [first, second, ..] => {
            let message = format!(
                "a route has one action, and this one has `{}` and `{}`",
                first.name, second.name
            );
            second.spot.refuse_with(message, "", first.spot, "and this")
        }
    }
}

/// `"app"`, or a list of names and `{ name = "app", weight = 95 }`.
fn shares(value: &Value<'_>, context: &Context<'_>) -> Option<Vec<(usize, u32)>> {
    let items = value.one_or_more()?;
    if items.is_empty() || items.len() > SHARES_MAX {
        return value
            .spot
            .refuse(format!("a route has 1 to {SHARES_MAX} upstreams"), "", None);
    }
    let (mut shares, mut is_good) = (Vec::<(usize, u32)>::new(), true);
    for item in &items {
        match share(item, context) {
            Some((index, _)) if shares.iter().any(|(known, _)| *known == index) => {
                is_good = false;
                item.spot
                    .refuse::<()>("the route names this upstream twice", "", None);
            }
            Some(share) => shares.push(share),
            None => is_good = false,
        }
    }
    if is_good && shares.iter().all(|(_, weight)| *weight == 0) {
        return value
            .spot
            .refuse("all weights are 0: nobody would be asked", "", None);
    }
    is_good.then_some(shares)
}

fn share(item: &Value<'_>, context: &Context<'_>) -> Option<(usize, u32)> {
    if !item.is_table() {
        return context.upstreams.resolve(item).map(|index| (index, 1));
    }
    let section = item.section()?;
    let index = section
        .need("name", "name = \"app\"")
        .and_then(|value| context.upstreams.resolve(&value));
    let weight = section
        .find("weight")
        .map_or(Some(1), |value| value.number(0..=WEIGHT_MAX));
    section.finish();
    Some((index?, weight?))
}

/// `{ status = 200, headers = {..}, body = ".." }`, or `body_file` for the body.
fn respond(value: &Value<'_>, context: &Context<'_>) -> Option<Action> {
    let section = value.section()?;
    let status = section
        .find("status")
        .map_or(Some(200), |value| value.number(200..=599));
    let headers = section.find("headers").map_or(Some(Vec::new()), |value| {
        named_values(&value, context, false)
    });
    let (text, file) = (section.find("body"), section.find("body_file"));
    let body_spot = text.as_ref().or(file.as_ref()).map(|value| value.spot);
    let body: Option<Arc<[u8]>> = match (text, file) {
        (Some(_), Some(file)) => {
            file.spot
                .refuse("`body` and `body_file` exclude each other", "", None)
        }
        (Some(text), None) => text.text().map(|text| text.as_bytes().into()),
        (None, Some(file)) => context.file(&file).map(|(_, bytes)| bytes.into()),
        (None, None) => Some(Arc::from([])),
    };
    section.finish();
    let (status, headers, body) = (status?, headers?, body?);
    // RFC 9110 sections 15.3.5 and 15.4.5: these end with their head.
    if let (204 | 304, Some(spot), false) = (status, body_spot, body.is_empty()) {
        return spot.refuse(
            format!("a response with status {status} has no body"),
            "",
            None,
        );
    }
    let status = u16::try_from(status).ok()?;
    Some(Action::Respond {
        status,
        headers,
        body,
    })
}

/// `{ to = "https://example.com/", status = 308 }`.
fn redirect(value: &Value<'_>) -> Option<Action> {
    let section = value.section()?;
    let location = section
        .need("to", "to = \"https://example.com/\"")
        .and_then(|value| value.parsed(parse_location));
    let status_value = section.find("status");
    let status = status_value.map_or(Some(308), |value| {
        let status = value.number(300..=399)?;
        if matches!(status, 301 | 302 | 303 | 307 | 308) {
            return Some(status);
        }
        value.spot.refuse(
            format!("{status} is no status of a redirect"),
            "expected 301, 302, 303, 307 or 308",
            None,
        )
    });
    section.finish();
    let status = u16::try_from(status?).ok()?;
    Some(Action::Redirect {
        status,
        location: location?,
    })
}

/// A URI or a path, as it is sent in Location (RFC 9110 section 10.2.2).
fn parse_location(text: &str) -> Result<String, String> {
    let wrong = |why: &str| {
        Err(format!(
            "`{}` {why}: write it like https://example.com/ or /new",
            shown(text)
        ))
    };
    if text.contains(['{', '}']) {
        return wrong("has a template, which is not supported by this version yet");
    }
    if text.len() > LOCATION_BYTES_MAX
        || !text
            .bytes()
            .all(|byte| (b'!'..=b'~').contains(&byte) && !b"\"<>\\^`|".contains(&byte))
    {
        return wrong("has characters that stand in no URI, or too many");
    }
    let has_host = |rest: &str| !rest.is_empty() && !rest.starts_with('/');
    let is_absolute = ["https://", "http://"]
        .iter()
        .any(|scheme| text.strip_prefix(scheme).is_some_and(has_host));
    if !is_absolute && (!text.starts_with('/') || text.starts_with("//")) {
        return wrong("is neither a URI of http or https nor a path");
    }
    Ok(text.to_owned())
}
