//! Thousands of listeners and endpoints: in force within seconds, forwarded, and one of them changed as fast as where it is alone.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::client::tcp_echo;
use rig::field::{EDGE_INTERFACES, Field, NAT_V4};
use rig::namespace::Namespace;
use rig::origin::{ECHO_PORT, Origin};
use rig::sluice::Sluice;
use rig::world::socket;
use rig::{harness, sandbox, tests, wait};

const LISTENERS: usize = 4000;
const UPSTREAMS: usize = 200;
const ENDPOINTS: usize = 20;
/// Of one upstream beside these.
const MOST: usize = 2000;

/// A change, from its arrival to the last slot. In a debug build, and three times of what it took on two busy cores.
const CHANGE: Duration = Duration::from_millis(30);

struct Stage {
    field: Field,
    _origin: Origin,
    sluice: Sluice,
    path: PathBuf,
}

fn main() -> ExitCode {
    harness::main(
        build,
        |stage| stage.sluice.last_words(),
        tests![
            each_of_four_thousand_listeners_forwards,
            one_endpoint_among_thousands_is_changed_alone,
            a_reload_of_thousands_keeps_them,
        ],
    )
}

fn build() -> Result<Stage> {
    let field = Field::build()?;
    // All endpoints are addresses of one origin, behind it as a gateway.
    let (edge, client, first) = (&field.edge, &field.client, &field.origins[0]);
    first.ip("route add local 10.90.0.0/16 dev lo")?;
    edge.ip("route add 10.90.0.0/16 via 10.77.1.2")?;
    client.ip(&format!("route add 198.18.0.0/15 via {}", gateway(client)?))?;
    let origin = Origin::start(first)?;
    let path = sandbox::folder("thousands")?.join("sluice.toml");
    fs::write(&path, configuration(MOST)).context("write the configuration")?;
    let begun = Instant::now();
    let sluice = Sluice::start(edge, &path)?;
    eprintln!("in force after {:?}", begun.elapsed());
    Ok(Stage {
        field,
        _origin: origin,
        sluice,
        path,
    })
}

/// The edge, as the client knows it.
fn gateway(client: &Namespace) -> Result<String> {
    let routes = client.run(&["ip", "-4", "route", "show"])?;
    let words: Vec<&str> = routes.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "via");
    let gateway = at.and_then(|at| words.get(at + 1));
    Ok((*gateway.context("no route over the edge")?).to_owned())
}

fn listener(number: usize) -> String {
    format!("198.18.{}.{}", number / 250, number % 250 + 1)
}

fn endpoint(number: usize) -> String {
    format!("10.90.{}.{}:{ECHO_PORT}", number / 250, number % 250 + 1)
}

fn quoted(items: impl Iterator<Item = String>) -> String {
    let quoted: Vec<String> = items.map(|item| format!("{item:?}")).collect();
    quoted.join(", ")
}

fn configuration(most: usize) -> String {
    let mut text = format!(
        "[datapath]\ninterfaces = {EDGE_INTERFACES:?}\nmode = \"native\"\n\
         nat = {{ source = [{NAT_V4:?}], ports = \"20000-59999\" }}\n"
    );
    let mut pair = |name: &str, listeners: String, endpoints: String| {
        text += &format!(
            "[[listener]]\nname = {name:?}\naddress = [{listeners}]\n\
             forward = {{ upstream = {name:?}, via = \"nat\" }}\n\
             [[upstream]]\nname = {name:?}\nendpoints = [{endpoints}]\n"
        );
    };
    for number in 0..UPSTREAMS {
        let of = (0..LISTENERS).filter(|listener| listener % UPSTREAMS == number);
        let listeners = of.map(|of| format!("{}:{ECHO_PORT}", listener(of)));
        let first = number * ENDPOINTS;
        let endpoints = (first..first + ENDPOINTS).map(endpoint);
        pair(&format!("u{number}"), quoted(listeners), quoted(endpoints));
    }
    let first = UPSTREAMS * ENDPOINTS;
    let endpoints = quoted((first..first + most).map(endpoint));
    pair("most", format!("\"198.19.0.1:{ECHO_PORT}\""), endpoints);
    text
}

fn forwards(stage: &Stage, address: &str) -> Result<()> {
    let to = socket(address, ECHO_PORT)?;
    let echoed = stage.field.client.inside(|| tcp_echo(to, 2000, 7));
    echoed.map(drop).with_context(|| address.to_owned())
}

fn each_of_four_thousand_listeners_forwards(stage: &mut Stage) -> Result<()> {
    let status = stage.sluice.status()?;
    let upstreams = status["upstreams"].as_array().context("no upstreams")?;
    let all = upstreams.iter().flat_map(|one| one["endpoints"].as_array());
    let unresolved = all.flatten().filter(|one| one["resolved"] != true).count();
    ensure!(unresolved == 0, "{unresolved} are not resolved");
    for number in (0..LISTENERS).step_by(7) {
        forwards(stage, &listener(number))?;
    }
    forwards(stage, &listener(LISTENERS - 1))?;
    let daemon = stage.sluice.daemon()?;
    let status = fs::read_to_string(format!("/proc/{daemon}/status"))?;
    let resident = status.lines().find(|line| line.starts_with("VmRSS"));
    eprintln!("the daemon's {}", resident.context("no memory")?);
    (0..100).try_for_each(|_| forwards(stage, "198.19.0.1"))
}

fn one_endpoint_among_thousands_is_changed_alone(stage: &mut Stage) -> Result<()> {
    for upstream in ["u7", "most"] {
        let mut best = Duration::MAX;
        for act in ["add", "drain", "del", "add", "del"] {
            let fresh = endpoint(UPSTREAMS * ENDPOINTS + MOST + 1);
            let change = stage.sluice.json(&["endpoint", act, upstream, &fresh])?;
            let took_us = change["took_us"].as_u64().context("no time")?;
            best = best.min(Duration::from_micros(took_us));
        }
        eprintln!("a change in {upstream} took {best:?}");
        let most = if upstream == "most" {
            CHANGE * 20
        } else {
            CHANGE
        };
        ensure!(best < most, "{upstream}: {best:?}");
    }
    forwards(stage, &listener(7))
}

fn a_reload_of_thousands_keeps_them(stage: &mut Stage) -> Result<()> {
    fs::write(&stage.path, configuration(MOST - 1))?;
    let begun = Instant::now();
    stage.sluice.command(&["reload"])?;
    eprintln!("reloaded after {:?}", begun.elapsed());
    forwards(stage, &listener(1234))?;
    let daemon = stage.sluice.daemon()?;
    let killed = stage.sluice.kill_daemon()?;
    ensure!(killed == daemon, "another daemon was killed");
    forwards(stage, &listener(1235))?;
    stage.sluice.wait_for_other_daemon(daemon)?;
    wait::until_true("the new daemon to forward", Duration::from_secs(20), || {
        forwards(stage, "198.19.0.1").is_ok()
    })
}
