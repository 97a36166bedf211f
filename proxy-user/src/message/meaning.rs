//! What the fields say that do not go on: where the body ends, whether the connection lives, whom the request is for.

use super::scan::Kind;
use super::{Reject, is_field_name};

/// The value stands behind its colon with one space or none, and before CRLF: nothing that a reader could trim otherwise.
pub(super) fn is_exact(bytes: &[u8], at: usize, len: usize) -> bool {
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
    pub takes_trailers: bool,
    pub has_date: bool,
    /// `Connection` options seen.
    options: u32,
    /// Which of [`Known::Single`] were seen, a bit each.
    singles: u8,
}

/// More options than this in one head are an attack on whoever compares them with the fields.
const OPTIONS_MAX: u32 = 32;

impl<'b> Meaning<'b> {
    /// Takes a field of a known name; answers whether it goes on.
    pub fn take(
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
            Known::Host | Known::Expect | Known::Claim | Known::Single(_)
                if kind == Kind::Response =>
            {
                return Ok(true);
            }
            // Of two, one origin takes the first and another the last.
            Known::Single(bit) if self.singles & bit != 0 => {
                return Err(Reject::bad("field_twice"));
            }
            Known::Single(bit) => {
                self.singles |= bit;
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
            Known::Te => {
                self.takes_trailers |=
                    options(value).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
            }
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
        let is_chunked_in_other_words =
            options(value).all(|coding| coding.eq_ignore_ascii_case(b"chunked"));
        if is_chunked_in_other_words || !options(value).all(is_field_name) {
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
pub(super) fn options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|b| *b == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|option| !option.is_empty())
}

/// Names that this room knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Expect,
    Upgrade,
    Te,
    Date,
    /// Others that concern one hop only.
    Hop,
    /// What only a proxy may say of a client, or names a request for others; a client that says it itself may lie.
    Claim,
    /// Has one value (RFC 9110 section 5.3), upon which a policy or an origin decides; a bit for each name.
    Single(u8),
    Other,
}

impl Known {
    /// Of a name in lower case.
    pub fn of(name: &[u8]) -> Self {
        match name {
            b"host" => Self::Host,
            b"date" => Self::Date,
            b"expect" => Self::Expect,
            b"upgrade" => Self::Upgrade,
            b"connection" => Self::Connection,
            b"content-length" => Self::ContentLength,
            b"transfer-encoding" => Self::TransferEncoding,
            b"te" => Self::Te,
            b"trailer"
            | b"keep-alive"
            | b"proxy-connection"
            | b"proxy-authenticate"
            | b"proxy-authorization"
            | b"proxy-authentication-info"
            | b"http2-settings" => Self::Hop,
            b"authorization" => Self::Single(1),
            b"content-type" => Self::Single(2),
            b"range" => Self::Single(4),
            b"if-range" => Self::Single(8),
            b"if-modified-since" => Self::Single(16),
            b"if-unmodified-since" => Self::Single(32),
            b"forwarded" | b"x-real-ip" | b"x-request-id" => Self::Claim,
            _ if name.starts_with(b"x-forwarded-") => Self::Claim,
            _ => Self::Other,
        }
    }

    /// Written by `encode` and by nobody else.
    pub fn is_ours(self) -> bool {
        !matches!(
            self,
            Self::Other | Self::Date | Self::Claim | Self::Single(_) | Self::Expect
        )
    }
}
