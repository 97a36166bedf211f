//! The head of a request, parsed strictly.

use super::authority::Authority;
use super::forwarding::Hops;
use super::scan::{Kind, Scan, Shape};
use super::target::Target;
use super::{Fields, Framing, Limits, Parse, Reject, Span};

/// A request head; one per connection, its memory used again for each request.
#[derive(Debug, Default)]
pub struct RequestHead {
    pub(super) fields: Fields,
    scan: Scan,
    method: Method,
    method_name: Span,
    target: Target,
    authority: Authority,
    /// What `Host` shall be towards the origin, where a policy says so.
    pub(super) host_override: Option<Span>,
    pub(super) hops: Hops,
    pub(super) id: Span,
    consumer: Span,
    framing: Framing,
    keep_alive: bool,
    expects_continue: bool,
    wants_upgrade: bool,
    pub(super) takes_trailers: bool,
    is_http10: bool,
}

/// Request methods that something depends on (RFC 9110 section 9.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    #[default]
    Get,
    Head,
    Post,
    Put,
    Delete,
    Options,
    Patch,
    /// Any other token: passed on as it is.
    Other,
}

impl Method {
    /// Asking twice is as good as asking once (RFC 9110 section 9.2.2).
    pub fn is_idempotent(self) -> bool {
        matches!(
            self,
            Self::Get | Self::Head | Self::Put | Self::Delete | Self::Options
        )
    }

    /// A body means something (RFC 9110 section 9.3); of the others some origins read none, and take it for the next request.
    fn defines_content(self) -> bool {
        !matches!(self, Self::Get | Self::Head | Self::Delete | Self::Options)
    }
}

impl RequestHead {
    /// Parses a head from all bytes received of it so far; after `Partial` call again with more behind the same bytes.
    ///
    /// The head of an earlier request stays readable until this one is complete. After a `Reject` it says nothing, and
    /// nothing more can be read from this connection.
    pub fn parse(&mut self, bytes: &[u8], limits: &Limits) -> Result<Parse, Reject> {
        let parsed = match self.scan.resume(bytes, Kind::Request, limits) {
            Ok(None) => return Ok(Parse::Partial),
            Ok(Some(shape)) => self
                .take(bytes, &shape, limits)
                .map(|()| Parse::Complete(shape.fields.end)),
            Err(reject) => Err(reject),
        };
        self.scan = Scan::default();
        parsed
    }

    /// Says nothing any more, as before the first head.
    pub fn forget(&mut self) {
        let mut fields = std::mem::take(&mut self.fields);
        fields.clear();
        *self = Self {
            fields,
            ..Self::default()
        };
    }

    fn take(&mut self, bytes: &[u8], shape: &Shape, limits: &Limits) -> Result<(), Reject> {
        let meaning = self.fields.take(bytes, shape, Kind::Request, limits)?;
        self.host_override = None;
        self.hops.clear();
        self.id = Span::default();
        self.consumer = Span::default();
        let line = &bytes[shape.start_line.clone()];
        let (method, rest) = split_at_space(line)?;
        let (target, version) = split_at_space(rest)?;
        if !super::is_field_name(method) || version.len() != b"HTTP/1.1".len() {
            return Err(Reject::bad("start_line"));
        }
        if target.len() > limits.target_bytes_max {
            return Err(Reject::with(414, "target_too_long"));
        }
        self.method = parse_method(method)?;
        self.method_name = Span::new(shape.start_line.start, method.len());
        self.is_http10 = version.last() == Some(&b'0');
        let target_at = shape.start_line.start + method.len() + 1;
        self.target = Target::parse(
            &mut self.fields.arena,
            target_at..target_at + target.len(),
            self.method,
            limits.encoded_slash,
        )?;
        self.take_authority(meaning.host)?;
        self.framing = match (meaning.length, meaning.is_chunked) {
            (Some(_), true) => return Err(Reject::bad("length_and_coding")),
            (None, true) if self.is_http10 => return Err(Reject::bad("coding_on_http10")),
            (None, true) => Framing::Chunked,
            (Some(length), false) => Framing::Length(length),
            (None, false) => Framing::None,
        };
        self.keep_alive = !meaning.closes && (!self.is_http10 || meaning.keeps_alive);
        self.expects_continue = meaning.expects_continue && !self.is_http10;
        self.wants_upgrade = meaning.wants_upgrade;
        self.takes_trailers = meaning.takes_trailers;
        Ok(())
    }

    /// The target's own authority wins; `Host` must be there and right all the same (RFC 9112 section 3.2).
    fn take_authority(&mut self, host: Option<&[u8]>) -> Result<(), Reject> {
        let arena = &mut self.fields.arena;
        self.authority = match host {
            Some(host) => Authority::parse(host, arena)?,
            None if self.is_http10 => Authority::default(),
            None => return Err(Reject::bad("host_missing")),
        };
        if let Some(span) = self.target.authority {
            let authority = arena[span.range()].to_vec();
            self.authority = Authority::parse(&authority, arena)?;
        }
        Ok(())
    }

    pub fn method(&self) -> Method {
        self.method
    }

    /// As received; methods are case-sensitive.
    pub fn method_name(&self) -> &str {
        self.method_name.text(&self.fields.arena)
    }

    /// In its one form: dot segments and empty ones gone, nothing encoded that need not be; `*` for `OPTIONS *`.
    pub fn path(&self) -> &str {
        self.target.path.text(&self.fields.arena)
    }

    /// Behind the `?`, as received.
    pub fn query(&self) -> Option<&str> {
        self.target
            .query
            .map(|query| query.text(&self.fields.arena))
    }

    /// Lower case, without port; empty if an HTTP/1.0 client named none.
    pub fn host(&self) -> &str {
        self.authority.host().text(&self.fields.arena)
    }

    /// As the client gave it.
    pub fn port(&self) -> Option<u16> {
        self.authority.port
    }

    /// `host[:port]`; empty if an HTTP/1.0 client named none.
    pub fn authority(&self) -> &str {
        self.authority.whole.text(&self.fields.arena)
    }

    /// Who calls, as a policy found it; empty: nobody that is known.
    pub fn consumer(&self) -> &str {
        self.consumer.text(&self.fields.arena)
    }

    /// Notes who calls.
    pub fn set_consumer(&mut self, name: &str) {
        let start = self.fields.arena.len();
        self.fields.arena.extend_from_slice(name.as_bytes());
        self.consumer = Span::new(start, name.len());
    }

    /// `None`, `Length` or `Chunked`.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Any origin finds the end of this request where it is. Behind one with a body that its method gives no meaning, an
    /// origin may answer what the body says, and its connection is nobody else's.
    pub fn ends_surely(&self) -> bool {
        matches!(self.framing, Framing::None | Framing::Length(0)) || self.method.defines_content()
    }

    /// The client lets the connection live after this exchange.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// The client holds its body back until [`super::CONTINUE`] is sent. The field goes no further: whoever first reads the
    /// body sends the 100, so that the origin never waits and the body is never lost (RFC 9110 section 10.1.1).
    pub fn expects_continue(&self) -> bool {
        self.expects_continue
    }

    /// The client asked for another protocol. There is no tunnel yet: the request goes on without the question.
    pub fn wants_upgrade(&self) -> bool {
        self.wants_upgrade
    }

    pub fn is_http10(&self) -> bool {
        self.is_http10
    }

    /// End-to-end fields.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    pub fn remove(&mut self, name: &str) {
        self.fields.remove(name);
    }

    /// Sets a field of this name (lower case). `host` changes what the origin is told, not how the request is routed.
    pub fn set(&mut self, name: &str, value: &str) {
        if name == "host" {
            let arena = &mut self.fields.arena;
            if let Ok(authority) = Authority::parse(value.as_bytes(), arena) {
                self.host_override = Some(authority.whole);
            }
            return;
        }
        self.fields.set(name, value);
    }

    pub fn add(&mut self, name: &str, value: &str) {
        self.fields.add(name, value);
    }
}

/// Both sides of the first space. A second space beside it leaves an empty part, which nothing accepts.
fn split_at_space(line: &[u8]) -> Result<(&[u8], &[u8]), Reject> {
    let at = memchr::memchr(b' ', line).ok_or(Reject::bad("start_line"))?;
    Ok((&line[..at], &line[at + 1..]))
}

/// CONNECT asks for a tunnel that we do not dig; TRACE would show a client what we add for the origin's eyes.
fn parse_method(name: &[u8]) -> Result<Method, Reject> {
    Ok(match name {
        b"GET" => Method::Get,
        b"HEAD" => Method::Head,
        b"POST" => Method::Post,
        b"PUT" => Method::Put,
        b"DELETE" => Method::Delete,
        b"OPTIONS" => Method::Options,
        b"PATCH" => Method::Patch,
        b"CONNECT" | b"TRACE" => return Err(Reject::with(405, "method")),
        _ => Method::Other,
    })
}
