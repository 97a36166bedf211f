//! Addresses as operators write them: `0.0.0.0:8080`, `[::]:443`, `203.0.113.53:53/udp`.

use std::net::{IpAddr, SocketAddr};

use super::{ListenAddress, Protocol};
use crate::tunable::unit::shown;

/// Parse `IP:PORT[/tcp|/udp]`. Prefixes, port ranges and `*` are promised, and said to be not there yet.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_listen_address(text: &str) -> Result<ListenAddress, String> {
    let (address, protocol) = match text.rsplit_once('/') {
        Some((address, "tcp")) => (address, Protocol::Tcp),
        Some((address, "udp")) => (address, Protocol::Udp),
        Some((_, word)) if !word.contains(':') => {
            return Err(format!(
                "`{}` is no protocol: write 203.0.113.53:53/udp or .../tcp",
                shown(word)
            ));
        }
        _ => (text, Protocol::Tcp),
    };
    if let Some((ip, _)) = address.rsplit_once(':')
        && ip.contains('/')
    {
        return Err(format!(
            "`{}` is a prefix, which is not supported by this version yet: write single addresses",
            shown(text)
        ));
    }
    if let Some((ip, port)) = address.rsplit_once(':')
        && ip_of(ip).is_some()
        && (port == "*"
            || port
                .split_once('-')
                .is_some_and(|(first, last)| is_number(first) && is_number(last)))
    {
        return Err(format!(
            "`{}` names several ports, which is not supported by this version yet: write single ones",
            shown(text)
        ));
    }
    let socket = socket(address, "0.0.0.0:8080 or [::]:8080")?;
    Ok(ListenAddress { socket, protocol })
}

/// Parse the `IP:PORT` of an endpoint.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_endpoint_address(text: &str) -> Result<SocketAddr, String> {
    const EXAMPLE: &str = "10.0.0.11:8080 or [2001:db8::11]:8080";
    if let Some((address, "tcp" | "udp")) = text.rsplit_once('/') {
        return Err(format!(
            "an endpoint has no protocol, its listener has: write `{}`",
            shown(address)
        ));
    }
    let socket = socket(text, EXAMPLE)?;
    let ip = socket.ip();
    let nobody =
        ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255]);
    if nobody {
        return Err(format!(
            "nobody answers at `{}`: an endpoint is one host, like {EXAMPLE}",
            shown(text)
        ));
    }
    Ok(socket)
}

fn socket(text: &str, example: &str) -> Result<SocketAddr, String> {
    let wrong = |why: &str| Err(format!("`{}` {why}: write it like {example}", shown(text)));
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return match socket {
            _ if socket.port() == 0 => wrong("has port 0, and ports count from 1"),
            SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
                wrong("is an IPv4 address in the dress of IPv6")
            }
            _ => Ok(socket),
        };
    }
    if text.parse::<IpAddr>().is_ok() || ip_of(text).is_some() {
        return wrong("has no port");
    }
    match text.rsplit_once(':') {
        _ if is_number(text) => wrong("is a port without an address"),
        Some(("" | "*", _)) => {
            wrong("has no IP address before its port (for every address: 0.0.0.0 and [::])")
        }
        Some((ip, port)) if ip_of(ip).is_some() && !port.is_empty() => {
            wrong("has a port that is no number from 1 to 65535")
        }
        Some((ip, _)) if ip.parse::<std::net::Ipv6Addr>().is_ok() => {
            wrong("needs brackets around its IPv6 address")
        }
        Some((host, _))
            if host.contains(|c: char| c.is_ascii_alphabetic()) && !host.contains(':') =>
        {
            wrong("has a host name, and this version does not look names up yet")
        }
        _ => wrong("is no address"),
    }
}

/// An IP address as it stands before a port: IPv4, or IPv6 in brackets.
fn ip_of(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listen_address_is_tcp_unless_it_says_otherwise() {
        let parsed = |text| {
            parse_listen_address(text).map(|address| (address.socket.to_string(), address.protocol))
        };
        assert_eq!(
            parsed("0.0.0.0:8080"),
            Ok(("0.0.0.0:8080".into(), Protocol::Tcp))
        );
        assert_eq!(parsed("[::]:53/udp"), Ok(("[::]:53".into(), Protocol::Udp)));
        assert_eq!(
            parsed("203.0.113.53:53/tcp"),
            Ok(("203.0.113.53:53".into(), Protocol::Tcp))
        );
    }

    #[test]
    fn each_usual_mistake_is_named() {
        let mistakes = [
            ("8080", "is a port without an address"),
            (":8080", "no IP address before its port"),
            ("*:80", "no IP address before its port"),
            ("10.0.0.1", "has no port"),
            ("::1", "has no port"),
            ("[::1]", "has no port"),
            ("2001:db8::1:80x", "needs brackets"),
            ("localhost:80", "has a host name"),
            ("10.0.0.1:0", "has port 0"),
            ("10.0.0.1:70000", "no number from 1 to 65535"),
            ("10.0.0.1:80/sctp", "`sctp` is no protocol"),
            ("10.0.0.0/24:80", "is a prefix"),
            ("10.0.0.1:80-90", "names several ports"),
            ("10.0.0.1:*", "names several ports"),
            ("[::ffff:10.0.0.1]:80", "in the dress of IPv6"),
            ("", "is no address"),
        ];
        for (text, why) in mistakes {
            let error = parse_listen_address(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn an_endpoint_is_one_host_without_a_protocol() {
        assert!(parse_endpoint_address("10.0.0.11:8080").is_ok());
        for text in [
            "0.0.0.0:80",
            "[::]:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "10.0.0.1:80/udp",
            "app:80",
        ] {
            assert!(parse_endpoint_address(text).is_err(), "{text}");
        }
    }
}
