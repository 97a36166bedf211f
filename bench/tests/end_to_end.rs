//! The bench from its command line to its report: its shape, and whether it sees a proxy that was slowed down on purpose.

use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// Where no Sluice is.
const NOWHERE: &str = "/nonexistent";

/// Two benches at once would measure each other.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs the bench with words that a line holds, where Sluice is built or, for its absence, is not.
fn bench(line: &str, sluice: &str) -> Output {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let done = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(line.split_ascii_whitespace())
        .env("SLUICE_BIN", sluice)
        .output();
    match done {
        Ok(done) => done,
        Err(error) => panic!("start the bench: {error}"),
    }
}

/// The one object that a bench printed, and nothing else.
fn report(done: &Output) -> Value {
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    match serde_json::from_slice(&done.stdout) {
        Ok(report) => report,
        Err(error) => panic!("{error}: {}\n{said}", String::from_utf8_lossy(&done.stdout)),
    }
}

/// Whether the bench can run here; says aloud why not.
fn can_run(test: &str, peer: &str) -> bool {
    // Only root may read this, and only root may make the namespaces that the bench makes.
    let root = std::fs::read_dir("/proc/1/fd").is_ok();
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
    let report = report(&bench(
        "http1-small --case 64-at --rate 4000 --seconds 0.5 --rounds 2 --noisy --json --peers haproxy,haproxy/slowed",
        NOWHERE,
    ));

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
    let report = report(&bench(
        "http1-small --case 64-at --rate 1000 --seconds 0.2 --rounds 1 --noisy --json --peers sluice,nginx",
        NOWHERE,
    ));
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
    let done = bench("grpc --json --peers nginx", NOWHERE);
    assert!(String::from_utf8_lossy(&done.stderr).contains("not yet"));
    assert!(rows(&report(&done)).is_empty());
}

#[test]
fn a_wrong_name_is_refused_with_the_right_ones() {
    for (line, known) in [
        ("http1-smal", "http1-small"),
        ("http1-small --peers squid", "haproxy"),
    ] {
        let done = bench(line, NOWHERE);
        assert!(!done.status.success(), "{line}");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(said.contains(known), "{said}");
    }
}
