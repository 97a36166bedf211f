//! One line: an object of JSON (RFC 8259) on a line of its own, written without an allocation.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Entry, Span};
use crate::config::LogField;
use crate::message::push_decimal;

/// More than most lines take.
pub const USUAL_BYTES: usize = 2 << 10;

/// Bytes of a value beyond these are left out, and `...` says so.
const VALUE_BYTES_MAX: usize = 2 << 10;

/// Appends a line of these fields. A field that has no value is left out.
pub fn push(out: &mut Vec<u8>, fields: &[LogField], entry: &Entry<'_>, clock: &Clock) {
    let begin = out.len();
    for field in fields {
        let before = out.len();
        push_key(out, field);
        let at = out.len();
        push_value(out, field, entry, clock);
        if out.len() == at {
            out.truncate(before);
        }
    }
    match out.get_mut(begin) {
        // Each field begins with a comma; the first one's is the brace.
        Some(first) => *first = b'{',
        None => out.push(b'{'),
    }
    out.extend_from_slice(b"}\n");
}

/// `,"key":`
fn push_key(out: &mut Vec<u8>, field: &LogField) {
    let (kind, name) = match field {
        LogField::Request(name) => ("request.", name),
        LogField::Response(name) => ("response.", name),
        plain => return out.extend_from_slice(plain.plain_key().as_bytes()),
    };
    for part in [",\"", kind, name, "\":"] {
        out.extend_from_slice(part.as_bytes());
    }
}

/// The value, or nothing where there is none.
fn push_value(out: &mut Vec<u8>, field: &LogField, entry: &Entry<'_>, clock: &Clock) {
    let request = entry.request;
    match field {
        LogField::Time => clock.push(out, SystemTime::now()),
        LogField::Id => push_plain(out, request.id()),
        LogField::Listener => push_plain(out, entry.listener),
        LogField::Route => push_plain(out, entry.route),
        LogField::Upstream => push_plain(out, entry.upstream),
        LogField::Endpoint => push_shown(out, entry.endpoint),
        LogField::Client if entry.client.is_some() => push_shown(out, entry.client),
        LogField::Client | LogField::Peer => push_plain(out, entry.peer),
        LogField::Consumer => push_text(out, request.consumer().as_bytes()),
        LogField::Method => push_text(out, request.method_name().as_bytes()),
        LogField::Scheme => push_plain(out, entry.scheme),
        LogField::Host => push_text(out, request.host().as_bytes()),
        LogField::Path => push_text(out, request.path().as_bytes()),
        LogField::Query => push_text(out, request.query().unwrap_or_default().as_bytes()),
        LogField::Protocol if request.method_name().is_empty() => {}
        LogField::Protocol if request.is_http10() => push_plain(out, "HTTP/1.0"),
        LogField::Protocol => push_plain(out, "HTTP/1.1"),
        LogField::Tls => push_plain(out, entry.tls),
        LogField::Status => push_number(out, Some(entry.status).filter(|status| *status > 0)),
        LogField::Reason => push_plain(out, entry.reason),
        LogField::ReceivedBytes => push_number(out, Some(entry.received_bytes)),
        LogField::SentBytes => push_number(out, Some(entry.sent_bytes)),
        LogField::Retries => push_number(out, Some(entry.retries)),
        LogField::Reused => match entry.is_reused {
            Some(true) => out.extend_from_slice(b"true"),
            Some(false) => out.extend_from_slice(b"false"),
            None => {}
        },
        LogField::AcceptUs => push_number(out, entry.durations_us[Span::Accept as usize]),
        LogField::TlsUs => push_number(out, entry.durations_us[Span::Tls as usize]),
        LogField::HeadUs => push_number(out, entry.durations_us[Span::Head as usize]),
        LogField::RouteUs => push_number(out, entry.durations_us[Span::Route as usize]),
        LogField::ConnectUs => push_number(out, entry.durations_us[Span::Connect as usize]),
        LogField::FirstByteUs => push_number(out, entry.durations_us[Span::FirstByte as usize]),
        LogField::BodyUs => push_number(out, entry.durations_us[Span::Body as usize]),
        LogField::TotalUs => push_number(out, entry.durations_us[Span::Total as usize]),
        LogField::Request(name) => push_text(out, request.fields().value(name).unwrap_or_default()),
        LogField::Response(name) => {
            let value = entry
                .response
                .and_then(|response| response.fields().value(name));
            push_text(out, value.unwrap_or_default());
        }
    }
}

fn push_number(out: &mut Vec<u8>, number: Option<impl Into<u64>>) {
    if let Some(number) = number {
        push_decimal(out, number.into());
    }
}

/// A text of ours, in which nothing needs an escape; none where it is empty.
fn push_plain(out: &mut Vec<u8>, text: &str) {
    if !text.is_empty() {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    }
}

fn push_shown(out: &mut Vec<u8>, value: Option<impl std::fmt::Display>) {
    if let Some(value) = value {
        // Writing to memory cannot fail.
        let _ = write!(out, "\"{value}\"");
    }
}

/// A text of others: what JSON or a terminal could take otherwise is escaped, and bytes that are no ASCII are taken for
/// Latin-1, as HTTP once did.
fn push_text(out: &mut Vec<u8>, text: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    if text.is_empty() {
        return;
    }
    out.push(b'"');
    for byte in text.iter().copied().take(VALUE_BYTES_MAX) {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b' '..=b'~' => out.push(byte),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.push(DIGITS[usize::from(byte >> 4)]);
                out.push(DIGITS[usize::from(byte & 15)]);
            }
        }
    }
    if text.len() > VALUE_BYTES_MAX {
        out.extend_from_slice(b"...");
    }
    out.push(b'"');
}

/// The wall clock as text: RFC 3339 in UTC, with milliseconds. Made anew once a second.
#[derive(Debug, Default)]
pub struct Clock {
    second: Cell<u64>,
    /// `"2026-11-24T14:35:29.`
    text: RefCell<Vec<u8>>,
}

impl Clock {
    pub fn push(&self, out: &mut Vec<u8>, now: SystemTime) {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let mut text = self.text.borrow_mut();
        if self.second.replace(since.as_secs()) != since.as_secs() || text.is_empty() {
            text.clear();
            let (year, month, day) = date(since.as_secs() / 86_400);
            let (hour, minute, second) = (
                since.as_secs() / 3600 % 24,
                since.as_secs() / 60 % 60,
                since.as_secs() % 60,
            );
            let _ = write!(
                text,
                "\"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}."
            );
        }
        let ms = since.subsec_millis();
        let digit = |number: u32| b'0' + (number % 10) as u8;
        out.extend_from_slice(&text);
        out.extend_from_slice(&[digit(ms / 100), digit(ms / 10), digit(ms), b'Z', b'"']);
    }
}

/// Year, month and day of a day since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn date(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468;
    let era = day / 146_097;
    let of_era = day % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, of_year - (153 * shifted + 2) / 5 + 1)
}
