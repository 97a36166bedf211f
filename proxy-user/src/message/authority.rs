//! Host and port of a request: checked, lowered, written into the arena in one form (RFC 9110 section 4.2, 7.2).

use super::{Reject, Span};
use std::net::Ipv6Addr;

/// The authority that a request is for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Authority {
    /// `host[:port]`, lower case, without the dot that may end a name.
    pub whole: Span,
    pub host_len: u32,
    pub port: Option<u16>,
}

/// Longest name of the DNS, and what brackets add to an address.
const HOST_BYTES_MAX: usize = 255;

impl Authority {
    /// Checks it and appends its one form to the arena.
    pub fn parse(authority: &[u8], arena: &mut Vec<u8>) -> Result<Self, Reject> {
        const BAD: Reject = Reject::bad("host");
        let is_literal = authority.first() == Some(&b'[');
        let (host, port) = match authority.iter().rposition(|b| *b == b':' || *b == b']') {
            Some(at) if authority[at] == b':' => {
                (&authority[..at], parse_port(&authority[at + 1..])?)
            }
            _ => (authority, None),
        };
        let host = if is_literal {
            host
        } else {
            host.strip_suffix(b".").unwrap_or(host)
        };
        if host.is_empty()
            || host.len() > HOST_BYTES_MAX
            || !(if is_literal {
                is_ipv6_literal(host)
            } else {
                is_name(host)
            })
        {
            return Err(BAD);
        }
        let start = arena.len();
        arena.extend_from_slice(host);
        arena[start..].make_ascii_lowercase();
        if let Some(port) = port {
            arena.push(b':');
            push_decimal(arena, u64::from(port));
        }
        Ok(Self {
            whole: Span::new(start, arena.len() - start),
            host_len: host.len() as u32,
            port,
        })
    }

    /// The host alone.
    pub fn host(&self) -> Span {
        Span {
            start: self.whole.start,
            len: self.host_len,
        }
    }
}

/// Digits up to 65535; none at all is a port not given (RFC 3986 section 3.2.3).
fn parse_port(digits: &[u8]) -> Result<Option<u16>, Reject> {
    if digits.is_empty() {
        return Ok(None);
    }
    let value = digits.iter().try_fold(0u32, |sum, digit| {
        (digit.is_ascii_digit() && digits.len() <= 5).then(|| sum * 10 + u32::from(digit - b'0'))
    });
    match value.map(u16::try_from) {
        Some(Ok(port)) => Ok(Some(port)),
        _ => Err(Reject::bad("host")),
    }
}

/// Letters, digits, hyphen, underscore and single dots inside. RFC 3986 would let a registered name hold more, of which
/// the DNS and certificates know nothing; origins that build file names from hosts do.
fn is_name(host: &[u8]) -> bool {
    let mut before = b'.';
    for byte in host {
        let is_fine = byte.is_ascii_alphanumeric()
            || matches!(byte, b'-' | b'_')
            || (*byte == b'.' && before != b'.');
        if !is_fine {
            return false;
        }
        before = *byte;
    }
    before != b'.'
}

fn is_ipv6_literal(host: &[u8]) -> bool {
    host.strip_prefix(b"[")
        .and_then(|rest| rest.strip_suffix(b"]"))
        .and_then(|address| std::str::from_utf8(address).ok())
        .is_some_and(|address| address.parse::<Ipv6Addr>().is_ok())
}

/// Appends a number in decimal.
pub(crate) fn push_decimal(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(authority: &str) -> Option<(String, u32, Option<u16>)> {
        let mut arena = b"before".to_vec();
        let parsed = Authority::parse(authority.as_bytes(), &mut arena).ok()?;
        Some((
            parsed.whole.text(&arena).to_owned(),
            parsed.host_len,
            parsed.port,
        ))
    }

    #[test]
    fn an_authority_has_one_form() {
        assert_eq!(form("Example.COM"), Some(("example.com".into(), 11, None)));
        assert_eq!(
            form("example.com.:8080"),
            Some(("example.com:8080".into(), 11, Some(8080)))
        );
        assert_eq!(
            form("a_b-1.example:"),
            Some(("a_b-1.example".into(), 13, None))
        );
        assert_eq!(
            form("[2001:DB8::1]:00443"),
            Some(("[2001:db8::1]:443".into(), 13, Some(443)))
        );
        assert_eq!(
            form("192.0.2.1:80"),
            Some(("192.0.2.1:80".into(), 9, Some(80)))
        );
    }

    #[test]
    fn what_is_no_authority_is_refused() {
        for bad in [
            "",
            ":80",
            ".",
            "a..b",
            ".a",
            "a..",
            "a b",
            "a/b",
            "user@a",
            "a:b",
            "a:-1",
            "a:65536",
            "a:000080",
            "a:80:90",
            "a%41",
            "a,b",
            "[::1",
            "::1",
            "[1.2.3.4]",
            "[fe80::1%eth0]",
            "[::1]x",
            "[::1]x:80",
            "[]",
            "a\\b",
            "a;b",
            "a\"b",
            "\u{e9}",
            "a?b",
            "a#b",
            "a:+8",
        ] {
            assert_eq!(form(bad), None, "{bad:?}");
        }
        assert!(form(&"a".repeat(255)).is_some());
        assert_eq!(form(&"a".repeat(256)), None);
    }
}
