//! Every kind of bad or doubtful message by name, from a client and from an origin, with the answer it gets.

use super::*;

/// Field lines that are refused beside a good start line and `Host`.
fn refuses(cases: &[(&str, u16, &str)]) {
    for (lines, status, reason) in cases {
        let reject = request_with(lines)
            .map(|head| summary(&head))
            .expect_err(lines);
        assert_eq!(
            (reject.status, reject.reason),
            (*status, *reason),
            "{lines:?}"
        );
    }
}

/// Whole requests that are refused.
fn refuses_whole(cases: &[(&str, u16, &str)]) {
    for (whole, status, reason) in cases {
        let reject = request(whole).map(|head| summary(&head)).expect_err(whole);
        assert_eq!(
            (reject.status, reject.reason),
            (*status, *reason),
            "{whole:?}"
        );
    }
}

#[test]
fn a_length_beside_a_coding_is_refused_and_so_is_any_coding_but_one_exact_chunked() {
    refuses(&[
        (
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            400,
            "length_and_coding",
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
            400,
            "length_and_coding",
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            400,
            "transfer_encoding_twice",
        ),
        (
            "Transfer-Encoding: chunked, chunked\r\n",
            400,
            "transfer_encoding",
        ),
        ("Transfer-Encoding: Chunked\r\n", 400, "transfer_encoding"),
        ("Transfer-Encoding: chunked,\r\n", 400, "transfer_encoding"),
        ("Transfer-Encoding:\r\n", 400, "transfer_encoding"),
        (
            "Transfer-Encoding: \"chunked\"\r\n",
            400,
            "transfer_encoding",
        ),
        (
            "Transfer-Encoding: chunked;q=1\r\n",
            400,
            "transfer_encoding",
        ),
        ("Transfer-Encoding:  chunked\r\n", 400, "transfer_encoding"),
        ("Transfer-Encoding:\tchunked\r\n", 400, "transfer_encoding"),
        ("Transfer-Encoding: chunked \r\n", 400, "transfer_encoding"),
        ("Transfer-Encoding: \u{b}chunked\r\n", 400, "field_value"),
        ("Transfer-Encoding : chunked\r\n", 400, "field_name"),
        (
            "Transfer-Encoding: identity\r\n",
            501,
            "transfer_coding_unknown",
        ),
        (
            "Transfer-Encoding: gzip, chunked\r\n",
            501,
            "transfer_coding_unknown",
        ),
        (
            "Transfer-Encoding: xchunked\r\n",
            501,
            "transfer_coding_unknown",
        ),
    ]);
    refuses_whole(&[(
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
        "coding_on_http10",
    )]);
    assert_eq!(
        request_with("Transfer-Encoding: chunked\r\n").map(|head| head.framing()),
        Ok(Framing::Chunked)
    );
    assert_eq!(
        request_with("Transfer-Encoding:chunked\r\n").map(|head| head.framing()),
        Ok(Framing::Chunked)
    );
}

#[test]
fn a_length_is_one_number_of_up_to_eighteen_digits() {
    refuses(&[
        (
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            400,
            "content_length_twice",
        ),
        (
            "Content-Length: 5\r\nContent-Length: 5\r\n",
            400,
            "content_length_twice",
        ),
        ("Content-Length: 5, 5\r\n", 400, "content_length"),
        ("Content-Length: +5\r\n", 400, "content_length"),
        ("Content-Length: -5\r\n", 400, "content_length"),
        ("Content-Length:\r\n", 400, "content_length"),
        ("Content-Length: \r\n", 400, "content_length"),
        ("Content-Length: 0x5\r\n", 400, "content_length"),
        ("Content-Length: 5 \r\n", 400, "content_length"),
        ("Content-Length:  5\r\n", 400, "content_length"),
        ("Content-Length: 5 5\r\n", 400, "content_length"),
        ("Content-Length: 1e3\r\n", 400, "content_length"),
        ("Content-Length: \u{0665}\r\n", 400, "content_length"),
        (
            "Content-Length: 1234567890123456789\r\n",
            400,
            "content_length",
        ),
        (
            "Content-Length: 0000000000000000005\r\n",
            400,
            "content_length",
        ),
    ]);
    let framing = |lines| request_with(lines).map(|head| head.framing());
    assert_eq!(
        framing("Content-Length: 999999999999999999\r\n"),
        Ok(Framing::Length(999_999_999_999_999_999))
    );
    assert_eq!(framing("Content-Length: 0\r\n"), Ok(Framing::Length(0)));
    assert_eq!(framing(""), Ok(Framing::None));
}

#[test]
fn lines_and_fields_are_read_to_the_letter() {
    refuses(&[
        ("X: 1\n", 400, "bare_lf"),
        ("X: 1\r\n\n", 400, "bare_lf"),
        ("X: 1\rY: 2\r\n", 400, "field_value"),
        ("X: 1\r\r\n", 400, "field_value"),
        ("X: \0\r\n", 400, "field_value"),
        ("X: \u{7f}\r\n", 400, "field_value"),
        ("X: 1\r\n folded\r\n", 400, "field_name"),
        ("X: 1\r\n\tfolded\r\n", 400, "field_name"),
        (" X: 1\r\n", 400, "field_name"),
        ("X : 1\r\n", 400, "field_name"),
        ("X\t: 1\r\n", 400, "field_name"),
        (": 1\r\n", 400, "field_name"),
        ("X\r\n", 400, "field_name"),
        ("X(: 1\r\n", 400, "field_name"),
        ("X\u{e9}: 1\r\n", 400, "field_name"),
        ("X\0: 1\r\n", 400, "field_name"),
    ]);
    refuses_whole(&[
        ("GET / HTTP/1.1\nHost: a\n\n", 400, "bare_lf"),
        ("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bare_lf"),
        (
            "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "empty_line",
        ),
        ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400, "field_name"),
    ]);
    let head = request_with("X-Ok:\t a\tb \u{e9}  \r\nX-Empty:\r\n").expect("a good head");
    assert_eq!(
        list(head.fields()),
        [
            ("x-ok".into(), "a\tb \u{e9}".into()),
            ("x-empty".into(), String::new())
        ]
    );
    assert!(
        request("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n").is_ok(),
        "one CRLF too many after a body is an old habit"
    );
}

#[test]
fn a_body_that_its_method_gives_no_meaning_is_not_surely_read() {
    let framings = [
        ("", true),
        ("Content-Length: 0\r\n", true),
        ("Content-Length: 5\r\n", false),
        ("Transfer-Encoding: chunked\r\n", false),
    ];
    for (framing, surely) in framings {
        for method in [
            "GET", "HEAD", "DELETE", "OPTIONS", "POST", "PUT", "PATCH", "SEARCH",
        ] {
            let whole = format!("{method} / HTTP/1.1\r\nHost: a\r\n{framing}\r\n");
            let is_defined = matches!(method, "POST" | "PUT" | "PATCH" | "SEARCH");
            let ends = request(&whole).map(|head| head.ends_surely());
            assert_eq!(ends, Ok(surely || is_defined), "{whole:?}");
        }
    }
}

#[test]
fn what_has_one_value_is_there_once() {
    let origin = "HTTP/1.1 200 OK\r\nContent-Type: a\r\nContent-Type: b\r\n\r\n";
    assert_eq!(response(origin).map(|head| head.fields().len()), Ok(2));
    for name in [
        "Authorization",
        "Content-Type",
        "Range",
        "If-Range",
        "If-Modified-Since",
        "If-Unmodified-Since",
    ] {
        refuses(&[(
            &format!("{name}: a\r\nX: b\r\n{}: a\r\n", name.to_lowercase()),
            400,
            "field_twice",
        )]);
    }
    let each = "Authorization: a\r\nContent-Type: a\r\nRange: a\r\nIf-Range: a\r\nIf-Match: a\r\nIf-Match: b\r\n";
    assert_eq!(request_with(each).map(|head| head.fields().len()), Ok(6));
}

#[test]
fn a_host_is_there_once_and_an_authority_and_an_absolute_target_wins_over_it() {
    refuses_whole(&[
        ("GET / HTTP/1.1\r\n\r\n", 400, "host_missing"),
        (
            "GET http://a.example/ HTTP/1.1\r\n\r\n",
            400,
            "host_missing",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            400,
            "host_twice",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n",
            400,
            "host_twice",
        ),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400, "host"),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "host"),
        ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "host"),
        ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400, "host"),
        ("GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", 400, "host"),
        ("GET / HTTP/1.1\r\nHost: a:99999\r\n\r\n", 400, "host"),
        (
            "GET http://user@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "host",
        ),
        ("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", 400, "host"),
        ("GET http://a/ HTTP/1.1\r\nHost: b c\r\n\r\n", 400, "host"),
        ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "target"),
        (
            "GET a.example:80 HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "target",
        ),
    ]);
    let head = request("GET HTTP://B.example:8080/x?y HTTP/1.1\r\nHost: a.example\r\n\r\n")
        .expect("absolute form");
    assert_eq!(
        (head.host(), head.port(), head.path(), head.query()),
        ("b.example", Some(8080), "/x", Some("y"))
    );
    assert!(forwarded(&head).starts_with("GET /x?y HTTP/1.1\r\nhost: b.example:8080\r\n"));
    assert!(!forwarded(&head).contains("a.example"));
    let bare = request("GET https://b?q HTTP/1.1\r\nHost: b\r\n\r\n")
        .expect("absolute form without a path");
    assert_eq!((bare.path(), bare.query()), ("/", Some("q")));
    let old = request("GET / HTTP/1.0\r\n\r\n").expect("HTTP/1.0 needs no host");
    assert_eq!((old.host(), old.keep_alive()), ("", false));
    assert!(forwarded(&old).contains("\r\nhost: 192.0.2.9:80\r\n"));
}

#[test]
fn a_target_is_visible_ascii_without_a_fragment() {
    for byte in (0..=0x20).chain([b'#']).chain(0x7f..=0xff) {
        for at in ["/a*b", "/a?b*c", "http://a/*", "http://a?*"] {
            let (before, behind) = at.split_once('*').expect("a place");
            let whole = [
                b"GET ",
                before.as_bytes(),
                &[byte],
                behind.as_bytes(),
                b" HTTP/1.1\r\nHost: a\r\n\r\n",
            ]
            .concat();
            assert_eq!(
                request(&whole)
                    .map(|head| summary(&head))
                    .map_err(|reject| reject.status),
                Err(400),
                "{:?}",
                text(&whole)
            );
        }
    }
    refuses_whole(&[
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "start_line"),
        ("GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400, "start_line"),
        ("GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "start_line"),
        ("G@T / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "start_line"),
        (" / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "start_line"),
        ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400, "target"),
        (
            "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
            405,
            "method",
        ),
        ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405, "method"),
    ]);
    let server = request("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").expect("asterisk form");
    let absolute =
        request("OPTIONS http://a HTTP/1.1\r\nHost: b\r\n\r\n").expect("the same through a proxy");
    assert_eq!(
        (server.path(), absolute.path(), absolute.host()),
        ("*", "*", "a")
    );
    let odd = request("GET /%e9'()[]?a=%zz&b={|}?/../ HTTP/1.1\r\nHost: a\r\n\r\n")
        .expect("a query is the origin's to read");
    assert_eq!(
        (odd.path(), odd.query()),
        ("/%E9'()[]", Some("a=%zz&b={|}?/../"))
    );
}

#[test]
fn versions_are_told_apart() {
    refuses_whole(&[
        ("GET /\r\n", 400, "version"),
        ("GET / \r\n", 400, "version"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "h2_preface"),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, "version"),
        ("GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505, "version"),
        ("GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400, "version"),
        ("GET / HTTP/1\r\nHost: a\r\n\r\n", 400, "version"),
        ("GET / http/1.1\r\nHost: a\r\n\r\n", 400, "version"),
        ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400, "version"),
        ("GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", 400, "version"),
        (
            "GET /x\u{20}y HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "start_line",
        ),
        ("\u{16}\u{3}\u{1}\u{2}", 400, "start_line"),
    ]);
    let head = request("GET / HTTP/1.2\r\nHost: a\r\n\r\n").expect("a later minor version");
    assert!(head.keep_alive() && !head.is_http10());
    assert!(forwarded(&head).starts_with("GET / HTTP/1.1\r\n"));
}

#[test]
fn an_underscore_in_a_name_follows_the_setting() {
    let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nX_User: root\r\nContent_Length: 5\r\n\r\n";
    let with = |underscore_fields| {
        request_within(
            bytes,
            &Limits {
                underscore_fields,
                ..Limits::default()
            },
        )
    };
    assert_eq!(
        with(UnderscoreFields::Drop).map(|head| list(head.fields())),
        Ok(vec![])
    );
    let kept = with(UnderscoreFields::Keep).map(|head| (head.fields().len(), head.framing()));
    assert_eq!(kept, Ok((2, Framing::None)));
    assert_eq!(
        with(UnderscoreFields::Refuse).map(|head| list(head.fields())),
        Err(Reject::bad("underscore_field"))
    );
}

#[test]
fn limits_hold_to_the_byte_and_are_known_before_the_end() {
    let limits = Limits {
        head_bytes_max: 400,
        field_bytes_max: 100,
        fields_max: 4,
        target_bytes_max: 50,
        ..Limits::default()
    };
    let whole = |target: usize, field: usize, fields: usize| {
        let mut whole = format!("GET /{} HTTP/1.1\r\nHost: a\r\n", "t".repeat(target - 1));
        whole.push_str(&format!("X: {}\r\n", "v".repeat(field - 3)));
        whole.push_str(&"Y: 1\r\n".repeat(fields - 2));
        whole + "\r\n"
    };
    let outcome = |bytes: &str| {
        request_within(bytes.as_bytes(), &limits)
            .map(|_| ())
            .map_err(|reject| (reject.status, reject.reason))
    };
    assert_eq!(outcome(&whole(50, 100, 4)), Ok(()));
    assert_eq!(outcome(&whole(51, 100, 4)), Err((414, "target_too_long")));
    assert_eq!(outcome(&whole(50, 101, 4)), Err((431, "field_too_long")));
    assert_eq!(outcome(&whole(50, 100, 5)), Err((431, "fields_too_many")));
    let exact = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}",
        format!("X: {}\r\n", "v".repeat(95)).repeat(3)
    );
    let exact = format!("{exact}Y: {}\r\n\r\n", "v".repeat(400 - exact.len() - 7));
    let wide = Limits {
        fields_max: 9,
        ..limits
    };
    assert_eq!(exact.len(), 400);
    assert!(request_within(exact.as_bytes(), &wide).is_ok());
    let narrow = Limits {
        head_bytes_max: 399,
        ..wide
    };
    assert_eq!(
        request_within(exact.as_bytes(), &narrow).map(|_| ()),
        Err(Reject::with(431, "head_too_long"))
    );

    // Nothing has to be whole to be too long.
    for (unfinished, reject) in [
        (
            format!("GET /{}", "t".repeat((8 << 10) + 64)),
            Reject::with(414, "target_too_long"),
        ),
        (
            format!("GET / HTTP/1.1\r\nX: {}", "v".repeat(16 << 10)),
            Reject::with(431, "field_too_long"),
        ),
        (
            format!(
                "GET / HTTP/1.1\r\n{}",
                format!("X: {}\r\n", "v".repeat(1000)).repeat(40)
            ),
            Reject::with(431, "head_too_long"),
        ),
        (
            format!("GET / HTTP/1.1\r\n{}", "X: 1\r\n".repeat(101)),
            Reject::with(431, "fields_too_many"),
        ),
    ] {
        assert_eq!(request(&unfinished).map(|_| ()), Err(reject));
    }
    let many = "X: 1\r\n".repeat(99);
    assert_eq!(request_with(&many).map(|head| head.fields().len()), Ok(99));
}

#[test]
fn a_client_removes_its_own_fields_by_connection_but_none_that_we_set() {
    let lines = "Connection: X-Mine, x-forwarded-for, X-Forwarded-Proto, Host, Content-Length\r\nX-Mine: 1\r\nX-Forwarded-For: 6.6.6.6\r\n\
                 X-Forwarded-Prefix: /evil\r\nForwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nX-Other: 2\r\nContent-Length: 3\r\n";
    let mut head = request_with(lines).expect("a good head");
    assert_eq!(list(head.fields()), [("x-other".into(), "2".into())]);
    head.set("x-mine", "ours");
    assert_eq!(
        forwarded(&head),
        "GET / HTTP/1.1\r\nhost: a.example\r\nx-other: 2\r\nx-mine: ours\r\ncontent-length: 3\r\nx-forwarded-for: 192.0.2.1\r\n\
         x-forwarded-proto: https\r\nx-forwarded-port: 443\r\nx-forwarded-host: a.example\r\n\r\n"
    );
    let hops = "Connection: close, TE\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\nTE: trailers\r\nTrailer: x\r\nProxy-Authorization: x\r\nUpgrade: h2c\r\n\
                HTTP2-Settings: x\r\n";
    let head = request_with(hops).expect("a good head");
    assert!(head.fields().is_empty() && !head.keep_alive() && head.wants_upgrade());
    refuses(&[
        ("Connection: a b\r\n", 400, "connection_option"),
        ("Connection: \"close\"\r\n", 400, "connection_option"),
        (
            &format!("Connection: {}x\r\n", "x,".repeat(32)),
            400,
            "connection_option",
        ),
    ]);
    let keep_alive = |version: &str, lines: &str| {
        request(format!("GET / HTTP/1.{version}\r\nHost: a\r\n{lines}\r\n"))
            .map(|head| head.keep_alive())
    };
    assert_eq!(keep_alive("1", ""), Ok(true));
    assert_eq!(
        keep_alive("1", "Connection: keep-alive, CLOSE\r\n"),
        Ok(false)
    );
    assert_eq!(keep_alive("0", ""), Ok(false));
    assert_eq!(keep_alive("0", "Connection: Keep-Alive\r\n"), Ok(true));
}

#[test]
fn a_path_is_matched_and_forwarded_in_one_form() {
    let head =
        request("GET /a/./b//%2E%2e/%63?x=/../ HTTP/1.1\r\nHost: a\r\n\r\n").expect("a good head");
    assert_eq!((head.path(), head.query()), ("/a/c", Some("x=/../")));
    assert!(forwarded(&head).starts_with("GET /a/c?x=/../ HTTP/1.1\r\n"));
    refuses_whole(&[
        (
            "GET /a/../../b HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "path_above_root",
        ),
        (
            "GET http://a/../b HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "path_above_root",
        ),
        (
            "GET /a%2f..%2fb HTTP/1.1\r\nHost: a\r\n\r\n",
            400,
            "encoded_slash",
        ),
        ("GET /a%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "encoded_nul"),
        ("GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n", 400, "backslash"),
    ]);
}

#[test]
fn an_upgrade_is_asked_of_nobody_and_its_early_bytes_are_no_part_of_the_head() {
    let bytes = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n\u{1}early";
    let mut head = RequestHead::default();
    assert_eq!(
        head.parse(bytes.as_bytes(), &Limits::default()),
        Ok(Parse::Complete(bytes.len() - 6))
    );
    assert!(head.wants_upgrade() && head.framing() == Framing::None);
    let forwarded = forwarded(&head).to_lowercase();
    assert!(
        !forwarded.contains("\r\nupgrade") && !forwarded.contains("connection"),
        "{forwarded}"
    );
    let switched = response(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    );
    assert_eq!(
        switched.map(|_| ()),
        Err(Reject::with(502, "unasked_upgrade"))
    );
}

#[test]
fn an_expectation_is_answered_by_us_and_not_forwarded() {
    let head = request_with("Expect: 100-Continue\r\nContent-Length: 5\r\n").expect("a good head");
    assert!(head.expects_continue() && !forwarded(&head).contains("xpect"));
    refuses(&[("Expect: 200-ok\r\n", 417, "expect")]);
    let old = request("POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        .expect("a good head");
    assert!(!old.expects_continue(), "HTTP/1.0 knows no interim answers");
}

#[test]
fn an_origin_is_read_no_less_strictly() {
    for (whole, reason) in [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            "length_and_coding",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "transfer_coding_unknown",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "transfer_encoding_twice",
        ),
        (
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "coding_on_http10",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            "content_length_twice",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
            "content_length",
        ),
        ("HTTP/1.1 200 OK\nContent-Length: 5\n\n", "bare_lf"),
        ("HTTP/1.1 200 OK\r\nX: 1\r\n folded\r\n\r\n", "field_name"),
        ("HTTP/1.1 200 OK\r\nX : 1\r\n\r\n", "field_name"),
        ("HTTP/1.1 200 OK\r\nX: \0\r\n\r\n", "field_value"),
        ("HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n", "field_value"),
        ("\r\nHTTP/1.1 200 OK\r\n\r\n", "empty_line"),
        ("HTTP/1.1 200 O\0K\r\n\r\n", "status_line"),
        ("HTTP/1.1 20 OK\r\n\r\n", "status_line"),
        ("HTTP/1.1 2000 OK\r\n\r\n", "status_line"),
        ("HTTP/1.1 +20 OK\r\n\r\n", "status_line"),
        ("HTTP/1.1  200 OK\r\n\r\n", "status_line"),
        ("HTTP/1.1 099 OK\r\n\r\n", "status_line"),
        ("HTTP/1.1 600 OK\r\n\r\n", "status_line"),
        ("HTTP/1.1\r\n\r\n", "status_line"),
        ("HTTP/2.0 200 OK\r\n\r\n", "version"),
        ("ICY 200 OK\r\n\r\n", "version"),
        (
            "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
            "body_forbidden",
        ),
        (
            "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
            "body_forbidden",
        ),
        (
            "HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n",
            "body_forbidden",
        ),
    ] {
        let reject = response(whole)
            .map(|head| list(head.fields()))
            .expect_err(whole);
        assert_eq!((reject.status, reject.reason), (502, reason), "{whole:?}");
    }
    let long = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: 1\r\n".repeat(101));
    assert_eq!(
        response(long).map(|_| ()),
        Err(Reject::with(502, "fields_too_many"))
    );
}
