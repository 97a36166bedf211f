//! Tools that others wrote: slowhttptest, varnishtest, curl and Python's own client.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rig::field::WEB_V4;
use rig::harness::Skip;
use rig::http::{Curl, KeepAlive};
use rig::namespace::Namespace;
use rig::scripted::{BYSTANDER, Script, data_of, path_of};
use rig::{sandbox, wait};

use crate::{DIRECT, World, edge};

const SLOW_CONNECTIONS: &str = "150";
const SLOW_TIME_S: u64 = 8;
/// A request of the well-behaved client so often, as in `faults` of every kind.
const PACE: Duration = Duration::from_millis(20);
/// So many requests at least tell a hundredth of them.
const REQUESTS_MIN: usize = 100;
/// Who waits behind a slow one waits until that is ended, which is after a second (see `http.head_timeout` in the configuration).
const P99_MAX: Duration = Duration::from_millis(500);
/// A machine with much else to do is as busy before the attack, whose own load comes on top.
const P99_RATIO_MAX: u32 = 10;

/// Slow heads, slow bodies and slow readers at once, beside a client that behaves well and must not notice.
pub fn slow(world: &mut World) -> Result<()> {
    expect_program("slowhttptest")?;
    let large = Script {
        said: [
            b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n".to_vec(),
            vec![b'x'; 4_000_000],
        ]
        .concat(),
        ..Script::default()
    };
    world.origin.say("/large", large);
    let open_before = open_connections(world)?;
    let client = &world.field.client;
    let undisturbed = client.inside(|| behave(Duration::ZERO))?;
    let before = world.sluice.metrics()?;
    let time = SLOW_TIME_S.to_string();
    let attack = |arguments: &[&str]| {
        let url = format!("http://{WEB_V4}:{DIRECT}/large");
        let mut command = world.field.client.command("slowhttptest");
        command.args([
            "-c",
            SLOW_CONNECTIONS,
            "-r",
            "100",
            "-l",
            &time,
            "-p",
            "3",
            "-u",
            &url,
        ]);
        command.args(arguments);
        let folder = sandbox::folder("slow")?;
        command.current_dir(folder);
        rig::process::Process::start(&format!("slow{}", arguments[0]), command)
    };
    let mut attacks = [
        attack(&["-H", "-i", "1"])?,
        attack(&["-B", "-i", "1", "-s", "8192", "-x", "10"])?,
        attack(&["-X", "-w", "10", "-y", "20", "-n", "1", "-z", "5"])?,
    ];
    let disturbed = client.inside(|| behave(Duration::from_secs(SLOW_TIME_S)))?;
    for attack in &mut attacks {
        attack.wait(Duration::from_secs(SLOW_TIME_S + 10))?;
    }
    ensure!(
        disturbed < P99_MAX.max(undisturbed * P99_RATIO_MAX),
        "a well-behaved client waits {disturbed:?}, and {undisturbed:?} before"
    );
    let after = world.sluice.metrics()?;
    for reason in ["head_timeout", "body_timeout", "client_gone"] {
        let count = |metrics: &rig::sluice::Metrics| {
            metrics.labelled("sluice_http_rejected_total", "reason", reason)
        };
        ensure!(
            count(&after) > count(&before),
            "nobody was ended by {reason}"
        );
    }
    wait::until_true("the slow to be gone", Duration::from_secs(10), || {
        open_connections(world).is_ok_and(|open| open <= open_before)
    })
}

/// Client connections that are open.
fn open_connections(world: &World) -> Result<f64> {
    Ok(world
        .sluice
        .metrics()?
        .value("sluice_listener_connections_active"))
}

/// A client that sends a request every 20 ms, on connections new and old: the 99th percentile of what it waited. It puts up with no failure.
fn behave(time: Duration) -> Result<Duration> {
    let mut latencies = Vec::new();
    let mut connection = KeepAlive::connect(None, edge(DIRECT)?)?;
    let start = Instant::now();
    let mut next = start;
    while latencies.len() < REQUESTS_MIN || start.elapsed() < time {
        let asked = Instant::now();
        let number = latencies.len();
        if number % 5 == 0 {
            connection = KeepAlive::connect(None, edge(DIRECT)?)?;
        }
        let path = format!("{BYSTANDER}behaves/{number}");
        let response = connection.get("a.test", &path, "")?;
        ensure!(response.text() == path, "{response:?}");
        latencies.push(asked.elapsed());
        next += PACE;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    latencies.sort_unstable();
    Ok(latencies[latencies.len() * 99 / 100])
}

/// Each script of `tests/varnishtest`: orders of events between client and origin that barriers make sure of.
pub fn scripts(world: &mut World) -> Result<()> {
    expect_program("varnishtest")?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("varnishtest");
    let work = sandbox::folder("varnishtest")?;
    let mut count = 0;
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let script = entry?.path();
        let mut command = world.field.client.command("varnishtest");
        command.env("TMPDIR", &work).args(["-t", "20"]).arg(&script);
        let done = command.output().context("start varnishtest")?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let told = said
            .lines()
            .filter(|line| line.contains("----") || line.contains("EXPECT"));
        let told: Vec<&str> = told.collect();
        ensure!(
            done.status.success(),
            "{}:\n{}",
            script.display(),
            told.join("\n")
        );
        count += 1;
    }
    ensure!(count >= 5, "{count} scripts");
    Ok(())
}

/// What users do with curl, and what the origin must hear of it.
pub fn curl(world: &mut World) -> Result<()> {
    let curl = Curl::new(&world.field.client, WEB_V4);
    let folder = sandbox::folder("curl")?;
    let (file, sent) = (folder.join("body"), pattern(2_000_000));
    fs::write(&file, &sent)?;
    let body = format!("@{}", file.display());
    let upload = file.display().to_string();
    let cases: &[(&str, &[&str], &str, &[u8])] = &[
        ("/get", &[], "GET /get ", b""),
        ("/head", &["--head"], "HEAD /head ", b""),
        ("/form", &["--data", "a=b&c=d"], "POST /form ", b"a=b&c=d"),
        (
            "/expect",
            &["--data-binary", &body, "--header", "Expect: 100-continue"],
            "POST /expect ",
            &sent,
        ),
        (
            "/no-expect",
            &["--data-binary", &body, "--header", "Expect:"],
            "POST /no-expect ",
            &sent,
        ),
        (
            "/chunked",
            &[
                "--data-binary",
                &body,
                "--header",
                "Transfer-Encoding: chunked",
            ],
            "POST /chunked ",
            &sent,
        ),
        (
            "/upload",
            &["--upload-file", &upload],
            "PUT /upload ",
            &sent,
        ),
        (
            "/get-with-body",
            &["--request", "GET", "--data", "x"],
            "GET /get-with-body ",
            b"x",
        ),
        ("/empty", &["--request", "POST"], "POST /empty ", b""),
        ("/old", &["--http1.0"], "GET /old ", b""),
        ("/a/../b/%7e", &["--path-as-is"], "GET /b/~ ", b""),
        ("/q?a=b&c=%2F", &[], "GET /q?a=b&c=%2F ", b""),
        (
            "/server",
            &["--request", "OPTIONS", "--request-target", "*"],
            "OPTIONS * ",
            b"",
        ),
        (
            "/absolute",
            &["--request-target", "http://b.test/absolute"],
            "GET /absolute ",
            b"",
        ),
    ];
    for (path, arguments, start, data) in cases {
        world.origin.take_heard();
        let response = curl.fetch(&format!("http://a.test:{DIRECT}{path}"), arguments)?;
        ensure!(response.status == 200, "{path}: {response:?}");
        let heard = world.origin.take_heard();
        let [heard] = heard.as_slice() else {
            bail!("{path} was heard {} times", heard.len());
        };
        let head = String::from_utf8_lossy(&heard.head);
        ensure!(head.starts_with(start), "{path} was heard as {head}");
        ensure!(
            data_of(&heard.head, &heard.body) == *data,
            "{path}: another body"
        );
    }
    Ok(())
}

/// A hundred exchanges of Python's own client.
pub fn python(world: &mut World) -> Result<()> {
    expect_program("python3")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/http_client.py");
    world.origin.take_heard();
    let said = run(&world.field.client, &script, &[WEB_V4, &DIRECT.to_string()])?;
    ensure!(said.trim() == "101", "{said}");
    let mut heard = world.origin.take_heard();
    heard.retain(|heard| path_of(&heard.head).starts_with("/python/"));
    ensure!(heard.len() == 101, "{} were heard", heard.len());
    for (heard, number) in heard.iter().zip(1..) {
        let sent = number < 101 && matches!(number % 4, 0 | 1);
        let count = if sent { number } else { 0 };
        let expected = number.to_string().repeat(count);
        let data = data_of(&heard.head, &heard.body);
        ensure!(data == expected.as_bytes(), "body {number} is another");
    }
    Ok(())
}

fn run(namespace: &Namespace, script: &Path, arguments: &[&str]) -> Result<String> {
    let script = script.display().to_string();
    namespace.run(&[&["python3", &script], arguments].concat())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// Skips the test, aloud, where a tool is not installed: `cargo xtask setup` does that.
pub fn expect_program(name: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Where Debian has servers; not everybody's PATH has it.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    let is_there = folders
        .into_iter()
        .any(|folder| folder.join(name).is_file());
    if is_there {
        return Ok(());
    }
    Err(Skip(format!("{name} is not installed")).into())
}
