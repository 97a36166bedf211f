//! Who asks, as hops tell it: what is believed, and what goes on.

use super::*;
use std::net::IpAddr;

/// The client of a request with these lines that a hop of 10.0.0.0/8 brought, and what an origin is told of it.
fn behind_hops(claim: Claim, told: Told, lines: &str) -> (Option<IpAddr>, String) {
    let mut head = request_with(lines).expect(lines);
    let is_trusted = |ip: IpAddr| matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 10);
    let client = head.believe(claim, is_trusted);
    let mut out = Vec::new();
    head.encode(&mut out, &Forward { told, ..FORWARD });
    let told = text(&out);
    let from = told.find("forwarded").unwrap_or(told.len());
    let from = told[..from].rfind("\r\n").map_or(from, |at| at + 2);
    (client, told[from..].trim_end().to_owned())
}

fn ip(text: &str) -> Option<IpAddr> {
    Some(text.parse().expect("an address"))
}

#[test]
fn hops_are_counted_from_the_right_and_what_stands_before_the_client_goes_no_further() {
    // Lines, the client, and what the origin gets of the chain.
    for (lines, client, chain) in [
        ("", None, ""),
        (
            "X-Forwarded-For: 198.51.100.7\r\n",
            ip("198.51.100.7"),
            "198.51.100.7, ",
        ),
        (
            "X-Forwarded-For: 6.6.6.6, 198.51.100.7\r\n",
            ip("198.51.100.7"),
            "198.51.100.7, ",
        ),
        (
            "X-Forwarded-For: 6.6.6.6, 198.51.100.7, 10.0.0.2,10.0.0.3\r\n",
            ip("198.51.100.7"),
            "198.51.100.7, 10.0.0.2, 10.0.0.3, ",
        ),
        (
            "X-Forwarded-For: 6.6.6.6\r\nA: b\r\nx-forwarded-for: 198.51.100.7\r\nX-Forwarded-For: 10.0.0.2\r\n",
            ip("198.51.100.7"),
            "198.51.100.7, 10.0.0.2, ",
        ),
        (
            "X-Forwarded-For: 10.0.0.9, 10.0.0.2\r\n",
            ip("10.0.0.9"),
            "10.0.0.9, 10.0.0.2, ",
        ),
        (
            "X-Forwarded-For: 6.6.6.6, unknown, 10.0.0.2\r\n",
            ip("10.0.0.2"),
            "10.0.0.2, ",
        ),
        ("X-Forwarded-For: 6.6.6.6, unknown\r\n", None, ""),
        (
            "X-Forwarded-For: [2001:db8::7]:4711\r\n",
            ip("2001:db8::7"),
            "2001:db8::7, ",
        ),
        (
            "X-Forwarded-For: 198.51.100.7:4711\r\n",
            ip("198.51.100.7"),
            "198.51.100.7, ",
        ),
        (
            "X-Forwarded-For: ::ffff:198.51.100.7\r\n",
            ip("198.51.100.7"),
            "198.51.100.7, ",
        ),
        // The other field may be the client's own.
        ("Forwarded: for=6.6.6.6\r\n", None, ""),
    ] {
        let (found, told) = behind_hops(Claim::XForwardedFor, Told::XForwarded, lines);
        assert_eq!(found, client, "{lines}");
        assert_eq!(
            told,
            format!(
                "x-forwarded-for: {chain}192.0.2.1\r\nx-forwarded-proto: https\r\nx-forwarded-port: 443\r\nx-forwarded-host: a.example"
            ),
            "{lines}"
        );
    }
}

#[test]
fn beside_the_clients_address_stands_what_it_asked_for() {
    let told = |lines: &str| {
        let (_, told) = behind_hops(Claim::XForwardedFor, Told::XForwarded, lines);
        told.split_once("\r\n").expect("more lines").1.to_owned()
    };
    let shop =
        "x-forwarded-proto: http\r\nx-forwarded-port: 8080\r\nx-forwarded-host: shop.example:8080";
    let hosts = "X-Forwarded-Host: Shop.example:8080\r\nX-Forwarded-Port: 8080\r\n";
    assert_eq!(
        told(&format!(
            "X-Forwarded-For: 198.51.100.7, 10.0.0.2\r\nX-Forwarded-Proto: HTTP\r\n{hosts}"
        )),
        shop
    );
    assert_eq!(
        told(&format!(
            "X-Forwarded-For: 6.6.6.6, 198.51.100.7, 10.0.0.2\r\nX-Forwarded-Proto: gopher, http, https\r\n{hosts}"
        )),
        shop
    );
    assert_eq!(
        told(
            "X-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Proto: gopher\r\nX-Forwarded-Host: a b\r\nX-Forwarded-Port: 0\r\n"
        ),
        "x-forwarded-proto: https\r\nx-forwarded-port: 443\r\nx-forwarded-host: a.example",
        "what makes no sense is not believed"
    );
}

#[test]
fn forwarded_is_read_and_written_as_rfc_7239_has_it() {
    for (lines, client, told) in [
        (
            "",
            None,
            "forwarded: for=192.0.2.1;host=a.example;proto=https",
        ),
        (
            "Forwarded: for=6.6.6.6, For=\"[2001:db8:cafe::17]:4711\";Proto=http;host=\"b.example:81\", for=10.0.0.2;by=x\r\n",
            ip("2001:db8:cafe::17"),
            "forwarded: for=\"[2001:db8:cafe::17]\";host=\"b.example:81\";proto=http, for=10.0.0.2, for=192.0.2.1",
        ),
        (
            "Forwarded: for=6.6.6.6\r\nForwarded: for=\"_a,b;c\", for=10.0.0.2;proto=http\r\n",
            ip("10.0.0.2"),
            "forwarded: for=10.0.0.2;host=a.example;proto=http, for=192.0.2.1",
        ),
        (
            "Forwarded: for=\"198.51.100.7\r\n",
            None,
            "forwarded: for=192.0.2.1;host=a.example;proto=https",
        ),
        (
            "X-Forwarded-For: 6.6.6.6\r\n",
            None,
            "forwarded: for=192.0.2.1;host=a.example;proto=https",
        ),
    ] {
        let found = behind_hops(Claim::Forwarded, Told::Forwarded, lines);
        assert_eq!(found, (client, told.to_owned()), "{lines}");
    }
    let (_, both) = behind_hops(
        Claim::XForwardedFor,
        Told::Both,
        "X-Forwarded-For: 198.51.100.7\r\n",
    );
    assert!(
        both.starts_with("x-forwarded-for: 198.51.100.7, 192.0.2.1\r\n"),
        "{both}"
    );
    assert!(
        both.ends_with("forwarded: for=198.51.100.7;host=a.example;proto=https, for=192.0.2.1"),
        "{both}"
    );
}

#[test]
fn a_chain_without_end_is_not_followed_to_its_end() {
    let chain = "10.0.0.1, ".repeat(500);
    let (client, told) = behind_hops(
        Claim::XForwardedFor,
        Told::XForwarded,
        &format!("X-Forwarded-For: 198.51.100.7, {chain}10.0.0.2\r\n"),
    );
    assert_eq!(
        (client, told.matches("10.0.0.").count()),
        (ip("10.0.0.1"), 32)
    );
}

#[test]
fn a_request_has_one_id_and_only_a_trusted_hop_may_give_it() {
    let id = |lines: &str, is_trusted| {
        let mut head = request_with(lines).expect(lines);
        head.identify(is_trusted, || 0xabc << 100);
        assert_eq!(
            forwarded(&head)
                .matches(&format!("\r\nx-request-id: {}\r\n", head.id()))
                .count(),
            1
        );
        head.id().to_owned()
    };
    let made = format!("{:032x}", 0xabc_u128 << 100);
    assert_eq!(id("", true), made);
    assert_eq!(id("X-Request-Id: abc-123\r\n", false), made);
    assert_eq!(id("X-Request-Id: abc-123\r\n", true), "abc-123");
    for bad in ["a b", "a\"b", "<a>", &"a".repeat(65)] {
        assert_eq!(id(&format!("X-Request-Id: {bad}\r\n"), true), made, "{bad}");
    }
    let mut head = request_with("X-Request-Id: theirs\r\n").expect("a good head");
    head.identify(true, || 0);
    head.set("x-request-id", "ours");
    assert!(
        forwarded(&head).contains("x-request-id: ours") && !forwarded(&head).contains("theirs")
    );
    head.forget();
    assert_eq!((head.id(), head.path(), head.fields().len()), ("", "", 0));
}

#[test]
fn via_names_us_where_it_is_wanted_and_knows_us_again() {
    let mut out = Vec::new();
    let via = Some("edge-1");
    let head = request_with("Via: 1.0 fred, 1.1 p.example.net\r\n").expect("a good head");
    head.encode(&mut out, &Forward { via, ..FORWARD });
    assert!(text(&out).contains("\r\nvia: 1.0 fred, 1.1 p.example.net\r\n"));
    assert!(text(&out).contains("\r\nvia: 1.1 edge-1\r\n"));
    assert!(head.came_via("fred") && !head.came_via("edge-1") && !head.came_via("1.0"));
    assert!(!forwarded(&head).contains("edge-1"));
}

#[test]
fn what_traces_a_request_passes_as_it_is() {
    let lines = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\ntracestate: a=b\r\n";
    assert!(forwarded(&request_with(lines).expect("a good head")).contains(lines));
}

/// Pieces of what hops say, put together at random: whatever comes of it is one head that says the same again.
#[test]
fn whatever_a_trusted_hop_says_origins_are_told_something_that_can_be_read() {
    const PIECES: [&str; 20] = [
        "for=",
        "proto=",
        "host=",
        "by=",
        "http",
        "https",
        "\"",
        "\\",
        ";",
        ",",
        "=",
        "[",
        "]",
        ":",
        " ",
        "10.0.0.1",
        "198.51.100.7",
        "2001:db8::1",
        "a.example",
        "é",
    ];
    let mut state = 0x5111_ce5e_ed00_0002_u64;
    let mut next = move |end: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % end as u64) as usize
    };
    let (mut found, mut rounds) = (0, 0);
    while rounds < 20_000 {
        let mut value =
            || -> String { (0..next(12)).map(|_| PIECES[next(PIECES.len())]).collect() };
        let lines = format!(
            "Forwarded: {}\r\nX-Forwarded-For: {}\r\nX-Forwarded-Host: {}\r\nX-Forwarded-Proto: {}\r\nForwarded: {}\r\n",
            value(),
            value(),
            value(),
            value(),
            value()
        );
        let text = format!("GET / HTTP/1.1\r\nHost: a.example\r\n{lines}\r\n");
        let mut head = RequestHead::default();
        if head.parse(text.as_bytes(), &Limits::default()).is_err() {
            continue;
        }
        rounds += 1;
        for claim in [Claim::Forwarded, Claim::XForwardedFor] {
            let is_trusted = |ip: IpAddr| matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 10);
            let client = head.believe(claim, is_trusted);
            found += usize::from(client.is_some());
            let mut out = Vec::new();
            let forward = Forward {
                peer: "10.0.0.9",
                told: Told::Both,
                ..FORWARD
            };
            head.encode(&mut out, &forward);
            let mut again = RequestHead::default();
            assert!(
                again.parse(&out, &Limits::default()).is_ok(),
                "{lines}{}",
                self::text(&out)
            );
            for claim in [Claim::Forwarded, Claim::XForwardedFor] {
                let told = again.believe(claim, |ip| {
                    is_trusted(ip) || client.is_some_and(|client| client == ip)
                });
                let expected = client.unwrap_or(IpAddr::from([10, 0, 0, 9]));
                assert_eq!(told, Some(expected), "{lines}{}", self::text(&out));
            }
        }
    }
    assert!(
        found > 300,
        "too little is understood to tell anything: {found}"
    );
}
