//! Addresses as operators write them: `0.0.0.0:8080`, `[::]:443`, `203.0.113.53:53/udp`, `203.0.113.0/28:8000-8015`, `203.0.113.1:*`.

use std::net::{IpAddr, SocketAddr};

use super::{ListenAddress, Network, Protocol};
use crate::tunable::unit::shown;

/// Parse `IP[/PREFIX]:PORT[-PORT][/tcp|/udp]`, with `*` for every port.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_listen_address(text: &str) -> Result<ListenAddress, String> {
    let (address, protocol) = match text.rsplit_once('/') {
        Some((address, "tcp")) => (address, Protocol::Tcp),
        Some((address, "udp")) => (address, Protocol::Udp),
        Some((_, word)) if !word.contains(':') && !is_number(word) => {
            return Err(format!(
                "`{}` is no protocol: write 203.0.113.53:53/udp or .../tcp",
                shown(word)
            ));
        }
        _ => (text, Protocol::Tcp),
    };
    let wrong = |why: String| Err(format!("`{}` {why}", shown(text)));
    let (host, ports) = address.rsplit_once(':').unwrap_or((address, ""));
    let (ip, prefix) = match host.split_once('/') {
        Some((ip, bits)) => (ip, Some(bits)),
        None => (host, None),
    };
    let (first, last) = match ports.split_once('-') {
        Some((first, last)) if is_number(first) => (first, Some(last)),
        _ => (ports, None),
    };
    let all_ports = ports == "*" && ip_of(ip).is_some();
    // What is wrong with a single address and port is told as of any, and shown as it is written.
    let plain = match (prefix, last) {
        (None, None) if !all_ports => address.to_owned(),
        _ if ports.is_empty() => ip.to_owned(),
        _ => format!("{ip}:{}", if all_ports { "1" } else { first }),
    };
    let mut socket = socket(&plain, "0.0.0.0:8080 or [::]:8080")?;
    let port_last = match last {
        _ if all_ports => 0,
        None => socket.port(),
        Some(last) => match last.parse() {
            Ok(last) if last >= socket.port() => last,
            _ => return wrong("has a last port that is no number from the first to 65535".into()),
        },
    };
    if all_ports {
        socket.set_port(0);
    }
    let bits = if socket.is_ipv4() { 32 } else { 128 };
    let prefix_bits = match prefix.map(|prefix| (prefix, prefix.parse::<u8>())) {
        None => bits,
        Some((_, Ok(prefix))) if prefix <= bits => prefix,
        Some((prefix, _)) => {
            let prefix = shown(prefix);
            return wrong(format!(
                "has a prefix of `{prefix}` bits: 0 to {bits} are possible"
            ));
        }
    };
    let listened = ListenAddress {
        socket,
        prefix_bits,
        port_last,
        protocol,
    };
    if let Some(network) = network_of(socket.ip(), bits - prefix_bits)
        && network != socket.ip()
    {
        return wrong(format!(
            "has bits behind its prefix: its first address is {network}"
        ));
    }
    Ok(listened)
}

/// Parse `IP` or `IP/PREFIX`.
///
/// # Errors
/// A sentence that says what is wrong and how it is written.
pub fn parse_network(text: &str) -> Result<Network, String> {
    let (ip, bits) = match text.split_once('/') {
        Some((ip, bits)) => (ip, Some(bits)),
        None => (text, None),
    };
    let wrong = |why: String| Err(format!("`{}` {why}", shown(text)));
    let Ok(first) = ip.parse::<IpAddr>() else {
        return wrong("is no network: write it like 10.0.0.0/8 or 2001:db8::/32".into());
    };
    let most = if first.is_ipv4() { 32 } else { 128 };
    let prefix_bits = match bits.map(str::parse::<u8>) {
        None => most,
        Some(Ok(bits)) if bits <= most => bits,
        Some(_) => return wrong(format!("has a prefix that is no number from 0 to {most}")),
    };
    if let Some(network) = network_of(first, most - prefix_bits)
        && network != first
    {
        return wrong(format!(
            "has bits behind its prefix: its first address is {network}"
        ));
    }
    Ok(Network { first, prefix_bits })
}

/// The address without its last bits; None where none is left out.
fn network_of(ip: IpAddr, bits: u8) -> Option<IpAddr> {
    let bits = u32::from(bits);
    if bits == 0 {
        return None;
    }
    Some(match ip {
        IpAddr::V4(ip) => {
            let kept = u32::MAX.checked_shl(bits).unwrap_or(0);
            IpAddr::from((u32::from(ip) & kept).to_be_bytes())
        }
        IpAddr::V6(ip) => {
            let kept = u128::MAX.checked_shl(bits).unwrap_or(0);
            IpAddr::from((u128::from(ip) & kept).to_be_bytes())
        }
    })
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
            wrong("has a host name, and an IP address is wanted here")
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
    fn a_prefix_and_several_ports_are_one_address_that_stands_for_many() {
        for (text, entries, shown) in [
            ("203.0.113.0/28:80/udp", 16, "203.0.113.0/28:80/udp"),
            ("203.0.113.1:8000-8015", 16, "203.0.113.1:8000-8015/tcp"),
            ("203.0.113.1:*", 1, "203.0.113.1:*/tcp"),
            ("203.0.113.1/32:80", 1, "203.0.113.1:80/tcp"),
            (
                "[2001:db8::]/126:53-54/udp",
                8,
                "[2001:db8::]/126:53-54/udp",
            ),
            ("203.0.112.0/20:*", 4096, "203.0.112.0/20:*/tcp"),
        ] {
            let parsed = parse_listen_address(text).expect(text);
            assert_eq!(
                (parsed.entries(), parsed.to_string()),
                (entries, shown.into())
            );
            let ips: Vec<IpAddr> = parsed.ips().collect();
            assert_eq!(ips.len() * parsed.ports().count(), entries as usize);
            assert!(ips.iter().all(|ip| parsed.has_ip(*ip)));
            assert!(!parsed.has_ip([203, 0, 111, 255].into()));
            assert!(!parsed.has_ip([203, 0, 128, 0].into()));
        }
        let wide = parse_listen_address("[2001:db8::]/64:443-444").expect("an address");
        assert_eq!(wide.entries(), 2 << 64);
        assert_eq!(wide.to_string(), "[2001:db8::]/64:443-444/tcp");
        let single = parse_listen_address("0.0.0.0:80").expect("an address");
        assert!(single.is_single() && single.has_port(80) && !single.has_port(81));
        let all = parse_listen_address("10.0.0.1:*").expect("an address");
        assert!(!all.is_single() && all.has_port(1) && all.has_port(65_535));
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
            ("10.0.0.1/24:80", "its first address is 10.0.0.0"),
            ("[2001:db8::1]/64:80", "its first address is 2001:db8::"),
            ("10.0.0.0/33:80", "has a prefix of `33` bits: 0 to 32"),
            ("10.0.0.0/x:80", "has a prefix of `x` bits"),
            ("10.0.0.1:90-80", "has a last port"),
            ("10.0.0.1:80-70000", "has a last port"),
            ("10.0.0.1:0-80", "has port 0"),
            ("10.0.0.1:80-", "has a last port"),
            ("10.0.0.0/24", "has no port"),
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
