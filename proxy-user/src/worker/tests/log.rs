//! Lines of the access log, as whole workers write them.

use serde_json::Value;

use super::client::get;
use super::origin::ok;
use super::*;

const LOG: &str = "[log]\naccess = \"stdout\"\n";

impl Sluice {
    /// Lines that were written; waits until there are so many, which is until the worker hands them over.
    pub fn log(&self, count: usize) -> Vec<Value> {
        let mut found = Vec::new();
        wait_until("the lines are there", || {
            for lines in self.lines.take() {
                let text = std::str::from_utf8(&lines.bytes).expect("text");
                found.extend(
                    text.lines()
                        .map(|line| serde_json::from_str(line).expect(line)),
                );
            }
            found.len() >= count
        });
        assert_eq!(found.len(), count, "{found:?}");
        found
    }
}

fn us(line: &Value, span: &str) -> u64 {
    line[span]
        .as_u64()
        .unwrap_or_else(|| panic!("no {span}: {line}"))
}

#[test]
fn an_exchange_has_a_line_that_says_what_came_of_it() {
    let origin = Origin::answering(|request| {
        std::thread::sleep(Duration::from_millis(30));
        ok(request.path())
    });
    let sluice = Sluice::start(&[origin.address], LOG);
    let mut client = Client::connect(&sluice);
    client.send("POST /orders?key=canary HTTP/1.1\r\nhost: Api.example:8080\r\ncookie: canary\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.response().status, 200);
    client.send("HEAD / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
    client.head();
    let lines = sluice.log(2);
    let [first, second] = &lines[..] else {
        panic!("{lines:?}")
    };
    for (field, value) in [
        ("listener", "web"),
        ("route", "all"),
        ("upstream", "app"),
        ("client", "127.0.0.1"),
        ("method", "POST"),
        ("host", "api.example"),
        ("path", "/orders"),
        ("protocol", "HTTP/1.1"),
    ] {
        assert_eq!(first[field], value, "{first}");
    }
    assert_eq!(first["endpoint"], origin.address.to_string());
    assert_eq!(
        (
            &first["status"],
            &first["received_bytes"],
            &first["sent_bytes"],
            &first["retries"],
            &first["reused"]
        ),
        (&200.into(), &5.into(), &18.into(), &0.into(), &false.into())
    );
    assert!(first["reason"].is_null() && first["tls"].is_null() && first["tls_us"].is_null());
    assert!(!first.to_string().contains("canary"), "{first}");
    let asked = &origin.requests()[0].head;
    assert_eq!(
        client::value_of(asked, "x-request-id"),
        first["id"].as_str()
    );
    // What happens within one turn of the loop takes no time, as it is counted.
    let parts: u64 = [
        "head_us",
        "route_us",
        "connect_us",
        "first_byte_us",
        "body_us",
    ]
    .map(|span| us(first, span))
    .iter()
    .sum();
    assert_eq!(parts, us(first, "total_us"));
    assert!(us(first, "first_byte_us") >= 30_000, "{first}");
    assert!(first["accept_us"].is_u64() && second["accept_us"].is_null());
    assert_eq!(
        (
            &second["protocol"],
            &second["reused"],
            &second["sent_bytes"]
        ),
        (&"HTTP/1.0".into(), &true.into(), &0.into())
    );
    let time = first["time"].as_str().expect("a time");
    assert!(
        time.len() == 24 && time.starts_with("20") && time.ends_with('Z'),
        "{time}"
    );
}

/// Whoever overtakes, too, was connected to while the first one was waited for.
#[test]
fn what_a_hedged_exchange_waits_for_is_a_first_byte_and_no_connection() {
    let silent = Origin::start(|peer| peer.wait_for_end());
    let origin = Origin::echoing();
    let more =
        "[[route]]\nmatch = { path = \"/h\" }\nupstream = \"app\"\nhedge = { after = \"50ms\" }\n";
    let sluice = Sluice::start(&[silent.address, origin.address], &format!("{more}{LOG}"));
    let mut client = Client::connect(&sluice);
    for _ in 0..2 {
        assert_eq!(client.get("/h").status, 200);
    }
    let lines = sluice.log(2);
    let hedged = lines.iter().filter(|line| us(line, "total_us") >= 50_000);
    let waits: Vec<bool> = hedged
        .map(|line| us(line, "first_byte_us") >= 50_000)
        .collect();
    assert!(
        waits.contains(&true) && !waits.contains(&false),
        "{lines:?}"
    );
}

#[test]
fn a_refusal_has_a_line_with_its_reason() {
    let dead = Origin::nowhere();
    let more = "[[route]]\nmatch = { path = \"/fixed\" }\nrespond = { body = \"fixed\" }\n";
    let sluice = Sluice::start(&[dead], &format!("{more}{LOG}"));
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/app").status, 503);
    assert_eq!(client.get("/fixed").status, 200);
    client.send("GET /bad HTTP/1.1\r\nhost : a\r\n\r\n");
    let refused = client.response();
    let lines = sluice.log(3);
    assert_eq!(
        (&lines[0]["status"], &lines[0]["reason"]),
        (&503.into(), &"origin_unreachable".into())
    );
    assert_eq!(
        (&lines[0]["upstream"], &lines[0]["retries"]),
        (&Value::Null, &1.into())
    );
    assert_eq!(
        (&lines[1]["route"], &lines[1]["sent_bytes"]),
        (&"route-2".into(), &5.into())
    );
    assert!(lines[1]["upstream"].is_null() && lines[1]["connect_us"].is_null());
    // Of a head that was not taken nothing is told but what was wrong with it.
    assert_eq!(
        (&lines[2]["status"], &lines[2]["reason"]),
        (&400.into(), &"field_name".into())
    );
    assert!(
        lines[2]["path"].is_null()
            && lines[2]["method"].is_null()
            && lines[2]["protocol"].is_null()
    );
    assert_eq!(lines[2]["id"].as_str(), refused.value("x-request-id"));
}

#[test]
fn an_exchange_that_breaks_off_has_a_line_and_a_connection_without_one_has_none() {
    let origin = Origin::start(|peer| match peer.head() {
        Some(request) if request.path() == "/cut" => {
            peer.send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf");
        }
        _ => peer.wait_for_end(),
    });
    let sluice = Sluice::start(&[origin.address], LOG);
    drop(Client::connect(&sluice));
    let mut silent = Client::connect(&sluice);
    silent.send("GET / HT");
    drop(silent);
    let mut cut = Client::connect(&sluice);
    cut.send(get("/cut"));
    cut.rest();
    let mut gone = Client::connect(&sluice);
    gone.send(get("/gone"));
    wait_until("the origin has it", || origin.paths().len() == 2);
    gone.reset();
    let mut stopped = Client::connect(&sluice);
    stopped.send(get("/stopped"));
    wait_until("the origin has it", || origin.paths().len() == 3);
    wait_until("who is gone is gone", || sluice.open() == 1);
    sluice.close_source([127, 0, 0, 1].into());
    let mut lines = sluice.log(3);
    lines.sort_by_key(|line| line["path"].to_string());
    let told: Vec<_> = lines
        .iter()
        .map(|line| {
            (
                line["path"].as_str(),
                line["status"].as_u64(),
                line["reason"].as_str(),
                line["sent_bytes"].as_u64(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            (
                Some("/cut"),
                Some(200),
                Some("origin_body_cut_short"),
                Some(4)
            ),
            (Some("/gone"), None, Some("client_gone"), Some(0)),
            (Some("/stopped"), None, Some("cut_off"), Some(0)),
        ]
    );
}

/// A secret in every place that has one, in a request that is served, and in one that is refused.
#[test]
fn no_secret_is_in_a_line_unless_it_was_asked_for_by_name() {
    let origin = Origin::answering(|_| {
        b"HTTP/1.1 200 OK\r\nset-cookie: canary\r\nx-token: canary\r\ncontent-length: 6\r\n\r\ncanary".to_vec()
    });
    let more = "[log]\naccess = { stdout = true, fields = [\"default\", \"request.user-agent\", \"response.server\", \"scheme\", \"peer\"] }\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    for end in ["\r\ncanary", "x : y\r\n\r\n"] {
        client.send(
            "POST /a?token=canary HTTP/1.1\r\nhost: a\r\nuser-agent: test\r\nauthorization: Bearer canary\r\ncookie: s=canary\r\n".to_owned()
                + "x-api-key: canary\r\nx-canary: 1\r\nreferer: http://a/?canary\r\nx-request-id: canary\r\n"
                + "forwarded: for=canary\r\ncontent-length: 6\r\n"
                + end,
        );
        client.response();
    }
    let lines = sluice.log(2);
    for line in &lines {
        assert!(!line.to_string().contains("canary"), "{line}");
    }
    assert_eq!(lines[0]["request.user-agent"], "test");
    assert!(lines[0]["response.server"].is_null());
}

#[test]
fn what_is_not_wanted_has_no_line() {
    let origin = Origin::echoing();
    let more = "[[route]]\nname = \"quiet\"\nmatch = { path = \"/quiet\" }\nlog = \"off\"\nupstream = \"app\"\n";
    let sluice = Sluice::start(&[origin.address], &format!("{more}{LOG}"));
    let mut client = Client::connect(&sluice);
    client.get("/quiet");
    client.get("/loud");
    assert_eq!(sluice.log(1)[0]["path"], "/loud");

    let more = "[[route]]\nname = \"loud\"\nmatch = { path = \"/loud\" }\nlog = \"on\"\nupstream = \"app\"\n";
    let sluice = Sluice::start_on(
        "log = \"off\"\n",
        &[origin.address],
        &format!("{more}{LOG}"),
    );
    let mut client = Client::connect(&sluice);
    client.get("/quiet");
    client.get("/loud");
    assert_eq!(sluice.log(1)[0]["path"], "/loud");

    let mut sluice = Sluice::start(&[origin.address], "");
    let mut client = Client::connect(&sluice);
    client.get("/before");
    sluice.reload(&[origin.address], LOG);
    client.get("/after");
    assert_eq!(sluice.log(1)[0]["path"], "/after");
}

#[test]
fn a_sample_has_some_of_what_went_well_and_all_that_did_not() {
    let origin = Origin::answering(|request| match request.path() {
        "/bad" => b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".to_vec(),
        _ => ok("good"),
    });
    let more = "[log]\naccess = { stdout = true, sample = 10 }\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    for _ in 0..40 {
        client.get("/bad");
        for _ in 0..10 {
            client.get("/good");
        }
    }
    let mut paths = Vec::new();
    wait_until("all failures are there", || {
        for lines in sluice.lines.take() {
            let text = String::from_utf8_lossy(&lines.bytes).into_owned();
            paths.extend(text.lines().map(|line| line.contains("/bad")));
        }
        paths.iter().filter(|is_bad| **is_bad).count() == 40
    });
    // 40 of 400 are expected; 6 deviations more or less are 36.
    let good = paths.iter().filter(|is_bad| !**is_bad).count();
    assert!((4..=76).contains(&good), "{good}");
}

#[test]
fn an_exchange_that_panics_has_a_line_too() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(&[origin.address], LOG);
    let mut client = Client::connect(&sluice);
    let answer = client.get(crate::exchange::PANICS_AT);
    let line = &sluice.log(1)[0];
    assert_eq!((answer.status, &line["status"]), (500, &500.into()));
    assert_eq!(
        (&line["reason"], &line["path"]),
        (&"panic".into(), &"/panics".into())
    );
    assert_eq!(line["id"].as_str(), answer.value("x-request-id"));
}
