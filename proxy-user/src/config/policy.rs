//! `[[policy]]`: one of `headers`, `api_key`, `rate_limit`.

use std::time::Duration;

use super::consumer::consumers;
use super::context::Context;
use super::field::{edit, parse_field_name};
use super::table::{Section, Value};
use super::{ApiKey, BanRule, HeaderEdit, Policy, PolicyKind, RateKey, RateLimit};
use crate::tunable::unit;

/// Highest burst of a rate and count before a ban.
const COUNT_MAX: u32 = 1_000_000;
/// How long a ban may last.
const BAN_MIN: Duration = Duration::from_secs(1);
const BAN_MAX: Duration = Duration::from_secs(24 * 3600);

pub(super) fn policy(section: &Section<'_>, context: &Context<'_>) -> Option<Policy> {
    let name = section.find("name").and_then(|value| value.as_text());
    let kinds = ["headers", "api_key", "rate_limit"].map(|key| section.find(key));
    let present: Vec<&Value<'_>> = kinds.iter().flatten().collect();
    let kind = match present.as_slice() {
        [value] => match value.name.as_str() {
            "headers" => headers(value, context),
            "api_key" => api_key(value, context),
            _ => rate_limit(value),
        },
        [] => section.spot.refuse(
            "a policy that does nothing",
            "",
            Some("give it headers, api_key or rate_limit".to_owned()),
        ),
        [first, second, ..] => {
            let message = format!(
                "a policy is one thing, and this one has `{}` and `{}`",
                first.name, second.name
            );
            second.spot.refuse_with(message, "", first.spot, "and this")
        }
    };
    section.finish();
    Some(Policy {
        name: name?.to_owned(),
        kind: kind?,
        at: section.spot.origin(),
    })
}

fn headers(value: &Value<'_>, context: &Context<'_>) -> Option<PolicyKind> {
    let section = value.section()?;
    let request = section
        .find("request")
        .map(|value| edit(&value, context, true));
    let response = section
        .find("response")
        .map(|value| edit(&value, context, false));
    section.finish();
    if request.is_none() && response.is_none() {
        return value.spot.refuse(
            "`headers` changes nothing",
            "",
            Some("give it request or response".to_owned()),
        );
    }
    let absent =
        |edit: Option<Option<HeaderEdit>>| edit.unwrap_or_else(|| Some(HeaderEdit::default()));
    Some(PolicyKind::Headers {
        request: absent(request)?,
        response: absent(response)?,
    })
}

fn api_key(value: &Value<'_>, context: &Context<'_>) -> Option<PolicyKind> {
    let section = value.section()?;
    let header = section
        .need("header", "header = \"x-api-key\"")
        .and_then(|value| value.parsed(parse_field_name));
    let found = section.need("consumers", "consumers = \"/etc/sluice/consumers.toml\"");
    let consumers = found.and_then(|value| consumers(&value, context));
    section.finish();
    Some(PolicyKind::ApiKey(ApiKey {
        header: header?,
        consumers: consumers?,
    }))
}

fn rate_limit(value: &Value<'_>) -> Option<PolicyKind> {
    let section = value.section()?;
    let key = section
        .need("key", "key = \"consumer\"")
        .and_then(|value| rate_key(&value));
    let rate = section
        .need("rate", "rate = \"100/s\"")
        .and_then(|value| value.parsed(unit::parse_rate));
    let burst = section
        .find("burst")
        .map(|value| value.number(1..=COUNT_MAX));
    let ban = section.find("ban").map(|value| ban(&value));
    section.finish();
    let rate = rate?;
    Some(PolicyKind::RateLimit(RateLimit {
        key: key?,
        interval_ns: rate.interval_ns(),
        // As much as the rate counts: `1000/h` lets an hour's worth come at once.
        burst: burst.unwrap_or(Some(rate.count.min(COUNT_MAX)))?,
        ban: match ban {
            Some(ban) => Some(ban?),
            None => None,
        },
    }))
}

fn rate_key(value: &Value<'_>) -> Option<RateKey> {
    if let Some(name) = value
        .as_text()
        .and_then(|text| text.strip_prefix("header:"))
    {
        return value
            .parsed(|_| parse_field_name(name))
            .map(RateKey::Header);
    }
    let words = [
        ("consumer", Some(RateKey::Consumer)),
        ("address", Some(RateKey::Address)),
        ("all", Some(RateKey::All)),
        ("header:NAME", None),
    ];
    match value.word(&words, &[])? {
        Some(key) => Some(key),
        None => value.spot.refuse(
            "NAME stands for the name of a field",
            "",
            Some("write it like header:x-tenant".to_owned()),
        ),
    }
}

fn ban(value: &Value<'_>) -> Option<BanRule> {
    let section = value.section()?;
    let after = section
        .need("after", "after = 50")
        .and_then(|value| value.number(1..=COUNT_MAX));
    let duration = section
        .need("for", "for = \"60s\"")
        .and_then(|value| value.duration(BAN_MIN..=BAN_MAX));
    section.finish();
    Some(BanRule {
        after: after?,
        duration: duration?,
    })
}
