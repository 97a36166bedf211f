//! How long a route waits, what it tries again, when it asks twice; and when an upstream is left alone for a while.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::table::{Value, optional};
use crate::tunable::unit;

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);
/// Longest time for an exchange.
const EXCHANGE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Times of a call, as of the tunables that they stand for.
const CALL_TIMES: RangeInclusive<Duration> = Duration::from_millis(10)..=HOUR;
const RETRIES_MAX: u32 = 10;
/// Calls beside the first one that one request may have under way.
const HEDGES_MAX: u32 = 3;

/// A route's own deadlines; what is absent is the tunable's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeout {
    /// Whole exchange, from the end of the request's head to the end of the response; `http.exchange_timeout`.
    pub exchange: Option<Duration>,
    /// A connection to an endpoint; `upstream.connect_timeout`.
    pub connect: Option<Duration>,
    /// From the last byte of the request to the head of the response; `upstream.head_timeout`.
    pub first_byte: Option<Duration>,
    /// The next bytes of either body; `http.body_timeout` and `upstream.body_timeout`.
    pub idle: Option<Duration>,
}

/// What a route tries again; what is absent is the tunable's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    /// Tries after the first; `upstream.retries`.
    pub retries: Option<u32>,
    pub on: RetryOn,
    /// Longest time of one try, from its beginning to the head of the response.
    pub per_try: Option<Duration>,
    /// Longest wait before the first retry, doubled for each one after it; `upstream.retry_backoff`.
    pub backoff: Option<Duration>,
}

/// Which failures are worth another try. Only the first of them leaves no doubt that nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryOn {
    /// There is no connection: refused, unreachable, or not in time.
    pub connect: bool,
    /// The connection ended before the head of a response.
    pub reset: bool,
    /// The status of the response is 500 or above.
    pub server_error: bool,
    /// No head of a response came in time.
    pub timeout: bool,
}

impl Default for RetryOn {
    /// What can be tried again without a surprise.
    fn default() -> Self {
        Self {
            connect: true,
            reset: true,
            server_error: false,
            timeout: false,
        }
    }
}

/// A route that asks another endpoint, too, when the first one takes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hedge {
    pub after: HedgeAfter,
    /// Calls beside the first one.
    pub max: u32,
}

/// How long is long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HedgeAfter {
    Time(Duration),
    /// Longer than so many of a hundred calls of this route took.
    Percentile(u32),
}

/// When an upstream that fails is left alone for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breaker {
    /// Calls that fail, of a hundred, that open it.
    pub share_percent: u32,
    /// With fewer calls in a window nothing is concluded.
    pub calls_min: u32,
    pub window: Duration,
    /// How long nobody is asked; then one call is let through, and decides.
    pub open: Duration,
}

/// `{ exchange = "10s", connect = "1s", first_byte = "5s", idle = "30s" }`, any of them.
pub(super) fn timeout(value: &Value<'_>) -> Option<Timeout> {
    let section = value.section()?;
    let time = |key: &'static str, range: RangeInclusive<Duration>| {
        optional(section.find(key).map(|value| value.duration(range)))
    };
    let exchange = time("exchange", *CALL_TIMES.start()..=EXCHANGE_MAX);
    let connect = time("connect", CALL_TIMES);
    let first_byte = time("first_byte", CALL_TIMES);
    let idle = time("idle", CALL_TIMES);
    section.finish();
    let timeout = Timeout {
        exchange: exchange?,
        connect: connect?,
        first_byte: first_byte?,
        idle: idle?,
    };
    if timeout == Timeout::default() {
        return value.spot.refuse(
            "`timeout` names no time",
            "",
            Some("write it like { exchange = \"10s\" }".to_owned()),
        );
    }
    Some(timeout)
}

/// `{ retries = 2, on = ["connect", "5xx"], per_try = "1s", backoff = "25ms" }`.
pub(super) fn retry(value: &Value<'_>) -> Option<Retry> {
    let section = value.section()?;
    let retries = section
        .find("retries")
        .map(|value| value.number(0..=RETRIES_MAX));
    let on = section
        .find("on")
        .map_or(Some(RetryOn::default()), |value| retry_on(&value));
    let per_try = section
        .find("per_try")
        .map(|value| value.duration(CALL_TIMES));
    let backoff = section
        .find("backoff")
        .map(|value| value.duration(Duration::ZERO..=60_000 * MS));
    section.finish();
    Some(Retry {
        retries: optional(retries)?,
        on: on?,
        per_try: optional(per_try)?,
        backoff: optional(backoff)?,
    })
}

fn retry_on(value: &Value<'_>) -> Option<RetryOn> {
    let words = ["connect", "reset", "5xx", "timeout"];
    let items = value.one_or_more()?;
    let words = words.map(|word| (word, word));
    // All of them are looked at before the first wrong one ends it.
    let named: Vec<Option<&str>> = items.iter().map(|item| item.word(&words, &[])).collect();
    let named: Vec<&str> = named.into_iter().collect::<Option<_>>()?;
    if named.is_empty() {
        return value.spot.refuse(
            "`on` names no failure",
            "",
            Some("to try nothing again, write retries = 0".to_owned()),
        );
    }
    Some(RetryOn {
        connect: named.contains(&"connect"),
        reset: named.contains(&"reset"),
        server_error: named.contains(&"5xx"),
        timeout: named.contains(&"timeout"),
    })
}

/// `{ after = "p95", max = 1 }`, or a time in place of the percentile.
pub(super) fn hedge(value: &Value<'_>) -> Option<Hedge> {
    let section = value.section()?;
    let after = section.need("after", "after = \"p95\"").and_then(|value| {
        match value.text()?.strip_prefix('p') {
            Some(_) => value.parsed(parse_percentile).map(HedgeAfter::Percentile),
            None => value.duration(MS..=HOUR).map(HedgeAfter::Time),
        }
    });
    let max = section
        .find("max")
        .map_or(Some(1), |value| value.number(1..=HEDGES_MAX));
    section.finish();
    Some(Hedge {
        after: after?,
        max: max?,
    })
}

fn parse_percentile(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix('p').unwrap_or_default();
    match digits.parse() {
        Ok(percentile @ 50..=99) if digits.len() == 2 => Ok(percentile),
        _ => Err(format!(
            "`{}` is no percentile: write it like p95 (p50 to p99), or as a time like 50ms",
            unit::shown(text)
        )),
    }
}

/// `{ share = "50%", calls_min = 20, window = "10s", open = "5s" }`, any of them.
pub(super) fn breaker(value: &Value<'_>) -> Option<Breaker> {
    let section = value.section()?;
    let share = section.find("share").map_or(Some(50), |value| {
        let percent = value.parsed(unit::parse_percent)?;
        if percent == 0 {
            return value.spot.refuse(
                "a `share` of 0% would be reached by no failure at all",
                "expected 1% to 100%",
                None,
            );
        }
        Some(percent)
    });
    let calls_min = section
        .find("calls_min")
        .map_or(Some(20), |value| value.number(1..=1_000_000));
    let time = |key: &'static str, default_ms: u32| {
        section.find(key).map_or(Some(default_ms * MS), |value| {
            value.duration(100 * MS..=HOUR)
        })
    };
    let (window, open) = (time("window", 10_000), time("open", 5_000));
    section.finish();
    Some(Breaker {
        share_percent: share?,
        calls_min: calls_min?,
        window: window?,
        open: open?,
    })
}
