//! Hosts and paths that a route matches, as operators write them: `*.example.com`, `/a/*`, `/orders/{id}`.

use super::{HostMatch, PathMatch};
use crate::tunable::unit::shown;

/// Longest host name (RFC 1035 section 2.3.4).
const HOST_BYTES_MAX: usize = 253;
/// Longest path and most segments of a template.
const PATH_BYTES_MAX: usize = 2048;
const SEGMENTS_MAX: usize = 64;

/// Parse `match.host`.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_host(text: &str) -> Result<HostMatch, String> {
    const FORM: &str = "write it like api.example.com or *.example.com";
    let lower = text.to_ascii_lowercase();
    if lower == "*" {
        return Ok(HostMatch::Any);
    }
    let (name, is_wildcard) = lower
        .strip_prefix("*.")
        .map_or((lower.as_str(), false), |name| (name, true));
    let wrong = |why: &str| Err(format!("`{}` {why}: {FORM}", shown(text)));
    let in_brackets = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    if let Some(Ok(ip)) = in_brackets.map(str::parse::<std::net::Ipv6Addr>) {
        return if is_wildcard {
            wrong("is an address, which has no subdomains")
        } else {
            Ok(HostMatch::Exact(format!("[{ip}]")))
        };
    }
    if !name.is_ascii() {
        return wrong("has characters beyond ASCII (an international name is written as xn--...)");
    }
    if name.contains('/') {
        return wrong("has a slash, and a host is a name alone");
    }
    if name.contains(':') {
        return wrong("has a port, and hosts are matched without");
    }
    if name.contains('*') {
        return wrong("has a star that is not its whole first label");
    }
    let good_label = |label: &str| {
        let characters = label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        (1..=63).contains(&label.len())
            && characters
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() > HOST_BYTES_MAX || !name.split('.').all(good_label) {
        return wrong("is no host name");
    }
    let name = name.to_owned();
    Ok(if is_wildcard {
        HostMatch::Wildcard(name)
    } else {
        HostMatch::Exact(name)
    })
}

/// Parse `match.path`.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_path(text: &str) -> Result<PathMatch, String> {
    const FORM: &str = "write it like /a/b, /a/* or /a/{id}";
    let wrong = |why: &str| Err(format!("the path `{}` {why}: {FORM}", shown(text)));
    if !text.starts_with('/') {
        return wrong("does not begin with a slash");
    }
    let path = match normal(text) {
        Ok(path) => path,
        Err(why) => return wrong(&why),
    };
    if let Some(prefix) = path.strip_suffix('*')
        && prefix.ends_with('/')
    {
        if prefix.contains(['*', '{', '}']) {
            return wrong(
                "has a template before its star, which is not supported by this version yet",
            );
        }
        return Ok(PathMatch::Prefix(prefix.to_owned()));
    }
    if path.contains('*') {
        return wrong("has a star that is not its whole last segment");
    }
    if !path.contains(['{', '}']) {
        return Ok(PathMatch::Exact(path));
    }
    match template(&path) {
        Ok(template) => Ok(template),
        Err(why) => wrong(&why),
    }
}

fn template(path: &str) -> Result<PathMatch, String> {
    let (mut segments, mut captures) = (Vec::new(), Vec::new());
    for segment in path.split('/').skip(1) {
        let Some(name) = segment
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
        else {
            if segment.contains(['{', '}']) {
                return Err("has a capture that is not a whole segment".to_owned());
            }
            segments.push(Some(segment.to_owned()));
            continue;
        };
        let good = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if name.is_empty() || name.len() > 63 || !good {
            return Err(format!(
                "has a capture whose name `{}` is not made of letters, digits and _",
                shown(name)
            ));
        }
        if captures.iter().any(|capture| capture == name) {
            return Err(format!("captures `{name}` twice"));
        }
        segments.push(None);
        captures.push(name.to_owned());
    }
    if segments.len() > SEGMENTS_MAX {
        return Err(format!("has more than {SEGMENTS_MAX} segments"));
    }
    Ok(PathMatch::Template { segments, captures })
}

/// The path as requests are compared (RFC 3986 section 6.2.2): escapes of unreserved characters resolved, other
/// escapes in upper case. What a request can never have after that is an error.
fn normal(text: &str) -> Result<String, String> {
    if text.len() > PATH_BYTES_MAX {
        return Err(format!("is longer than {PATH_BYTES_MAX} bytes"));
    }
    let mut path = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        match character {
            '%' => {
                let digits: String = rest.by_ref().take(2).collect();
                let byte = u8::from_str_radix(&digits, 16)
                    .ok()
                    .filter(|_| digits.len() == 2 && !digits.starts_with('+'));
                let Some(byte) = byte else {
                    return Err("has a % without two hexadecimal digits".to_owned());
                };
                if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                    path.push(char::from(byte));
                } else {
                    path.push_str(&format!("%{byte:02X}"));
                }
            }
            '?' | '#' => return Err(format!("has a `{character}`, and a path ends before it")),
            '!'..='~' => path.push(character),
            _ => return Err("has a character that stands in no path (write it as %XX)".to_owned()),
        }
    }
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    if segments
        .iter()
        .any(|segment| *segment == "." || *segment == "..")
    {
        return Err("has a dot segment, which no request has after normalisation".to_owned());
    }
    if segments
        .iter()
        .rev()
        .skip(1)
        .any(|segment| segment.is_empty())
    {
        return Err("has an empty segment, which no request has after normalisation".to_owned());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_exact_or_wildcards_in_lower_case_without_a_port() {
        assert_eq!(
            parse_host("API.example.com"),
            Ok(HostMatch::Exact("api.example.com".into()))
        );
        assert_eq!(
            parse_host("*.example.com"),
            Ok(HostMatch::Wildcard("example.com".into()))
        );
        assert_eq!(parse_host("*"), Ok(HostMatch::Any));
        assert_eq!(parse_host("[::1]"), Ok(HostMatch::Exact("[::1]".into())));
        assert_eq!(
            parse_host("10.0.0.1"),
            Ok(HostMatch::Exact("10.0.0.1".into()))
        );
        for text in [
            "",
            "a..b",
            "a.*.b",
            "api.*",
            "host:80",
            "http://a",
            "-a.b",
            "bücher.de",
            "a b",
            "*.[::1]",
        ] {
            assert!(parse_host(text).is_err(), "{text}");
        }
    }

    #[test]
    fn paths_are_exact_or_prefixes_or_templates() {
        assert_eq!(parse_path("/a/b"), Ok(PathMatch::Exact("/a/b".into())));
        assert_eq!(parse_path("/"), Ok(PathMatch::Exact("/".into())));
        assert_eq!(parse_path("/*"), Ok(PathMatch::Prefix("/".into())));
        assert_eq!(parse_path("/a/*"), Ok(PathMatch::Prefix("/a/".into())));
        let segments = vec![Some("orders".into()), None, Some("items".into())];
        let captures = vec!["id".into()];
        assert_eq!(
            parse_path("/orders/{id}/items"),
            Ok(PathMatch::Template { segments, captures })
        );
    }

    #[test]
    fn a_path_is_kept_as_requests_are_compared() {
        assert_eq!(
            parse_path("/%7euser/%c3%bc"),
            Ok(PathMatch::Exact("/~user/%C3%BC".into()))
        );
        for text in [
            "a",
            "",
            "/a//b",
            "/a/../b",
            "/./a",
            "/%2e%2e/a",
            "/a?b",
            "/a#b",
            "/a b",
            "/ü",
            "/%zz",
            "/%2",
            "/%+1",
        ] {
            assert!(parse_path(text).is_err(), "{text}");
        }
    }

    #[test]
    fn stars_and_captures_are_whole_segments() {
        for text in [
            "/a*",
            "/*/b",
            "/a/{id}/*",
            "/a{id}",
            "/{}",
            "/{a-b}",
            "/{a}/{a}",
            "/{a",
            "/a}",
        ] {
            assert!(parse_path(text).is_err(), "{text}");
        }
    }
}
