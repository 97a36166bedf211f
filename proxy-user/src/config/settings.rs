//! Tunables of files: drop-ins in their folders, then `[tunables]`, each checked where it stands.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::context::{Context, read};
use super::problem::{Source, Spot};
use super::source::failure;
use super::table::{Section, Value};
use super::{Diagnostic, Origin};
use crate::tunable::{DIRECTORIES, TunableError, Tunables, parse_file, select};

/// Read the drop-in folders, weakest first, and assign what their files say.
pub(super) fn drop_ins(context: &Context<'_>, tunables: &mut Tunables) {
    let list = |folder: &&str| match context.reader.list(Path::new(folder)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            context.problems.push_general(Diagnostic::error(format!(
                "cannot read {folder}: {}",
                failure(&error)
            )));
            Vec::new()
        }
    };
    let paths: Vec<PathBuf> = DIRECTORIES.iter().flat_map(list).collect();
    for path in select(paths) {
        drop_in(context, &path, tunables);
    }
}

fn drop_in(context: &Context<'_>, path: &Path, tunables: &mut Tunables) {
    let text = read(context.reader, path).map(String::from_utf8);
    let text = match text {
        Ok(Ok(text)) => text,
        Ok(Err(_)) => {
            return context.problems.push_general(Diagnostic::error(format!(
                "{} is no text in UTF-8",
                path.display()
            )));
        }
        Err(error) => {
            let message = format!("cannot read {}: {}", path.display(), failure(&error));
            return context.problems.push_general(Diagnostic::error(message));
        }
    };
    let source = Source::new(context.next_index(), path, text, false);
    let (assignments, bad) = parse_file(&source.path, &source.text);
    for line in bad {
        if let Some(spot) = line_of(&source, context, &line.origin) {
            spot.refuse::<()>(line.reason, "", None);
        }
    }
    for assignment in assignments {
        let assigned = tunables.assign(
            &assignment.key,
            &assignment.value,
            assignment.origin.clone(),
        );
        if let (Err(error), false) = (assigned, assignment.ignore_failure)
            && let Some(spot) = line_of(&source, context, &assignment.origin)
        {
            refuse(spot, spot, error);
        }
    }
}

/// The line of an origin, as a place.
fn line_of<'s>(source: &'s Source, context: &Context<'s>, origin: &Origin) -> Option<Spot<'s>> {
    match origin {
        Origin::File { line, .. } => Some(source.line_spot(context.problems, *line)),
        _ => None,
    }
}

/// Assign what `[tunables]` of all files says; answers it as written. A key twice is an error.
pub(super) fn configured(
    sections: &[Section<'_>],
    tunables: &mut Tunables,
) -> Vec<(String, String, Origin)> {
    let mut first: HashMap<String, Spot<'_>> = HashMap::new();
    let mut written = Vec::new();
    for section in sections {
        let mut flat = Vec::new();
        flatten(section, "", &mut flat);
        for (key, spot, value) in flat {
            if let Some(other) = first.get(&key) {
                spot.refuse_with::<()>(
                    format!("the tunable `{key}` is set twice"),
                    "set again",
                    *other,
                    "set first",
                );
                continue;
            }
            first.insert(key.clone(), spot);
            let Some(text) = value.scalar() else { continue };
            match tunables.assign(&key, &text, spot.origin()) {
                Ok(_) => written.push((key, text, spot.origin())),
                Err(error) => refuse(spot, value.spot, error),
            }
        }
    }
    written
}

/// `"http.head_timeout" = ...` and `http = { head_timeout = ... }` say the same.
fn flatten<'s>(section: &Section<'s>, prefix: &str, flat: &mut Vec<(String, Spot<'s>, Value<'s>)>) {
    for (key, spot, value) in section.entries() {
        let key = format!("{prefix}{}", key.replace('/', "."));
        match value.is_table().then(|| value.section()).flatten() {
            Some(inner) => flatten(&inner, &format!("{key}."), flat),
            None => flat.push((key, spot, value)),
        }
    }
}

fn refuse(key: Spot<'_>, value: Spot<'_>, error: TunableError) {
    let (spot, help) = match &error {
        TunableError::Unknown { nearest, .. } => (
            key,
            nearest.map(|nearest| format!("did you mean `{nearest}`?")),
        ),
        _ => (value, None),
    };
    let message = match &error {
        TunableError::Unknown { key, .. } => format!("there is no tunable `{key}`"),
        error => error.to_string(),
    };
    spot.refuse::<()>(message, "", help);
}
