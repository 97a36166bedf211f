//! Limits and those who wait for room, cookies, hashes and endpoints that stand in, over real connections.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{self, Sender};

use super::client::get;
use super::origin::ok;
use super::*;

/// `/own/*` is served by an upstream with these keys.
fn own(keys: &str) -> String {
    format!(
        "[[upstream]]\nname = \"own\"\n{keys}\n\
         [[route]]\nname = \"own\"\nmatch = {{ path = \"/own/*\" }}\nupstream = \"own\"\n"
    )
}

fn addresses(origins: &[&Origin]) -> String {
    let quoted: Vec<String> = (origins.iter())
        .map(|origin| format!("\"{}\"", origin.address))
        .collect();
    format!("endpoints = [{}]", quoted.join(", "))
}

/// Answers each request when it is told to, and knows how many it had at a time.
struct Held {
    origin: Origin,
    release: Sender<()>,
    most: std::sync::Arc<AtomicUsize>,
}

impl Held {
    fn start() -> Self {
        let (release, released) = mpsc::channel();
        let released = Mutex::new(released);
        let most = std::sync::Arc::<AtomicUsize>::default();
        let (now, highest) = (AtomicUsize::new(0), std::sync::Arc::clone(&most));
        let origin = Origin::start(move |peer| {
            while let Some(request) = peer.request() {
                highest.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                let goes_on = peer.wait_for(&released);
                now.fetch_sub(1, SeqCst);
                if !goes_on {
                    return;
                }
                peer.send(ok(request.path()));
            }
        });
        Self {
            origin,
            release,
            most,
        }
    }

    fn release(&self) {
        self.release.send(()).expect("the origin lives");
    }

    fn wait_for_requests(&self, count: usize) {
        wait_until("the request is there", || {
            self.origin.requests().len() >= count
        });
    }
}

/// A client whose request waits, as the queue knows.
fn waiting_client(sluice: &Sluice, path: &str, pending: u32) -> Client {
    let mut client = Client::connect(sluice);
    client.send(get(path));
    wait_until("it waits", || sluice.pending("own") == pending);
    client
}

#[test]
fn requests_wait_for_room_and_are_served_in_the_order_of_coming() {
    let held = Held::start();
    let keys = format!(
        "endpoint_calls_max = 1\nqueue = {{ wait = \"10s\" }}\n{}",
        addresses(&[&held.origin])
    );
    let sluice = Sluice::start(&[], &own(&keys));
    let mut first = Client::connect(&sluice);
    first.send(get("/own/0"));
    held.wait_for_requests(1);
    let mut others: Vec<Client> = (1..5)
        .map(|number| waiting_client(&sluice, &format!("/own/{number}"), number))
        .collect();
    for (number, client) in std::iter::once(&mut first).chain(&mut others).enumerate() {
        held.wait_for_requests(number + 1);
        held.release();
        let response = client.response();
        assert_eq!(
            (response.status, response.text()),
            (200, &*format!("/own/{number}"))
        );
    }
    assert_eq!(held.most.load(SeqCst), 1, "never two at a time");
    assert_eq!(
        held.origin.paths(),
        ["/own/0", "/own/1", "/own/2", "/own/3", "/own/4"]
    );
    assert_eq!(
        held.origin.connections(),
        1,
        "handed on from one to the next"
    );
}

#[test]
fn who_finds_too_many_waiting_or_waits_too_long_gets_a_503_that_says_when_to_come_again() {
    let held = Held::start();
    let keys = format!(
        "calls_max = 1\nqueue = {{ pending_max = 1, wait = \"1s\" }}\n{}",
        addresses(&[&held.origin])
    );
    let sluice = Sluice::start(&[], &own(&keys));
    let mut first = Client::connect(&sluice);
    first.send(get("/own/first"));
    held.wait_for_requests(1);
    let since = Instant::now();
    let mut second = waiting_client(&sluice, "/own/second", 1);
    let mut third = Client::connect(&sluice);
    let response = third.get("/own/third");
    assert_eq!(
        (response.status, response.value("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(sluice.rejected("upstream_full"), 1.0);
    let response = second.response();
    assert_eq!(
        (response.status, response.value("retry-after")),
        (503, Some("1"))
    );
    assert!(since.elapsed() >= Duration::from_secs(1));
    assert_eq!(sluice.rejected("upstream_pending_timeout"), 1.0);
    held.release();
    assert_eq!(first.response().status, 200);
    held.release();
    assert_eq!(
        second.get("/own/again").status,
        200,
        "on the same connection"
    );
    assert_eq!(held.origin.paths(), ["/own/first", "/own/again"]);
}

#[test]
fn a_client_that_goes_away_leaves_the_line_and_its_room() {
    let held = Held::start();
    let keys = format!(
        "calls_max = 1\nqueue = {{ wait = \"10s\" }}\n{}",
        addresses(&[&held.origin])
    );
    let sluice = Sluice::start(&[], &own(&keys));
    for round in 1..=3 {
        let mut first = Client::connect(&sluice);
        first.send(get("/own/first"));
        held.wait_for_requests(2 * round - 1);
        let leaving = waiting_client(&sluice, "/own/leaving", 1);
        let mut last = waiting_client(&sluice, "/own/last", 2);
        leaving.reset();
        wait_until("it is gone", || sluice.pending("own") == 1);
        // The one whose request is under way goes, too.
        first.reset();
        held.wait_for_requests(2 * round);
        held.release();
        assert_eq!(last.response().text(), "/own/last");
    }
    assert!(!held.origin.paths().contains(&"/own/leaving".to_owned()));
    assert_eq!(sluice.pending("own"), 0);
}

#[test]
fn a_call_that_fails_gives_its_room_back() {
    let origin = Origin::start(|peer| {
        if let Some(request) = peer.request()
            && request.path().ends_with("good")
        {
            peer.send(ok("good"));
        }
    });
    let keys = format!(
        "calls_max = 1\nqueue = {{ pending_max = 0 }}\n{}",
        addresses(&[&origin])
    );
    let sluice = Sluice::start(&[], &own(&keys));
    let mut client = Client::connect(&sluice);
    for _ in 0..10 {
        assert_eq!(client.get("/own/bad").status, 502);
        assert_eq!(client.get("/own/good").status, 200);
    }
}

#[test]
fn a_connection_that_was_closed_while_it_waited_is_replaced_in_its_own_room() {
    // With no place in the line, a second look for room would be a 503.
    let origin = Origin::start(|peer| {
        if let Some(request) = peer.request() {
            peer.send(ok(request.path()));
            // Closed as soon as it is used again.
            peer.head();
        }
    });
    let keys = format!(
        "calls_max = 1\nqueue = {{ pending_max = 0 }}\n{}",
        addresses(&[&origin])
    );
    let sluice = Sluice::start(&[], &own(&keys));
    let mut client = Client::connect(&sluice);
    for number in 0..6 {
        let path = format!("/own/{number}");
        assert_eq!(client.get(&path).text(), path);
    }
    assert_eq!(sluice.rejected("upstream_full"), 0.0);
    assert!(origin.connections() > 3);
}

/// Two origins that answer with their number.
fn two() -> [Origin; 2] {
    [0, 1].map(|number| Origin::answering(move |_| ok(number.to_string())))
}

#[test]
fn a_cookie_brings_a_client_back_until_its_endpoint_is_gone() {
    let origins = two();
    let keys = format!(
        "sticky = {{ cookie = \"node\", ttl = \"1h\" }}\n{}",
        addresses(&[&origins[0], &origins[1]])
    );
    let mut sluice = Sluice::start(&[], &own(&keys));
    let mut client = Client::connect(&sluice);
    let first = client.get("/own/");
    let set = first.value("set-cookie").expect("a cookie").to_owned();
    assert!(
        set.ends_with("; Path=/; Max-Age=3600; SameSite=Lax; HttpOnly"),
        "{set}"
    );
    assert!(!set.contains("127.0.0.1"));
    let pair = set.split(';').next().expect("a pair").to_owned();
    let with_cookie = |client: &mut Client, pair: &str| {
        client.send(format!(
            "GET /own/ HTTP/1.1\r\nhost: a\r\ncookie: x=y; {pair}\r\n\r\n"
        ));
        client.response()
    };
    for _ in 0..6 {
        let response = with_cookie(&mut client, &pair);
        assert_eq!(response.text(), first.text());
        assert_eq!(response.value("set-cookie"), None);
    }
    // A reload changes nothing of it; a cookie that nobody knows is replaced.
    sluice.reload(&[], &own(&keys));
    assert_eq!(with_cookie(&mut client, &pair).text(), first.text());
    assert!(
        with_cookie(&mut client, "node=0")
            .value("set-cookie")
            .is_some()
    );
    let [zero, one] = origins;
    let (gone, other) = match first.text() {
        "0" => (zero, one),
        _ => (one, zero),
    };
    let left = Origin::nowhere();
    let keys = keys.replace(&gone.address.to_string(), &left.to_string());
    drop(gone);
    sluice.reload(&[], &own(&keys));
    let moved = with_cookie(&mut client, &pair);
    assert_ne!(moved.text(), first.text());
    let set = moved
        .value("set-cookie")
        .expect("another cookie")
        .to_owned();
    let pair = set.split(';').next().expect("a pair");
    assert_eq!(with_cookie(&mut client, pair).value("set-cookie"), None);
    drop(other);
}

#[test]
fn requests_with_the_same_field_meet_the_same_endpoint() {
    let origins = two();
    let keys = format!(
        "balance = \"maglev\"\nhash = \"header:x-tenant\"\n{}",
        addresses(&[&origins[0], &origins[1]])
    );
    let sluice = Sluice::start(&[], &own(&keys));
    let mut seen = Vec::new();
    for tenant in 0..32 {
        let of_tenant: Vec<String> = (0..3)
            .map(|_| {
                let mut client = Client::connect(&sluice);
                client.send(format!(
                    "GET /own/ HTTP/1.1\r\nhost: a\r\nx-tenant: {tenant}\r\n\r\n"
                ));
                client.response().text().to_owned()
            })
            .collect();
        assert!(of_tenant.windows(2).all(|pair| pair[0] == pair[1]));
        seen.extend(of_tenant.into_iter().next());
    }
    assert!(seen.contains(&"0".to_owned()) && seen.contains(&"1".to_owned()));
}

#[test]
fn an_endpoint_that_stands_in_serves_when_the_others_refuse_or_are_ill() {
    let origins = two();
    let keys = format!(
        "endpoints = [\"{}\", {{ address = \"{}\", backup = true }}]",
        origins[0].address, origins[1].address
    );
    let sluice = Sluice::start(&[], &own(&keys));
    let mut client = Client::connect(&sluice);
    for _ in 0..4 {
        assert_eq!(client.get("/own/").text(), "0");
    }
    sluice.believe_at(origins[0].address, false);
    for _ in 0..4 {
        assert_eq!(client.get("/own/").text(), "1");
    }
    sluice.believe_at(origins[0].address, true);
    assert_eq!(client.get("/own/").text(), "0");
    let nowhere = Origin::nowhere().to_string();
    let keys = keys.replace(&origins[0].address.to_string(), &nowhere);
    let sluice = Sluice::start(&[], &own(&keys));
    let mut client = Client::connect(&sluice);
    for _ in 0..4 {
        assert_eq!(
            client.get("/own/").text(),
            "1",
            "a refused connection is enough"
        );
    }
}

#[test]
fn a_cookie_decides_between_upstreams_before_their_weights_do() {
    let origins = two();
    let upstream = |name: &str, origin: &Origin| {
        format!(
            "[[upstream]]\nname = \"{name}\"\nsticky = {{ cookie = \"node\" }}\n\
             endpoints = [\"{}\"]\n",
            origin.address
        )
    };
    let more = format!(
        "{}{}[[route]]\nname = \"own\"\nmatch = {{ path = \"/own/*\" }}\n\
         upstream = [{{ name = \"old\", weight = 999 }}, {{ name = \"new\", weight = 1 }}]\n",
        upstream("old", &origins[0]),
        upstream("new", &origins[1])
    );
    let swapped = more
        .replace("weight = 999", "weight = 2")
        .replace("weight = 1 ", "weight = 998 ")
        .replace("weight = 2", "weight = 1");
    let mut sluice = Sluice::start(&[], &swapped);
    let mut client = Client::connect(&sluice);
    let mut first = client.get("/own/");
    while first.text() != "1" {
        first = client.get("/own/");
    }
    let set = first.value("set-cookie").expect("a cookie").to_owned();
    let pair = set.split(';').next().expect("a pair").to_owned();
    sluice.reload(&[], &more);
    for _ in 0..10 {
        client.send(format!(
            "GET /own/ HTTP/1.1\r\nhost: a\r\ncookie: {pair}\r\n\r\n"
        ));
        assert_eq!(client.response().text(), "1", "the one in a thousand");
    }
}

#[test]
fn a_hedge_takes_no_place_in_the_line() {
    let held = Held::start();
    let more = format!(
        "[[upstream]]\nname = \"own\"\ncalls_max = 1\nqueue = {{ wait = \"10s\" }}\n{}\n\
         [[route]]\nname = \"own\"\nmatch = {{ path = \"/own/*\" }}\nupstream = \"own\"\n\
         hedge = {{ after = \"20ms\", max = 1 }}\n",
        addresses(&[&held.origin])
    );
    let sluice = Sluice::start(&[], &more);
    let mut first = Client::connect(&sluice);
    first.send(get("/own/first"));
    held.wait_for_requests(1);
    let mut second = waiting_client(&sluice, "/own/second", 1);
    // Long enough for a hedge to be wanted.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(sluice.pending("own"), 1);
    held.release();
    assert_eq!(first.response().text(), "/own/first");
    held.wait_for_requests(2);
    held.release();
    assert_eq!(second.response().text(), "/own/second");
    assert_eq!(held.origin.paths(), ["/own/first", "/own/second"]);
}
