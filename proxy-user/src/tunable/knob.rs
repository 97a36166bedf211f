//! One knob: what it is, when a change of it is felt, how its values are written and which are allowed.

use std::time::Duration;

use super::{TunableError, unit};

/// When a changed value is felt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// At once.
    Live,
    /// By connections (or flows, or calls) that begin after the change.
    New,
    /// When Sluice starts the next time.
    Restart,
}

/// What a value is: how it is written, and in which unit the raw number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Milliseconds; written `10s`, `250ms`.
    Duration,
    /// Bytes; written `16KiB`.
    Bytes,
    /// Bytes per second; written `240B/s`.
    ByteRate,
    /// A whole number.
    Count,
    /// A whole number that is a power of two.
    Power,
    /// One of these words; the raw number is its index.
    Word(&'static [&'static str]),
}

/// One knob: a row of the tree.
#[derive(Clone, Copy, Debug)]
pub struct Tunable {
    /// `area.knob`, lower snake case.
    pub key: &'static str,
    pub kind: Kind,
    /// In the unit of `kind`, as are `min` and `max`, both included.
    pub default: u64,
    pub min: u64,
    pub max: u64,
    pub class: Class,
    /// One line.
    pub help: &'static str,
}

impl Tunable {
    /// Parse a value in its range.
    ///
    /// # Errors
    /// Unreadable, or outside of the range.
    pub fn parse(&self, text: &str) -> Result<u64, TunableError> {
        let text = text.trim();
        let invalid = |reason| TunableError::Invalid {
            key: self.key,
            reason,
        };
        let value = match self.kind {
            Kind::Duration => {
                let duration = unit::parse_duration(text).map_err(invalid)?;
                if !duration.subsec_nanos().is_multiple_of(1_000_000) {
                    return Err(invalid(format!(
                        "`{}` is finer than a millisecond",
                        unit::shown(text)
                    )));
                }
                u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
            }
            Kind::Bytes => unit::parse_size(text).map_err(invalid)?,
            Kind::ByteRate => unit::parse_byte_rate(text).map_err(invalid)?,
            Kind::Count | Kind::Power => parse_count(text).map_err(invalid)?,
            Kind::Word(words) => return parse_word(text, words).map_err(invalid),
        };
        let fits = (self.min..=self.max).contains(&value)
            && (self.kind != Kind::Power || value.is_power_of_two());
        if fits {
            return Ok(value);
        }
        Err(TunableError::OutOfRange {
            key: self.key,
            value: self.format(value),
            range: self.range(),
        })
    }

    /// A raw value as it is printed, and read back.
    pub fn format(&self, value: u64) -> String {
        match self.kind {
            Kind::Duration => unit::format_duration(Duration::from_millis(value)),
            Kind::Bytes => unit::format_size(value),
            Kind::ByteRate => format!("{}/s", unit::format_size(value)),
            Kind::Count | Kind::Power => value.to_string(),
            Kind::Word(words) => usize::try_from(value)
                .ok()
                .and_then(|index| words.get(index))
                .unwrap_or(&"")
                .to_string(),
        }
    }

    /// What may be written, in words: `1s to 1h`, `drop, keep or refuse`.
    pub fn range(&self) -> String {
        let (min, max) = (self.format(self.min), self.format(self.max));
        match self.kind {
            Kind::Word(words) => list(words, "or"),
            Kind::Power => format!("a power of two from {min} to {max}"),
            _ => format!("{min} to {max}"),
        }
    }
}

impl Class {
    /// The word for it in `sysctl --long` and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::New => "new",
            Self::Restart => "restart",
        }
    }
}

impl Kind {
    /// The word for it in `sysctl --long` and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Duration => "duration",
            Self::Bytes => "size",
            Self::ByteRate => "bytes per second",
            Self::Count | Self::Power => "count",
            Self::Word(_) => "word",
        }
    }
}

fn parse_count(text: &str) -> Result<u64, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let count = if digits { text.parse().ok() } else { None };
    count.ok_or_else(|| format!("`{}` is no whole number", unit::shown(text)))
}

fn parse_word(text: &str, words: &[&'static str]) -> Result<u64, String> {
    if let Some(index) = words.iter().position(|word| *word == text) {
        return Ok(index as u64);
    }
    let meant = unit::nearest(text, words.iter().copied());
    let meant = meant
        .map(|word| format!("; did you mean `{word}`?"))
        .unwrap_or_default();
    Err(format!(
        "`{}` is not one of {}{meant}",
        unit::shown(text),
        list(words, "or")
    ))
}

/// `a, b or c`.
pub fn list(words: &[&str], and: &str) -> String {
    match words {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} {and} {last}", first.join(", ")),
    }
}
