//! Endpoints changed by command: at both layers at once, kept over a daemon's death, ended by a reload, refused whole.

use std::collections::BTreeMap;
use std::process::{ExitCode, Output};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rig::field::{EDGE_INTERFACES, L4_V4, WEB_V4};
use rig::http::KeepAlive;
use rig::origin::HTTP_PORT;
use rig::world::{World, socket};
use rig::{harness, sluice, tests, wait};

/// The page that operators read: its configuration is that of these tests, and its commands are run.
const PAGE: &str = include_str!("../../docs/endpoints.md");

const PATIENCE: Duration = Duration::from_secs(10);

/// Few ids, so that they come to an end, and a short idle limit, so that they come back soon.
const TUNABLES: &str = r#"
[tunables]
"datapath.endpoints_max" = 64
"flow.tcp_idle_timeout"  = "5s"
"flow.udp_idle_timeout"  = "5s"
"#;

/// So many that each endpoint gets some.
const TRIES: u64 = 60;

fn main() -> ExitCode {
    harness::main(
        || World::build(&configuration()?),
        World::last_words,
        tests![
            what_the_page_says_is_what_happens,
            an_endpoint_that_comes_and_goes_is_followed_by_both_layers_at_once,
            what_has_begun_stays_when_its_endpoint_is_drained_and_removed,
            changes_outlive_a_daemon_that_dies_and_end_with_a_reload,
            what_makes_no_sense_is_refused_whole_with_a_remedy,
            an_endpoint_that_is_added_is_probed,
            a_reload_that_waits_for_a_neighbour_keeps_nobody_waiting_and_loses_no_change,
            ids_of_endpoints_that_are_gone_are_given_to_others,
        ],
    )
}

/// What stands between fences of this kind in the page.
fn block(kind: &str) -> Result<&'static str> {
    let (_, rest) = PAGE
        .split_once(&format!("```{kind}\n"))
        .with_context(|| format!("no {kind} in the page"))?;
    Ok(rest.split_once("```").context("no end of it")?.0)
}

fn configuration() -> Result<String> {
    let named = r#"interfaces = ["eth0", "eth1"]"#;
    let text = block("toml")?;
    ensure!(text.contains(named), "the interfaces of the page");
    let text = text.replace(named, &format!("interfaces = {EDGE_INTERFACES:?}"));
    Ok(format!("{text}{TUNABLES}"))
}

/// As the file says, whatever a test before left.
fn reset(world: &World) -> Result<()> {
    world.write(&configuration()?)?;
    world.sluice.reload().map(drop)
}

fn run(world: &World, words: &[&str]) -> Result<Output> {
    let mut command = sluice::command(&world.field.edge)?;
    command.arg("endpoint").args(words);
    command.output().context("run sluice endpoint")
}

fn a_reload_that_waits_for_a_neighbour_keeps_nobody_waiting_and_loses_no_change(
    world: &mut World,
) -> Result<()> {
    reset(world)?;
    // Nobody has this address, and it takes the kernel seconds to be sure of that.
    let nobody = r#""10.77.2.2:8080", "10.77.2.99:8080"]"#;
    let text = configuration()?.replace(r#""10.77.2.2:8080"]"#, nobody);
    ensure!(text.contains(nobody), "the endpoints of the page");
    world.write(&text)?;
    let generation = world.sluice.generation()?;
    let (sluice, is_over) = (&world.sluice, AtomicBool::new(false));
    let (answered, added) = thread::scope(|scope| -> Result<_> {
        let reload = scope.spawn(|| {
            let done = sluice.command(&["reload"]);
            is_over.store(true, Relaxed);
            done.map(drop)
        });
        let looking = scope.spawn(|| -> Result<usize> {
            let mut answered = 0;
            while !is_over.load(Relaxed) {
                sluice.command(&["endpoint", "list"])?;
                answered += usize::from(!is_over.load(Relaxed));
            }
            Ok(answered)
        });
        // One that comes before the reload ends with it; the first that comes meanwhile waits, and belongs to what comes.
        let mut port = 9100;
        let added = loop {
            port += 1;
            let added = change(world, &["add", "app", &format!("10.77.3.2:{port}")])?;
            if added["generation"] != generation || is_over.load(Relaxed) {
                break added;
            }
        };
        let answered = looking.join().map_err(|_| anyhow!("a look panicked"))??;
        reload
            .join()
            .map_err(|_| anyhow!("the reload panicked"))??;
        Ok((answered, added))
    })?;
    ensure!(answered >= 3, "{answered} were answered meanwhile");
    ensure!(added["generation"] == generation + 1, "{added} is lost");
    let waited_us = added["took_us"].as_u64().context("no time")?;
    ensure!(waited_us > 50_000, "{added} did not wait for the reload");
    let status = world.sluice.status()?;
    let endpoints = status["upstreams"][0]["endpoints"].as_array();
    let kept = endpoints.context("no endpoints")?.iter();
    let kept: Vec<_> = kept.filter(|one| one["origin"] == "runtime").collect();
    ensure!(
        kept.len() == 1 && kept[0]["address"] == added["address"],
        "{kept:?}"
    );
    reset(world)
}

fn ids_of_endpoints_that_are_gone_are_given_to_others(world: &mut World) -> Result<()> {
    reset(world)?;
    let origin3 = &world.field.origins[2];
    origin3.ip("address add 10.77.3.3/24 dev eth0")?;
    for port in 9000..9064 {
        let address = format!("10.77.1.2:{port}");
        if !run(world, &["add", "app", &address])?.status.success() {
            break;
        }
        change(world, &["del", "app", &address])?;
    }
    let one_more = &["add", "app", "10.77.3.3:8080"];
    let refused = run(world, one_more)?;
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(error.contains("datapath.endpoints_max"), "{error}");
    expect(world, &["origin1", "origin2"])?;
    wait::until_true("an id", PATIENCE * 3, || {
        run(world, one_more).is_ok_and(|output| output.status.success())
    })?;
    expect(world, &["origin1", "origin2", "origin3"])?;
    change(world, &["del", "app", "10.77.3.3:8080"])?;
    // An address that had an id may come back as well.
    change(world, &["add", "app", "10.77.1.2:9000"])?;
    change(world, &["del", "app", "10.77.1.2:9000"])?;
    expect(world, &["origin1", "origin2"])
}

fn what_the_page_says_is_what_happens(world: &mut World) -> Result<()> {
    reset(world)?;
    let mut expected = Vec::new();
    for line in block("console")?.lines() {
        if let Some(words) = line.strip_prefix("# sluice endpoint ") {
            let words: Vec<&str> = words.split(' ').collect();
            let output = run(world, &words)?;
            ensure!(output.status.success(), "{words:?}: {output:?}");
            let said = String::from_utf8(output.stdout)?;
            expected.push((words, said));
        }
    }
    let shown = expected
        .into_iter()
        .map(|(words, said)| format!("# sluice endpoint {}\n{said}", words.join(" ")));
    let shown = shown.collect::<String>();
    ensure!(shown == block("console")?, "{shown}");
    Ok(())
}

/// Who answers requests over the worker's listener, and those over the kernel's.
fn answers(world: &World, address: &str) -> Result<BTreeMap<String, u64>> {
    let tally = world.requests(socket(address, HTTP_PORT)?, "app.test", TRIES);
    tally.expect_no_failure()?;
    Ok(tally.per_endpoint)
}

fn expect(world: &World, names: &[&str]) -> Result<()> {
    for address in [WEB_V4, L4_V4] {
        let answers = answers(world, address)?;
        ensure!(
            answers.keys().eq(names),
            "{address}: {answers:?} for {names:?}"
        );
    }
    Ok(())
}

fn change(world: &World, words: &[&str]) -> Result<serde_json::Value> {
    world.sluice.json(&[&["endpoint"], words].concat())
}

fn an_endpoint_that_comes_and_goes_is_followed_by_both_layers_at_once(
    world: &mut World,
) -> Result<()> {
    reset(world)?;
    expect(world, &["origin1", "origin2"])?;
    let generation = world.sluice.generation()?;
    let added = change(world, &["add", "app", "10.77.3.2:8080"])?;
    ensure!(added["weight"] == 1 && added["took_us"].is_u64(), "{added}");
    expect(world, &["origin1", "origin2", "origin3"])?;
    change(world, &["del", "app", "10.77.1.2:8080"])?;
    expect(world, &["origin2", "origin3"])?;
    change(world, &["drain", "app", "10.77.2.2:8080"])?;
    expect(world, &["origin3"])?;
    change(
        world,
        &["weight", "app", "10.77.2.2:8080", "--weight", "1000"],
    )?;
    let shares = answers(world, L4_V4)?;
    ensure!(
        shares.get("origin2") > Some(&(TRIES * 9 / 10)),
        "{shares:?}"
    );
    change(world, &["weight", "app", "10.77.2.2:8080", "--weight", "1"])?;
    change(world, &["add", "app", "10.77.1.2:8080"])?;
    change(world, &["del", "app", "10.77.3.2:8080"])?;
    expect(world, &["origin1", "origin2"])?;
    let status = world.sluice.status()?;
    let app = &status["upstreams"][0];
    let origins = app["endpoints"].as_array().context("no endpoints")?;
    let as_in_file = |one: &serde_json::Value| {
        one["origin"]
            .as_str()
            .is_some_and(|place| place.contains("sluice.toml:"))
    };
    ensure!(origins.iter().all(as_in_file), "back as in the file: {app}");
    ensure!(world.sluice.generation()? == generation, "it is no reload");
    Ok(())
}

fn what_has_begun_stays_when_its_endpoint_is_drained_and_removed(world: &mut World) -> Result<()> {
    reset(world)?;
    let mut open = world.field.client.inside(|| -> Result<Vec<_>> {
        let mut open = Vec::new();
        for _ in 0..TRIES {
            let mut flow = KeepAlive::connect(None, socket(L4_V4, HTTP_PORT)?)?;
            let name = flow.get("app.test", "/", "")?.origin().map(str::to_owned);
            open.push((flow, name.context("an answer without a name")?));
        }
        Ok(open)
    })?;
    for act in ["drain", "del"] {
        change(world, &[act, "app", "10.77.1.2:8080"])?;
        expect(world, &["origin2"])?;
        for (flow, name) in &mut open {
            let response = flow.get("app.test", "/", "")?;
            ensure!(
                response.origin() == Some(name.as_str()),
                "{act}: a flow moved"
            );
        }
    }
    let names: std::collections::BTreeSet<_> = open.iter().map(|(_, name)| name).collect();
    ensure!(names.len() == 2, "{names:?}");
    Ok(())
}

fn changes_outlive_a_daemon_that_dies_and_end_with_a_reload(world: &mut World) -> Result<()> {
    reset(world)?;
    change(world, &["add", "app", "10.77.3.2:8080"])?;
    change(world, &["del", "app", "10.77.1.2:8080"])?;
    let old = world.sluice.kill_daemon()?;
    world.sluice.wait_for_other_daemon(old)?;
    expect(world, &["origin2", "origin3"])?;
    let app = world.sluice.status()?["upstreams"][0].clone();
    ensure!(app["removed"][0] == "10.77.1.2:8080", "{app}");
    ensure!(app["endpoints"][1]["origin"] == "runtime", "{app}");
    world.sluice.reload()?;
    expect(world, &["origin1", "origin2"])?;
    let old = world.sluice.kill_daemon()?;
    world.sluice.wait_for_other_daemon(old)?;
    expect(world, &["origin1", "origin2"])
}

fn what_makes_no_sense_is_refused_whole_with_a_remedy(world: &mut World) -> Result<()> {
    reset(world)?;
    let before = world.sluice.status()?["upstreams"].clone();
    for (words, code, said) in [
        (
            &["add", "ap", "10.77.3.2:8080"][..],
            1,
            "did you mean `app`?",
        ),
        (&["list", "ap"], 1, "did you mean `app`?"),
        (
            &["add", "app", "10.77.1.2:8080"],
            1,
            "sluice endpoint weight",
        ),
        (&["del", "app", "10.77.3.2:8080"], 1, "sluice endpoint list"),
        (&["add", "app", "10.77.1.1:8080"], 1, "is this host itself"),
        (&["add", "app", "10.77.3.2"], 2, "10.77.3.2"),
        (
            &["add", "app", "10.77.3.2:80", "--weight", "1001"],
            2,
            "1000",
        ),
        (&["weight", "app", "10.77.1.2:8080"], 2, "--weight"),
    ] {
        let output = run(world, words)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(code), "{words:?}: {output:?}");
        ensure!(error.contains(said), "{words:?}: {error}");
    }
    change(world, &["del", "app", "10.77.1.2:8080"])?;
    let last = run(world, &["del", "app", "10.77.2.2:8080"])?;
    let error = String::from_utf8_lossy(&last.stderr).into_owned();
    ensure!(error.contains("sluice endpoint drain"), "{error}");
    expect(world, &["origin2"])?;
    world
        .sluice
        .command(&["sysctl", "-w", "upstream.endpoints_max=1"])?;
    let full = run(world, &["add", "app", "10.77.3.2:8080"])?;
    let error = String::from_utf8_lossy(&full.stderr).into_owned();
    ensure!(error.contains("upstream.endpoints_max is 1"), "{error}");
    world
        .sluice
        .command(&["sysctl", "-w", "upstream.endpoints_max=4096"])?;
    change(world, &["add", "app", "10.77.1.2:8080"])?;
    let after = world.sluice.status()?["upstreams"].clone();
    ensure!(after == before, "{after} is not {before}");
    Ok(())
}

fn an_endpoint_that_is_added_is_probed(world: &mut World) -> Result<()> {
    reset(world)?;
    // Nobody listens there.
    change(world, &["add", "app", "10.77.3.2:8081"])?;
    wait::until_true("the probe to find nobody", PATIENCE, || {
        let status = world.sluice.status().unwrap_or_default();
        status["upstreams"][0]["endpoints"][2]["healthy"] == false
    })?;
    expect(world, &["origin1", "origin2"])?;
    let of_three = |world: &World| -> Result<f64> {
        let name = "sluice_upstream_healthy{upstream=\"app\",endpoint=\"10.77.3.2:8081\"}";
        Ok(world.sluice.metrics()?.value(name))
    };
    ensure!(of_three(world)? == 0.0, "{}", of_three(world)?);
    change(world, &["del", "app", "10.77.3.2:8081"])?;
    expect(world, &["origin1", "origin2"])
}
