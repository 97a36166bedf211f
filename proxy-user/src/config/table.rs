//! A checked walk over a TOML document: every question remembers its key, every wrong answer its place.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::problem::Spot;
use crate::tunable::{list, unit};

/// A value with its place and the words for it in messages (`timeout.exchange`).
#[derive(Clone)]
pub(super) struct Value<'s> {
    pub spot: Spot<'s>,
    pub name: String,
    value: &'s DeValue<'s>,
}

/// A table whose keys are asked for one by one; what nobody asked for is unknown.
pub(super) struct Section<'s> {
    pub spot: Spot<'s>,
    /// How messages call it: `[[listener]]`, `match`.
    pub name: String,
    table: &'s DeTable<'s>,
    asked: RefCell<Vec<&'static str>>,
}

/// What need not be there, but must be good where it is.
pub(super) fn optional<T>(part: Option<Option<T>>) -> Option<Option<T>> {
    match part {
        Some(part) => part.map(Some),
        None => Some(None),
    }
}

impl<'s> Value<'s> {
    /// What kind of value stands here, in words.
    fn kind(&self) -> &'static str {
        match self.value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        }
    }

    fn wrong_type<T>(&self, wanted: &str) -> Option<T> {
        let message = format!("`{}` is {wanted}, not {}", self.name, self.kind());
        self.spot
            .refuse(message, &format!("expected {wanted}"), None)
    }

    /// A string.
    pub fn text(&self) -> Option<&'s str> {
        match self.value {
            DeValue::String(text) => Some(text.as_ref()),
            _ => self.wrong_type("a string"),
        }
    }

    /// The string, if it is one.
    pub fn as_text(&self) -> Option<&'s str> {
        self.value.as_str()
    }

    /// A string, parsed; an error of the parser is a message about this place.
    pub fn parsed<T>(&self, parse: impl FnOnce(&'s str) -> Result<T, String>) -> Option<T> {
        match parse(self.text()?) {
            Ok(value) => Some(value),
            Err(message) => self.spot.refuse(message, "", None),
        }
    }

    /// `true`, and nothing else.
    pub fn yes(&self) -> Option<()> {
        match self.value {
            DeValue::Boolean(true) => Some(()),
            DeValue::Boolean(false) => self.spot.refuse(
                format!("leave `{}` out instead of false", self.name),
                "",
                None,
            ),
            _ => self.wrong_type("true"),
        }
    }

    /// `"on"` or `"off"`.
    pub fn switch(&self) -> Option<bool> {
        self.word(&[("on", true), ("off", false)], &[])
    }

    /// `true` or `false`.
    pub fn truth(&self) -> Option<bool> {
        match self.value {
            DeValue::Boolean(truth) => Some(*truth),
            _ => self.wrong_type("true or false"),
        }
    }

    /// A whole number in a range.
    pub fn number(&self, range: RangeInclusive<u32>) -> Option<u32> {
        let DeValue::Integer(integer) = self.value else {
            return self.wrong_type("a whole number");
        };
        let number = i64::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .and_then(|number| u32::try_from(number).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Some(number),
            None => {
                let (min, max) = (range.start(), range.end());
                let message = format!("`{}` is out of range", self.name);
                self.spot
                    .refuse(message, &format!("expected {min} to {max}"), None)
            }
        }
    }

    /// A duration in a range.
    pub fn duration(&self, range: RangeInclusive<Duration>) -> Option<Duration> {
        let duration = self.parsed(unit::parse_duration)?;
        if range.contains(&duration) {
            return Some(duration);
        }
        let (min, max) = (
            unit::format_duration(*range.start()),
            unit::format_duration(*range.end()),
        );
        self.spot.refuse(
            format!("`{}` is out of range", self.name),
            &format!("expected {min} to {max}"),
            None,
        )
    }

    /// One of these words.
    pub fn word<T: Clone>(&self, words: &[(&str, T)], later: &[&str]) -> Option<T> {
        let text = self.text()?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(value.clone());
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        if later.contains(&text) {
            let message = format!(
                "`{} = \"{text}\"` is not supported by this version yet",
                self.name
            );
            return self
                .spot
                .refuse(message, &format!("today: {}", list(&known, "or")), None);
        }
        let meant = unit::nearest(text, known.iter().copied())
            .map(|word| format!("did you mean `{word}`?"));
        let message = format!("`{}` is no value of `{}`", unit::shown(text), self.name);
        self.spot
            .refuse(message, &format!("expected {}", list(&known, "or")), meant)
    }

    /// A table.
    pub fn section(&self) -> Option<Section<'s>> {
        match self.value {
            DeValue::Table(table) => {
                Some(Section::new(self.spot, format!("`{}`", self.name), table))
            }
            _ => self.wrong_type("a table"),
        }
    }

    /// The tables of `[[listener]]` and its like.
    pub fn tables(&self) -> Vec<Section<'s>> {
        if self.value.is_table() {
            let help = format!("write [[{}]]: there can be several", self.name);
            return self
                .spot
                .refuse(
                    format!("`{}` is a list of tables, not a table", self.name),
                    "",
                    Some(help),
                )
                .unwrap_or_default();
        }
        let name = format!("[[{}]]", self.name);
        let named = |mut section: Section<'s>| {
            section.name.clone_from(&name);
            section
        };
        self.items()
            .unwrap_or_default()
            .iter()
            .filter_map(Value::section)
            .map(named)
            .collect()
    }

    pub fn is_table(&self) -> bool {
        self.value.is_table()
    }

    pub fn is_list(&self) -> bool {
        self.value.is_array()
    }

    /// The members of a list.
    pub fn items(&self) -> Option<Vec<Value<'s>>> {
        let DeValue::Array(array) = self.value else {
            return self.wrong_type("a list");
        };
        let items = array.iter().map(|item| Value {
            spot: self.spot.source.spot(self.spot.problems, item.span()),
            name: format!("{}[]", self.name),
            value: item.get_ref(),
        });
        Some(items.collect())
    }

    /// The members of a list, or the one value that stands for a list of one.
    pub fn one_or_more(&self) -> Option<Vec<Value<'s>>> {
        if self.is_list() {
            self.items()
        } else {
            Some(vec![self.clone()])
        }
    }

    /// The value as `[tunables]` takes it: a string, a whole number.
    pub fn scalar(&self) -> Option<String> {
        match self.value {
            DeValue::String(text) => Some(text.clone().into_owned()),
            DeValue::Integer(integer) if integer.radix() == 10 => Some(integer.as_str().to_owned()),
            _ => self.wrong_type("a string or a whole number"),
        }
    }
}

impl<'s> Section<'s> {
    pub fn new(spot: Spot<'s>, name: String, table: &'s DeTable<'s>) -> Self {
        Self {
            spot,
            name,
            table,
            asked: RefCell::default(),
        }
    }

    /// The value of a key, if it is there.
    pub fn find(&self, key: &'static str) -> Option<Value<'s>> {
        self.asked.borrow_mut().push(key);
        let (_, value) = self.table.iter().find(|(name, _)| name.get_ref() == key)?;
        let spot = self.spot.source.spot(self.spot.problems, value.span());
        Some(Value {
            spot,
            name: key.to_owned(),
            value: value.get_ref(),
        })
    }

    /// The value of a key that must be there; `example` shows how it is written.
    pub fn need(&self, key: &'static str, example: &str) -> Option<Value<'s>> {
        match self.find(key) {
            Some(value) => Some(value),
            None => {
                let message = format!("{} has no `{key}`", self.name);
                self.spot
                    .refuse(message, "", Some(format!("write it like `{example}`")))
            }
        }
    }

    /// Whether the key is there.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// A key that is promised and not there yet.
    pub fn later(&self, key: &'static str) {
        if let Some(value) = self.find(key) {
            value.spot.refuse::<()>(
                format!("`{key}` is not supported by this version yet"),
                "",
                None,
            );
        }
    }

    /// Every entry in the order written, for tables whose keys are free.
    pub fn entries(&self) -> Vec<(&'s str, Spot<'s>, Value<'s>)> {
        let mut entries: Vec<_> = self.table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let spot = |span| self.spot.source.spot(self.spot.problems, span);
        let entries = entries.into_iter().map(|(key, value)| {
            let name = key.get_ref().to_string();
            (
                key.get_ref().as_ref(),
                spot(key.span()),
                Value {
                    spot: spot(value.span()),
                    name,
                    value: value.get_ref(),
                },
            )
        });
        entries.collect()
    }

    /// Complain about every key that nobody asked for.
    pub fn finish(&self) {
        let asked = self.asked.borrow();
        for (key, spot, _) in self.entries() {
            if asked.contains(&key) {
                continue;
            }
            let help = match unit::nearest(key, asked.iter().copied()) {
                _ if self.spot.source.is_secret => None,
                Some(meant) => Some(format!("did you mean `{meant}`?")),
                None => {
                    let mut known = asked.clone();
                    known.sort_unstable();
                    known.dedup();
                    Some(format!("it knows {}", list(&known, "and")))
                }
            };
            // In a file of secrets even a key may be one, written in the wrong place.
            let shown = if self.spot.source.is_secret {
                String::new()
            } else {
                format!(" `{}`", unit::shown(key))
            };
            spot.refuse::<()>(format!("unknown key{shown} in {}", self.name), "", help);
        }
    }
}
