//! The fields of a head: one arena of bytes, ranges into it, and what the known names among them mean.

use super::{
    Limits, Reject, Span, UnderscoreFields,
    scan::{Kind, Shape},
};
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
        self.has_claim = false;
    }

    /// Whether the configuration has set this field of the kind that `encode` says of clients.
    pub(super) fn claims(&self, name: &str) -> bool {
        self.has_claim && self.value(name).is_some()
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

/// The value stands behind its colon with one space or none, and before CRLF: nothing that a reader could trim otherwise.
fn is_exact(bytes: &[u8], at: usize, len: usize) -> bool {
    let before = bytes.get(at.wrapping_sub(2)..at).unwrap_or_default();
    (before == b": " || before.ends_with(b":")) && bytes.get(at + len) == Some(&b'\r')
}

/// What the fields that do not go on say about the message.
#[derive(Debug, Default)]
pub(super) struct Meaning<'b> {
    pub host: Option<&'b [u8]>,
    pub length: Option<u64>,
    pub is_chunked: bool,
    pub closes: bool,
    pub keeps_alive: bool,
    pub expects_continue: bool,
    pub wants_upgrade: bool,
    pub has_date: bool,
    /// `Connection` options seen.
    options: u32,
}

/// More options than this in one head are an attack on whoever compares them with the fields.
const OPTIONS_MAX: u32 = 32;

impl<'b> Meaning<'b> {
    /// Takes a field of a known name; answers whether it goes on.
    fn take(
        &mut self,
        known: Known,
        kind: Kind,
        value: &'b [u8],
        is_exact: bool,
        lists_fields: &mut bool,
    ) -> Result<bool, Reject> {
        match known {
            Known::Other => return Ok(true),
            Known::Date => {
                self.has_date = true;
                return Ok(true);
            }
            // They mean something in requests only.
            Known::Host | Known::Expect | Known::Claim if kind == Kind::Response => {
                return Ok(true);
            }
            Known::Host if self.host.replace(value).is_some() => {
                return Err(Reject::bad("host_twice"));
            }
            Known::ContentLength => self.take_length(value, is_exact)?,
            Known::TransferEncoding => self.take_coding(value, is_exact)?,
            Known::Connection => *lists_fields |= self.take_options(value)?,
            Known::Expect if value.eq_ignore_ascii_case(b"100-continue") => {
                self.expects_continue = true
            }
            Known::Expect => return Err(Reject::with(417, "expect")),
            Known::Upgrade => self.wants_upgrade = true,
            Known::Host | Known::Hop | Known::Claim => {}
        }
        Ok(false)
    }

    fn take_length(&mut self, value: &[u8], is_exact: bool) -> Result<(), Reject> {
        if self.length.is_some() {
            return Err(Reject::bad("content_length_twice"));
        }
        if value.is_empty()
            || value.len() > 18
            || !is_exact
            || !value.iter().all(u8::is_ascii_digit)
        {
            return Err(Reject::bad("content_length"));
        }
        self.length = Some(
            value
                .iter()
                .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')),
        );
        Ok(())
    }

    /// One exact `chunked`. Other spellings of it would be the same coding, but an origin that thinks otherwise has been
    /// every second smuggling attack, and no client sends them.
    fn take_coding(&mut self, value: &[u8], is_exact: bool) -> Result<(), Reject> {
        if self.is_chunked {
            return Err(Reject::bad("transfer_encoding_twice"));
        }
        if value == b"chunked" && is_exact {
            self.is_chunked = true;
            return Ok(());
        }
        let is_list_of_known = value
            .split(|b| *b == b',')
            .all(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"chunked"));
        if is_list_of_known || !options(value).all(is_field_name) {
            return Err(Reject::bad("transfer_encoding"));
        }
        Err(Reject::with(501, "transfer_coding_unknown"))
    }

    /// Answers whether the options list fields to be removed.
    fn take_options(&mut self, value: &[u8]) -> Result<bool, Reject> {
        let mut lists_fields = false;
        for option in options(value) {
            self.options += 1;
            if !is_field_name(option) || self.options > OPTIONS_MAX {
                return Err(Reject::bad("connection_option"));
            }
            if option.eq_ignore_ascii_case(b"close") {
                self.closes = true;
            } else if option.eq_ignore_ascii_case(b"keep-alive") {
                self.keeps_alive = true;
            } else {
                lists_fields = true;
            }
        }
        Ok(lists_fields)
    }
}

/// The members of a comma-separated list, empty ones left out (RFC 9110 section 5.6.1.2).
fn options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|b| *b == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|option| !option.is_empty())
}

/// Names that this room knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Expect,
    Upgrade,
    Date,
    /// Others that concern one hop only.
    Hop,
    /// What only a proxy may say of a client; a client that says it itself lies.
    Claim,
    Other,
}

impl Known {
    /// Of a name in lower case.
    fn of(name: &[u8]) -> Self {
        match name {
            b"host" => Self::Host,
            b"date" => Self::Date,
            b"expect" => Self::Expect,
            b"upgrade" => Self::Upgrade,
            b"connection" => Self::Connection,
            b"content-length" => Self::ContentLength,
            b"transfer-encoding" => Self::TransferEncoding,
            b"te"
            | b"trailer"
            | b"keep-alive"
            | b"proxy-connection"
            | b"proxy-authenticate"
            | b"proxy-authorization"
            | b"proxy-authentication-info"
            | b"http2-settings" => Self::Hop,
            b"forwarded" | b"x-real-ip" => Self::Claim,
            _ if name.starts_with(b"x-forwarded-") => Self::Claim,
            _ => Self::Other,
        }
    }

    /// Written by `encode` and by nobody else.
    fn is_ours(self) -> bool {
        !matches!(self, Self::Other | Self::Date | Self::Claim | Self::Expect)
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
