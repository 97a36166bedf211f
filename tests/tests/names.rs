//! Endpoints by name, with dnsmasq as the name server: they come, change and stay at both layers, whatever becomes of the server.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rig::client::Tally;
use rig::field::{L4_V4, WEB_V4};
use rig::namespace::Namespace;
use rig::origin::HTTP_PORT;
use rig::process::Process;
use rig::world::{World, socket};
use rig::{harness, sandbox, tests, wait};

const CONFIGURATION: &str = r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "native"
nat        = { source = ["10.77.9.1"], ports = "20000-39999" }

[resolver]
servers = ["127.0.0.1:5353"]

[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[listener]]
name    = "kernel"
address = "203.0.113.20:8080"
forward = { upstream = "app", via = "nat" }

[[route]]
match    = { host = "app.test", path = "/*" }
upstream = "app"

[[route]]
match    = { host = "service.test", path = "/*" }
upstream = "service"

[[upstream]]
name      = "app"
endpoints = ["app.test:8080"]

[[upstream]]
name      = "service"
endpoints = [{ srv = "_http._tcp.app.test" }]

[tunables]
"upstream.dns_timeout" = "500ms"
"upstream.dns_start_timeout" = "1s"
"#;

/// Long enough for any change to be seen, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(20);

struct Stage {
    world: World,
    server: Option<NameServer>,
}

/// dnsmasq beside the edge, with the addresses of `app.test` in a file that it reads again when it is told.
struct NameServer {
    process: Process,
    hosts: PathBuf,
}

impl NameServer {
    fn start(edge: &Namespace, origins: &[u32]) -> Result<Self> {
        let folder = sandbox::folder("names")?;
        let hosts = folder.join("hosts");
        fs::write(&hosts, text(origins))?;
        let mut command = edge.command("/usr/sbin/dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--no-resolv",
                "--no-hosts",
                "--conf-file=/dev/null",
            ])
            .args([
                "--listen-address=127.0.0.1",
                "--bind-interfaces",
                "--port=5353",
            ])
            .args([
                "--user=root",
                "--group=root",
                "--pid-file=",
                "--local-ttl=1",
            ])
            .arg("--local=/test/")
            .arg(format!("--addn-hosts={}", hosts.display()))
            .args([
                "--srv-host=_http._tcp.app.test,one.test,8080,10,3",
                "--srv-host=_http._tcp.app.test,two.test,8080,10,1",
                "--srv-host=_http._tcp.app.test,three.test,8080,20,1",
            ])
            .args([
                "--host-record=one.test,10.77.1.2",
                "--host-record=two.test,10.77.2.2",
                "--host-record=three.test,10.77.3.2",
            ]);
        let process = Process::start("dnsmasq", command)?;
        Ok(Self { process, hosts })
    }

    /// `app.test` has the addresses of these origins from now on.
    fn say(&mut self, origins: &[u32]) -> Result<()> {
        self.say_text(&text(origins))
    }

    fn say_text(&mut self, text: &str) -> Result<()> {
        fs::write(&self.hosts, text)?;
        self.process.signal(Signal::SIGHUP)
    }

    fn end(mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(PATIENCE).map(drop)
    }
}

fn text(origins: &[u32]) -> String {
    let lines = origins
        .iter()
        .map(|origin| format!("10.77.{origin}.2 app.test\n"));
    lines.collect()
}

fn main() -> ExitCode {
    harness::main(
        || {
            // Nobody answers names yet.
            let world = World::build(CONFIGURATION)?;
            Ok(Stage {
                world,
                server: None,
            })
        },
        |stage: &Stage| stage.world.last_words(),
        tests![
            without_a_name_server_the_start_is_not_held_up_and_endpoints_come_with_it,
            what_the_name_server_says_is_followed_at_both_layers,
            a_service_is_asked_by_weight_and_the_first_priority,
            what_cannot_be_followed_changes_nothing,
            when_the_name_server_is_gone_what_was_known_stays_over_reloads_and_deaths,
        ],
    )
}

fn without_a_name_server_the_start_is_not_held_up_and_endpoints_come_with_it(
    stage: &mut Stage,
) -> Result<()> {
    let tally = requests(&stage.world, WEB_V4, "app.test")?;
    ensure!(tally.per_endpoint.is_empty(), "{tally:?}");
    stage.server = Some(NameServer::start(&stage.world.field.edge, &[1, 2])?);
    wait_for(&stage.world, &["origin1", "origin2"])
}

fn what_the_name_server_says_is_followed_at_both_layers(stage: &mut Stage) -> Result<()> {
    let server = stage.server.as_mut().context("there is no server")?;
    for (origins, names) in [
        (&[2, 3][..], &["origin2", "origin3"][..]),
        (&[1][..], &["origin1"][..]),
        (&[1, 2, 3][..], &["origin1", "origin2", "origin3"][..]),
    ] {
        server.say(origins)?;
        wait_for(&stage.world, names)?;
    }
    let status = stage.world.sluice.status()?;
    let app = &status["upstreams"][0];
    ensure!(app["names"][0]["addresses"] == 3, "{app}");
    ensure!(app["endpoints"][0]["origin"] == "dns", "{app}");
    Ok(())
}

fn a_service_is_asked_by_weight_and_the_first_priority(stage: &mut Stage) -> Result<()> {
    let tally = requests(&stage.world, WEB_V4, "service.test")?;
    tally.expect_no_failure()?;
    let shares: Vec<_> = tally.per_endpoint.iter().collect();
    // Three to one of sixty, turn by turn on each of the workers.
    ensure!(
        matches!(&shares[..], [(one, 40..=50), (two, 10..=20)] if *one == "origin1" && *two == "origin2"),
        "{shares:?}"
    );
    Ok(())
}

/// NAT cannot forward to the edge itself; whoever may answer names could say so, and must not take anything down.
fn what_cannot_be_followed_changes_nothing(stage: &mut Stage) -> Result<()> {
    let all = &["origin1", "origin2", "origin3"];
    let server = stage.server.as_mut().context("there is no server")?;
    server.say_text("10.77.1.1 app.test\n")?;
    wait_for_failure(&stage.world)?;
    wait_for(&stage.world, all)?;
    stage.world.sluice.reload()?;
    wait_for(&stage.world, all)?;
    let server = stage.server.as_mut().context("there is no server")?;
    server.say(&[1, 2, 3])?;
    wait::until_true("the name to be known", PATIENCE, || {
        failure(&stage.world).is_ok_and(|failure| failure.is_null())
    })
}

fn wait_for_failure(world: &World) -> Result<()> {
    wait::until_true("a failure to be told", PATIENCE, || {
        failure(world).is_ok_and(|failure| failure.is_string())
    })
}

/// Why `app.test` is not known.
fn failure(world: &World) -> Result<serde_json::Value> {
    let status = world.sluice.status()?;
    Ok(status["upstreams"][0]["names"][0]["failure"].clone())
}

fn when_the_name_server_is_gone_what_was_known_stays_over_reloads_and_deaths(
    stage: &mut Stage,
) -> Result<()> {
    let all = &["origin1", "origin2", "origin3"];
    let server = stage.server.take().context("there is no server")?;
    server.end()?;
    wait_for_failure(&stage.world)?;
    wait_for(&stage.world, all)?;
    stage.world.sluice.reload()?;
    wait_for(&stage.world, all)?;
    let old = stage.world.sluice.kill_daemon()?;
    stage.world.sluice.wait_for_other_daemon(old)?;
    wait_for(&stage.world, all)?;
    let metrics = stage.world.sluice.metrics()?;
    let known = metrics.labelled("sluice_upstream_dns_known", "name", "app.test");
    let addresses = metrics.labelled("sluice_upstream_dns_addresses", "name", "app.test");
    ensure!((known, addresses) == (0.0, 3.0), "{known}, {addresses}");
    // Back, with something new to say.
    stage.server = Some(NameServer::start(&stage.world.field.edge, &[3])?);
    wait_for(&stage.world, &["origin3"])
}

/// Sixty requests, each over a connection of its own.
fn requests(world: &World, address: &str, host: &str) -> Result<Tally> {
    Ok(world.requests(socket(address, HTTP_PORT)?, host, 60))
}

/// Waits until exactly these origins answer at both layers, and nothing fails; from then on it is so.
fn wait_for(world: &World, origins: &[&str]) -> Result<()> {
    let mut seen = String::new();
    let mut is_so = || {
        let both = [WEB_V4, L4_V4].map(|address| requests(world, address, "app.test"));
        seen = format!("{both:?}");
        both.iter().all(|tally| {
            tally.as_ref().is_ok_and(|tally| {
                tally.per_endpoint.keys().eq(origins) && tally.expect_no_failure().is_ok()
            })
        })
    };
    let settled = wait::until_true("these endpoints and no others", PATIENCE, &mut is_so);
    let stays = is_so();
    settled.with_context(|| format!("{origins:?} were expected, and seen were {seen}"))?;
    ensure!(stays, "{origins:?} were there, and then {seen}");
    Ok(())
}
