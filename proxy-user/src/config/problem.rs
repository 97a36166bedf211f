//! Files being read, places in them, and the problems found there. What may be a secret is never shown.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use super::Origin;
use super::diagnostic::{Diagnostic, Place};

/// Longest line that is shown, in bytes.
const LINE_BYTES_MAX: usize = 400;
/// Errors, and warnings, that are kept; nobody reads more.
const DIAGNOSTICS_MAX: usize = 200;

/// One file.
pub(super) struct Source {
    /// Order of reading; diagnostics are sorted by it.
    pub index: usize,
    pub path: Arc<str>,
    pub text: String,
    line_starts: Vec<usize>,
    /// Nothing of this file is shown: it is made of secrets.
    pub is_secret: bool,
    /// Spans whose characters are shown as `*`.
    secrets: RefCell<Vec<Range<usize>>>,
}

/// Everything found so far.
#[derive(Default)]
pub(super) struct Problems {
    found: RefCell<Vec<(usize, usize, Diagnostic)>>,
    /// How many there were, kept or not.
    errors: Cell<usize>,
    warnings: Cell<usize>,
}

/// A span of a file.
#[derive(Clone, Copy)]
pub(super) struct Spot<'s> {
    pub source: &'s Source,
    pub problems: &'s Problems,
    /// Bytes of the file.
    start: usize,
    end: usize,
}

impl Source {
    pub fn new(index: usize, path: &Path, text: String, is_secret: bool) -> Self {
        let line_starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        let path = path.display().to_string().into();
        Self {
            index,
            path,
            text,
            line_starts,
            is_secret,
            secrets: RefCell::default(),
        }
    }

    /// The folder that relative paths in this file start from.
    pub fn folder(&self) -> PathBuf {
        Path::new(&*self.path)
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default()
    }

    /// Hide the values that an operator may have written a secret into: fields that are set, added, or answered with.
    pub fn hide_secrets(&self, table: &DeTable<'_>) {
        self.hide_fields(table, "");
    }

    /// `parent` is the key under which the table stands.
    fn hide_fields(&self, table: &DeTable<'_>, parent: &str) {
        for (key, value) in table.iter() {
            let key = key.get_ref().as_ref();
            let holds_fields = matches!((parent, key), (_, "set" | "add") | ("respond", "headers"));
            match value.get_ref() {
                DeValue::Table(fields) if holds_fields => {
                    fields.values().for_each(|field| self.hide_strings(field));
                }
                DeValue::Table(inner) => self.hide_fields(inner, key),
                DeValue::String(_)
                    if matches!((parent, key), ("sticky", "key") | (_, "hash_key")) =>
                {
                    self.hide_strings(value);
                }
                DeValue::Array(items) => {
                    let tables = items.iter().filter_map(|item| item.get_ref().as_table());
                    tables.for_each(|inner| self.hide_fields(inner, key));
                }
                _ => {}
            }
        }
    }

    /// The strings in a value, to any depth, without their quotes.
    fn hide_strings(&self, value: &toml::Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::String(_) => {
                let span = value.span();
                self.secrets
                    .borrow_mut()
                    .push(span.start + 1..span.end.saturating_sub(1).max(span.start + 1));
            }
            DeValue::Array(items) => items.iter().for_each(|item| self.hide_strings(item)),
            DeValue::Table(inner) => inner.values().for_each(|inner| self.hide_strings(inner)),
            _ => {}
        }
    }

    /// A whole line, by its number from 1.
    pub fn line_spot<'s>(&'s self, problems: &'s Problems, line: u32) -> Spot<'s> {
        let start = self
            .line_starts
            .get(line.saturating_sub(1) as usize)
            .copied()
            .unwrap_or(0);
        let text = self.text[start..].lines().next().unwrap_or("");
        let blank = text.len() - text.trim_start().len();
        self.spot(
            problems,
            start + blank..start + text.trim_end().len().max(blank),
        )
    }

    pub fn spot<'s>(&'s self, problems: &'s Problems, span: Range<usize>) -> Spot<'s> {
        Spot {
            source: self,
            problems,
            start: span.start,
            end: span.end,
        }
    }

    /// Line and column from 1, and the span of the whole line without its end.
    fn position(&self, at: usize) -> (usize, usize, Range<usize>) {
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        let line = self.line_starts.partition_point(|start| *start <= at);
        let start = self
            .line_starts
            .get(line.saturating_sub(1))
            .copied()
            .unwrap_or(0);
        let end = self.text[start..]
            .find('\n')
            .map_or(self.text.len(), |length| start + length);
        let column = self.text[start..at].chars().count() + 1;
        (line, column, start..end)
    }

    fn origin(&self, at: usize) -> Origin {
        let (line, column, _) = self.position(at);
        Origin::File {
            path: self.path.clone(),
            line: saturate(line),
            column: saturate(column),
        }
    }

    fn place(&self, span: Range<usize>, label: &str, show: bool) -> Place {
        let (line, column, whole) = self.position(span.start);
        let end = span.end.clamp(span.start, whole.end.max(span.start));
        let length = self
            .text
            .get(span.start..end)
            .map_or(1, |text| text.trim_end().chars().count());
        let shown = show && !self.is_secret && whole.len() <= LINE_BYTES_MAX;
        Place {
            path: self.path.clone(),
            line: saturate(line),
            column: saturate(column),
            length: saturate(length.max(1)),
            label: label.to_owned(),
            source: shown.then(|| self.masked(whole)),
        }
    }

    /// A line with its secrets as stars, control characters as blanks; as many characters as it has.
    fn masked(&self, line: Range<usize>) -> String {
        let secrets = self.secrets.borrow();
        let here: Vec<_> = secrets
            .iter()
            .filter(|span| span.start < line.end && span.end > line.start)
            .collect();
        let characters = self.text[line.clone()].char_indices();
        let shown = characters.map(|(at, character)| match character {
            _ if here.iter().any(|span| span.contains(&(line.start + at))) => '*',
            character if character.is_control() => ' ',
            character => character,
        });
        shown.collect::<String>().trim_end().to_owned()
    }
}

impl Problems {
    /// Keep a diagnostic; `order` is the file's index and the offset in it.
    pub fn push(&self, order: (usize, usize), diagnostic: Diagnostic) {
        let is_error = diagnostic.is_error();
        let kept = if is_error {
            &self.errors
        } else {
            &self.warnings
        };
        if kept.get() < DIAGNOSTICS_MAX {
            self.found.borrow_mut().push((order.0, order.1, diagnostic));
        }
        kept.set(kept.get() + 1);
    }

    /// Keep a diagnostic about no place in a file.
    pub fn push_general(&self, diagnostic: Diagnostic) {
        self.push((usize::MAX, 0), diagnostic);
    }

    /// Whether one more error would only be counted, so that looking for a suggestion is time lost.
    pub fn is_full(&self) -> bool {
        self.errors.get() >= DIAGNOSTICS_MAX
    }

    pub fn has_errors(&self) -> bool {
        self.errors.get() > 0
    }

    /// All of them in the order of the files.
    pub fn into_sorted(self) -> Vec<Diagnostic> {
        let mut found = self.found.into_inner();
        found.sort_by_key(|(file, offset, _)| (*file, *offset));
        let mut sorted: Vec<Diagnostic> = found
            .into_iter()
            .map(|(_, _, diagnostic)| diagnostic)
            .collect();
        let beyond = self.errors.get().saturating_sub(DIAGNOSTICS_MAX);
        if beyond > 0 {
            sorted.push(Diagnostic::error(format!(
                "{beyond} more errors are not shown"
            )));
        }
        sorted
    }
}

impl<'s> Spot<'s> {
    pub fn origin(&self) -> Origin {
        self.source.origin(self.start)
    }

    /// Whether the line looks as if a secret stood in it. For files that are no TOML: nothing better is known of them.
    pub fn may_hold_secret(&self) -> bool {
        let (_, _, line) = self.source.position(self.start);
        let line = self.source.text[line].to_ascii_lowercase();
        [
            "authorization",
            "cookie",
            "key",
            "password",
            "secret",
            "set",
            "token",
        ]
        .iter()
        .any(|word| line.contains(word))
    }

    /// Say what is wrong here; always `None`, so that a parser can end with it.
    pub fn refuse<T>(
        &self,
        message: impl Into<String>,
        label: &str,
        help: Option<String>,
    ) -> Option<T> {
        self.tell(Diagnostic::error(message), label, help);
        None
    }

    /// Say what is wrong here and show another place that belongs to it.
    pub fn refuse_with<T>(
        &self,
        message: impl Into<String>,
        label: &str,
        other: Spot<'_>,
        other_label: &str,
    ) -> Option<T> {
        let mut diagnostic = Diagnostic::error(message);
        diagnostic.also.push(
            other
                .source
                .place(other.start..other.end, other_label, true),
        );
        self.tell(diagnostic, label, None);
        None
    }

    /// Say what is wrong here, without the line: it may hold a secret that could not be told apart.
    pub fn refuse_unseen<T>(&self, message: impl Into<String>) -> Option<T> {
        let mut diagnostic = Diagnostic::error(message);
        diagnostic.place = Some(self.source.place(self.start..self.end, "", false));
        self.problems
            .push((self.source.index, self.start), diagnostic);
        None
    }

    pub fn warn(&self, message: impl Into<String>, label: &str, help: Option<String>) {
        self.tell(Diagnostic::warning(message), label, help);
    }

    fn tell(&self, mut diagnostic: Diagnostic, label: &str, help: Option<String>) {
        diagnostic.place = Some(self.source.place(self.start..self.end, label, true));
        diagnostic.help.extend(help);
        self.problems
            .push((self.source.index, self.start), diagnostic);
    }
}

fn saturate(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
