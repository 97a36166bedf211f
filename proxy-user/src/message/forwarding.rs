//! Who asks, through hops that are trusted to say so: `X-Forwarded-*`, `Forwarded` (RFC 7239), `X-Request-Id`; read and written.

use std::io::Write;
use std::net::IpAddr;

use super::authority::{Authority, push_decimal};
use super::encode::push_field;
use super::meaning::options;
use super::{RequestHead, Span};

/// Hops that are followed back; who stands behind more of them is not found.
const HOPS_MAX: usize = 32;

/// Longest request id that is taken from a hop.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// Which field of a trusted hop names the client. The other one may have come from the client itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Claim {
    #[default]
    XForwardedFor,
    Forwarded,
}

/// How an origin is told who asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Told {
    /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Port`.
    #[default]
    XForwarded,
    /// `Forwarded`.
    Forwarded,
    Both,
}

/// What trusted hops said of the client.
#[derive(Debug, Default)]
pub(super) struct Hops {
    /// The client, then hops between it and the peer. What stood before the client nobody vouches for, and it goes no further.
    chain: Vec<IpAddr>,
    /// `http` or `https`, as the client came.
    scheme: Option<&'static str>,
    host: Option<Span>,
    port: Option<u16>,
}

impl Hops {
    pub fn clear(&mut self) {
        self.chain.clear();
        (self.scheme, self.host, self.port) = (None, None, None);
    }
}

/// What an origin is told beside what the client said.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// Address of the peer as text, formatted once per connection.
    pub peer: &'a str,
    /// `http` or `https`, as the peer came.
    pub scheme: &'a str,
    /// The port that the peer came to.
    pub port: u16,
    pub told: Told,
    /// What `Via` calls us; `None`: there is none.
    pub via: Option<&'a str>,
    /// Trailers of the response go on to a client that takes them.
    pub passes_trailers: bool,
    /// `Host` for HTTP/1.0 clients that named none: usually the endpoint's address.
    pub fallback_authority: &'a str,
}

impl RequestHead {
    /// Believes what the peer, a trusted hop, says of who asked it: the client's address, if it names one.
    ///
    /// Hops are counted from the right: behind each address that is trusted itself stands the one that asked it, and the
    /// first that is not trusted is the client. An address that cannot be read ends the search.
    pub fn believe(&mut self, claim: Claim, is_trusted: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let mut said = match claim {
            Claim::XForwardedFor => self.x_forwarded(&is_trusted),
            Claim::Forwarded => self.forwarded(&is_trusted),
        };
        said.chain.reverse();
        let arena = &mut self.fields.arena;
        let host = said.host.filter(|host| !host.is_empty());
        let host = host.and_then(|host| Authority::parse(host.as_bytes(), arena).ok());
        self.hops = Hops {
            chain: said.chain,
            scheme: said.scheme,
            host: host.map(|host| host.whole),
            port: said.port,
        };
        self.hops.chain.first().copied()
    }

    fn x_forwarded(&self, is_trusted: &impl Fn(IpAddr) -> bool) -> Said {
        let mut said = Said::default();
        for member in self.claimed("x-forwarded-for") {
            let Some(address) = parse_node(member) else {
                break;
            };
            said.chain.push(address);
            if !is_trusted(address) || said.chain.len() == HOPS_MAX {
                break;
            }
        }
        // Beside the client's address stands what its hop said of it; a hop that overwrites leaves one value for all.
        let depth = said.chain.len().max(1);
        let of_client = |name| self.claimed(name).take(depth).last().map(str::to_owned);
        said.scheme = of_client("x-forwarded-proto").and_then(|scheme| parse_scheme(&scheme));
        said.host = of_client("x-forwarded-host");
        said.port = of_client("x-forwarded-port").and_then(|port| parse_port(&port));
        said
    }

    fn forwarded(&self, is_trusted: &impl Fn(IpAddr) -> bool) -> Said {
        let mut said = Said::default();
        let values: Vec<&[u8]> = self.fields.claims("forwarded").collect();
        let elements = values.iter().rev().flat_map(|value| {
            let text = std::str::from_utf8(value).unwrap_or_default();
            split_unquoted(text, b',').into_iter().rev()
        });
        for element in elements.take(HOPS_MAX) {
            let pairs: Vec<(&str, String)> = split_unquoted(element, b';')
                .into_iter()
                .filter_map(parse_pair)
                .collect();
            let value = |name: &str| {
                let pair = pairs
                    .iter()
                    .find(|(found, _)| found.eq_ignore_ascii_case(name));
                pair.map(|(_, value)| value.as_str())
            };
            let Some(address) = value("for").and_then(parse_node) else {
                break;
            };
            said.chain.push(address);
            said.scheme = value("proto").and_then(parse_scheme).or(said.scheme);
            said.host = value("host").map(str::to_owned).or(said.host);
            if !is_trusted(address) {
                break;
            }
        }
        said
    }

    /// The members of all fields of this name that a client may not set, the last one first.
    fn claimed<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h str> {
        let values: Vec<&[u8]> = self.fields.claims(name).collect();
        values.into_iter().rev().flat_map(|value| {
            let members: Vec<&[u8]> = options(value).collect();
            let text = |member| std::str::from_utf8(member).unwrap_or_default();
            members.into_iter().rev().map(text)
        })
    }

    /// Gives the request its id: the one that a trusted peer gave it, or one that is made.
    pub fn identify(&mut self, is_trusted: bool, made: impl FnOnce() -> u128) {
        let given = if is_trusted {
            self.fields.claim_spans("x-request-id").next()
        } else {
            None
        };
        let given = given.filter(|id| is_request_id(self.fields.bytes(*id)));
        self.id = given.unwrap_or_else(|| {
            let (arena, id) = (&mut self.fields.arena, hex(made()));
            arena.extend_from_slice(&id);
            Span::new(arena.len() - id.len(), id.len())
        });
    }

    /// Who asked, where a hop has said it: see [`Self::believe`].
    pub fn client(&self) -> Option<IpAddr> {
        self.hops.chain.first().copied()
    }

    /// See [`Self::identify`]; empty before it.
    pub fn id(&self) -> &str {
        self.id.text(&self.fields.arena)
    }

    /// Whether a hop that calls itself so has seen this request (RFC 9110 section 7.6.3).
    pub fn came_via(&self, pseudonym: &str) -> bool {
        self.fields.values("via").any(|value| {
            options(value).any(|member| {
                let mut words = member.split(|b| *b == b' ').filter(|word| !word.is_empty());
                words.nth(1) == Some(pseudonym.as_bytes())
            })
        })
    }

    /// Appends what tells an origin who asks, unless the configuration says it itself.
    pub(super) fn encode_forwarding(&self, out: &mut Vec<u8>, forward: &Forward<'_>) {
        let scheme = self.hops.scheme.unwrap_or(forward.scheme);
        let host = match self.hops.host {
            Some(host) => host.text(&self.fields.arena),
            None => self.authority(),
        };
        let is_free = |name| !self.fields.is_set(name);
        if forward.told != Told::Forwarded {
            if is_free("x-forwarded-for") {
                out.extend_from_slice(b"x-forwarded-for: ");
                for hop in &self.hops.chain {
                    // Writing to memory cannot fail.
                    let _ = write!(out, "{hop}, ");
                }
                out.extend_from_slice(forward.peer.as_bytes());
                out.extend_from_slice(b"\r\n");
            }
            if is_free("x-forwarded-proto") {
                push_field(out, "x-forwarded-proto", scheme.as_bytes());
            }
            if is_free("x-forwarded-port") {
                out.extend_from_slice(b"x-forwarded-port: ");
                push_decimal(out, self.hops.port.unwrap_or(forward.port).into());
                out.extend_from_slice(b"\r\n");
            }
            if !host.is_empty() && is_free("x-forwarded-host") {
                push_field(out, "x-forwarded-host", host.as_bytes());
            }
        }
        if forward.told != Told::XForwarded && is_free("forwarded") {
            out.extend_from_slice(b"forwarded: ");
            match self.hops.chain.split_first() {
                Some((client, hops)) => {
                    push_element(out, &client.to_string(), Some((scheme, host)));
                    for hop in hops {
                        out.extend_from_slice(b", ");
                        push_element(out, &hop.to_string(), None);
                    }
                    out.extend_from_slice(b", ");
                    push_element(out, forward.peer, None);
                }
                None => push_element(out, forward.peer, Some((scheme, host))),
            }
            out.extend_from_slice(b"\r\n");
        }
        if !self.id().is_empty() && is_free("x-request-id") {
            push_field(out, "x-request-id", self.id().as_bytes());
        }
        if forward.passes_trailers && self.takes_trailers {
            // Of this connection, as all that `Connection` lists (RFC 9110 section 10.1.4).
            out.extend_from_slice(b"te: trailers\r\nconnection: te\r\n");
        }
        if let Some(pseudonym) = forward.via {
            let version: &[u8] = if self.is_http10() { b"1.0 " } else { b"1.1 " };
            out.extend_from_slice(b"via: ");
            out.extend_from_slice(version);
            out.extend_from_slice(pseudonym.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// What hops said, the nearest one first.
#[derive(Default)]
struct Said {
    chain: Vec<IpAddr>,
    scheme: Option<&'static str>,
    host: Option<String>,
    port: Option<u16>,
}

/// One element of `Forwarded`. A host with a port, and an IPv6 address, stand in quotes (RFC 7239 section 4).
fn push_element(out: &mut Vec<u8>, address: &str, asked: Option<(&str, &str)>) {
    let is_v6 = address.contains(':');
    out.extend_from_slice(if is_v6 { b"for=\"[" } else { b"for=" });
    out.extend_from_slice(address.as_bytes());
    out.extend_from_slice(if is_v6 { b"]\"" } else { b"" });
    let Some((scheme, host)) = asked else { return };
    if !host.is_empty() {
        let quote: &[u8] = if super::is_field_name(host.as_bytes()) {
            b""
        } else {
            b"\""
        };
        for part in [b";host=", quote, host.as_bytes(), quote] {
            out.extend_from_slice(part);
        }
    }
    out.extend_from_slice(b";proto=");
    out.extend_from_slice(scheme.as_bytes());
}

fn hex(number: u128) -> [u8; 32] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    std::array::from_fn(|at| DIGITS[(number >> (124 - 4 * at) & 15) as usize])
}

/// An id that can stand in a field, in a line of a log and in a page as it is.
fn is_request_id(id: &[u8]) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
        && id
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.=:+/".contains(b))
}

/// The address of a node, with a port or without: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]:80`.
fn parse_node(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let ip = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, rest)) if rest.is_empty() || rest.starts_with(':') => ip,
        Some(_) => return None,
        None if text.matches(':').count() == 1 => text.split_once(':')?.0,
        None => text,
    };
    ip.parse().ok().map(|ip: IpAddr| ip.to_canonical())
}

fn parse_scheme(text: &str) -> Option<&'static str> {
    ["http", "https"]
        .into_iter()
        .find(|scheme| text.eq_ignore_ascii_case(scheme))
}

fn parse_port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port > 0)
}

/// The parts of a text between bytes that do not stand in quotes.
fn split_unquoted(text: &str, between: u8) -> Vec<&str> {
    let (mut parts, mut start, mut is_quoted, mut is_escaped) = (Vec::new(), 0, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_quoted => is_escaped = true,
            b'"' => is_quoted = !is_quoted,
            _ if byte == between && !is_quoted => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

/// `name=value` or `name="value"`.
fn parse_pair(text: &str) -> Option<(&str, String)> {
    let (name, value) = text.split_once('=')?;
    let quoted = value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'));
    let value = match quoted {
        Some(quoted) => {
            let mut plain = String::new();
            let mut rest = quoted.chars();
            while let Some(char) = rest.next() {
                plain.push(if char == '\\' { rest.next()? } else { char });
            }
            plain
        }
        None if value.contains('"') => return None,
        None => value.to_owned(),
    };
    Some((name, value))
}
