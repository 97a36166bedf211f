//! Names of listeners, policies and upstreams: each stands once, over all files; a reference finds its index.

use std::collections::HashMap;

use super::problem::Spot;
use super::table::{Section, Value};
use crate::tunable::unit::{nearest, shown};

/// Longest name, in bytes: it stands in labels of metrics.
const NAME_BYTES_MAX: usize = 63;

/// All names of one kind of object.
pub(super) struct Names<'s> {
    /// `upstream`: the word in messages.
    kind: &'static str,
    /// By the index of the object; `None` where it has no good name.
    defined: Vec<Option<(&'s str, Spot<'s>)>>,
    by_name: HashMap<&'s str, usize>,
}

impl<'s> Names<'s> {
    /// Collect the names of these sections, in order; index `i` is section `i`. Complains about bad and double names.
    pub fn collect(kind: &'static str, sections: &[Section<'s>]) -> Self {
        let mut names = Self {
            kind,
            defined: Vec::new(),
            by_name: HashMap::new(),
        };
        for section in sections {
            let named = names.define(section);
            names.defined.push(named);
        }
        names
    }

    fn define(&mut self, section: &Section<'s>) -> Option<(&'s str, Spot<'s>)> {
        let kind = self.kind;
        let value = section.need("name", &format!("name = \"{}\"", example(kind)))?;
        let name = value.parsed(parse_name)?;
        let first = self
            .by_name
            .get(name)
            .and_then(|index| *self.defined.get(*index)?);
        if let Some((_, first)) = first {
            let message = format!("the {kind} `{name}` is defined twice");
            return value
                .spot
                .refuse_with(message, "defined again", first, "defined first");
        }
        self.by_name.insert(name, self.defined.len());
        Some((name, value.spot))
    }

    /// The index of the object that a value names.
    pub fn resolve(&self, value: &Value<'s>) -> Option<usize> {
        let name = value.text()?;
        if let Some(index) = self.by_name.get(name) {
            return Some(*index);
        }
        let names = self.defined.iter().flatten().map(|(name, _)| *name);
        let names = names.filter(|_| !value.spot.problems.is_full());
        let meant = nearest(name, names);
        let help = meant.map_or_else(
            || {
                format!(
                    "define it: [[{}]] with name = \"{}\"",
                    self.kind,
                    shown(name)
                )
            },
            |meant| format!("did you mean `{meant}`?"),
        );
        value.spot.refuse(
            format!("there is no {} `{}`", self.kind, shown(name)),
            "not defined",
            Some(help),
        )
    }

    /// The name of the object at an index.
    pub fn name(&self, index: usize) -> Option<&'s str> {
        self.defined
            .get(index)
            .copied()
            .flatten()
            .map(|(name, _)| name)
    }
}

/// A name that can stand in a label, in a path and on a command line.
///
/// # Errors
/// A sentence that says what a name is made of.
pub(super) fn parse_name(text: &str) -> Result<&str, String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let begins = text
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && text.len() <= NAME_BYTES_MAX && text.bytes().all(good) {
        return Ok(text);
    }
    let rule = format!(
        "letters, digits, `-`, `_` and `.`, at most {NAME_BYTES_MAX}, a letter or digit first"
    );
    Err(format!("`{}` is no name: {rule}", shown(text)))
}

fn example(kind: &str) -> &'static str {
    match kind {
        "listener" => "web",
        "policy" => "keys",
        _ => "app",
    }
}
