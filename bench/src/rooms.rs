//! Pure rooms of Sluice at work with nothing around them, for valgrind to count their instructions.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use sluice::config::{self, Config};
use sluice::message::{Limits, Parse, RequestHead};
use sluice::policy::{Cells, Facts, Policies, Step};
use sluice::route::Routes;

/// Their names. The chain of policies changes a head, so each time has one parsed for it.
pub const ROOMS: &[&str] = &["parse", "route", "parse-policy"];

/// As clients of `http1-gateway` send it.
const REQUEST: &[u8] = b"GET /route77/answer HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: sluice-bench/1\r\nAccept: */*\r\n\
    Accept-Language: en\r\nConnection: keep-alive\r\nX-Api-Key: open-sesame\r\n\r\n";
const ROUTES: usize = 100;
/// The policies of `http1-gateway`.
const POLICIES: &str = r#"
[[policy]]
name    = "keys"
api_key = { header = "x-api-key", consumers = "consumers.toml" }

[[policy]]
name       = "fair-use"
rate_limit = { key = "consumer", rate = "1000000/s", burst = 1000000 }

[[policy]]
name    = "fields"
headers = { request = { remove = ["x-secret"], set = { x-edge = "bench" } }, response = { set = { x-served-by = "edge" } } }
"#;

/// A cell for everybody that is never empty.
struct Generous;

impl Cells for Generous {
    fn spend(&self, _: u64, _: u64, _: u32, _: u64) -> Result<(), u64> {
        Ok(())
    }
}

/// Does the work of a room so often.
pub fn enter(room: &str, times: u32) -> Result<()> {
    let config = configuration()?;
    let mut head = RequestHead::default();
    match room {
        "parse" => {
            for _ in 0..times {
                parse(&mut head)?;
            }
        }
        "route" => {
            let routes = Routes::new(&config);
            for _ in 0..times {
                let found = routes.find(0, black_box("bench.test"), black_box("/route77/answer"));
                black_box(found).context("no route was found")?;
            }
        }
        "parse-policy" => {
            let policies = Policies::new(&config, 7);
            for _ in 0..times {
                parse(&mut head)?;
                chain(&policies, &mut head)?;
            }
        }
        _ => bail!("no room is called `{room}`: {}", ROOMS.join(", ")),
    }
    Ok(())
}

fn parse(head: &mut RequestHead) -> Result<()> {
    match head.parse(black_box(REQUEST), &Limits::default()) {
        Ok(Parse::Complete(_)) => Ok(()),
        other => bail!("our own request was parsed to {other:?}"),
    }
}

fn chain(policies: &Policies, head: &mut RequestHead) -> Result<()> {
    let mut facts = Facts {
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        now_ns: 1,
        consumer: None,
    };
    for policy in 0..3 {
        match policies.request(policy, head, &mut facts, &Generous) {
            Step::Continue => {}
            step => bail!("a policy refuses our own request: {step:?}"),
        }
    }
    Ok(())
}

/// A hundred routes and the policies of a gateway.
fn configuration() -> Result<Config> {
    let mut text = "[[listener]]\nname = \"edge\"\naddress = \"127.0.0.1:8000\"\n\
        [[upstream]]\nname = \"origin\"\nendpoints = [\"127.0.0.1:9000\"]\n"
        .to_owned();
    for number in 0..ROUTES {
        text += &format!(
            "[[route]]\nmatch = {{ path = \"/route{number}/*\" }}\nupstream = \"origin\"\n"
        );
    }
    let files = config::Bundle::of_files([
        ("/sluice.toml", text + POLICIES),
        (
            "/consumers.toml",
            include_str!("../peers/consumers.toml").to_owned(),
        ),
    ]);
    config::load(&files, Path::new("/sluice.toml"))
        .map(|loaded| loaded.config)
        .map_err(|wrong| anyhow!("{} errors in our own configuration: {wrong:?}", wrong.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_room_does_its_work() {
        for room in ROOMS {
            enter(room, 3).unwrap();
        }
        assert!(enter("attic", 1).is_err());
    }
}
