//! `errors` of a route: what its clients get in place of our own answers to what was refused.

use std::path::PathBuf;

use super::Page;
use super::context::Context;
use super::field::check_field_value;
use super::table::{Section, Value};
use crate::tunable::unit::shown;

/// `errors`: pages by status, and by class of statuses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorPages {
    pub by_status: Vec<(u16, Page)>,
    /// 4 and 5.
    pub by_class: Vec<(u16, Page)>,
}

impl ErrorPages {
    /// The page for a status: its own, or that of its class.
    pub fn find(&self, status: u16) -> Option<&Page> {
        let by_status = self.by_status.iter().find(|(named, _)| *named == status);
        let by_class = || {
            let mut classes = self.by_class.iter();
            classes.find(|(named, _)| *named == status / 100)
        };
        by_status.or_else(by_class).map(|(_, page)| page)
    }
}

/// What the end of a file's name says of its type.
const TYPES: [(&str, &str); 5] = [
    ("html", "text/html; charset=utf-8"),
    ("htm", "text/html; charset=utf-8"),
    ("txt", "text/plain; charset=utf-8"),
    ("json", "application/json"),
    ("xml", "application/xml"),
];

/// `{ 503 = { file = "503.html" }, 4xx = { body = "no", type = "text/plain" } }`.
pub(super) fn error_pages(value: &Value<'_>, context: &Context<'_>) -> Option<ErrorPages> {
    let section = value.section()?;
    let (mut pages, mut is_good) = (ErrorPages::default(), true);
    for (key, spot, value) in section.entries() {
        let page = value.section().and_then(|section| page(&section, context));
        let (into, number) = match (key, key.parse::<u16>()) {
            ("4xx" | "5xx", _) => (&mut pages.by_class, u16::from(key.as_bytes()[0] - b'0')),
            (_, Ok(status @ 400..=599)) => (&mut pages.by_status, status),
            _ => {
                is_good = false;
                let message = format!(
                    "`{}` is no status of an error: write 404, 4xx or 5xx",
                    shown(key)
                );
                spot.refuse::<()>(message, "", None);
                continue;
            }
        };
        match page {
            Some(page) => into.push((number, page)),
            None => is_good = false,
        }
    }
    is_good.then_some(pages)
}

fn page(section: &Section<'_>, context: &Context<'_>) -> Option<Page> {
    let (file, body, kind) = (
        section.find("file"),
        section.find("body"),
        section.find("type"),
    );
    section.finish();
    let content_type = match &kind {
        Some(kind) => {
            let checked = kind.parsed(|text| check_field_value(text).map(|()| text.to_owned()));
            Some(checked?)
        }
        None => None,
    };
    let (path, body) = match (&file, body) {
        (Some(file), None) => {
            let (path, bytes) = context.file(file)?;
            (path, bytes.into())
        }
        (None, Some(body)) => (PathBuf::new(), body.text()?.as_bytes().into()),
        _ => {
            let message = format!("{} needs `file` or `body`, one of both", section.name);
            return section.spot.refuse(message, "", None);
        }
    };
    let by_name = || {
        let end = path.extension().and_then(|end| end.to_str());
        let known = TYPES.iter().find(|(known, _)| Some(*known) == end);
        known.map(|(_, kind)| (*kind).to_owned())
    };
    let content_type = match content_type.or_else(by_name) {
        Some(content_type) => content_type,
        None if file.is_none() => "text/plain; charset=utf-8".to_owned(),
        None => {
            let message = format!("what {} is cannot be told by its name", path.display());
            let help = "write type = \"text/html; charset=utf-8\" beside it".to_owned();
            return section.spot.refuse(message, "", Some(help));
        }
    };
    Some(Page { content_type, body })
}
