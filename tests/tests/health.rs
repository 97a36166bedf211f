//! Health: who answers neither probes nor calls gets no more work, at layer 7 and in the kernel, and is back when it answers again.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::client::Tally;
use rig::field::{L4_V4, WEB_V4};
use rig::http::KeepAlive;
use rig::origin::HTTP_PORT;
use rig::sluice::Sluice;
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

[[listener]]
name    = "flows"
address = "203.0.113.20:8081"
forward = { upstream = "flows", via = "nat" }

[[listener]]
name    = "slow"
address = "203.0.113.20:8082"
forward = { upstream = "slow", via = "nat" }

[[route]]
match    = { host = "slow.test", path = "/*" }
upstream = "slow"

[[route]]
match    = { host = "called.test", path = "/*" }
upstream = "called"

[[route]]
match    = { host = "strict.test", path = "/*" }
upstream = "strict"

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

[[upstream]]
name      = "called"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
eject     = { failures = 3, for = "1s", for_max = "2s" }

[[upstream]]
name      = "strict"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
eject     = { failures = 3, status = "5xx", for = "1s", for_max = "1s" }

[[upstream]]
name      = "flows"
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
eject     = { calls_min = 10, window = "2s", for = "4s", for_max = "4s" }

[[upstream]]
name       = "slow"
endpoints  = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
probe      = { tcp = true, interval = "100ms", timeout = "100ms", rise = 2, fall = 2 }
eject      = "off"
slow_start = "10s"

[tunables]
"upstream.failed_hold" = "0s"
"#;

/// Long enough for any belief to change, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(10);

/// In one look at who answers.
const REQUESTS: u64 = 90;

fn main() -> ExitCode {
    harness::main(
        || World::build(CONFIGURATION),
        World::last_words,
        tests![
            a_server_that_only_listens_fails_the_http_probe_and_passes_the_tcp_probe,
            a_dead_server_is_left_out_at_both_layers_until_it_lives_again,
            a_server_that_fails_calls_is_ejected_without_a_probe_and_comes_back,
            answers_that_count_as_failures_eject_whoever_gives_them,
            a_server_that_refuses_flows_is_ejected_from_the_kernels_ring,
            health_is_ignored_while_too_few_have_it,
            a_server_that_comes_back_gets_more_work_by_and_by_at_both_layers,
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
    let knocked = is_healthy(&world.sluice, "knocked");
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

fn a_server_that_fails_calls_is_ejected_without_a_probe_and_comes_back(
    world: &mut World,
) -> Result<()> {
    expect_all(&requests(world, WEB_V4, "called.test")?)?;
    let before = count(world, "ejections", "called")?;
    world.origins[0].end_web()?;
    // A call that is refused is tried again elsewhere, so that no client sees any of it.
    let tally = requests(world, WEB_V4, "called.test")?;
    tally.expect_no_failure()?;
    wait_for_belief(world, "called", false)?;
    expect_others_only(&requests(world, WEB_V4, "called.test")?)?;
    // It is still dead when its time is over, and goes again.
    wait::until_true("a second ejection", PATIENCE, || {
        requests(world, WEB_V4, "called.test").is_ok_and(|tally| tally.expect_no_failure().is_ok())
            && count(world, "ejections", "called").is_ok_and(|count| count >= before + 2.0)
    })?;
    world.origins[0].start_web()?;
    wait_for_belief(world, "called", true)?;
    expect_all(&requests(world, WEB_V4, "called.test")?)
}

fn answers_that_count_as_failures_eject_whoever_gives_them(world: &mut World) -> Result<()> {
    expect_all(&requests(world, WEB_V4, "strict.test")?)?;
    let to = socket(WEB_V4, HTTP_PORT)?;
    let (mut broken, mut well) = (0, 0);
    world.field.client.inside(|| -> Result<()> {
        for _ in 0..90 {
            let mut connection = KeepAlive::connect(None, to)?;
            let answer = connection.get("strict.test", "/broken", "Connection: close\r\n")?;
            match answer.status {
                500 => broken += 1,
                200 => well += 1,
                _ => anyhow::bail!("{answer:?}"),
            }
        }
        Ok(())
    })?;
    // Control hears of the third one a moment after the client.
    ensure!((3..30).contains(&broken) && well > 60, "{broken} of 90");
    ensure!(count(world, "ejections", "strict")? >= 1.0);
    wait_for_belief(world, "strict", true)?;
    expect_all(&requests(world, WEB_V4, "strict.test")?)
}

fn a_server_that_refuses_flows_is_ejected_from_the_kernels_ring(world: &mut World) -> Result<()> {
    let to = socket(L4_V4, 8081)?;
    let refused_of = |count| {
        world.field.client.inside(|| {
            let each = (0..count).map(|_| KeepAlive::connect(None, to));
            each.filter(Result::is_err).count()
        })
    };
    ensure!(
        refused_of(30) == 0,
        "a flow was refused by a server that lives"
    );
    let web = &mut world.origins[0];
    web.end_web()?;
    let ejected = wait::until_true("an ejection", PATIENCE, || {
        refused_of(30);
        is_healthy(&world.sluice, "flows").is_ok_and(|healthy| !healthy)
    });
    let refused = refused_of(90);
    web.start_web()?;
    ejected?;
    ensure!(
        refused == 0,
        "{refused} of 90 flows went to an ejected server"
    );
    wait_for_belief(world, "flows", true)
}

fn health_is_ignored_while_too_few_have_it(world: &mut World) -> Result<()> {
    let panic = |world: &World| {
        let metrics = world.sluice.metrics()?;
        anyhow::Ok(metrics.labelled("sluice_upstream_panic", "upstream", "knocked"))
    };
    for origin in &mut world.origins[..2] {
        origin.end_web()?;
    }
    wait::until_true("a panic", PATIENCE, || {
        panic(world).is_ok_and(|panics| panics == 1.0)
    })?;
    let retries = count(world, "retries", "knocked")?;
    let tally = requests(world, WEB_V4, "knocked.test")?;
    let retried = count(world, "retries", "knocked")? - retries;
    for origin in &mut world.origins[..2] {
        origin.start_web()?;
    }
    ensure!(tally.per_endpoint.keys().eq(["origin3"]), "{tally:?}");
    ensure!(retried > 0.0, "the dead were not asked");
    wait::until_true("its end", PATIENCE, || {
        panic(world).is_ok_and(|panics| panics == 0.0)
    })?;
    wait::until_true("all to be back", PATIENCE, || {
        requests(world, WEB_V4, "knocked.test").is_ok_and(|tally| expect_all(&tally).is_ok())
    })
}

fn a_server_that_comes_back_gets_more_work_by_and_by_at_both_layers(
    world: &mut World,
) -> Result<()> {
    world.origins[0].end_web()?;
    wait_for_belief(world, "slow", false)?;
    world.origins[0].start_web()?;
    wait_for_belief(world, "slow", true)?;
    let shares = |world: &World| -> Result<[u64; 2]> {
        let flows = to_origin1(&world.requests(socket(L4_V4, 8082)?, "slow.test", REQUESTS))?;
        let calls = to_origin1(&requests(world, WEB_V4, "slow.test")?)?;
        Ok([flows, calls])
    };
    // Thirty of ninety would be its part, and it begins with a tenth of that.
    let first = shares(world)?;
    ensure!(first.iter().all(|count| *count < 20), "{first:?} at first");
    wait::until_true("the end of the slow start", PATIENCE * 3, || {
        let endpoint = first_endpoint(&world.sluice, "slow");
        endpoint.is_ok_and(|endpoint| endpoint["share_percent"].is_null())
    })?;
    // The ring follows within a second.
    let mut last = String::new();
    let whole = wait::until_true("its whole part", PATIENCE, || {
        let shares = shares(world);
        last = format!("{shares:?}");
        shares.is_ok_and(|shares| shares.iter().all(|count| *count >= 20))
    });
    whole.with_context(|| format!("{last} at last"))
}

fn to_origin1(tally: &Tally) -> Result<u64> {
    tally.expect_no_failure()?;
    Ok(tally.per_endpoint.get("origin1").copied().unwrap_or(0))
}

/// A counter of the endpoints of an upstream.
fn count(world: &World, what: &str, upstream: &str) -> Result<f64> {
    let metrics = world.sluice.metrics()?;
    let name = format!("sluice_upstream_{what}_total");
    Ok(metrics.labelled(&name, "upstream", upstream))
}

/// So many requests that each endpoint gets some.
fn requests(world: &World, address: &str, host: &str) -> Result<Tally> {
    Ok(world.requests(socket(address, HTTP_PORT)?, host, REQUESTS))
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
        is_healthy(&world.sluice, upstream).is_ok_and(|believed| believed == healthy)
    })
}

/// What status says of the first endpoint of an upstream.
fn is_healthy(sluice: &Sluice, upstream: &str) -> Result<bool> {
    let endpoint = first_endpoint(sluice, upstream)?;
    endpoint["healthy"].as_bool().context("no belief")
}

fn first_endpoint(sluice: &Sluice, upstream: &str) -> Result<serde_json::Value> {
    let status = sluice.status()?;
    let named = |one: &&serde_json::Value| one["name"] == upstream;
    let found = status["upstreams"]
        .as_array()
        .and_then(|all| all.iter().find(named));
    let found = found.with_context(|| format!("no such upstream in {status}"))?;
    Ok(found["endpoints"][0].clone())
}
