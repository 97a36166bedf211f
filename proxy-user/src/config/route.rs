//! `[[route]]`: what it matches, which policies run, what answers.

use super::action::action;
use super::context::Context;
use super::error_page::error_pages;
use super::field::parse_field_name;
use super::listener::ListenerDraft;
use super::names::parse_name;
use super::pattern::{parse_host, parse_path};
use super::problem::Spot;
use super::resilience::{Retry, Timeout, hedge, retry, timeout};
use super::table::{Section, Value};
use super::{Action, ErrorPages, HostMatch, ListenerMode, PathMatch, Route};

/// Most policies of one route.
const POLICIES_MAX: usize = 64;
/// Most names of trailers; more lines than twice as many are no trailers that anybody meant.
const TRAILERS_MAX: usize = 12;
const NO_TRAILERS: [&str; 16] = [
    "host",
    "authorization",
    "proxy-authorization",
    "www-authenticate",
    "proxy-authenticate",
    "cookie",
    "set-cookie",
    "cache-control",
    "expect",
    "range",
    "location",
    "vary",
    "age",
    "forwarded",
    "via",
    "x-request-id",
];

/// A route with the places that later checks point at.
pub(super) struct RouteDraft<'s> {
    pub route: Route,
    pub matching: Spot<'s>,
    pub policies: Vec<Spot<'s>>,
    /// Where its name stands, if it was given one.
    pub name: Option<Spot<'s>>,
}

/// `number` counts routes from 1, in the order written.
pub(super) fn route<'s>(
    section: &Section<'s>,
    number: usize,
    context: &Context<'s>,
    listeners: &[Option<ListenerDraft<'s>>],
) -> Option<RouteDraft<'s>> {
    let name = section.find("name");
    let given = name.as_ref().map(|value| value.parsed(parse_name));
    let listener = section
        .find("listener")
        .map(|value| serving_listener(&value, context, listeners));
    let matching = section.need("match", "match = { path = \"/*\" }");
    let parsed_match = matching.as_ref().and_then(self::matching);
    let policies = section
        .find("policies")
        .map_or(Some(Vec::new()), |value| policies(&value, context));
    let action = action(section, context);
    let timeout = section
        .find("timeout")
        .map_or(Some(Timeout::default()), |value| timeout(&value));
    let of_calls = ["retry", "hedge", "trailers"].map(|key| section.find(key));
    let [retry_value, hedge_value, trailers_value] = &of_calls;
    let retry = retry_value.as_ref().map_or(Some(Retry::default()), retry);
    let hedge = hedge_value
        .as_ref()
        .map_or(Some(None), |value| hedge(value).map(Some));
    for value in of_calls.iter().flatten() {
        if action.as_ref().is_some_and(|action| !asks(action)) {
            let message = format!("`{}` of a route that asks no upstream", value.name);
            value.spot.refuse::<()>(message, "leave it out", None);
        }
    }
    let trailers = trailers_value.as_ref().map_or(Some(Vec::new()), trailers);
    let errors = section
        .find("errors")
        .map_or(Some(ErrorPages::default()), |value| {
            error_pages(&value, context)
        });
    let is_logged = match section.find("log") {
        Some(value) => value.switch().map(Some),
        None => Some(None),
    };
    section.later("tls");
    section.finish();
    let (host, path) = parsed_match?;
    let (action, (policies, policy_spots)) = (action?, policies?.into_iter().unzip());
    let name_text = match given {
        Some(given) => given?.to_owned(),
        None => default_name(&action, number, context),
    };
    let listener = match listener {
        Some(listener) => Some(listener?),
        None => None,
    };
    let route = Route {
        name: name_text,
        listener,
        host,
        path,
        policies,
        action,
        timeout: timeout?,
        retry: retry?,
        hedge: hedge?,
        trailers: trailers?,
        errors: errors?,
        is_logged: is_logged?,
        at: section.spot.origin(),
    };
    let matching = matching.map_or(section.spot, |value| value.spot);
    Some(RouteDraft {
        route,
        matching,
        policies: policy_spots,
        name: name.map(|value| value.spot),
    })
}

fn asks(action: &Action) -> bool {
    matches!(action, Action::Upstream(_))
}

fn default_name(action: &Action, number: usize, context: &Context<'_>) -> String {
    let upstream = match action {
        Action::Upstream(shares) => shares
            .first()
            .and_then(|(index, _)| context.upstreams.name(*index)),
        _ => None,
    };
    upstream.map_or_else(|| format!("route-{number}"), str::to_owned)
}

fn serving_listener<'s>(
    value: &Value<'s>,
    context: &Context<'s>,
    listeners: &[Option<ListenerDraft<'s>>],
) -> Option<usize> {
    let index = context.listeners.resolve(value)?;
    let Some(Some(draft)) = listeners.get(index) else {
        return Some(index);
    };
    if let ListenerMode::Forward { .. } = draft.listener.mode {
        let message = format!(
            "the listener `{}` forwards in the kernel, where there are no routes",
            draft.listener.name
        );
        return value
            .spot
            .refuse_with(message, "", draft.section, "it forwards");
    }
    Some(index)
}

/// `{ host = "...", path = "..." }`; what is absent matches everything.
fn matching(value: &Value<'_>) -> Option<(HostMatch, PathMatch)> {
    let section = value.section()?;
    let host = section
        .find("host")
        .map_or(Some(HostMatch::Any), |value| value.parsed(parse_host));
    let path = section
        .find("path")
        .map_or(Some(PathMatch::Prefix("/".to_owned())), |value| {
            if value.is_table() {
                return value.spot.refuse(
                    "a regular expression as `path` is not supported by this version yet",
                    "",
                    None,
                );
            }
            value.parsed(parse_path)
        });
    for key in ["method", "header", "sni"] {
        section.later(key);
    }
    section.finish();
    Some((host?, path?))
}

fn policies<'s>(value: &Value<'s>, context: &Context<'s>) -> Option<Vec<(usize, Spot<'s>)>> {
    let items = value.one_or_more()?;
    if items.len() > POLICIES_MAX {
        return value.spot.refuse(
            format!("a route has at most {POLICIES_MAX} policies"),
            "",
            None,
        );
    }
    let (mut policies, mut is_good) = (Vec::<(usize, Spot<'s>)>::new(), true);
    for item in &items {
        let Some(index) = context.policies.resolve(item) else {
            is_good = false;
            continue;
        };
        if let Some((_, first)) = policies.iter().find(|(known, _)| *known == index) {
            is_good = false;
            item.spot.refuse_with::<()>(
                "the route runs this policy twice",
                "named again",
                *first,
                "named first",
            );
        }
        policies.push((index, item.spot));
    }
    is_good.then_some(policies)
}

/// Names of trailers. Nothing that frames, routes, authenticates or describes the body: who reads such a field behind the
/// body has acted without it already (RFC 9110 section 6.5.1).
fn trailers(value: &Value<'_>) -> Option<Vec<String>> {
    let is_early = |name: &str| {
        name.starts_with("content-")
            || name.starts_with("x-forwarded-")
            || NO_TRAILERS.contains(&name)
    };
    let items = value.one_or_more()?;
    if items.len() > TRAILERS_MAX {
        let message = format!("a route lists at most {TRAILERS_MAX} trailers");
        return value.spot.refuse(message, "", None);
    }
    let names = items.iter().map(|item| {
        item.parsed(|text| {
            let name = parse_field_name(text)?;
            if is_early(&name) {
                return Err(format!(
                    "`{name}` cannot be a trailer: it has to be known before the body"
                ));
            }
            Ok(name)
        })
    });
    names.collect::<Vec<_>>().into_iter().collect()
}
