//! Requests through hops: who is believed to ask, and what follows from it.

use super::client::value_of;
use super::*;
use crate::report::Report;

const RATE: &str = "[[policy]]\nname = \"fair-use\"\n\
    rate_limit = { key = \"address\", rate = \"1/h\", burst = 1, ban = { after = 9, for = \"60s\" } }\n\
    [[route]]\nname = \"limited\"\nmatch = { path = \"/limited\" }\npolicies = \"fair-use\"\nupstream = \"app\"\n";

fn asked_by(client: &mut Client, path: &str, lines: &str) -> u16 {
    client.send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n{lines}\r\n"));
    client.response().status
}

#[test]
fn a_limit_counts_who_stands_behind_a_trusted_hop_and_no_offence_is_held_against_the_hop() {
    let origin = Origin::echoing();
    let sluice = Sluice::start_on("trusted = [\"127.0.0.0/8\"]\n", &[origin.address], RATE);
    let mut client = Client::connect(&sluice);
    for (lines, status) in [
        ("x-forwarded-for: 198.51.100.1\r\n", 200),
        ("x-forwarded-for: 198.51.100.1\r\n", 429),
        ("x-forwarded-for: 198.51.100.1, 198.51.100.2\r\n", 200),
        (
            "x-forwarded-for: 198.51.100.3, 198.51.100.2, 127.0.0.9\r\n",
            429,
        ),
    ] {
        assert_eq!(asked_by(&mut client, "/limited", lines), status, "{lines}");
    }
    assert_eq!(sluice.reports.take(), []);
    let requests = origin.requests();
    assert_eq!(
        value_of(&requests[1].head, "x-forwarded-for"),
        Some("198.51.100.2, 127.0.0.1")
    );
}

#[test]
fn who_is_not_trusted_asks_for_itself_whatever_it_says() {
    let origin = Origin::echoing();
    let sluice = Sluice::start_on("trusted = [\"10.0.0.0/8\"]\n", &[origin.address], RATE);
    let mut client = Client::connect(&sluice);
    let lines = |n| {
        format!(
            "x-forwarded-for: 198.51.100.{n}\r\nforwarded: for=198.51.100.{n}\r\nx-request-id: mine\r\n"
        )
    };
    assert_eq!(asked_by(&mut client, "/limited", &lines(1)), 200);
    assert_eq!(asked_by(&mut client, "/limited", &lines(2)), 429);
    let reports = sluice.reports.take();
    assert!(
        matches!(&reports[..], [Report::Offence { source, .. }] if *source == client.stream.local_addr().unwrap().ip()),
        "{reports:?}"
    );
    let head = &origin.requests()[0].head;
    assert_eq!(value_of(head, "x-forwarded-for"), Some("127.0.0.1"));
    let port = sluice.address.port().to_string();
    assert_eq!(value_of(head, "x-forwarded-port"), Some(&*port));
    assert!(
        !head.contains("198.51.100") && !head.contains("mine"),
        "{head}"
    );
}

#[test]
fn every_request_has_an_id_of_its_own_which_origins_and_answers_of_ours_name() {
    let origin = Origin::echoing();
    let more = "[[route]]\nmatch = { path = \"/fixed\" }\nrespond = { body = \"fixed\" }\n";
    let sluice = Sluice::start_on("trusted = \"127.0.0.1\"\n", &[origin.address], more);
    let mut client = Client::connect(&sluice);
    let mut ids = Vec::new();
    for _ in 0..3 {
        assert_eq!(
            client.get("/a").value("x-request-id"),
            None,
            "that is the origin's to say"
        );
        ids.push(
            client
                .get("/fixed")
                .value("x-request-id")
                .expect("an id")
                .to_owned(),
        );
    }
    let requests = origin.requests();
    let told = requests
        .iter()
        .map(|request| value_of(&request.head, "x-request-id"));
    ids.extend(told.map(|id| id.expect("an id").to_owned()));
    client.send("GET /fixed HTTP/1.1\r\nhost: a\r\nx-request-id: from-the-hop\r\n\r\n");
    assert_eq!(
        client.response().value("x-request-id"),
        Some("from-the-hop")
    );
    client.send("GET /fixed HTTP/1.1\r\nhost : a\r\nx-request-id: from-the-hop\r\n\r\n");
    let refused = client.response();
    assert_eq!(refused.status, 400);
    ids.push(refused.value("x-request-id").expect("an id").to_owned());
    assert!(
        ids.iter()
            .all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()))
    );
    let count = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!((count, ids.len()), (7, 7));
}

#[test]
fn a_request_that_comes_round_again_is_refused_where_we_have_a_name() {
    let origin = Origin::echoing();
    let sluice = Sluice::start_on("via = \"edge-1\"\n", &[origin.address], "");
    let mut client = Client::connect(&sluice);
    assert_eq!(asked_by(&mut client, "/", "via: 1.1 edge-2\r\n"), 200);
    let head = &origin.requests()[0].head;
    assert!(
        head.contains("via: 1.1 edge-2\r\n") && head.contains("via: 1.1 edge-1\r\n"),
        "{head}"
    );
    assert_eq!(
        asked_by(&mut client, "/", "via: 1.1 edge-2, 1.1 edge-1\r\n"),
        508
    );
    assert_eq!((sluice.rejected("loop"), origin.requests().len()), (1.0, 1));
}
