//! What goes on of good messages: fields, framing, connection, in the words of the next hop.

use super::*;

fn answered(asked: &str, origin: &str) -> (Answer, String) {
    let request = request(asked).expect(asked);
    let response = response_to(request.method(), origin.as_bytes()).expect(origin);
    let answer = response.answer(&request, true);
    let mut out = Vec::new();
    response.encode(&mut out, &answer, "Thu, 01 Jan 1970 00:00:00 GMT");
    (answer, text(&out))
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const OLD: &str = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
const HEAD: &str = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn a_request_is_written_anew() {
    let head = request("GET /a?b HTTP/1.1\r\nHost: A.Example:80\r\nUser-Agent: \t x  \r\nACCEPT:*/*\r\nCookie: a=1\r\nCookie: b=2\r\n\r\n").expect("a good head");
    assert_eq!(
        forwarded(&head),
        "GET /a?b HTTP/1.1\r\nhost: a.example:80\r\nuser-agent: x\r\naccept: */*\r\ncookie: a=1\r\ncookie: b=2\r\n\
         x-forwarded-for: 192.0.2.1\r\nx-forwarded-proto: https\r\nx-forwarded-port: 443\r\nx-forwarded-host: a.example:80\r\n\r\n"
    );
    let post = request("POST / HTTP/1.1\r\nHost: a\r\n\r\n").expect("a good head");
    assert!(
        forwarded(&post).contains("\r\ncontent-length: 0\r\n"),
        "a method that usually has a body says that it has none"
    );
    let odd = request("X-Method!~ / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        .expect("a good head");
    assert!(
        forwarded(&odd).starts_with("X-Method!~ / HTTP/1.1\r\n")
            && forwarded(&odd).contains("\r\ntransfer-encoding: chunked\r\n")
    );
}

#[test]
fn a_policy_may_say_itself_who_the_client_is() {
    let mut head = request_with("X-Forwarded-For: 6.6.6.6\r\n").expect("a good head");
    head.set("x-forwarded-for", "10.0.0.1");
    head.set("host", "Origin.internal:8080");
    let forwarded = forwarded(&head);
    assert_eq!(
        forwarded.matches("x-forwarded-for").count(),
        1,
        "{forwarded}"
    );
    assert!(
        forwarded.contains("\r\nx-forwarded-for: 10.0.0.1\r\n")
            && forwarded.contains("\r\nhost: origin.internal:8080\r\n")
    );
    assert!(forwarded.contains("\r\nx-forwarded-host: a.example\r\n"));
}

#[test]
fn the_body_of_a_response_ends_as_its_client_understands() {
    let (answer, out) = answered(
        GET,
        "HTTP/1.1 200 Fine\r\nContent-Length: 5\r\nServer: x\r\nConnection: x-secret\r\nX-Secret: 1\r\nKeep-Alive: 5\r\n\r\n",
    );
    assert_eq!(
        answer,
        Answer {
            framing: Framing::Length(5),
            keep_alive: true,
            is_http10: false
        }
    );
    assert_eq!(
        out,
        "HTTP/1.1 200 OK\r\nserver: x\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\ncontent-length: 5\r\n\r\n"
    );

    let (answer, out) = answered(GET, "HTTP/1.0 404\r\nDate: now\r\n\r\n");
    assert_eq!(
        (answer.framing, answer.keep_alive),
        (Framing::Chunked, true),
        "what ends with the origin's connection ends with a chunk for us"
    );
    assert_eq!(
        out,
        "HTTP/1.1 404 Not Found\r\ndate: now\r\ntransfer-encoding: chunked\r\n\r\n"
    );

    let (answer, out) = answered(
        OLD,
        "HTTP/1.1 200 OK\r\nDate: now\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    assert_eq!(
        (answer.framing, answer.keep_alive),
        (Framing::UntilClose, false),
        "HTTP/1.0 knows no chunks"
    );
    assert_eq!(
        out,
        "HTTP/1.1 200 OK\r\ndate: now\r\nconnection: close\r\n\r\n"
    );

    let (answer, out) = answered(
        OLD,
        "HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 0\r\n\r\n",
    );
    assert!(answer.keep_alive);
    assert_eq!(
        out,
        "HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n"
    );

    let (answer, out) = answered(
        HEAD,
        "HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 5\r\n\r\n",
    );
    assert_eq!((answer.framing, answer.keep_alive), (Framing::None, true));
    assert_eq!(
        out, "HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 5\r\n\r\n",
        "a HEAD tells the length of what it does not send"
    );
}

#[test]
fn statuses_without_a_body_have_none() {
    for (origin, framing) in [
        (
            "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
            Framing::None,
        ),
        (
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
            Framing::None,
        ),
        ("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", Framing::None),
        ("HTTP/1.1 200 OK\r\n\r\n", Framing::UntilClose),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            Framing::Chunked,
        ),
    ] {
        assert_eq!(
            response(origin).map(|head| head.framing()),
            Ok(framing),
            "{origin}"
        );
    }
    let (_, out) = answered(
        GET,
        "HTTP/1.1 304 Not Modified\r\nDate: now\r\nContent-Length: 5\r\n\r\n",
    );
    assert_eq!(
        out,
        "HTTP/1.1 304 Not Modified\r\ndate: now\r\ncontent-length: 5\r\n\r\n"
    );
    let (_, out) = answered(GET, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n");
    assert_eq!(out, "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n");
    let (_, out) = answered(
        GET,
        "HTTP/1.1 299 \r\nDate: now\r\nContent-Length: 1\r\n\r\n",
    );
    assert!(out.starts_with("HTTP/1.1 299 Success\r\n"));
}

#[test]
fn an_origin_keeps_its_connection_only_if_its_body_has_an_end() {
    for (origin, keep_alive) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n",
            false,
        ),
        ("HTTP/1.1 200 OK\r\n\r\n", false),
        ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", false),
        (
            "HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n",
            true,
        ),
    ] {
        assert_eq!(
            response(origin).map(|head| head.keep_alive()),
            Ok(keep_alive),
            "{origin}"
        );
    }
}

#[test]
fn one_head_serves_many_requests() {
    let mut head = RequestHead::default();
    let limits = Limits::default();
    assert!(head.parse(b"POST /a HTTP/1.0\r\nHost: a\r\nExpect: x", &limits) == Ok(Parse::Partial));
    let first = "POST http://b/long/path?query HTTP/1.1\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\nUpgrade: x\r\nContent-Length: 3\r\nX: 1\r\n\r\n";
    let mut head = RequestHead::default();
    assert!(head.parse(first.as_bytes(), &limits).is_ok());
    head.set("host", "c");
    assert!(
        head.parse(b"GET / HTTP/1.1\r\nHost: d\r\n\r\n", &limits)
            .is_ok()
    );
    let mut fresh = RequestHead::default();
    assert!(
        fresh
            .parse(b"GET / HTTP/1.1\r\nHost: d\r\n\r\n", &limits)
            .is_ok()
    );
    assert_eq!(summary(&head), summary(&fresh));
    assert_eq!(forwarded(&head), forwarded(&fresh));
    assert!(head.keep_alive() && !head.expects_continue() && !head.wants_upgrade());
}

#[test]
fn replies_of_our_own_say_what_is_wrong_and_frame_it() {
    let delivery = Delivery {
        date: "now",
        request_id: "17",
        keep_alive: false,
        is_http10: false,
        is_head: false,
    };
    let mut out = Vec::new();
    let bare_lf = Reply::from(Reject::bad("bare_lf"));
    let sent = bare_lf.encode(&mut out, &delivery, Form::Text, None);
    assert_eq!(
        (text(&out).as_str(), sent),
        (
            "HTTP/1.1 400 Bad Request\r\ndate: now\r\nx-request-id: 17\r\ncache-control: no-store\r\ncontent-type: text/plain; charset=utf-8\r\n\
             content-length: 36\r\nconnection: close\r\n\r\n400 Bad Request: bare_lf\nrequest 17\n",
            36
        )
    );
    out.clear();
    let reply = Reply::new(429, "rate_limited")
        .field("retry-after", "3")
        .field("x-bad", "a\r\nb");
    let to_head = Delivery {
        keep_alive: true,
        is_head: true,
        ..delivery
    };
    let sent = reply.encode(&mut out, &to_head, Form::Text, None);
    assert_eq!(
        (text(&out).as_str(), sent),
        (
            "HTTP/1.1 429 Too Many Requests\r\ndate: now\r\nx-request-id: 17\r\ncache-control: no-store\r\ncontent-type: text/plain; charset=utf-8\r\n\
             retry-after: 3\r\ncontent-length: 47\r\n\r\n",
            0
        )
    );
    for (form, content_type, body) in [
        (
            Form::Problem,
            "application/problem+json",
            "{\"type\":\"about:blank\",\"title\":\"Bad Request\",\"status\":400,\"reason\":\"bare_lf\",\"request_id\":\"17\"}\n",
        ),
        (
            Form::Json,
            "application/json",
            "{\"status\":400,\"title\":\"Bad Request\",\"reason\":\"bare_lf\",\"request_id\":\"17\"}\n",
        ),
        (
            Form::Html,
            "text/html; charset=utf-8",
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>400 Bad Request</title></head>\n\
             <body><h1>400 Bad Request</h1><p>bare_lf</p><p>Request <code>17</code></p></body></html>\n",
        ),
    ] {
        out.clear();
        bare_lf.encode(&mut out, &delivery, form, None);
        let answer = text(&out);
        let (head, told) = answer.split_once("\r\n\r\n").expect("a head");
        assert_eq!(told, body);
        assert!(
            head.contains(&format!(
                "content-type: {content_type}\r\ncontent-length: {}",
                body.len()
            )),
            "{head}"
        );
    }
    out.clear();
    let page = Page {
        content_type: "text/x".into(),
        body: b"ours".as_slice().into(),
    };
    bare_lf.encode(&mut out, &delivery, Form::Html, Some(&page));
    assert!(
        text(&out).ends_with(
            "content-type: text/x\r\ncontent-length: 4\r\nconnection: close\r\n\r\nours"
        )
    );
    out.clear();
    let fields = [("Content-Length", "9"), ("x", "y")];
    encode_reply(
        &mut out,
        204,
        fields.into_iter(),
        b"none",
        &Delivery {
            keep_alive: true,
            is_http10: true,
            ..delivery
        },
    );
    assert_eq!(
        text(&out),
        "HTTP/1.1 204 No Content\r\ndate: now\r\nx-request-id: 17\r\nx: y\r\nconnection: keep-alive\r\n\r\n"
    );
}
