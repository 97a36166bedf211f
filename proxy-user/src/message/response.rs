//! The head of a response from an origin, parsed as strictly as a request: every fault is a 502.

use super::scan::{Kind, Scan, Shape};
use super::{Fields, Framing, Limits, Method, Parse, Reject};

/// A response head; its memory is used again.
#[derive(Debug, Default)]
pub struct ResponseHead {
    pub(super) fields: Fields,
    scan: Scan,
    status: u16,
    framing: Framing,
    /// Of a response without a body, the length its body would have (RFC 9110 section 8.6).
    pub(super) length_told: Option<u64>,
    keep_alive: bool,
    pub(super) has_date: bool,
}

impl ResponseHead {
    /// Parses a head from all bytes received of it so far; `method` is that of the request it answers.
    ///
    /// After an interim head ([`Self::is_interim`]) call again for the next one.
    pub fn parse(
        &mut self,
        bytes: &[u8],
        method: Method,
        limits: &Limits,
    ) -> Result<Parse, Reject> {
        let parsed = match self.scan.resume(bytes, Kind::Response, limits) {
            Ok(None) => return Ok(Parse::Partial),
            Ok(Some(shape)) => self
                .take(bytes, &shape, method, limits)
                .map(|()| Parse::Complete(shape.fields.end)),
            Err(reject) => Err(reject),
        };
        self.scan = Scan::default();
        parsed.map_err(Reject::by_origin)
    }

    /// Forgets a head that came to no end: what is parsed next comes from another connection.
    pub fn restart(&mut self) {
        self.scan = Scan::default();
    }

    fn take(
        &mut self,
        bytes: &[u8],
        shape: &Shape,
        method: Method,
        limits: &Limits,
    ) -> Result<(), Reject> {
        let meaning = self.fields.take(bytes, shape, Kind::Response, limits)?;
        let line = &bytes[shape.start_line.clone()];
        self.status = parse_status(line)?;
        let is_http10 = line.get(7) == Some(&b'0');
        self.keep_alive = !meaning.closes && (!is_http10 || meaning.keeps_alive);
        self.has_date = meaning.has_date;
        self.length_told = None;
        self.framing = match (meaning.length, meaning.is_chunked) {
            (Some(_), true) => return Err(Reject::bad("length_and_coding")),
            (_, true) if is_http10 => return Err(Reject::bad("coding_on_http10")),
            // A body where none can be is the next response to whoever believes it (RFC 9112 section 6.1).
            (_, true) if self.is_interim() || self.status == 204 => {
                return Err(Reject::bad("body_forbidden"));
            }
            (Some(1..), _) if self.is_interim() || self.status == 204 => {
                return Err(Reject::bad("body_forbidden"));
            }
            _ if self.is_interim() || self.status == 204 => Framing::None,
            (length, _) if method == Method::Head || self.status == 304 => {
                self.length_told = length;
                Framing::None
            }
            (None, true) => Framing::Chunked,
            (Some(length), false) => Framing::Length(length),
            (None, false) => Framing::UntilClose,
        };
        // We never ask for another protocol.
        if self.status == 101 {
            Err(Reject::bad("unasked_upgrade"))
        } else {
            Ok(())
        }
    }

    pub fn status(&self) -> u16 {
        self.status
    }

    /// 1xx: another head follows, the answer itself is still to come.
    pub fn is_interim(&self) -> bool {
        self.status < 200
    }

    /// How the origin frames the body.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// The origin lets the connection live, and its body has an end without closing it.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive && self.framing != Framing::UntilClose
    }

    /// End-to-end fields.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    pub fn remove(&mut self, name: &str) {
        self.has_date &= name != "date";
        self.fields.remove(name);
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.fields.set(name, value);
    }

    pub fn add(&mut self, name: &str, value: &str) {
        self.fields.add(name, value);
    }
}

/// Three digits from 100 to 599, and a reason phrase or none; ours is written in its place.
fn parse_status(line: &[u8]) -> Result<u16, Reject> {
    const BAD: Reject = Reject::bad("status_line");
    let [b' ', digits @ ..] = line.get(8..).ok_or(BAD)? else {
        return Err(BAD);
    };
    let (code, phrase) = digits.split_at_checked(3).ok_or(BAD)?;
    if !code.iter().all(u8::is_ascii_digit) || !matches!(phrase.first(), None | Some(b' ')) {
        return Err(BAD);
    }
    if phrase
        .iter()
        .any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f)
    {
        return Err(BAD);
    }
    let status = code
        .iter()
        .fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0'));
    if (100..=599).contains(&status) {
        Ok(status)
    } else {
        Err(BAD)
    }
}
