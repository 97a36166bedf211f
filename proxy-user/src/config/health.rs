//! Of an `[[upstream]]`: what failing calls do to endpoints, when health is ignored, and how they come back.

use std::time::Duration;

use super::table::{Section, Value};
use crate::tunable::unit::shown;

const S: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// What follows from what is believed of endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// `None`: no call takes an endpoint out.
    pub eject: Option<Eject>,
    /// Where fewer of a hundred endpoints are healthy than this, health is ignored; 0 = never.
    pub panic_percent: u32,
    /// How long an endpoint that comes back takes to have its whole weight again; zero = no time.
    pub slow_start: Duration,
}

/// When calls that fail leave an endpoint out, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Eject {
    /// Failed calls in a row.
    pub failures: u32,
    /// Or this share of the calls within `window`, in per cent, once so many have ended in it.
    pub failed_percent: u32,
    pub calls_min: u32,
    pub window: Duration,
    /// Answers of these statuses are failures as well as calls without a whole answer.
    pub status: Statuses,
    /// The first time; twice as long each time it follows soon.
    pub duration: Duration,
    pub duration_max: Duration,
    /// At most so many of a hundred endpoints are out by this at a time.
    pub share_percent_max: u32,
}

/// Ranges of statuses, both ends included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statuses(Vec<(u16, u16)>);

impl Statuses {
    /// What a probe takes for good if it is not told: 200 to 399.
    pub fn good() -> Self {
        Self(vec![(200, 399)])
    }

    pub fn has(&self, status: u16) -> bool {
        self.0
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&status))
    }
}

impl Default for Health {
    fn default() -> Self {
        Self {
            eject: Some(Eject::default()),
            panic_percent: 50,
            slow_start: Duration::ZERO,
        }
    }
}

impl Default for Eject {
    fn default() -> Self {
        Self {
            failures: 5,
            failed_percent: 50,
            calls_min: 20,
            window: 10 * S,
            status: Statuses::default(),
            duration: 10 * S,
            duration_max: 5 * MINUTE,
            share_percent_max: 50,
        }
    }
}

/// `eject`, `panic` and `slow_start`.
pub(super) fn health(section: &Section<'_>) -> Option<Health> {
    let default = Health::default();
    let eject = section.find("eject").map(|value| eject(&value));
    let panic = section
        .find("panic")
        .map(|value| value.parsed(|text| percent(text, 0)));
    let slow_start = section
        .find("slow_start")
        .map(|value| value.duration(Duration::ZERO..=HOUR));
    Some(Health {
        eject: eject.unwrap_or(Some(default.eject))?,
        panic_percent: panic.unwrap_or(Some(default.panic_percent))?,
        slow_start: slow_start.unwrap_or(Some(default.slow_start))?,
    })
}

/// `{ failures = 5, for = "10s" }` and more, or `"off"`.
fn eject(value: &Value<'_>) -> Option<Option<Eject>> {
    if !value.is_table() {
        return value.word(&[("off", None)], &[]);
    }
    let section = value.section()?;
    let default = Eject::default();
    let number = |key, otherwise| {
        let value = section.find(key);
        value.map_or(Some(otherwise), |value| value.number(1..=1_000_000))
    };
    let share = |key, otherwise| {
        let value = section.find(key);
        value.map_or(Some(otherwise), |value| {
            value.parsed(|text| percent(text, 1))
        })
    };
    let duration = |key, otherwise, max| {
        let value = section.find(key);
        value.map_or(Some(otherwise), |value| value.duration(S..=max))
    };
    let failures = number("failures", default.failures);
    let calls_min = number("calls_min", default.calls_min);
    let failed_percent = share("failed_share", default.failed_percent);
    let share_percent_max = share("share_max", default.share_percent_max);
    let window = duration("window", default.window, MINUTE);
    let first = duration("for", default.duration, HOUR);
    let longest = section.find("for_max");
    let duration_max = longest.as_ref().map(|value| value.duration(S..=24 * HOUR));
    let status = section.find("status").map(|value| statuses(&value));
    section.finish();
    let first = first?;
    let duration_max = duration_max.unwrap_or(Some(default.duration_max.max(first)))?;
    if let Some(longest) = longest.filter(|_| duration_max < first) {
        let help = "`for` is how long the first ejection lasts, and each that follows soon lasts twice as long, up to `for_max`";
        return longest
            .spot
            .refuse("`for_max` is shorter than `for`", "", Some(help.to_owned()));
    }
    Some(Some(Eject {
        failures: failures?,
        failed_percent: failed_percent?,
        calls_min: calls_min?,
        window: window?,
        status: status.unwrap_or(Some(default.status))?,
        duration: first,
        duration_max,
        share_percent_max: share_percent_max?,
    }))
}

/// Whole per cent, like `50%`, not below `min`.
fn percent(text: &str, min: u32) -> Result<u32, String> {
    let number = text
        .strip_suffix('%')
        .and_then(|number| number.parse().ok());
    number
        .filter(|number| (min..=100).contains(number))
        .ok_or_else(|| {
            format!(
                "`{}` is no share: write it like 50%, from {min}% to 100%",
                shown(text)
            )
        })
}

/// `"503"`, `"200-399"`, `"5xx"`, or a list of such.
pub(super) fn statuses(value: &Value<'_>) -> Option<Statuses> {
    let items = value.one_or_more()?;
    let ranges: Vec<_> = items.iter().map(|item| item.parsed(status_range)).collect();
    if ranges.is_empty() {
        return value.spot.refuse("no status is named", "", None);
    }
    ranges.into_iter().collect::<Option<_>>().map(Statuses)
}

fn status_range(text: &str) -> Result<(u16, u16), String> {
    if let Some(hundreds @ 2..=5) = text.strip_suffix("xx").and_then(|n| n.parse().ok()) {
        return Ok((hundreds * 100, hundreds * 100 + 99));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let status = |text: &str| {
        let is_whole = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
        let status = text.parse().ok().filter(|_| is_whole);
        status.filter(|status| (200..=599).contains(status))
    };
    match (status(first), status(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first, last)),
        _ => Err(format!(
            "`{}` is no status and no range of statuses: write it like 503, 500-599 or 5xx, from 200 to 599",
            shown(text)
        )),
    }
}
