//! Layer 7 through whole proxies: routes, policies, bans, reloads, restarts, and messages that must not get through.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::client::syn_is_ignored;
use rig::field::{ATTACKER_V4, WEB_V4, WEB_V6};
use rig::http::{KeepAlive, send_raw};
use rig::load::Load;
use rig::world::{World, socket};
use rig::{client, harness, process, tests, wait};

const PORT: u16 = 8080;

const CONFIGURATION: &str = r#"
[datapath]
interfaces = ["client0"]
mode       = "native"

[[listener]]
name    = "plain"
address = ["203.0.113.10:8080", "[2001:db8::10]:8080"]

[[listener]]
name    = "secure"
address = ["203.0.113.10:443", "[2001:db8::10]:443"]
serve   = "https"
tls     = { certificates = "certs" }

[[route]]
name     = "limited"
match    = { host = "api.test", path = "/limited" }
policies = "fair-use"
upstream = "web"

[[route]]
name     = "web"
match    = { path = "/*" }
upstream = "web"

[[policy]]
name       = "fair-use"
rate_limit = { key = "address", rate = "1/s", burst = 3, ban = { after = 5, for = "4s" } }

[[upstream]]
name      = "web"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080"]

[tunables]
"http.head_timeout" = "1s"
"#;

fn main() -> ExitCode {
    harness::main(
        || World::build(CONFIGURATION),
        World::last_words,
        tests![
            both_families_and_tls_are_served_and_a_wrong_name_is_refused,
            ambiguous_messages_are_refused_and_never_forwarded,
            a_slow_head_ends_at_its_deadline,
            a_large_response_arrives_whole,
            a_source_that_goes_on_is_banned_in_the_kernel_and_free_again_afterwards,
            a_reload_under_load_loses_no_request,
            an_invalid_reload_keeps_the_old_configuration,
            a_daemon_killed_under_load_is_back_with_the_same_sockets,
        ],
    )
}

fn both_families_and_tls_are_served_and_a_wrong_name_is_refused(world: &mut World) -> Result<()> {
    for address in [WEB_V4, WEB_V6] {
        let clear = world
            .curl(address)
            .fetch(&format!("http://web.test:{PORT}/a"), &[])?;
        ensure!(clear.status == 200 && clear.origin().is_some(), "{clear:?}");
        let secure = world.curl(address).fetch("https://web.test/b", &[])?;
        ensure!(
            secure.status == 200 && secure.tls.as_deref() == Some("TLSv1.3"),
            "{secure:?}"
        );
        ensure!(
            world
                .curl(address)
                .fetch("https://other.test/", &[])
                .is_err(),
            "a name without a certificate was trusted"
        );
    }
    Ok(())
}

/// What RFC 9112 calls invalid or ambiguous, each with the statuses that may answer it.
const REFUSED: &[(&str, &[u16])] = &[
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        &[400, 501],
    ),
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    (
        "POST /bad HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &[400],
    ),
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        &[400],
    ),
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx",
        &[400],
    ),
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\nx",
        &[400],
    ),
    ("GET /bad HTTP/1.1\nHost: a\n\n", &[400]),
    ("GET /bad HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", &[400]),
    ("GET /bad HTTP/1.1\r\nHost : a\r\n\r\n", &[400]),
    ("GET /bad HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", &[400]),
    ("GET /bad HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", &[400]),
    ("GET /bad HTTP/1.1\r\n\r\n", &[400]),
    ("GET /bad#x HTTP/1.1\r\nHost: a\r\n\r\n", &[400]),
    ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[400, 505]),
    (
        "POST /bad HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        &[400],
    ),
];

fn ambiguous_messages_are_refused_and_never_forwarded(world: &mut World) -> Result<()> {
    let to = socket(WEB_V4, PORT)?;
    for (message, statuses) in REFUSED {
        // A second request behind it must not be answered either: whoever smuggles wants exactly that.
        let bytes = format!("{message}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n");
        let reaction = world
            .field
            .client
            .inside(|| send_raw(None, to, bytes.as_bytes(), client::PATIENCE))?;
        ensure!(reaction.closed, "left open after {message:?}: {reaction:?}");
        ensure!(
            statuses.contains(&reaction.status()) && reaction.responses() == 1,
            "{message:?} was answered by {:?}",
            String::from_utf8_lossy(&reaction.bytes)
        );
    }
    let seen: Vec<String> = world
        .origins
        .iter()
        .flat_map(|origin| origin.requests())
        .collect();
    ensure!(
        !seen
            .iter()
            .any(|line| line.contains("/smuggled") || line.contains(" 200 host=a")),
        "{seen:?}"
    );
    Ok(())
}

fn a_slow_head_ends_at_its_deadline(world: &mut World) -> Result<()> {
    let to = socket(WEB_V4, PORT)?;
    let reaction = world.field.client.inside(|| {
        send_raw(
            None,
            to,
            b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
            client::PATIENCE,
        )
    })?;
    ensure!(reaction.closed && reaction.status() == 408, "{reaction:?}");
    ensure!(
        reaction.after >= Duration::from_millis(900) && reaction.after < Duration::from_secs(3),
        "after {:?}",
        reaction.after
    );
    Ok(())
}

fn a_large_response_arrives_whole(world: &mut World) -> Result<()> {
    let direct = rig::http::Curl::new(&world.field.edge, "10.77.1.2")
        .fetch("http://any.test:8080/large", &[])?;
    for url in [
        "https://web.test/large".to_owned(),
        format!("http://web.test:{PORT}/large"),
    ] {
        let response = world.curl(WEB_V4).fetch(&url, &[])?;
        ensure!(
            response.body.len() == 8 << 20 && response.body == direct.body,
            "{url}: {} bytes",
            response.body.len()
        );
    }
    Ok(())
}

fn a_source_that_goes_on_is_banned_in_the_kernel_and_free_again_afterwards(
    world: &mut World,
) -> Result<()> {
    let (from, to): (IpAddr, _) = (ATTACKER_V4.parse()?, socket(WEB_V4, PORT)?);
    let others = Load::requests(&world.field.client, to, 2, "web.test", "/others")?;
    let mut statuses = Vec::new();
    let end = Instant::now() + client::PATIENCE;
    // Control reads its workers' reports every 50 ms, in which a fast proxy answers very many.
    while Instant::now() < end {
        // Asked before each request, for a connection to a wall would outlast the ban.
        let answer = world.field.client.inside(|| {
            if syn_is_ignored(from, to, Duration::from_millis(300))? {
                return Ok(None);
            }
            KeepAlive::connect(Some(from), to)?
                .get("api.test", "/limited", "")
                .map(Some)
        });
        // A ban may come between the two, and have ended when the connection is: the next one is met before.
        let Ok(answer) = answer else { continue };
        let Some(response) = answer else { break };
        ensure!(
            response.status != 429 || response.field("retry-after").is_some(),
            "{response:?}"
        );
        statuses.push(response.status);
    }
    ensure!(
        statuses.starts_with(&[200, 200, 200]) && statuses.contains(&429),
        "{statuses:?}"
    );
    let start = Instant::now();
    let dropped = |world: &World| -> Result<f64> {
        Ok(world.sluice.metrics()?.labelled(
            "sluice_guard_dropped_packets_total",
            "rule",
            "fair-use",
        ))
    };
    let before = dropped(world)?;
    ensure!(
        world
            .field
            .client
            .inside(|| syn_is_ignored(from, to, Duration::from_millis(800)))?,
        "its SYN was answered"
    );
    ensure!(
        dropped(world)? > before,
        "XDP dropped nothing by the rule's name"
    );
    wait::until_true("the ban to end", Duration::from_secs(10), || {
        world
            .field
            .client
            .inside(|| client::connect(Some(from), to).is_ok())
    })?;
    ensure!(
        start.elapsed() < Duration::from_secs(8),
        "it lasted {:?}",
        start.elapsed()
    );
    others.stop()?.expect_no_failure().context("others")
}

fn a_reload_under_load_loses_no_request(world: &mut World) -> Result<()> {
    let load = Load::requests(
        &world.field.client,
        socket(WEB_V4, PORT)?,
        4,
        "web.test",
        "/reload",
    )?;
    load.wait_for(100)?;
    let grown = CONFIGURATION.replace(
        "\"10.77.2.2:8080\"",
        "\"10.77.2.2:8080\", \"10.77.3.2:8080\"",
    );
    for round in 0..10 {
        world.write(if round % 2 == 0 {
            &grown
        } else {
            CONFIGURATION
        })?;
        world.sluice.reload()?;
        load.wait_for(100)?;
    }
    let tally = load.stop()?;
    tally.expect_no_failure()?;
    ensure!(tally.per_endpoint.len() == 3, "{:?}", tally.per_endpoint);
    Ok(())
}

fn an_invalid_reload_keeps_the_old_configuration(world: &mut World) -> Result<()> {
    let before = world.sluice.generation()?;
    world.write(&CONFIGURATION.replace("upstream = \"web\"", "upstream = \"wbe\""))?;
    world
        .sluice
        .keeper()
        .signal(nix::sys::signal::Signal::SIGHUP)?;
    let said = wait::until("the refusal", Duration::from_secs(10), || {
        Some(world.sluice.log()).filter(|log| log.contains("wbe"))
    });
    world.write(CONFIGURATION)?;
    ensure!(
        said?.contains("did you mean"),
        "no suggestion:\n{}",
        world.sluice.last_words()
    );
    ensure!(
        world.sluice.generation()? == before,
        "an invalid configuration made a generation"
    );
    ensure!(
        world.curl(WEB_V4).fetch("https://web.test/", &[])?.status == 200,
        "not served any more"
    );
    Ok(())
}

fn a_daemon_killed_under_load_is_back_with_the_same_sockets(world: &mut World) -> Result<()> {
    let to = socket(WEB_V4, PORT)?;
    let sockets = world.sluice.listening_inodes()?;
    ensure!(
        sockets.len() >= 4,
        "the keeper holds {} listening sockets",
        sockets.len()
    );
    let load = Load::requests(&world.field.client, to, 4, "web.test", "/kill")?;
    load.wait_for(100)?;
    let old = world.sluice.kill_daemon()?;
    // A daemon takes what it has accepted with it, and goes on accepting until it has quite gone.
    wait::until_true("the daemon to be gone", Duration::from_secs(5), || {
        !process::runs(old)
    })?;
    // Nobody is refused while there is no daemon: the keeper holds the sockets, and the connection waits in them.
    let waiting = world
        .field
        .client
        .inside(|| KeepAlive::connect(None, to))
        .context("connect while there is no daemon")?;
    world.sluice.wait_for_other_daemon(old)?;
    let mut waiting = waiting;
    let response = waiting
        .get("web.test", "/waited", "")
        .context("the connection that waited")?;
    ensure!(response.status == 200, "{response:?}");
    ensure!(
        world.sluice.listening_inodes()? == sockets,
        "the sockets are others now"
    );
    load.wait_for(100)?;
    let tally = load.stop()?;
    let refused = tally
        .failures
        .iter()
        .filter(|failure| failure.contains("refused"))
        .count();
    ensure!(refused == 0, "{refused} connections were refused");
    Ok(())
}
