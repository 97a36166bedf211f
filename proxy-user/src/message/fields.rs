//! The fields of a head: one arena of bytes and ranges into it.

use super::meaning::{Known, Meaning, is_exact, options};
use super::scan::{Kind, Shape};
use super::{Limits, Reject, Span, UnderscoreFields};
use httparse::Header;

/// End-to-end fields in the order received, names in lower case.
///
/// What concerns one connection only or frames the message (RFC 9110 section 7.6.1, RFC 9112 section 6) is not among
/// them: it was read, and is written anew for the next hop.
#[derive(Debug, Default)]
pub struct Fields {
    /// The head as received, names lowered in place; what is added later stands behind it.
    pub(super) arena: Vec<u8>,
    entries: Vec<Entry>,
    /// What a client may not say, and a hop that is trusted may.
    claims: Vec<Entry>,
    /// The configuration added a field of the kind that `encode` says of clients.
    has_claim: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: Span,
    value: Span,
    /// The arena holds `name: value CRLF` in just this form, so that it is encoded by one copy.
    is_line: bool,
}

impl Fields {
    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries
            .iter()
            .map(|entry| (self.bytes(entry.name), self.bytes(entry.value)))
    }

    /// The first value of this name (lower case).
    pub fn value(&self, name: &str) -> Option<&[u8]> {
        self.iter()
            .find(|(found, _)| *found == name.as_bytes())
            .map(|(_, value)| value)
    }

    /// Every value of this name (lower case).
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(found, _)| *found == name.as_bytes())
            .map(|(_, value)| value)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Removes every field of this name (lower case).
    pub fn remove(&mut self, name: &str) {
        let arena = &self.arena;
        self.entries
            .retain(|entry| arena[entry.name.range()] != *name.as_bytes());
    }

    /// Leaves one field of this name (lower case), with this value.
    pub fn set(&mut self, name: &str, value: &str) {
        self.remove(name);
        self.add(name, value);
    }

    /// Adds a field beside those there. What would break the message, or is ours to say (framing, the connection), is
    /// not added; the configuration refuses it before it comes so far.
    pub fn add(&mut self, name: &str, value: &str) {
        let known = Known::of(name.as_bytes());
        if !is_field_name(name.as_bytes()) || !is_field_value(value.as_bytes()) || known.is_ours() {
            return;
        }
        self.has_claim |= known == Known::Claim;
        let start = self.arena.len();
        self.arena.extend_from_slice(name.as_bytes());
        self.arena[start..].make_ascii_lowercase();
        self.arena.extend_from_slice(b": ");
        self.arena.extend_from_slice(value.as_bytes());
        self.arena.extend_from_slice(b"\r\n");
        let name = Span::new(start, name.len());
        let value = Span::new(start + name.len as usize + 2, value.len());
        self.entries.push(Entry {
            name,
            value,
            is_line: true,
        });
    }

    pub(super) fn clear(&mut self) {
        self.arena.clear();
        self.entries.clear();
        self.claims.clear();
        self.has_claim = false;
    }

    /// Whether the configuration has set this field of the kind that `encode` says of clients.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.has_claim && self.value(name).is_some()
    }

    /// Every value of this name (lower case) that is believed of a trusted hop alone.
    pub(super) fn claims<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.claim_spans(name).map(|value| self.bytes(value))
    }

    /// The same, where they stand.
    pub(super) fn claim_spans<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Span> {
        let claims = self.claims.iter();
        let named = claims.filter(move |entry| self.bytes(entry.name) == name.as_bytes());
        named.map(|entry| entry.value)
    }

    pub(super) fn bytes(&self, span: Span) -> &[u8] {
        self.arena.get(span.range()).unwrap_or_default()
    }

    /// Appends all of them as lines.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for entry in &self.entries {
            if entry.is_line {
                let line = entry.name.start as usize..entry.value.range().end + 2;
                out.extend_from_slice(&self.arena[line]);
            } else {
                out.extend_from_slice(self.bytes(entry.name));
                out.extend_from_slice(b": ");
                out.extend_from_slice(self.bytes(entry.value));
                out.extend_from_slice(b"\r\n");
            }
        }
    }

    /// Encoded size of all of them.
    pub(super) fn encoded_len(&self) -> usize {
        self.entries
            .iter()
            .map(|entry| (entry.name.len + entry.value.len + 4) as usize)
            .sum()
    }

    /// Takes the field lines of a whole head: keeps those that go on, and says what the others mean.
    pub(super) fn take<'b>(
        &mut self,
        bytes: &'b [u8],
        shape: &Shape,
        kind: Kind,
        limits: &Limits,
    ) -> Result<Meaning<'b>, Reject> {
        self.clear();
        self.arena.extend_from_slice(&bytes[..shape.fields.end]);
        let mut meaning = Meaning::default();
        let lines = &bytes[shape.fields.clone()];
        // Clearing slots for a hundred fields costs more than reading five.
        if shape.count <= 24 {
            self.read(
                bytes,
                parse_lines(lines, &mut [httparse::EMPTY_HEADER; 24])?,
                kind,
                limits,
                &mut meaning,
            )?;
        } else {
            let mut slots = [httparse::EMPTY_HEADER; super::FIELDS_MAX];
            self.read(
                bytes,
                parse_lines(lines, &mut slots)?,
                kind,
                limits,
                &mut meaning,
            )?;
        }
        Ok(meaning)
    }

    fn read<'b>(
        &mut self,
        bytes: &'b [u8],
        headers: &[Header<'b>],
        kind: Kind,
        limits: &Limits,
        meaning: &mut Meaning<'b>,
    ) -> Result<(), Reject> {
        let offset_of = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
        let mut lists_fields = false;
        for header in headers {
            let name = Span::new(offset_of(header.name.as_bytes()), header.name.len());
            let value_at = offset_of(header.value);
            let lowered = &mut self.arena[name.range()];
            lowered.make_ascii_lowercase();
            let known = Known::of(lowered);
            if known == Known::Claim && kind == Kind::Request {
                self.claims.push(Entry {
                    name,
                    value: Span::new(value_at, header.value.len()),
                    is_line: false,
                });
                continue;
            }
            if known == Known::Other {
                if kind == Kind::Request && lowered.contains(&b'_') {
                    match limits.underscore_fields {
                        UnderscoreFields::Drop => continue,
                        UnderscoreFields::Keep => {}
                        UnderscoreFields::Refuse => return Err(Reject::bad("underscore_field")),
                    }
                }
            } else if !meaning.take(
                known,
                kind,
                header.value,
                is_exact(bytes, value_at, header.value.len()),
                &mut lists_fields,
            )? {
                continue;
            }
            let is_line = value_at == name.range().end + 2
                && bytes[value_at - 1] == b' '
                && bytes.get(value_at + header.value.len()) == Some(&b'\r');
            self.entries.push(Entry {
                name,
                value: Span::new(value_at, header.value.len()),
                is_line,
            });
        }
        if lists_fields {
            self.remove_listed(headers);
        }
        Ok(())
    }

    /// Removes the fields that the sender's `Connection` lists. Whatever we set is set after this, so that no client
    /// can remove it (RFC 9110 section 7.6.1).
    fn remove_listed(&mut self, headers: &[Header<'_>]) {
        let arena = &self.arena;
        for header in headers
            .iter()
            .filter(|header| header.name.eq_ignore_ascii_case("connection"))
        {
            for option in options(header.value) {
                self.entries
                    .retain(|entry| !arena[entry.name.range()].eq_ignore_ascii_case(option));
            }
        }
    }
}

/// httparse over the field lines, with its faults under our names.
fn parse_lines<'s, 'b>(
    lines: &'b [u8],
    slots: &'s mut [Header<'b>],
) -> Result<&'s [Header<'b>], Reject> {
    match httparse::parse_headers(lines, slots) {
        Ok(httparse::Status::Complete((_, headers))) => Ok(headers),
        Ok(httparse::Status::Partial) => Err(Reject::bad("field")),
        Err(httparse::Error::HeaderName) => Err(Reject::bad("field_name")),
        Err(httparse::Error::HeaderValue) => Err(Reject::bad("field_value")),
        Err(httparse::Error::TooManyHeaders) => Err(Reject::with(431, "fields_too_many")),
        Err(_) => Err(Reject::bad("field")),
    }
}

/// Appends those of a trailer section's lines that have one of these names (lower case) and a good value. One that has
/// more lines than a head may have is dropped whole.
pub fn push_trailers(out: &mut Vec<u8>, section: &[u8], names: &[String]) {
    let mut slots = [httparse::EMPTY_HEADER; 24];
    let Ok(headers) = parse_lines(section, &mut slots) else {
        return;
    };
    for header in headers {
        let listed = names
            .iter()
            .find(|name| header.name.eq_ignore_ascii_case(name));
        if let Some(name) = listed.filter(|_| is_field_value(header.value)) {
            super::encode::push_field(out, name, header.value);
        }
    }
}

/// Whether the bytes are a field name, a token (RFC 9110 section 5.6.2).
pub fn is_field_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().copied().all(is_token)
}

/// Whether the bytes are a field value: visible bytes, obs-text, and white space inside (RFC 9110 section 5.5).
pub fn is_field_value(value: &[u8]) -> bool {
    value.trim_ascii().len() == value.len()
        && value
            .iter()
            .all(|b| *b == b'\t' || (*b >= b' ' && *b != 0x7f))
}

pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
