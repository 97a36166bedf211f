//! Answers of our own: their form, their id, and what a route has in their place.

use serde_json::Value;

use super::*;

fn ask(client: &mut Client, request: &str, accept: &str) -> client::Response {
    client.send(format!(
        "{request} HTTP/1.1\r\nhost: a\r\naccept: {accept}\r\n\r\n"
    ));
    if request.starts_with("HEAD") {
        return client.head();
    }
    client.response()
}

#[test]
fn a_refusal_comes_in_the_form_that_its_client_takes() {
    let sluice = Sluice::start(&[Origin::nowhere()], "");
    let mut client = Client::connect(&sluice);
    for (accept, content_type) in [
        ("*/*", "text/plain; charset=utf-8"),
        ("text/html, */*;q=0.8", "text/html; charset=utf-8"),
        ("application/json", "application/json"),
        (
            "application/problem+json, application/json;q=0.9",
            "application/problem+json",
        ),
    ] {
        let answer = ask(&mut client, "GET /a", accept);
        assert_eq!(
            (answer.status, answer.value("content-type")),
            (503, Some(content_type))
        );
        assert_eq!(answer.value("cache-control"), Some("no-store"));
        assert_eq!(answer.value("retry-after"), Some("1"));
        let id = answer.value("x-request-id").expect("an id").to_owned();
        assert!(
            answer.text().contains(&id) && answer.text().contains("origin_unreachable"),
            "{}",
            answer.text()
        );
        if content_type.ends_with("json") {
            let told: Value = serde_json::from_str(answer.text()).expect("JSON");
            assert_eq!(
                (&told["status"], &told["request_id"]),
                (&503.into(), &id.into())
            );
        }
        let length = answer.value("content-length").map(str::to_owned);
        let head = ask(&mut client, "HEAD /a", accept);
        assert_eq!(
            (head.status, head.value("content-length")),
            (503, length.as_deref())
        );
    }
    // The head that was not taken has no `Accept` either, nor has the one before.
    client.send("GET / HTTP/1.1\r\nhost : a\r\naccept: application/json\r\n\r\n");
    let refused = client.response();
    assert_eq!(
        refused.value("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(sluice.rejected("origin_unreachable"), 8.0);
}

#[test]
fn a_route_has_pages_of_its_own_for_what_is_refused_and_not_for_what_an_origin_says() {
    let origin =
        Origin::answering(|_| b"HTTP/1.1 503 No\r\ncontent-length: 6\r\n\r\ntheirs".to_vec());
    let more = format!(
        "[[upstream]]\nname = \"dead\"\nendpoints = [\"{}\"]\n\
         [[route]]\nname = \"dead\"\nmatch = {{ path = \"/dead\" }}\nupstream = \"dead\"\n\
         errors = {{ 503 = {{ body = \"<p>soon\", type = \"text/html\" }} }}\n\
         [[route]]\nname = \"live\"\nmatch = {{ path = \"/live\" }}\nupstream = \"app\"\n\
         errors = {{ 5xx = {{ body = \"sorry\" }}, 4xx = {{ body = \"no\" }} }}\n\
         [tunables]\n\"http.body_bytes_max\" = \"10B\"\n",
        Origin::nowhere()
    );
    let sluice = Sluice::start(&[origin.address], &more);
    let mut client = Client::connect(&sluice);
    let dead = ask(&mut client, "GET /dead", "application/json");
    assert_eq!((dead.status, dead.text()), (503, "<p>soon"));
    assert_eq!(dead.value("content-type"), Some("text/html"));
    assert!(dead.value("x-request-id").is_some() && dead.value("retry-after").is_some());
    let live = ask(&mut client, "GET /live", "*/*");
    assert_eq!((live.status, live.text()), (503, "theirs"));
    client.send("POST /live HTTP/1.1\r\nhost: a\r\ncontent-length: 11\r\n\r\nhello world");
    let large = client.response();
    assert_eq!((large.status, large.text()), (413, "no"));
    client.send("POST /dead HTTP/1.1\r\nhost: a\r\ncontent-length: 11\r\n\r\nhello world");
    let plain = client.response();
    assert!(
        plain.status == 413
            && plain
                .text()
                .starts_with("413 Content Too Large: body_too_large\n")
    );
}

/// The connection is ended behind the answer, not reset, as long as the client sends: a reset may take the answer from it.
#[test]
fn a_client_that_is_still_sending_can_read_why_it_was_refused() {
    let origin = Origin::echoing();
    let sluice = Sluice::start(
        &[origin.address],
        "[tunables]\n\"http.body_bytes_max\" = \"1MiB\"\n",
    );
    for _ in 0..3 {
        let mut client = Client::connect(&sluice);
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8000000\r\n\r\n");
        // As a client does that reads only when it has sent all: far more than the buffers of both sides hold.
        client.send(patterned(8_000_000));
        let answer = client.response();
        assert_eq!((answer.status, answer.closes()), (413, true));
        client.expect_end();
    }
    assert_eq!(origin.paths().len(), 0);
}
