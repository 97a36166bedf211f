//! Requests that are asked twice at a time: who wins, who is closed, and what is never asked twice.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{self, Sender};

use super::client::get;
use super::origin::{Peer, ok};
use super::*;

/// A route `/h/*` that is hedged so.
fn hedged(hedge: &str) -> String {
    format!(
        "[[route]]\nname = \"h\"\nmatch = {{ path = \"/h/*\" }}\nupstream = \"app\"\nhedge = {{ {hedge} }}\n"
    )
}

/// Takes requests, and never answers.
fn silent() -> Origin {
    Origin::start(|peer| {
        peer.request();
        peer.wait_for_end();
    })
}

/// Does this with each request, with those for `/h/` when it is told to; a connection ends once it says so.
fn held(act: impl Fn(&mut Peer) -> bool + Send + Sync + 'static) -> (Origin, Sender<()>) {
    let (release, released) = mpsc::channel();
    let released = Mutex::new(released);
    let origin = Origin::start(move |peer| {
        while let Some(request) = peer.request() {
            let goes_on = request.path() != "/h/" || peer.wait_for(&released);
            if !goes_on || !act(peer) {
                return;
            }
        }
    });
    (origin, release)
}

/// Asks for `/h/`, and waits until each of these is asked once more.
fn ask_both(client: &mut Client, origins: [&Origin; 2]) {
    let before = origins.map(|origin| origin.requests().len());
    client.send(get("/h/"));
    wait_until("both are asked", || {
        origins.map(|origin| origin.requests().len()) == before.map(|count| count + 1)
    });
}

fn count(sluice: &Sluice, what: &str, addresses: &[SocketAddr]) -> f64 {
    let each = addresses.iter().map(|address| {
        sluice.metric(&format!(
            "sluice_upstream_{what}_total{{upstream=\"app\",endpoint=\"{address}\"}}"
        ))
    });
    each.sum()
}

#[test]
fn who_takes_long_is_overtaken_and_its_connection_is_closed() {
    let (slow, origin) = (silent(), Origin::echoing());
    let addresses = [slow.address, origin.address];
    let sluice = Sluice::start(&addresses, &hedged("after = \"30ms\""));
    let mut client = Client::connect(&sluice);
    for n in 0..6 {
        let path = format!("/h/{n}");
        let response = client.get(&path);
        assert_eq!((response.status, response.text()), (200, &*path));
    }
    let overtaken = slow.connections();
    assert!(overtaken >= 1, "it was asked first at least once");
    slow.wait_until_gone(overtaken);
    assert_eq!(count(&sluice, "hedges", &addresses), overtaken as f64);
    assert_eq!(count(&sluice, "hedges_won", &addresses), overtaken as f64);
    assert_eq!(sluice.reports.take(), [], "slow is no failure");
}

#[test]
fn the_first_answer_wins_whoever_gives_it() {
    let (slow, answer) = held(|peer| peer.send(ok("slow")));
    let dead = silent();
    let addresses = [slow.address, dead.address];
    let sluice = Sluice::start(&addresses, &hedged("after = \"30ms\""));
    let mut client = Client::connect(&sluice);
    for _ in 0..2 {
        ask_both(&mut client, [&slow, &dead]);
        answer.send(()).unwrap();
        assert_eq!(client.response().text(), "slow");
    }
    dead.wait_until_gone(2);
    assert_eq!(count(&sluice, "hedges", &addresses), 2.0);
}

#[test]
fn a_first_call_that_fails_meanwhile_does_not_end_the_other() {
    let (dying, die) = held(|peer| {
        peer.reset();
        false
    });
    let (late, answer) = held(|peer| peer.send(ok("late")));
    let addresses = [dying.address, late.address];
    let more = hedged("after = \"30ms\"") + "retry = { retries = 0 }\n";
    let sluice = Sluice::start(&addresses, &more);
    let mut client = Client::connect(&sluice);
    let ask = |client: &mut Client| {
        ask_both(client, [&dying, &late]);
        die.send(()).unwrap();
        // Long enough for its end to be noticed; it is counted only when all is over.
        std::thread::sleep(Duration::from_millis(100));
        answer.send(()).unwrap();
        assert_eq!(client.response().text(), "late");
    };
    ask(&mut client);
    // Whoever is first by now, the other one is next.
    assert_eq!(client.get("/plain").text(), "late");
    ask(&mut client);
    let failures = count(&sluice, "failures", &addresses);
    assert_eq!(failures, dying.connections() as f64);
    assert!(failures >= 2.0);
}

/// First it is the own call that meets a connection which its endpoint gives up, then the other one.
#[test]
fn a_connection_that_waited_too_long_is_nobodys_failure_in_a_race_either() {
    for plain in [2, 1] {
        let stale = Origin::start(|peer| {
            if peer.request().is_some() {
                peer.send(ok("first"));
                peer.head();
                std::thread::sleep(Duration::from_millis(100));
                peer.reset();
            }
        });
        let other = Origin::start(|peer| {
            while let Some(request) = peer.request() {
                if request.path() == "/h/" {
                    std::thread::sleep(Duration::from_millis(300));
                }
                peer.send(ok("other"));
            }
        });
        let addresses = [stale.address, other.address];
        let sluice = Sluice::start(&addresses, &hedged("after = \"30ms\""));
        let mut client = Client::connect(&sluice);
        // They take turns in the order of their addresses, which the kernel has given them.
        if other.address < stale.address {
            assert_eq!(client.get("/plain").text(), "other");
        }
        let answers: Vec<String> = (0..plain)
            .map(|_| client.get("/plain").text().to_owned())
            .collect();
        assert_eq!(answers, ["first", "other"][..plain]);
        assert_eq!(client.get("/h/").text(), "other");
        assert_eq!(
            stale.paths(),
            ["/plain", "/h/"],
            "it was asked on the same one"
        );
        sluice.wait_until_nothing_is_open_to(stale.address);
        assert_eq!(count(&sluice, "failures", &addresses), 0.0);
        assert_eq!(sluice.reports.take(), []);
    }
}

#[test]
fn where_all_are_slow_there_are_as_many_calls_as_allowed_and_one_answer() {
    let (one, two, three) = (silent(), silent(), silent());
    let addresses = [one.address, two.address, three.address];
    let more = hedged("after = \"20ms\", max = 2")
        + "timeout = { first_byte = \"1s\" }\nretry = { retries = 0 }\n";
    let sluice = Sluice::start(&addresses, &more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/h/").status, 504);
    let asked = one.connections() + two.connections() + three.connections();
    assert_eq!(asked, 3);
    assert_eq!(sluice.rejected("origin_head_timeout"), 1.0);
    for address in addresses {
        sluice.wait_until_nothing_is_open_to(address);
    }
}

#[test]
fn what_has_a_body_or_an_effect_is_asked_once() {
    let (release, released) = mpsc::channel();
    let released = Mutex::new(released);
    let slow = Origin::start(move |peer| {
        while let Some(request) = peer.request() {
            if request.head.starts_with("GET /h/ ") && !peer.wait_for(&released) {
                return;
            }
            // Long enough for a hedge to be wanted.
            std::thread::sleep(Duration::from_millis(150));
            peer.send(ok("slow"));
        }
    });
    let addresses = [slow.address];
    let sluice = Sluice::start(&addresses, &hedged("after = \"10ms\""));
    let mut client = Client::connect(&sluice);
    for request in [
        "POST /h/ HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
        "PUT /h/ HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx",
        &get("/unhedged"),
    ] {
        client.send(request);
        assert_eq!(client.response().text(), "slow");
    }
    assert_eq!(slow.requests().len(), 3);
    client.send(get("/h/"));
    wait_until("a GET is asked twice", || slow.requests().len() == 5);
    release.send(()).unwrap();
    assert_eq!(client.response().text(), "slow");
}

#[test]
fn hedges_end_with_the_budget_of_retries() {
    let (slow, origin) = (silent(), Origin::echoing());
    let addresses = [slow.address, origin.address];
    let more = hedged("after = \"20ms\"")
        + "timeout = { first_byte = \"200ms\" }\nretry = { retries = 0 }\n\
           [tunables]\n\"upstream.retry_budget_percent\" = 0\n\"upstream.retries_per_second_min\" = 0\n";
    let sluice = Sluice::start(&addresses, &more);
    let mut client = Client::connect(&sluice);
    let mut statuses = [client.get("/h/").status, client.get("/h/").status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 504]);
    assert_eq!(count(&sluice, "hedges", &addresses), 0.0);
    assert_eq!(count(&sluice, "retries_denied", &addresses), 1.0);
}

#[test]
fn what_is_long_is_learned_from_the_calls() {
    let asked = AtomicUsize::new(0);
    // The one that is slow is slow the first time only.
    let origin = Origin::start(move |peer| {
        while let Some(request) = peer.request() {
            if request.path() == "/h/slow" && asked.fetch_add(1, SeqCst) == 0 {
                return peer.wait_for_end();
            }
            peer.send(ok(request.path()));
        }
    });
    let sluice = Sluice::start(&[origin.address], &hedged("after = \"p95\""));
    let mut client = Client::connect(&sluice);
    for _ in 0..60 {
        assert_eq!(client.get("/h/fast").text(), "/h/fast");
    }
    let started = Instant::now();
    assert_eq!(client.get("/h/slow").text(), "/h/slow");
    assert!(
        started.elapsed() < PATIENCE / 2,
        "long before any deadline of the call"
    );
    assert!(count(&sluice, "hedges_won", &[origin.address]) >= 1.0);
}
