//! The target of a request: its four forms, and the one form of its path (RFC 9112 section 3.2, RFC 3986 section 6.2.2).

use super::{EncodedSlash, Method, Reject, Span};
use std::ops::Range;

/// A target taken apart, as ranges of the arena.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Target {
    /// Of absolute form only: the bytes between `//` and the path.
    pub authority: Option<Span>,
    /// Normalised; `/` where none was given, `*` for the server as a whole.
    pub path: Span,
    /// What stands behind `?`, untouched.
    pub query: Option<Span>,
}

const BAD: Reject = Reject::bad("target");

impl Target {
    /// Takes apart the target at this range of the arena and normalises its path in place.
    pub fn parse(
        arena: &mut Vec<u8>,
        target: Range<usize>,
        method: Method,
        slash: EncodedSlash,
    ) -> Result<Self, Reject> {
        let bytes = &arena[target.clone()];
        if bytes.iter().any(|b| !is_target_byte(*b)) {
            return Err(BAD);
        }
        if bytes.first() == Some(&b'/') {
            return Self::parse_path(arena, target, None, slash);
        }
        if bytes == b"*" {
            let path = Span::new(target.start, 1);
            return if method == Method::Options {
                Ok(Self {
                    path,
                    ..Self::default()
                })
            } else {
                Err(BAD)
            };
        }
        let scheme = [&b"http://"[..], b"https://"].into_iter().find(|scheme| {
            bytes
                .get(..scheme.len())
                .is_some_and(|head| head.eq_ignore_ascii_case(scheme))
        });
        let start = target.start + scheme.ok_or(BAD)?.len();
        let rest = &arena[start..target.end];
        let end = start
            + rest
                .iter()
                .position(|b| matches!(b, b'/' | b'?'))
                .unwrap_or(rest.len());
        let authority = Some(Span::new(start, end - start));
        if arena.get(end) == Some(&b'/') && end < target.end {
            return Self::parse_path(arena, end..target.end, authority, slash);
        }
        // No path: `*` if the question was for the server as a whole (RFC 9112 section 3.2.4), else `/`.
        let query = (end < target.end).then(|| Span::new(end + 1, target.end - end - 1));
        let path = Span::new(arena.len(), 1);
        arena.push(if method == Method::Options && query.is_none() {
            b'*'
        } else {
            b'/'
        });
        Ok(Self {
            authority,
            path,
            query,
        })
    }

    fn parse_path(
        arena: &mut [u8],
        target: Range<usize>,
        authority: Option<Span>,
        slash: EncodedSlash,
    ) -> Result<Self, Reject> {
        let bytes = &mut arena[target.clone()];
        let end = bytes.iter().position(|b| *b == b'?').unwrap_or(bytes.len());
        let query =
            (end < bytes.len()).then(|| Span::new(target.start + end + 1, bytes.len() - end - 1));
        let path = Span::new(target.start, normalise(&mut bytes[..end], slash)?);
        Ok(Self {
            authority,
            path,
            query,
        })
    }
}

/// Visible ASCII but `#`, which no target has, and what looks like a separator to some.
fn is_target_byte(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e) && byte != b'#'
}

/// Brings a path that begins with `/` into its one form, in place, and answers its new length: never more than before.
fn normalise(path: &mut [u8], slash: EncodedSlash) -> Result<usize, Reject> {
    let mut before = 0;
    let mut is_plain = true;
    for byte in path.iter() {
        is_plain &=
            !(*byte == b'%' || *byte == b'\\' || (before == b'/' && matches!(byte, b'/' | b'.')));
        before = *byte;
    }
    if is_plain {
        return Ok(path.len());
    }
    let decoded = decode(path, slash)?;
    remove_dots(&mut path[..decoded])
}

/// Decodes what means the same decoded, and writes the escapes that stay with upper-case digits.
fn decode(path: &mut [u8], slash: EncodedSlash) -> Result<usize, Reject> {
    let (mut read, mut write) = (0, 0);
    while let Some(byte) = path.get(read).copied() {
        if byte == b'\\' {
            return Err(Reject::bad("backslash"));
        }
        if byte != b'%' {
            path[write] = byte;
            (read, write) = (read + 1, write + 1);
            continue;
        }
        let (Some(high), Some(low)) = (hex(path.get(read + 1)), hex(path.get(read + 2))) else {
            return Err(Reject::bad("percent_encoding"));
        };
        let decoded = high << 4 | low;
        match decoded {
            0 => return Err(Reject::bad("encoded_nul")),
            b'\\' if slash != EncodedSlash::Keep => return Err(Reject::bad("encoded_slash")),
            b'/' if slash == EncodedSlash::Refuse => return Err(Reject::bad("encoded_slash")),
            _ => {}
        }
        let is_same_decoded = decoded.is_ascii_alphanumeric()
            || b"-._~".contains(&decoded)
            || (decoded == b'/' && slash == EncodedSlash::Decode);
        read += 3;
        if is_same_decoded {
            path[write] = decoded;
            write += 1;
        } else {
            const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
            path[write] = b'%';
            path[write + 1] = DIGITS[usize::from(high)];
            path[write + 2] = DIGITS[usize::from(low)];
            write += 3;
        }
    }
    Ok(write)
}

fn hex(digit: Option<&u8>) -> Option<u8> {
    (*digit? as char).to_digit(16).map(|value| value as u8)
}

/// Removes `.`, `..` and empty segments (RFC 3986 section 5.2.4); above the root there is nothing to find.
fn remove_dots(path: &mut [u8]) -> Result<usize, Reject> {
    // `path[..write]` is done and ends with a slash.
    let (mut read, mut write) = (1, 1);
    loop {
        let rest = path.get(read..).unwrap_or_default();
        let len = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
        let segment = read..read + len;
        let is_last = segment.end == path.len();
        match &path[segment.clone()] {
            b"" | b"." => {}
            b".." if write == 1 => return Err(Reject::bad("path_above_root")),
            b".." => {
                write = path[..write - 1]
                    .iter()
                    .rposition(|b| *b == b'/')
                    .map_or(1, |at| at + 1)
            }
            // Servlet containers cut parameters off and then see dots.
            [b'.', b';', ..] | [b'.', b'.', b';', ..] => {
                return Err(Reject::bad("dot_segment_parameter"));
            }
            _ => {
                path.copy_within(segment.clone(), write);
                write += len;
                if !is_last {
                    path[write] = b'/';
                    write += 1;
                }
            }
        }
        if is_last {
            return Ok(write);
        }
        read = segment.end + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(path: &str, slash: EncodedSlash) -> Result<String, &'static str> {
        let mut bytes = path.as_bytes().to_vec();
        let len = normalise(&mut bytes, slash).map_err(|reject| reject.reason)?;
        bytes.truncate(len);
        Ok(String::from_utf8(bytes).expect("ASCII"))
    }

    #[test]
    fn a_path_has_one_form() {
        for (path, form) in [
            ("/", "/"),
            ("//", "/"),
            ("/a", "/a"),
            ("/a/", "/a/"),
            ("/a//b///c", "/a/b/c"),
            ("/./a/./b/.", "/a/b/"),
            ("/a/b/../c", "/a/c"),
            ("/a/b/..", "/a/"),
            ("/a/..", "/"),
            ("/a/%2e%2E/b", "/b"),
            ("/a/%2e/b", "/a/b"),
            ("/%61%7e%41", "/a~A"),
            ("/%c3%a9%2c", "/%C3%A9%2C"),
            ("/%252e%252e/", "/%252e%252e/"),
            ("/a/.b/..c/...", "/a/.b/..c/..."),
            ("/a//../b", "/b"),
            ("/a/b;v=1/c", "/a/b;v=1/c"),
            ("/a.b", "/a.b"),
            ("/%2525", "/%2525"),
        ] {
            assert_eq!(
                normal(path, EncodedSlash::Refuse).as_deref(),
                Ok(form),
                "{path}"
            );
            assert_eq!(
                normal(form, EncodedSlash::Refuse).as_deref(),
                Ok(form),
                "the form of the form of {path}"
            );
        }
    }

    #[test]
    fn a_path_that_two_origins_read_differently_is_refused() {
        for (path, reason) in [
            ("/..", "path_above_root"),
            ("/a/../..", "path_above_root"),
            ("/%2e%2e/a", "path_above_root"),
            ("/a\\b", "backslash"),
            ("/a%5cb", "encoded_slash"),
            ("/a%2fb", "encoded_slash"),
            ("/a%00", "encoded_nul"),
            ("/a%", "percent_encoding"),
            ("/a%2", "percent_encoding"),
            ("/a%zz", "percent_encoding"),
            ("/a/..;/b", "dot_segment_parameter"),
            ("/a/.;x/b", "dot_segment_parameter"),
            ("/a/%2e%2e;/b", "dot_segment_parameter"),
            ("/a%+1", "percent_encoding"),
        ] {
            assert_eq!(normal(path, EncodedSlash::Refuse), Err(reason), "{path}");
        }
    }

    #[test]
    fn an_encoded_slash_follows_the_setting() {
        assert_eq!(
            normal("/a%2fb%5c", EncodedSlash::Keep).as_deref(),
            Ok("/a%2Fb%5C")
        );
        assert_eq!(
            normal("/a%2fb", EncodedSlash::Decode).as_deref(),
            Ok("/a/b")
        );
        assert_eq!(
            normal("/a/x%2f..%2fb", EncodedSlash::Decode).as_deref(),
            Ok("/a/b")
        );
        assert_eq!(
            normal("/a%2f..%2f..%2f..", EncodedSlash::Decode),
            Err("path_above_root")
        );
        assert_eq!(normal("/a%5cb", EncodedSlash::Decode), Err("encoded_slash"));
    }
}
