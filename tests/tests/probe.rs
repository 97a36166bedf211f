//! Probes: who does not answer them gets no more work, at layer 7 and in the kernel, and is back when it answers again.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use rig::client::Tally;
use rig::field::{L4_V4, WEB_V4};
use rig::http::KeepAlive;
use rig::origin::HTTP_PORT;
use rig::world::{World, socket};
use rig::{harness, tests, wait};

const CONFIGURATION: &str = r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "native"
nat        = { source = ["10.77.9.1"], ports = "20000-39999" }

[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[listener]]
name    = "kernel"
address = "203.0.113.20:8080"
forward = { upstream = "forwarded", via = "nat" }

[[route]]
match    = { host = "asked.test", path = "/*" }
upstream = "asked"

[[route]]
match    = { host = "knocked.test", path = "/*" }
upstream = "knocked"

[[upstream]]
name      = "asked"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
probe     = { http = "/healthz", interval = "100ms", timeout = "100ms", rise = 2, fall = 2 }

[[upstream]]
name      = "knocked"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
probe     = { tcp = true, interval = "100ms", timeout = "100ms", rise = 2, fall = 2 }

[[upstream]]
name      = "forwarded"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
probe     = { tcp = true, interval = "100ms", timeout = "100ms", rise = 2, fall = 2 }
"#;

/// Long enough for any belief to change, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    harness::main(
        || World::build(CONFIGURATION),
        World::last_words,
        tests![
            a_server_that_only_listens_fails_the_http_probe_and_passes_the_tcp_probe,
            a_dead_server_is_left_out_at_both_layers_until_it_lives_again,
        ],
    )
}

fn a_server_that_only_listens_fails_the_http_probe_and_passes_the_tcp_probe(
    world: &mut World,
) -> Result<()> {
    wait_for_belief(world, "asked", true)?;
    // A stopped process still has its socket, on which the kernel accepts connections.
    world.origins[0].pause()?;
    let believed = wait_for_belief(world, "asked", false);
    let knocked = is_healthy(world, "knocked");
    let tally = requests(world, WEB_V4, "asked.test");
    world.origins[0].resume()?;
    believed?;
    ensure!(knocked?, "the TCP probe failed where the kernel accepts");
    expect_others_only(&tally?)?;
    wait_for_belief(world, "asked", true)?;
    expect_all(&requests(world, WEB_V4, "asked.test")?)
}

fn a_dead_server_is_left_out_at_both_layers_until_it_lives_again(world: &mut World) -> Result<()> {
    expect_all(&requests(world, WEB_V4, "knocked.test")?)?;
    expect_all(&requests(world, L4_V4, "forwarded.test")?)?;
    world.origins[0].end_web()?;
    for upstream in ["asked", "knocked", "forwarded"] {
        wait_for_belief(world, upstream, false)?;
    }
    expect_others_only(&requests(world, WEB_V4, "knocked.test")?)?;
    expect_others_only(&requests(world, L4_V4, "forwarded.test")?)?;
    world.origins[0].start_web()?;
    for upstream in ["asked", "knocked", "forwarded"] {
        wait_for_belief(world, upstream, true)?;
    }
    expect_all(&requests(world, WEB_V4, "knocked.test")?)?;
    expect_all(&requests(world, L4_V4, "forwarded.test")?)
}

/// So many requests that each endpoint gets some, each over a connection of its own.
fn requests(world: &World, address: &str, host: &str) -> Result<Tally> {
    let to = socket(address, HTTP_PORT)?;
    Ok(world.field.client.inside(|| {
        let mut tally = Tally::default();
        for _ in 0..90 {
            let answer = KeepAlive::connect(None, to)
                .and_then(|mut connection| connection.get(host, "/", "Connection: close\r\n"));
            tally.count(answer.and_then(|response| {
                ensure!(response.status == 200, "{response:?}");
                Ok((response.origin().unwrap_or_default().to_owned(), 1))
            }));
        }
        tally
    }))
}

fn expect_all(tally: &Tally) -> Result<()> {
    tally.expect_no_failure()?;
    ensure!(tally.per_endpoint.len() == 3, "{:?}", tally.per_endpoint);
    Ok(())
}

fn expect_others_only(tally: &Tally) -> Result<()> {
    tally.expect_no_failure()?;
    ensure!(
        tally.per_endpoint.len() == 2 && !tally.per_endpoint.contains_key("origin1"),
        "{:?}",
        tally.per_endpoint
    );
    Ok(())
}

/// Waits until the first endpoint of an upstream is believed healthy, or dead.
fn wait_for_belief(world: &World, upstream: &str, healthy: bool) -> Result<()> {
    wait::until_true("a belief to change", PATIENCE, || {
        is_healthy(world, upstream).is_ok_and(|believed| believed == healthy)
    })
}

/// What status and metrics say of the first endpoint of an upstream, which is the same.
fn is_healthy(world: &World, upstream: &str) -> Result<bool> {
    let status = world.sluice.status()?;
    let named = |one: &&serde_json::Value| one["name"] == upstream;
    let found = status["upstreams"]
        .as_array()
        .and_then(|all| all.iter().find(named));
    let said = found.and_then(|found| found["endpoints"][0]["healthy"].as_bool());
    said.ok_or_else(|| anyhow::anyhow!("no such endpoint in {status}"))
}
