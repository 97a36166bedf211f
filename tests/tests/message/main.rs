//! HTTP/1.1 messages through whole proxies: what is taken, what is refused, and what others read of what goes on.

mod behind;
mod corpus;
mod crossing;
mod tool;
mod witness;

use std::fs;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use rig::field::{Field, WEB_V4};
use rig::scripted::{Script, Scripted};
use rig::sluice::Sluice;
use rig::world::socket;
use rig::{harness, sandbox, tests};

/// Ports of the edge: to the origin itself, to nginx and HAProxy before it, and to the origin of a crowd. What stands
/// in `tests/varnishtest` uses 8083.
const DIRECT: u16 = 8080;
const NGINX: u16 = 8081;
const HAPROXY: u16 = 8082;
const CROWD: u16 = 8084;

const CONFIGURATION: &str = r#"
[[listener]]
name    = "direct"
address = "203.0.113.10:8080"

[[listener]]
name    = "nginx"
address = "203.0.113.10:8081"

[[listener]]
name    = "haproxy"
address = "203.0.113.10:8082"

[[listener]]
name    = "tool"
address = "203.0.113.10:8083"

[[listener]]
name    = "crowd"
address = "203.0.113.10:8084"

[[route]]
listener = "direct"
match    = { path = "/*" }
upstream = "direct"

[[route]]
listener = "nginx"
match    = { path = "/*" }
upstream = "nginx"

[[route]]
listener = "haproxy"
match    = { path = "/*" }
upstream = "haproxy"

[[route]]
listener = "tool"
match    = { path = "/*" }
upstream = "tool"

[[route]]
listener = "crowd"
match    = { path = "/*" }
upstream = "crowd"

[[upstream]]
name      = "crowd"
endpoints = ["10.77.1.2:9003"]

[[upstream]]
name      = "direct"
endpoints = ["10.77.1.2:9000"]

[[upstream]]
name      = "nginx"
endpoints = ["10.77.1.2:9001"]

[[upstream]]
name      = "haproxy"
endpoints = ["10.77.1.2:9002"]

[[upstream]]
name      = "tool"
endpoints = ["10.77.0.2:9900"]

[tunables]
"http.head_timeout"     = "1s"
"http.body_timeout"     = "1s"
"net.send_timeout"      = "2s"
"upstream.head_timeout" = "2s"
"upstream.body_timeout" = "2s"
"#;

/// Sluice between a client and an origin that keeps what it hears.
struct World {
    field: Field,
    sluice: Sluice,
    origin: Scripted,
}

fn main() -> ExitCode {
    harness::main(
        World::build,
        |world| world.sluice.last_words(),
        tests![
            each_request_on_file_is_taken_or_refused_as_it_says,
            each_response_on_file_reaches_its_client_as_it_says,
            a_wounded_response_costs_nobody_else_an_answer,
            what_is_taken_means_the_same_to_nginx_and_haproxy,
            no_answer_of_a_thousand_clients_crosses_over_whatever_else_breaks,
            an_answer_that_crosses_over_is_noticed,
            whoever_is_slow_is_ended_and_others_do_not_notice,
            scripts_of_varnishtest_see_their_events_in_order,
            what_curl_says_is_what_the_origin_hears,
            what_python_says_is_what_the_origin_hears,
        ],
    )
}

fn each_request_on_file_is_taken_or_refused_as_it_says(world: &mut World) -> Result<()> {
    corpus::requests(world)
}

fn each_response_on_file_reaches_its_client_as_it_says(world: &mut World) -> Result<()> {
    corpus::responses(world)
}

fn a_wounded_response_costs_nobody_else_an_answer(world: &mut World) -> Result<()> {
    corpus::wounded(world)
}

fn what_is_taken_means_the_same_to_nginx_and_haproxy(world: &mut World) -> Result<()> {
    behind::compare(world)
}

fn no_answer_of_a_thousand_clients_crosses_over_whatever_else_breaks(
    world: &mut World,
) -> Result<()> {
    crossing::crowd(world)
}

fn an_answer_that_crosses_over_is_noticed(world: &mut World) -> Result<()> {
    crossing::planted(world)
}

fn whoever_is_slow_is_ended_and_others_do_not_notice(world: &mut World) -> Result<()> {
    tool::slow(world)
}

fn scripts_of_varnishtest_see_their_events_in_order(world: &mut World) -> Result<()> {
    tool::scripts(world)
}

fn what_curl_says_is_what_the_origin_hears(world: &mut World) -> Result<()> {
    tool::curl(world)
}

fn what_python_says_is_what_the_origin_hears(world: &mut World) -> Result<()> {
    tool::python(world)
}

impl World {
    fn build() -> Result<Self> {
        let field = Field::build()?;
        let origin = Scripted::start(&field.origins[0], 9000)?;
        second(&origin);
        let folder = sandbox::folder("etc")?;
        let file = folder.join("sluice.toml");
        fs::write(&file, CONFIGURATION).context("write the configuration")?;
        let sluice = Sluice::start(&field.edge, &file)?;
        Ok(Self {
            field,
            sluice,
            origin,
        })
    }
}

/// The answer to the request that follows each message.
fn second(origin: &Scripted) {
    let said = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond";
    let script = Script {
        said: said.into(),
        ..Script::default()
    };
    origin.say("/second", script);
}

fn edge(port: u16) -> Result<SocketAddr> {
    socket(WEB_V4, port)
}
