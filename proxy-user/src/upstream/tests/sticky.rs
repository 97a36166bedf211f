//! The cookie that brings a client back to its endpoint.

use super::*;
use crate::config::{SameSite, Sticky};
use crate::message::Limits;

fn sticky() -> Sticky {
    Sticky {
        cookie: "node".into(),
        ttl: Some(Duration::from_secs(3600)),
        path: "/".into(),
        is_secure: None,
        same_site: SameSite::Lax,
        is_http_only: true,
        key: None,
    }
}

fn with_cookies(sticky: Sticky, seed: u64) -> Upstream {
    let mut config = upstream(Balance::RoundRobin, &[(1, 1), (2, 1), (3, 1)]);
    config.sticky = Some(sticky);
    Upstream::new(&config, 1, seed, None)
}

fn head(cookies: &str) -> RequestHead {
    let mut head = RequestHead::default();
    let text = format!("GET / HTTP/1.1\r\nhost: a\r\ncookie: {cookies}\r\n\r\n");
    assert!(head.parse(text.as_bytes(), &Limits::default()).is_ok());
    head
}

/// What a client sends that was given this cookie.
fn sent_back(set_cookie: &str) -> RequestHead {
    let pair = set_cookie.split(';').next().unwrap_or_default();
    head(&format!("other=1; {pair}; last=2"))
}

fn wish(upstream: &Upstream, head: &RequestHead) -> Wish {
    let peer = [192, 0, 2, 9].into();
    upstream.wish(head, peer, &PathMatch::Prefix("/".into()))
}

fn chosen(upstream: &Upstream, wish: Wish) -> Choice {
    upstream.choose(&Ask {
        wish,
        ..ask(0, None, 0, NOW_NS)
    })
}

#[test]
fn a_client_comes_back_to_the_endpoint_of_its_cookie_as_long_as_that_lives() {
    let upstream = with_cookies(sticky(), SEED);
    let none = wish(&upstream, &head("other=1"));
    assert_eq!(none.endpoint, None);
    let cookie = upstream.set_cookie(2, none, false).expect("a cookie");
    let wish = wish(&upstream, &sent_back(&cookie));
    assert_eq!(wish.endpoint, Some(2));
    for _ in 0..5 {
        assert_eq!(chosen(&upstream, wish), Choice::Endpoint(2));
    }
    assert_eq!(upstream.set_cookie(2, wish, false), None, "it has it");
    kill(&upstream, 2);
    let Choice::Endpoint(other) = chosen(&upstream, wish) else {
        panic!("two others live")
    };
    assert_ne!(other, 2);
    let moved = upstream.set_cookie(other, wish, false);
    assert!(moved.is_some_and(|moved| moved != cookie), "it moves on");
}

#[test]
fn who_just_failed_is_not_asked_again_because_of_a_cookie() {
    let upstream = with_cookies(sticky(), SEED);
    let wish = Wish {
        key: 0,
        endpoint: Some(1),
    };
    let again = Ask {
        wish,
        ..ask(0, Some(1), 0, NOW_NS)
    };
    assert!(matches!(upstream.choose(&again), Choice::Endpoint(0 | 2)));
    upstream.endpoints[1].hold(NOW_NS + 1);
    assert!(matches!(chosen(&upstream, wish), Choice::Endpoint(0 | 2)));
}

#[test]
fn an_endpoint_that_takes_no_new_work_keeps_the_clients_that_it_has() {
    let mut config = upstream(Balance::RoundRobin, &[(1, 1), (2, 0)]);
    config.sticky = Some(sticky());
    let upstream = made(&config, 1);
    let wish = Wish {
        key: 0,
        endpoint: Some(1),
    };
    assert_eq!(chosen(&upstream, wish), Choice::Endpoint(1));
    assert_eq!(chosen(&upstream, Wish::default()), Choice::Endpoint(0));
}

#[test]
fn a_client_waits_for_its_own_endpoint_when_that_is_full() {
    let mut config = upstream(Balance::RoundRobin, &[(1, 1), (2, 1)]);
    config.sticky = Some(sticky());
    config.endpoints[1].calls_max = Some(1);
    let upstream = made(&config, 1);
    let wish = Wish {
        key: 0,
        endpoint: Some(1),
    };
    let running = upstream.endpoints[1].begin(0, 0);
    assert_eq!(chosen(&upstream, wish), Choice::Full);
    assert!(upstream.is_bound(wish));
    assert_eq!(chosen(&upstream, Wish::default()), Choice::Endpoint(0));
    drop(running);
    assert_eq!(chosen(&upstream, wish), Choice::Endpoint(1));
}

#[test]
fn a_cookie_is_made_with_a_secret_and_tells_no_address() {
    let upstream = with_cookies(sticky(), SEED);
    let value = |upstream: &Upstream, index| {
        let cookie = upstream.set_cookie(index, Wish::default(), false);
        let cookie = cookie.expect("a cookie");
        let value = cookie.strip_prefix("node=").expect("its name");
        value.split(';').next().unwrap_or_default().to_owned()
    };
    let values = [0, 1, 2].map(|index| value(&upstream, index));
    assert!(values[0] != values[1] && values[1] != values[2]);
    let is_opaque =
        |value: &String| value.len() == 32 && value.bytes().all(|byte| byte.is_ascii_hexdigit());
    assert!(values.iter().all(is_opaque), "{values:?}");
    // The same everywhere with the same secret, and never with another.
    assert_eq!(value(&with_cookies(sticky(), SEED), 1), values[1]);
    assert_ne!(value(&with_cookies(sticky(), SEED + 1), 1), values[1]);
    let keyed = |key, seed| {
        let key = Some([key; 32]);
        value(&with_cookies(Sticky { key, ..sticky() }, seed), 1)
    };
    assert_eq!(keyed(1, 5), keyed(1, 6));
    assert_ne!(keyed(1, 5), keyed(2, 5));
    // That of another upstream names nobody here.
    let mut config = super::upstream(Balance::RoundRobin, &[(1, 1), (2, 1)]);
    config.sticky = Some(sticky());
    config.name = "other".into();
    let other = made(&config, 1);
    let theirs = other.set_cookie(0, Wish::default(), false);
    let theirs = sent_back(&theirs.expect("a cookie"));
    assert_eq!(upstream.sticky_endpoint(&theirs), None);
    assert_eq!(other.sticky_endpoint(&theirs), Some(0));
}

#[test]
fn attributes_are_those_of_the_configuration_and_of_the_connection() {
    let attributes = |sticky, is_tls| {
        let cookie = with_cookies(sticky, SEED).set_cookie(0, Wish::default(), is_tls);
        let cookie = cookie.expect("a cookie");
        cookie.split_once("; ").expect("attributes").1.to_owned()
    };
    assert_eq!(
        attributes(sticky(), false),
        "Path=/; Max-Age=3600; SameSite=Lax; HttpOnly"
    );
    assert_eq!(
        attributes(sticky(), true),
        "Path=/; Max-Age=3600; SameSite=Lax; HttpOnly; Secure"
    );
    let other = Sticky {
        ttl: None,
        path: "/shop".into(),
        is_secure: Some(true),
        same_site: SameSite::None,
        is_http_only: false,
        ..sticky()
    };
    assert_eq!(
        attributes(other, false),
        "Path=/shop; SameSite=None; Secure"
    );
}
