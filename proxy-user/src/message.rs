//! One message of HTTP: a head as a byte arena with field ranges, framing rules, and how it is written anew.
//!
//! Strictness is the rule here: what is ambiguous is refused, never repaired (RFC 9110, RFC 9112), because whatever
//! two origins could read in two ways is a way past a policy. What goes on is encoded from our own parse.
//! httparse reads field lines; it lets pass a bare LF, leading empty lines and more, so `scan` looks at the raw lines first.

mod accept;
mod authority;
mod encode;
mod fields;
mod forwarding;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod meaning;
mod reply;
mod request;
mod response;
mod scan;
mod target;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use accept::Form;
pub(crate) use authority::push_decimal;
pub use encode::Answer;
pub use fields::{Fields, is_field_name, is_field_value, push_trailers};
pub use forwarding::{Claim, Forward, Told};
pub use reply::{CONTINUE, Delivery, Page, Reply, encode_reply, reason_phrase};
pub use request::{Method, RequestHead};
pub use response::ResponseHead;

/// How the end of a message's body is found (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    #[default]
    None,
    /// So many bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// All until the connection closes; responses only.
    UntilClose,
}

/// A message that is not taken: what the peer is told, and the name under which it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// What a client gets; 502 where an origin is to blame.
    pub status: u16,
    /// Label of `sluice_http_rejected_total`.
    pub reason: &'static str,
}

impl Reject {
    /// The message is malformed or ambiguous.
    pub(crate) const fn bad(reason: &'static str) -> Self {
        Self {
            status: 400,
            reason,
        }
    }

    /// The message is one of ours to refuse, with this status.
    pub(crate) const fn with(status: u16, reason: &'static str) -> Self {
        Self { status, reason }
    }

    /// The same fault, made by an origin.
    pub(crate) const fn by_origin(self) -> Self {
        Self {
            status: 502,
            reason: self.reason,
        }
    }
}

/// What a parse came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parse {
    /// The head is whole and took so many bytes; what follows is body.
    Complete(usize),
    /// More bytes are needed; call again with all of them.
    Partial,
}

/// Limits of one message, in bytes unless named otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Start line and fields together.
    pub head_bytes_max: usize,
    /// One field line.
    pub field_bytes_max: usize,
    /// Number of field lines; never more than [`FIELDS_MAX`].
    pub fields_max: usize,
    /// The request target.
    pub target_bytes_max: usize,
    /// All chunk extensions of one body together.
    pub chunk_extension_bytes_max: usize,
    /// The trailer section of one body.
    pub trailer_bytes_max: usize,
    pub underscore_fields: UnderscoreFields,
    pub encoded_slash: EncodedSlash,
}

/// The most field lines that any setting allows in one head.
pub const FIELDS_MAX: usize = 256;

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes_max: 32 << 10,
            field_bytes_max: 16 << 10,
            fields_max: 100,
            target_bytes_max: 8 << 10,
            chunk_extension_bytes_max: 4 << 10,
            trailer_bytes_max: 8 << 10,
            underscore_fields: UnderscoreFields::Drop,
            encoded_slash: EncodedSlash::Refuse,
        }
    }
}

/// What becomes of request fields with an underscore in their names, which CGI-like origins take for a hyphen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnderscoreFields {
    Drop,
    Keep,
    Refuse,
}

/// What becomes of `%2F` and `%5C` in a path, which some origins take for a separator and others do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodedSlash {
    /// 400.
    Refuse,
    /// Forwarded as it is, part of its segment.
    Keep,
    /// `%2F` becomes `/` before matching; `%5C` is refused.
    Decode,
}

/// A range of an arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Span {
    start: u32,
    len: u32,
}

impl Span {
    /// Arenas are bounded by `Limits::head_bytes_max` and what the configuration adds: far below 4 GiB.
    fn new(start: usize, len: usize) -> Self {
        Self {
            start: start as u32,
            len: len as u32,
        }
    }

    fn range(self) -> Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }

    /// The bytes as text; everything kept in an arena as text was checked to be ASCII.
    fn text(self, arena: &[u8]) -> &str {
        arena
            .get(self.range())
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }
}
