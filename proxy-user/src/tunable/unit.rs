//! Durations, sizes and rates as operators write them: `1m30s`, `16KiB`, `100/s`. Parsing, and the way back.

use std::time::Duration;

/// Units of a duration, biggest first, in microseconds.
const DURATION_UNITS: [(&str, u64); 6] = [
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("m", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1_000),
    ("us", 1),
];

/// Units of a size, biggest first, in bytes. Only binary ones: `16k` means two things to two people.
const SIZE_UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// A rate: so many events in a unit of time, as written in `100/s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Events per `per`; at least 1.
    pub count: u32,
    /// The unit of time: a second, a minute or an hour.
    pub per: Duration,
}

impl Rate {
    /// Nanoseconds per event, rounded down; at least 1.
    pub fn interval_ns(self) -> u64 {
        let per_ns = u64::try_from(self.per.as_nanos()).unwrap_or(u64::MAX);
        (per_ns / u64::from(self.count.max(1))).max(1)
    }
}

/// Parse a duration: whole numbers, each with its unit, bigger units first: `10s`, `250ms`, `1m30s`. `0` needs no unit.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    const FORM: &str = "write it like 10s, 250ms or 1m30s (units: d, h, m, s, ms, us)";
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total_us: u64 = 0;
    let mut smallest = u64::MAX;
    if rest.is_empty() {
        return Err(format!("an empty duration: {FORM}"));
    }
    while !rest.is_empty() {
        let (number, after) = split_number(rest)
            .ok_or_else(|| format!("`{}` is no duration: {FORM}", shown(text)))?;
        let end = after
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(after.len());
        let (word, after) = after.split_at(end);
        if word.is_empty() {
            return Err(format!(
                "the duration `{}` has a number without a unit: {FORM}",
                shown(text)
            ));
        }
        let Some((_, unit_us)) = DURATION_UNITS.iter().find(|(name, _)| *name == word) else {
            return Err(format!("`{}` is no unit of time: {FORM}", shown(word)));
        };
        if *unit_us >= smallest {
            return Err(format!(
                "the units of `{}` do not get smaller: {FORM}",
                shown(text)
            ));
        }
        smallest = *unit_us;
        total_us = number
            .checked_mul(*unit_us)
            .and_then(|us| total_us.checked_add(us))
            .ok_or_else(|| format!("the duration `{}` is too long to count", shown(text)))?;
        rest = after;
    }
    Ok(Duration::from_micros(total_us))
}

/// The shortest exact way to write a duration (below a microsecond is cut off): `1m30s`.
pub fn format_duration(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (name, unit_us) in DURATION_UNITS {
        if rest >= unit_us {
            text.push_str(&format!("{}{name}", rest / unit_us));
            rest %= unit_us;
        }
    }
    text
}

/// Parse a size in bytes: one whole number with a binary unit: `512B`, `16KiB`, `1MiB`. `0` needs no unit.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_size(text: &str) -> Result<u64, String> {
    const FORM: &str = "write it like 512B, 16KiB or 1MiB (units: B, KiB, MiB, GiB, TiB)";
    let Some((number, word)) = split_number(text) else {
        return Err(format!("`{}` is no size: {FORM}", shown(text)));
    };
    if number == 0 && word.is_empty() {
        return Ok(0);
    }
    if word.is_empty() {
        return Err(format!("the size `{}` has no unit: {FORM}", shown(text)));
    }
    let Some((_, unit)) = SIZE_UNITS.iter().find(|(name, _)| *name == word) else {
        return Err(format!("`{}` is no unit of size: {FORM}", shown(word)));
    };
    number
        .checked_mul(*unit)
        .ok_or_else(|| format!("the size `{}` is too big to count", shown(text)))
}

/// The shortest exact way to write a size: `16KiB`, `1000B`.
pub fn format_size(bytes: u64) -> String {
    let exact = SIZE_UNITS
        .iter()
        .find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit));
    let (name, unit) = exact.unwrap_or(&("B", 1));
    format!("{}{name}", bytes / unit)
}

/// Parse bytes per second: a size and `/s`: `240B/s`, `1KiB/s`. `0` needs neither.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_byte_rate(text: &str) -> Result<u64, String> {
    if text == "0" {
        return Ok(0);
    }
    let Some(size) = text.strip_suffix("/s") else {
        return Err(format!(
            "`{}` is no rate of bytes: write it like 240B/s or 1KiB/s",
            shown(text)
        ));
    };
    parse_size(size)
}

/// Parse a share: `50%`, 0 to 100 of a hundred.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').and_then(split_number);
    match number {
        Some((number @ 0..=100, "")) => Ok(number as u32),
        _ => Err(format!(
            "`{}` is no share: write it like 50% (0% to 100%)",
            shown(text)
        )),
    }
}

/// Parse a rate of events: `100/s`, `5/m`, `1000/h`.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_rate(text: &str) -> Result<Rate, String> {
    const FORM: &str = "write it like 100/s, 5/m or 1000/h";
    let Some((count, unit)) = text.split_once('/') else {
        return Err(format!("`{}` is no rate: {FORM}", shown(text)));
    };
    let per = match unit {
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        "h" => Duration::from_secs(3600),
        _ => {
            return Err(format!(
                "`{}` is no unit of a rate (s, m or h): {FORM}",
                shown(unit)
            ));
        }
    };
    let count = match split_number(count) {
        Some((count, "")) => count,
        _ => return Err(format!("`{}` is no whole number: {FORM}", shown(count))),
    };
    match u32::try_from(count) {
        Ok(0) => Err(format!("a rate of 0 would refuse everything: {FORM}")),
        Ok(count) if count <= 1_000_000_000 => Ok(Rate { count, per }),
        _ => Err(format!("the rate `{}` is above 1000000000", shown(text))),
    }
}

/// What the operator wrote, made fit for a message: short, and without control characters.
pub fn shown(text: &str) -> String {
    let mut short: String = text
        .chars()
        .take(60)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if text.chars().nth(60).is_some() {
        short.push('…');
    }
    short
}

/// The name among `known` that was probably meant, if one is near enough.
pub fn nearest<'k>(wrong: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let wrong = wrong
        .get(..wrong.len().min(128))
        .unwrap_or(wrong)
        .to_ascii_lowercase()
        .replace('-', "_");
    let allowed = (wrong.chars().count() / 3).clamp(1, 4);
    known
        .into_iter()
        .filter(|name| name.len().abs_diff(wrong.len()) <= 4 * allowed)
        .map(|name| {
            (
                strsim::damerau_levenshtein(&wrong, &name.to_ascii_lowercase().replace('-', "_")),
                name,
            )
        })
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Leading decimal digits as a number, and what follows them; `None` without digits or beyond u64.
fn split_number(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    Some((digits.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        let good = [
            ("10s", 10_000),
            ("250ms", 250),
            ("1m30s", 90_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
            ("0", 0),
            ("0s", 0),
        ];
        for (text, ms) in good {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in [
            "",
            "10",
            "s",
            "10 s",
            "1.5s",
            "-1s",
            "30s1m",
            "1s1s",
            "10sec",
            "99999999999999999999s",
            "999999999999999d",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_formatted_duration_reads_back_as_itself() {
        for us in [
            0,
            1,
            999,
            1_000,
            1_500_000,
            60_000_000,
            90_000_000,
            86_400_000_000,
            90_061_001_001,
        ] {
            let duration = Duration::from_micros(us);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
        assert_eq!(format_duration(Duration::from_secs(90)), "1m30s");
    }

    #[test]
    fn sizes_need_a_binary_unit_and_read_back_as_themselves() {
        for (text, bytes) in [
            ("0", 0),
            ("512B", 512),
            ("16KiB", 16_384),
            ("1MiB", 1 << 20),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "16",
            "16k",
            "16KB",
            "KiB",
            "1.5MiB",
            "-1B",
            "16 KiB",
            "99999999TiB",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for bytes in [0, 1, 1000, 1024, 1025, 16_384, 3 << 20] {
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
    }

    #[test]
    fn a_rate_knows_how_far_apart_its_events_are() {
        let interval = |text| parse_rate(text).map(Rate::interval_ns);
        assert_eq!(interval("100/s"), Ok(10_000_000));
        assert_eq!(interval("5/m"), Ok(12_000_000_000));
        assert_eq!(interval("1000/h"), Ok(3_600_000_000));
        for text in [
            "",
            "100",
            "0/s",
            "100/x",
            "/s",
            "1.5/s",
            "-1/s",
            "99999999999/s",
        ] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_slip_of_the_finger_finds_the_name_that_was_meant_and_nonsense_finds_none() {
        let known = ["upstream", "endpoints", "rate_limit"];
        assert_eq!(nearest("upstraem", known), Some("upstream"));
        assert_eq!(nearest("rate-limit", known), Some("rate_limit"));
        assert_eq!(nearest("endpoint", known), Some("endpoints"));
        assert_eq!(nearest("zebra", known), None);
    }
}
