//! The sysctl tree: every limit with its name, unit, range, default, class and origin; one snapshot of all values.
//!
//! A knob is added in one place, the list in `tree`. A key names it everywhere: `http.head_timeout` in
//! `[tunables]`, in `--set`, in a drop-in file and in `sluice sysctl`; `tunables.http.head_timeout` in code.

mod drop_in;
mod knob;
mod sysctl;
mod tree;
pub mod unit;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use drop_in::{
    Assignment, BadLine, DIRECTORIES, LOCAL_FILE, in_drop_in_directory, parse_assignment,
    parse_file, select,
};
pub use knob::{Class, Kind, Tunable, list};
pub use sysctl::{Answer, Form, Query, render, write};
pub use tree::{
    EncodedSlash, ForwardedFields, MssClamp, NetBackend, TREE, UnderscoreFields, Values,
};

/// Where a value came from: what error messages, `status` and `sysctl --long` name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Built in.
    Default,
    /// A place in a file; line and column count from 1.
    File {
        path: Arc<str>,
        line: u32,
        column: u32,
    },
    /// A flag of the command line.
    Flag,
    /// Set at run time, over the admin socket.
    Runtime,
}

/// Every value at one moment, with where it came from. Immutable once shared: control makes a changed copy and
/// swaps the whole. Code reads plain fields: `tunables.http.head_timeout`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tunables {
    values: Values,
    /// By index in `TREE`.
    raw: Vec<u64>,
    origins: Vec<Origin>,
}

/// One value that was assigned.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub key: &'static str,
    /// As they would be printed.
    pub before: String,
    pub after: String,
    pub class: Class,
    /// Where the value before came from.
    pub origin_before: Origin,
    pub origin: Origin,
}

/// Why a value was not assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunableError {
    /// No such key; the nearest one, if any is near.
    Unknown {
        key: String,
        nearest: Option<&'static str>,
    },
    /// Not written as a value of this kind; a sentence.
    Invalid { key: &'static str, reason: String },
    /// Outside of its range.
    OutOfRange {
        key: &'static str,
        value: String,
        range: String,
    },
    /// Read only at start, so a value given at run time would never be felt.
    OnlyAtStart { key: &'static str, value: String },
}

impl Default for Tunables {
    fn default() -> Self {
        let raw: Vec<u64> = TREE.iter().map(|tunable| tunable.default).collect();
        Self {
            values: Values::from_raw(&raw),
            origins: vec![Origin::Default; raw.len()],
            raw,
        }
    }
}

impl std::ops::Deref for Tunables {
    type Target = Values;

    fn deref(&self) -> &Values {
        &self.values
    }
}

impl Tunables {
    /// Assign one value; the last assignment wins, so the caller assigns the weakest source first.
    ///
    /// # Errors
    /// Unknown key, unreadable value, value out of range, or a `Class::Restart` knob at run time; nothing is changed then.
    pub fn assign(
        &mut self,
        key: &str,
        text: &str,
        origin: Origin,
    ) -> Result<Change, TunableError> {
        let key = normal_key(key);
        let Some(index) = TREE.iter().position(|tunable| tunable.key == key) else {
            let nearest = unit::nearest(&key, TREE.iter().map(|tunable| tunable.key));
            return Err(TunableError::Unknown {
                key: unit::shown(&key),
                nearest,
            });
        };
        let tunable = &TREE[index];
        let value = tunable.parse(text)?;
        if origin == Origin::Runtime && tunable.class == Class::Restart {
            return Err(TunableError::OnlyAtStart {
                key: tunable.key,
                value: tunable.format(value),
            });
        }
        let change = Change {
            key: tunable.key,
            before: tunable.format(self.raw[index]),
            after: tunable.format(value),
            class: tunable.class,
            origin_before: std::mem::replace(&mut self.origins[index], origin.clone()),
            origin,
        };
        self.raw[index] = value;
        self.values = Values::from_raw(&self.raw);
        Ok(change)
    }

    /// Take over what was set at run time: a reload reads the files again but forgets nothing that `sysctl -w` said.
    pub fn keep_runtime(&mut self, previous: &Self) {
        for (index, origin) in previous.origins.iter().enumerate() {
            if *origin == Origin::Runtime {
                self.raw[index] = previous.raw[index];
                self.origins[index] = Origin::Runtime;
            }
        }
        self.values = Values::from_raw(&self.raw);
    }

    /// Keep the values of `Class::Restart` knobs as they run; answers the keys whose new value waits for a restart.
    pub fn keep_until_restart(&mut self, running: &Self) -> Vec<&'static str> {
        let mut waiting = Vec::new();
        for (index, tunable) in TREE.iter().enumerate() {
            if tunable.class == Class::Restart && self.raw[index] != running.raw[index] {
                self.raw[index] = running.raw[index];
                self.origins[index] = running.origins[index].clone();
                waiting.push(tunable.key);
            }
        }
        self.values = Values::from_raw(&self.raw);
        waiting
    }

    /// Every knob with its value as printed and its origin, in the order of the tree.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Tunable, String, &Origin)> {
        let values = self.raw.iter().zip(&self.origins);
        TREE.iter()
            .zip(values)
            .map(|(tunable, (raw, origin))| (tunable, tunable.format(*raw), origin))
    }

    /// One knob, its value as printed, its origin.
    pub fn find(&self, key: &str) -> Option<(&'static Tunable, String, &Origin)> {
        let key = normal_key(key);
        self.iter().find(|(tunable, ..)| tunable.key == key)
    }
}

impl Change {
    /// Whether the value is another one than before.
    pub fn is_effective(&self) -> bool {
        self.before != self.after
    }

    /// What an operator should know about this change and cannot see in `key = value`; `None` when there is nothing.
    pub fn note(&self) -> Option<String> {
        let (key, after) = (self.key, &self.after);
        let felt = match self.class {
            Class::Live => None,
            Class::New => Some(format!(
                "{key}: open connections keep {}; new ones take {after}",
                self.before
            )),
            Class::Restart => Some(format!("{key}: takes effect at the next start")),
        };
        let kept = (self.origin == Origin::Runtime).then(|| {
            let stronger = match &self.origin_before {
                Origin::Flag => " (and remove its --set)".to_owned(),
                Origin::File { path, line, .. } if !in_drop_in_directory(path) => format!(" (and remove it from {path}:{line})"),
                _ => String::new(),
            };
            format!("{key}: lost at the next start; to keep it, write `{key} = {after}` into {LOCAL_FILE}{stronger}")
        });
        match (felt.filter(|_| self.is_effective()), kept) {
            (Some(felt), Some(kept)) => Some(format!("{felt}\n{kept}")),
            (felt, kept) => felt.or(kept),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, column } => write!(f, "{path}:{line}:{column}"),
            Self::Flag => f.write_str("flag"),
            Self::Runtime => f.write_str("runtime"),
        }
    }
}

impl fmt::Display for TunableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { key, nearest: None } => write!(f, "there is no tunable `{key}`"),
            Self::Unknown {
                key,
                nearest: Some(nearest),
            } => write!(f, "there is no tunable `{key}`; did you mean `{nearest}`?"),
            Self::Invalid { key, reason } => write!(f, "{key}: {reason}"),
            Self::OutOfRange { key, value, range } => {
                write!(f, "{key}: {value} is out of range: {range}")
            }
            Self::OnlyAtStart { key, value } => {
                write!(
                    f,
                    "{key} is read only at start: write `{key} = {value}` into {LOCAL_FILE} and restart Sluice"
                )
            }
        }
    }
}

impl std::error::Error for TunableError {}

/// `/` may stand for `.`, as procps allows.
fn normal_key(key: &str) -> String {
    key.trim().replace('/', ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(key: &str, value: &str) -> Result<Change, TunableError> {
        Tunables::default().assign(key, value, Origin::Flag)
    }

    #[test]
    fn each_key_is_an_area_and_a_knob_and_stands_once() {
        let areas = [
            "net", "http", "h2", "tls", "upstream", "datapath", "flow", "guard", "log", "admin",
            "worker",
        ];
        let mut keys: Vec<&str> = TREE.iter().map(|tunable| tunable.key).collect();
        for key in &keys {
            let (area, knob) = key.split_once('.').unwrap_or_default();
            assert!(areas.contains(&area), "{key}");
            assert!(
                knob.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
                "{key}"
            );
        }
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), TREE.len());
    }

    #[test]
    fn each_default_is_in_its_range_and_reads_back_as_itself_and_each_help_is_one_line() {
        for tunable in TREE {
            for value in [tunable.default, tunable.min, tunable.max] {
                assert_eq!(
                    tunable.parse(&tunable.format(value)),
                    Ok(value),
                    "{}",
                    tunable.key
                );
            }
            assert!(
                tunable.help.len() < 140
                    && !tunable.help.contains('\n')
                    && tunable.help.ends_with('.'),
                "{}",
                tunable.key
            );
        }
    }

    #[test]
    fn an_assigned_value_is_seen_in_its_field_and_names_its_origin() {
        let mut tunables = Tunables::default();
        let change = tunables
            .assign("http/head_timeout", "5s", Origin::Runtime)
            .expect("in range");
        assert_eq!(
            (change.before.as_str(), change.after.as_str()),
            ("10s", "5s")
        );
        assert_eq!(
            tunables.http.head_timeout,
            std::time::Duration::from_secs(5)
        );
        let (_, value, origin) = tunables.find("http.head_timeout").expect("a key");
        assert_eq!((value.as_str(), origin), ("5s", &Origin::Runtime));
        tunables
            .assign("http.underscore_fields", "keep", Origin::Flag)
            .expect("a word");
        assert_eq!(tunables.http.underscore_fields, UnderscoreFields::Keep);
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_the_range_and_changes_nothing() {
        let mut tunables = Tunables::default();
        let error = tunables
            .assign("http.fields_max", "0", Origin::Flag)
            .expect_err("below the range");
        assert_eq!(
            error.to_string(),
            "http.fields_max: 0 is out of range: 1 to 256"
        );
        assert_eq!(tunables, Tunables::default());
        let error = assigned("net.buffers", "1000").expect_err("no power of two");
        assert!(error.to_string().contains("a power of two from"), "{error}");
    }

    #[test]
    fn an_unknown_key_and_an_unknown_word_name_what_was_probably_meant() {
        let error = assigned("http.head_timeuot", "1s").expect_err("no such key");
        assert_eq!(
            error.to_string(),
            "there is no tunable `http.head_timeuot`; did you mean `http.head_timeout`?"
        );
        let error = assigned("http.underscore_fields", "dorp").expect_err("no such word");
        assert!(
            error
                .to_string()
                .contains("drop, keep or refuse; did you mean `drop`?"),
            "{error}"
        );
    }

    #[test]
    fn a_knob_that_is_read_only_at_start_is_refused_at_run_time_but_not_before() {
        assert!(assigned("worker.count", "2").is_ok());
        let error = Tunables::default()
            .assign("worker.count", "2", Origin::Runtime)
            .expect_err("too late");
        assert!(matches!(error, TunableError::OnlyAtStart { .. }));
        assert!(error.to_string().contains("worker.count = 2"), "{error}");
    }

    #[test]
    fn a_change_at_run_time_says_that_it_will_be_lost_and_how_to_keep_it() {
        let mut tunables = Tunables::default();
        let origin = Origin::File {
            path: "/etc/sluice/sluice.toml".into(),
            line: 7,
            column: 1,
        };
        tunables
            .assign("http.head_timeout", "8s", origin)
            .expect("in range");
        let change = tunables
            .assign("http.head_timeout", "5s", Origin::Runtime)
            .expect("in range");
        let note = change.note().expect("something to say");
        assert!(
            note.contains("lost at the next start") && note.contains("/etc/sluice/sysctl.d/"),
            "{note}"
        );
        assert!(
            note.contains("remove it from /etc/sluice/sluice.toml:7"),
            "{note}"
        );
        let kept = tunables
            .assign("http.idle_timeout", "5s", Origin::Flag)
            .expect("in range");
        assert!(!kept.note().unwrap_or_default().contains("lost"));
    }

    #[test]
    fn a_reload_keeps_what_was_set_at_run_time_and_what_only_a_restart_changes() {
        let mut running = Tunables::default();
        running
            .assign("http.head_timeout", "5s", Origin::Runtime)
            .expect("in range");
        let mut next = Tunables::default();
        next.assign("http.head_timeout", "20s", Origin::Flag)
            .expect("in range");
        next.assign("worker.count", "7", Origin::Flag)
            .expect("in range");
        next.keep_runtime(&running);
        assert_eq!(next.keep_until_restart(&running), ["worker.count"]);
        assert_eq!(next.http.head_timeout, std::time::Duration::from_secs(5));
        assert_eq!(next.worker.count, 0);
    }
}
