//! `balance` of an upstream, with what belongs to it: `candidates` of least_request, `hash` of maglev.

use super::field::parse_field_name;
use super::table::{Section, Value, optional};

/// Who of an upstream is asked next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Each in turn, by weight.
    RoundRobin,
    /// Any, by weight.
    Random,
    /// Of so many that are drawn by weight (`u32::MAX` = all), the one with the fewest calls under way for its weight.
    LeastRequest { candidates: u32 },
    /// Of two that are drawn by weight, the one that is expected to answer first.
    Ewma,
    /// The one that a Maglev ring has for something that the request says.
    Maglev(Hashing),
}

/// What of a request chooses its endpoint, and how far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashing {
    pub key: Attribute,
    /// Calls that an endpoint may have under way, in per cent of the mean of all; what is more goes to another that the ring has for it.
    pub load_percent_max: Option<u32>,
}

/// What of a request is hashed; the client's address where a request does not have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    Address,
    Host,
    /// The value of a header field (lower case name).
    Header(String),
    Cookie(String),
    Path,
    /// The whole query.
    Query,
    /// One parameter of the query.
    Parameter(String),
    /// What the template of the route's path captured.
    Capture(String),
}

/// Endpoints that least_request may compare, short of all.
const CANDIDATES_MAX: u32 = 8;
/// Bounds of `load_percent_max`: at 100 every call would have to move, and far above nothing is bounded.
const LOAD_PERCENT_MIN: u32 = 105;
const LOAD_PERCENT_MAX: u32 = 1000;

pub(super) fn balance(section: &Section<'_>) -> Option<Balance> {
    let found = section.find("balance");
    let word = found.as_ref().map_or(Some("round_robin"), |value| {
        let words = ["round_robin", "least_request", "ewma", "maglev", "random"];
        value.word(&words.map(|word| (word, word)), &[])
    });
    let candidates = section.find("candidates");
    let hash = section.find("hash");
    let word = word?;
    let is_alone = belongs(candidates.as_ref(), word, "least_request")
        & belongs(hash.as_ref(), word, "maglev");
    let balance = match word {
        "least_request" => Balance::LeastRequest {
            candidates: candidates.as_ref().map_or(Some(2), self::candidates)?,
        },
        "ewma" => Balance::Ewma,
        "maglev" => Balance::Maglev(hash.as_ref().map_or(Some(by_address()), hashing)?),
        "random" => Balance::Random,
        _ => Balance::RoundRobin,
    };
    is_alone.then_some(balance)
}

/// A key that says something about one way of balancing only.
fn belongs(value: Option<&Value<'_>>, word: &str, wanted: &str) -> bool {
    let Some(value) = value.filter(|_| word != wanted) else {
        return true;
    };
    let message = format!("`{}` means nothing to `balance = \"{word}\"`", value.name);
    let help = format!("leave it out, or write balance = \"{wanted}\"");
    value.spot.refuse::<()>(message, "", Some(help));
    false
}

/// `2` to `8`, or `"all"`.
fn candidates(value: &Value<'_>) -> Option<u32> {
    match value.as_text() {
        Some(_) => value.word(&[("all", u32::MAX)], &[]),
        None => value.number(2..=CANDIDATES_MAX),
    }
}

fn by_address() -> Hashing {
    Hashing {
        key: Attribute::Address,
        load_percent_max: None,
    }
}

/// `"cookie:user"`, or `{ key = "cookie:user", load_percent_max = 125 }`.
fn hashing(value: &Value<'_>) -> Option<Hashing> {
    if !value.is_table() {
        let key = attribute(value)?;
        return Some(Hashing {
            key,
            load_percent_max: None,
        });
    }
    let section = value.section()?;
    let key = section
        .find("key")
        .map_or(Some(Attribute::Address), |value| attribute(&value));
    let load_percent_max = section
        .find("load_percent_max")
        .map(|value| value.number(LOAD_PERCENT_MIN..=LOAD_PERCENT_MAX));
    section.finish();
    Some(Hashing {
        key: key?,
        load_percent_max: optional(load_percent_max)?,
    })
}

fn attribute(value: &Value<'_>) -> Option<Attribute> {
    let text = value.text()?;
    if let Some((kind @ ("header" | "cookie" | "query" | "capture"), name)) = text.split_once(':') {
        return value.parsed(|_| match kind {
            "header" => parse_field_name(name).map(Attribute::Header),
            "cookie" => parse_cookie_name(name).map(Attribute::Cookie),
            "capture" => Ok(Attribute::Capture(name.to_owned())),
            _ => parse_parameter_name(name).map(Attribute::Parameter),
        });
    }
    let words = [
        ("address", Some(Attribute::Address)),
        ("host", Some(Attribute::Host)),
        ("path", Some(Attribute::Path)),
        ("query", Some(Attribute::Query)),
        ("header:NAME", None),
        ("cookie:NAME", None),
        ("query:NAME", None),
        ("capture:NAME", None),
    ];
    match value.word(&words, &[])? {
        Some(key) => Some(key),
        None => value
            .spot
            .refuse("NAME stands for a name", "", Some(help())),
    }
}

fn help() -> String {
    "write it like cookie:session".to_owned()
}

/// A token, whose case counts (RFC 6265 section 4.1.1).
pub(super) fn parse_cookie_name(name: &str) -> Result<String, String> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || name.len() > 256 || !name.bytes().all(is_token) {
        return Err("this is no name of a cookie: letters, digits, `-`, `_` and `.`".to_owned());
    }
    Ok(name.to_owned())
}

/// As it stands in the query, before its `=`.
fn parse_parameter_name(name: &str) -> Result<String, String> {
    let stands = |byte: u8| (b'!'..=b'~').contains(&byte) && !b"#&=".contains(&byte);
    if name.is_empty() || name.len() > 256 || !name.bytes().all(stands) {
        return Err(
            "this is no name of a parameter: write it as it stands in the query, like query:user"
                .to_owned(),
        );
    }
    Ok(name.to_owned())
}
