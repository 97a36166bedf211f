//! What is wrong with what the operator wrote: message, place, caret, remedy; as text for people and as JSON.

use std::sync::Arc;

use annotate_snippets::{
    AnnotationKind, Element, Group, Level, Origin as Location, Renderer, Snippet,
};
use serde::{Deserialize, Serialize};

use super::Origin;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is applied.
    Error,
    /// Applied all the same.
    Warning,
}

/// One thing to tell the operator. Complete in itself: it can be sent and rendered elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    pub severity: Severity,
    /// One sentence without a full stop.
    pub message: String,
    /// Where; absent for what stands in no file.
    pub place: Option<Place>,
    /// Other places that belong to it: where a name was defined first.
    pub also: Vec<Place>,
    /// What the operator can do, a sentence each.
    pub help: Vec<String>,
}

/// A place in a file, with what is needed to show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub path: Arc<str>,
    /// From 1.
    pub line: u32,
    /// In characters, from 1.
    pub column: u32,
    /// How many characters the caret covers.
    pub length: u32,
    /// What stands beside the caret; may be empty.
    pub label: String,
    /// The line; absent where it could show a secret, or is too long to show.
    pub source: Option<String>,
}

impl Diagnostic {
    /// An error that stands nowhere yet.
    pub fn error(message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            place: None,
            also: Vec::new(),
            help: Vec::new(),
        }
    }

    /// A warning that stands nowhere yet.
    pub fn warning(message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(message)
        }
    }

    /// With the place of a checked object, for what is found out after loading (a port in use, a missing interface).
    #[must_use]
    pub fn at(mut self, origin: &Origin) -> Self {
        self.place = match origin {
            Origin::File { path, line, column } => Some(Place {
                path: path.clone(),
                line: *line,
                column: *column,
                length: 1,
                label: String::new(),
                source: None,
            }),
            _ => None,
        };
        self
    }

    /// With one more remedy.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }

    /// Whether this one keeps the configuration from being applied.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// As people read it: a block for each, in the order given, an empty line between two.
pub fn render(diagnostics: &[Diagnostic], colour: bool) -> String {
    let renderer = if colour {
        Renderer::styled()
    } else {
        Renderer::plain()
    };
    let blocks: Vec<String> = diagnostics
        .iter()
        .map(|diagnostic| renderer.render(&groups(diagnostic)))
        .collect();
    let mut text = blocks.join("\n\n");
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

/// As programs read it: an array of objects on one line.
pub fn to_json(diagnostics: &[Diagnostic]) -> String {
    serde_json::to_string(diagnostics).unwrap_or_else(|_| "[]".to_owned())
}

/// `2 errors, 1 warning`.
pub fn summary(diagnostics: &[Diagnostic]) -> String {
    let errors = diagnostics
        .iter()
        .filter(|diagnostic| diagnostic.is_error())
        .count();
    let count = |number: usize, word: &str| {
        format!("{number} {word}{}", if number == 1 { "" } else { "s" })
    };
    format!(
        "{}, {}",
        count(errors, "error"),
        count(diagnostics.len() - errors, "warning")
    )
}

/// One group with everything; without a place, each remedy stands in a group of its own, for there is no line above it.
fn groups(diagnostic: &Diagnostic) -> Vec<Group<'_>> {
    let level = match diagnostic.severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    let title = level.primary_title(diagnostic.message.as_str());
    let help = diagnostic.help.iter().map(String::as_str);
    let Some(place) = &diagnostic.place else {
        let help = help.map(|help| Group::with_title(Level::HELP.secondary_title(help)));
        return std::iter::once(Group::with_title(title))
            .chain(help)
            .collect();
    };
    let first = element(place, AnnotationKind::Primary);
    let also = diagnostic
        .also
        .iter()
        .map(|place| element(place, AnnotationKind::Context));
    let help = help.map(|help| Element::from(Level::HELP.message(help)));
    vec![title.element(first).elements(also).elements(help)]
}

fn element(place: &Place, kind: AnnotationKind) -> Element<'_> {
    let (line, column) = (place.line as usize, place.column as usize);
    let Some(source) = &place.source else {
        return Location::path(&*place.path)
            .line(line)
            .char_column(column)
            .into();
    };
    let byte_at = |characters: usize| {
        source
            .char_indices()
            .nth(characters)
            .map_or(source.len(), |(at, _)| at)
    };
    let start = byte_at(column.saturating_sub(1));
    let end = byte_at(column.saturating_sub(1) + place.length.max(1) as usize).max(start);
    let label = (!place.label.is_empty()).then_some(place.label.as_str());
    let annotation = kind.span(start..end).label(label);
    Snippet::source(source.as_str())
        .line_start(line)
        .path(&*place.path)
        .annotation(annotation)
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Diagnostic {
        let place = Place {
            path: "a.toml".into(),
            line: 12,
            column: 9,
            length: 3,
            label: "not defined".into(),
            source: Some("upé  = \"app\"".into()),
        };
        let also = Place {
            path: "b.toml".into(),
            line: 3,
            column: 1,
            length: 1,
            label: "here".into(),
            source: None,
        };
        Diagnostic {
            place: Some(place),
            also: vec![also],
            ..Diagnostic::error("there is no upstream `app`")
        }
        .help("define it")
    }

    #[test]
    fn the_text_names_the_place_in_characters_and_puts_the_caret_below_the_word() {
        let text = render(&[sample()], false);
        let expected = "\
error: there is no upstream `app`
  --> a.toml:12:9
   |
12 | upé  = \"app\"
   |         ^^^ not defined
  ::: b.toml:3:1
   = help: define it
";
        assert_eq!(text, expected);
        assert!(
            render(&[sample()], true).contains("\u{1b}["),
            "colour on request"
        );
    }

    #[test]
    fn json_reads_back_as_the_same_diagnostics() {
        let sent = to_json(&[sample()]);
        let back: Vec<Diagnostic> = serde_json::from_str(&sent).expect("JSON");
        assert_eq!(back, [sample()]);
        assert_eq!(summary(&back), "1 error, 0 warnings");
    }

    #[test]
    fn a_place_beyond_its_line_is_shown_at_the_end() {
        let mut diagnostic = sample();
        if let Some(place) = &mut diagnostic.place {
            (place.column, place.length) = (4000, 70_000);
        }
        assert!(render(&[diagnostic], false).contains("error: there is no upstream"));
    }
}
