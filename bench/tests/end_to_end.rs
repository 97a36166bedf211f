//! The bench from its command line to its report: its shape, and whether it sees a proxy that was slowed down on purpose.

use std::process::{Command, Output};

use serde_json::Value;

/// Runs the bench with words that a line holds.
fn bench(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(line.split_ascii_whitespace())
        .output()
        .unwrap()
}

/// The one object that the bench printed, and nothing else.
fn report(line: &str) -> Value {
    let done = bench(line);
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    match serde_json::from_slice(&done.stdout) {
        Ok(report) => report,
        Err(error) => panic!("{error}: {}\n{said}", String::from_utf8_lossy(&done.stdout)),
    }
}

/// Whether the bench can run here; says aloud why not.
fn can_run(test: &str, peer: &str) -> bool {
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let installed = ["/usr/sbin", "/usr/bin"]
        .iter()
        .any(|folder| std::path::Path::new(folder).join(peer).exists());
    if !root || !installed {
        eprintln!("test {test} ... ignored, it needs root and {peer}");
    }
    root && installed
}

fn median(report: &Value, proxy: &str, metric: &str) -> Option<f64> {
    rows(report)
        .iter()
        .find(|row| row["proxy"] == proxy && row["metric"] == metric)
        .and_then(|row| row["median"].as_f64())
}

fn rows(report: &Value) -> &[Value] {
    report["rows"].as_array().map(Vec::as_slice).unwrap_or(&[])
}

#[test]
fn a_proxy_that_burns_processor_time_shows_as_slower_in_a_report_of_the_agreed_shape() {
    if !can_run("a_proxy_that_burns_processor_time", "haproxy") {
        return;
    }
    let report = report(
        "http1-small --case 64-at --rate 4000 --seconds 0.5 --rounds 2 --noisy --json --peers haproxy,haproxy/slowed",
    );

    assert_eq!(report["scenario"], "http1-small");
    let keys: Vec<&String> = report.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["machine", "rows", "scenario"]);
    let metrics = ["cpu_us_per_request", "requests_per_s", "p50_us", "p99_us"];
    assert_eq!(rows(&report).len(), 2 * metrics.len());
    for row in rows(&report) {
        let keys: Vec<&String> = row.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            [
                "case",
                "discarded",
                "max",
                "median",
                "metric",
                "min",
                "proxy",
                "rounds",
                "unit"
            ]
        );
        assert_eq!(row["case"], "64-at-4000");
        assert_eq!(row["rounds"], 2, "{row}");
        let numbers = ["min", "median", "max"].map(|name| row[name].as_f64().unwrap());
        assert!(numbers[0] > 0.0 && numbers.is_sorted(), "{row}");
    }
    for metric in metrics {
        assert!(median(&report, "haproxy", metric).is_some(), "{metric}");
    }

    let cost = |proxy| median(&report, proxy, "cpu_us_per_request").unwrap();
    let ratio = cost("haproxy/slowed") / cost("haproxy");
    // Burning 65 us on top of about 33, which is what HAProxy needs at this rate, makes three; a busy machine may make two of it, never one.
    assert!(
        ratio > 1.7,
        "slowed down threefold, it looks {ratio} times as dear"
    );
}

#[test]
fn a_peer_that_is_missing_has_rows_without_numbers() {
    if !can_run("a_peer_that_is_missing", "nginx") {
        return;
    }
    let done = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args("http1-small --case 64-at --rate 1000 --seconds 0.2 --rounds 1 --noisy --json --peers sluice,nginx".split(' '))
        .env("SLUICE_BIN", "/nonexistent")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(median(&report, "sluice", "cpu_us_per_request"), None);
    assert!(median(&report, "nginx", "cpu_us_per_request").is_some());
    let version = report["machine"]["peers"]["sluice"].as_str().unwrap();
    assert!(version.starts_with("missing: "), "{version}");
    let row = &rows(&report)[0];
    assert_eq!(
        (&row["proxy"], &row["rounds"]),
        (&"sluice".into(), &0.into())
    );
}

#[test]
fn a_scenario_that_is_not_there_yet_says_so_and_has_no_rows() {
    if !can_run("a_scenario_that_is_not_there_yet", "nginx") {
        return;
    }
    let done = bench("grpc --json --peers nginx");
    assert!(done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("not yet"));
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(rows(&report).is_empty());
}

#[test]
fn a_wrong_name_is_refused_with_the_right_ones() {
    for (line, known) in [
        ("http1-smal", "http1-small"),
        ("http1-small --peers squid", "haproxy"),
    ] {
        let done = bench(line);
        assert!(!done.status.success(), "{line}");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(said.contains(known), "{said}");
    }
}
