//! Finds the lines of a head as bytes arrive, each byte looked at once, and refuses what no lenient reader may repair.

use super::{Limits, Reject};
use memchr::memchr;
use std::ops::Range;

/// Whose head it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Response,
}

/// Where the parts of a whole head lie in the bytes it was found in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// The start line without its CRLF.
    pub start_line: Range<usize>,
    /// The field lines and the empty line after them.
    pub fields: Range<usize>,
    /// Number of field lines.
    pub count: usize,
}

/// How far a head has been looked at; empty between messages.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// The next byte to look at.
    at: usize,
    /// Where the line begins that is not whole yet.
    line: usize,
    /// The start line, once it is whole.
    start_line: Option<Range<usize>>,
    /// Whole field lines so far.
    count: usize,
}

/// Room for a method and the version beside the longest target.
const START_LINE_EXTRA_BYTES: usize = 64;

impl Scan {
    /// Goes on where it stopped: `bytes` is all there is of the message, what was there before included.
    /// A head that trickles in byte by byte so costs no more than one that comes at once.
    pub fn resume(
        &mut self,
        bytes: &[u8],
        kind: Kind,
        limits: &Limits,
    ) -> Result<Option<Shape>, Reject> {
        if bytes.len() < self.at {
            *self = Self::default();
        }
        while let Some(found) = memchr(b'\n', bytes.get(self.at..).unwrap_or_default()) {
            let newline = self.at + found;
            if newline == self.line || bytes[newline - 1] != b'\r' {
                return Err(Reject::bad("bare_lf"));
            }
            let line = self.line..newline - 1;
            self.at = newline + 1;
            self.line = newline + 1;
            if let Some(shape) = self.end_line(line, bytes, kind, limits)? {
                return Ok(Some(shape));
            }
        }
        self.at = bytes.len();
        self.look_at_rest(bytes, kind, limits)?;
        Ok(None)
    }

    /// Takes one whole line; the empty one after the start line completes the head.
    fn end_line(
        &mut self,
        line: Range<usize>,
        bytes: &[u8],
        kind: Kind,
        limits: &Limits,
    ) -> Result<Option<Shape>, Reject> {
        let Some(start_line) = &self.start_line else {
            if line.is_empty() {
                // Some clients end a body with one CRLF too many (RFC 9112 section 2.2).
                return if line.start == 0 && kind == Kind::Request {
                    Ok(None)
                } else {
                    Err(Reject::bad("empty_line"))
                };
            }
            check_length(&line, true, limits)?;
            check_version(&bytes[line.clone()], kind)?;
            self.start_line = Some(line);
            return Ok(None);
        };
        if !line.is_empty() {
            check_length(&line, false, limits)?;
            self.count += 1;
            return if self.count > limits.fields_max.min(super::FIELDS_MAX) {
                Err(Reject::with(431, "fields_too_many"))
            } else {
                Ok(None)
            };
        }
        let shape = Shape {
            start_line: start_line.clone(),
            fields: start_line.end + 2..self.at,
            count: self.count,
        };
        if self.at > limits.head_bytes_max {
            return Err(Reject::with(431, "head_too_long"));
        }
        *self = Self::default();
        Ok(Some(shape))
    }

    /// Refuses early what can become nothing good, however it goes on.
    fn look_at_rest(&self, bytes: &[u8], kind: Kind, limits: &Limits) -> Result<(), Reject> {
        // A CR at the very end belongs to the line's end, not to the line.
        let end = bytes.len() - usize::from(bytes.ends_with(b"\r"));
        let rest = self.line..end.max(self.line);
        check_length(&rest, self.start_line.is_none(), limits)?;
        if bytes.len() >= limits.head_bytes_max {
            return Err(Reject::with(431, "head_too_long"));
        }
        // A TLS hello or the like on a clear-text listener has no newline to wait for.
        let first = bytes.get(self.line).copied();
        if self.start_line.is_none()
            && kind == Kind::Request
            && first.is_some_and(|b| b != b'\r' && !super::fields::is_token(b))
        {
            return Err(Reject::bad("start_line"));
        }
        Ok(())
    }
}

/// A line over its limit: 414 for the target, 431 for a field.
fn check_length(line: &Range<usize>, is_start: bool, limits: &Limits) -> Result<(), Reject> {
    if is_start && line.len() > limits.target_bytes_max + START_LINE_EXTRA_BYTES {
        return Err(Reject::with(414, "target_too_long"));
    }
    if !is_start && line.len() > limits.field_bytes_max {
        return Err(Reject::with(431, "field_too_long"));
    }
    Ok(())
}

/// A start line must name its version: HTTP/0.9 has none, and would wait for fields that never come.
fn check_version(line: &[u8], kind: Kind) -> Result<(), Reject> {
    let version = match kind {
        Kind::Request => line
            .len()
            .checked_sub(9)
            .map(|at| &line[at..])
            .and_then(|tail| tail.strip_prefix(b" ")),
        Kind::Response => line.get(..8),
    };
    match version {
        Some([b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9']) => Ok(()),
        Some([b'H', b'T', b'T', b'P', b'/', b'2', b'.', b'0']) if line.starts_with(b"PRI ") => {
            Err(Reject::bad("h2_preface"))
        }
        Some(
            [
                b'H',
                b'T',
                b'T',
                b'P',
                b'/',
                b'0' | b'2'..=b'9',
                b'.',
                b'0'..=b'9',
            ],
        ) => Err(Reject::with(505, "version")),
        _ => Err(Reject::bad("version")),
    }
}
