//! Lines as others read them, and what becomes of those for which there is no room.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::line::Clock;
use super::*;
use crate::message::Limits;

fn request(text: &str) -> RequestHead {
    let mut head = RequestHead::default();
    assert!(head.parse(text.as_bytes(), &Limits::default()).is_ok());
    head
}

fn entry(request: &RequestHead) -> Entry<'_> {
    Entry {
        listener: "web",
        route: "",
        upstream: "app",
        endpoint: Some(([192, 0, 2, 9], 80).into()),
        client: None,
        peer: "192.0.2.1",
        scheme: "http",
        tls: "",
        request,
        response: None,
        status: 200,
        reason: "",
        received_bytes: 0,
        sent_bytes: u64::MAX,
        retries: 0,
        is_reused: None,
        durations_us: [None; Span::COUNT],
    }
}

fn line(fields: &[LogField], entry: &Entry<'_>) -> String {
    let mut out = Vec::new();
    line::push(&mut out, fields, entry, &Clock::default());
    String::from_utf8(out).expect("text")
}

#[test]
fn a_line_is_one_object_and_what_has_no_value_is_left_out() {
    let request = request("GET /a?token=canary HTTP/1.1\r\nHost: A.example:8080\r\n\r\n");
    let mut entry = entry(&request);
    entry.durations_us[Span::Total as usize] = Some(17);
    let fields: Vec<LogField> = LogField::PLAIN
        .iter()
        .filter(|field| !matches!(field, LogField::Time | LogField::Query))
        .cloned()
        .collect();
    assert_eq!(
        line(&fields, &entry),
        "{\"listener\":\"web\",\"upstream\":\"app\",\"endpoint\":\"192.0.2.9:80\",\"client\":\"192.0.2.1\",\"peer\":\"192.0.2.1\",\
         \"method\":\"GET\",\"scheme\":\"http\",\"host\":\"a.example\",\"path\":\"/a\",\"protocol\":\"HTTP/1.1\",\"status\":200,\
         \"received_bytes\":0,\"sent_bytes\":18446744073709551615,\"retries\":0,\"total_us\":17}\n"
    );
    entry.client = Some([198, 51, 100, 7].into());
    assert_eq!(
        line(&[LogField::Client, LogField::Peer], &entry),
        "{\"client\":\"198.51.100.7\",\"peer\":\"192.0.2.1\"}\n"
    );
    assert_eq!(line(&[LogField::Reason], &entry), "{}\n");
    assert_eq!(
        line(&[LogField::Reason, LogField::Query], &entry),
        "{\"query\":\"token=canary\"}\n"
    );
}

#[test]
fn whatever_a_request_says_a_line_stays_one_line_of_json() {
    let named = |name: &str| LogField::Request(name.to_owned());
    for byte in (1..=255_u8).filter(|byte| !matches!(byte, b'\r' | b'\n' | 0x7f) && *byte >= b' ') {
        let mut text = b"GET / HTTP/1.1\r\nHost: a\r\nX-A: a".to_vec();
        text.extend_from_slice(&[byte, b'b', b'\r', b'\n', b'\r', b'\n']);
        let mut head = RequestHead::default();
        assert!(head.parse(&text, &Limits::default()).is_ok(), "{byte}");
        let line = line(&[named("x-a")], &entry(&head));
        assert!(
            line.bytes()
                .all(|b| b == b'\n' || (b' '..=b'~').contains(&b)),
            "{line}"
        );
        let read: Value = serde_json::from_str(&line).expect(&line);
        assert_eq!(read["request.x-a"], format!("a{}b", char::from(byte)));
    }
    let long = request(&format!(
        "GET /{} HTTP/1.1\r\nHost: a\r\n\r\n",
        "x".repeat(5000)
    ));
    let read: Value = serde_json::from_str(&line(&[LogField::Path], &entry(&long))).expect("JSON");
    let path = read["path"].as_str().expect("text");
    assert!(path.len() == (2 << 10) + 3 && path.ends_with("x..."));
}

#[test]
fn time_is_written_as_rfc_3339_has_it() {
    let clock = Clock::default();
    for (ms, text) in [
        (0, "1970-01-01T00:00:00.000Z"),
        (951_782_399_999, "2000-02-28T23:59:59.999Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
        (951_868_800_007, "2000-03-01T00:00:00.007Z"),
        (1_795_530_929_042, "2026-11-24T14:35:29.042Z"),
        (1_795_530_929_043, "2026-11-24T14:35:29.043Z"),
        (4_107_542_399_000, "2100-02-28T23:59:59.000Z"),
        (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
    ] {
        let mut out = Vec::new();
        clock.push(&mut out, SystemTime::UNIX_EPOCH + Duration::from_millis(ms));
        assert_eq!(String::from_utf8(out).expect("text"), format!("\"{text}\""));
    }
}

#[test]
fn lines_for_which_there_is_no_room_are_counted_and_nobody_waits() -> io::Result<()> {
    let (queue, lines) = Queue::new()?;
    let metrics = Arc::new(metric::Worker::default());
    let log = queue.log(Arc::clone(&metrics));
    let request = request("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let add = || log.add(&[LogField::Status], &entry(&request), 30, 2);
    // Two lines fill a buffer, and two buffers may wait.
    for _ in 0..7 {
        add();
    }
    assert_eq!(metrics.log_dropped.value(), 2);
    let taken = lines.take();
    assert_eq!(
        taken.iter().map(|lines| lines.count).collect::<Vec<_>>(),
        [2, 2]
    );
    assert_eq!(taken[0].bytes, b"{\"status\":200}\n{\"status\":200}\n");
    add();
    assert_eq!(
        metrics.log_dropped.value(),
        4,
        "what was taken still waits to be written"
    );
    drop(taken);
    add();
    drop(log);
    let rest = lines.take();
    assert_eq!(
        rest.len(),
        1,
        "whatever was gathered is handed over at the end"
    );
    drop(lines);
    let log = queue.log(Arc::clone(&metrics));
    log.add(&[LogField::Status], &entry(&request), 1, 2);
    assert_eq!(metrics.log_dropped.value(), 5, "nobody listens any more");
    Ok(())
}

#[test]
fn behind_a_file_that_takes_nothing_buffers_are_filled_before_they_wait() -> io::Result<()> {
    let (queue, lines) = Queue::new()?;
    let metrics = Arc::new(metric::Worker::default());
    let log = queue.log(Arc::clone(&metrics));
    let request = request("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    for _ in 0..10 {
        log.add(&[LogField::Status], &entry(&request), 1000, 4);
        log.flush_early(4);
    }
    let counts: Vec<u32> = lines.take().iter().map(|lines| lines.count).collect();
    assert_eq!((counts, metrics.log_dropped.value()), (vec![1, 1], 0));
    log.flush_early(4);
    assert_eq!(lines.take()[0].count, 8);
    Ok(())
}

/// What a line costs: `cargo test --release -p proxy-user --lib access_log -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_a_line_costs() -> io::Result<()> {
    let (queue, lines) = Queue::new()?;
    let log = queue.log(Arc::default());
    let mut request = request("GET /orders/17 HTTP/1.1\r\nHost: api.example.com\r\n\r\n");
    request.identify(false, || 0x0123_4567_89ab_cdef << 32);
    let mut entry = entry(&request);
    entry.route = "orders";
    entry.is_reused = Some(true);
    entry.durations_us = [Some(123); Span::COUNT];
    const COUNT: u32 = 1_000_000;
    let processor_time = || {
        let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
        time.map_or(Duration::ZERO, Duration::from)
    };
    let started = processor_time();
    for _ in 0..COUNT / 1000 {
        for _ in 0..1000 {
            log.add(LogField::DEFAULT, &entry, 64 << 10, 4096);
        }
        lines.take();
    }
    println!("{:?} a line", (processor_time() - started) / COUNT);
    Ok(())
}
