//! What is measured: each scenario is a list of cases, in a file of its own; what has no feature or no instrument yet is listed as such.

mod http1_16k;
mod http1_connect;
mod http1_routes;
mod http1_small;
mod idle;
mod tls_small;

use anyhow::{Result, bail};

use crate::load::{Exchange, Pace};
use crate::peer::Site;

/// A named group of cases.
#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    pub what: &'static str,
    /// With the rate of paced cases, in requests per second. None: not yet.
    pub cases: Option<fn(u32) -> Vec<Case>>,
}

/// One thing that is measured for each peer.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub site: Site,
    pub exchange: Exchange,
    pub connections: usize,
    /// Connections are kept, else each exchange has its own.
    pub reuse: bool,
    pub work: Work,
}

/// What clients do with their connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Exchanges(Pace),
    /// One exchange each, and then nothing.
    Idle,
}

/// All of them: those that count first.
pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "http1-small",
        "128 B over kept connections",
        http1_small::cases,
    ),
    scenario(
        "http1-16k",
        "16 KiB over kept connections",
        http1_16k::cases,
    ),
    scenario(
        "http1-connect",
        "128 B, a new connection each",
        http1_connect::cases,
    ),
    scenario(
        "tls-small",
        "128 B over kept TLS connections",
        tls_small::cases,
    ),
    scenario(
        "http1-routes",
        "10, 1 000 and 10 000 routes",
        http1_routes::cases,
    ),
    scenario("idle", "memory per idle connection", idle::cases),
    not_yet("tls-handshake", "full and resumed handshakes"),
    not_yet("tls-bulk", "large bodies over TLS"),
    not_yet("http2-small", "128 B over HTTP/2"),
    not_yet("grpc", "unary calls"),
    not_yet(
        "http1-gateway",
        "keys, tokens, limits, header rules, access log",
    ),
    not_yet("download", "1 GiB, clear and TLS"),
    not_yet("upload", "1 GiB, clear and TLS"),
    not_yet("websocket", "messages both ways"),
    not_yet("l4-tcp", "forwarded TCP"),
    not_yet("l4-udp", "forwarded UDP"),
    not_yet("l4-connect", "forwarded TCP, a new connection each"),
    not_yet("packet", "ns per packet in the kernel half"),
    not_yet("packet-rate", "live frames per second"),
    not_yet("drop", "a flood against bans"),
    not_yet("endpoint-change", "time until a change has effect"),
    not_yet("start", "time until it serves"),
    not_yet("reload", "time until a new configuration serves"),
];

const fn scenario(name: &'static str, what: &'static str, cases: fn(u32) -> Vec<Case>) -> Scenario {
    Scenario {
        name,
        what,
        cases: Some(cases),
    }
}

const fn not_yet(name: &'static str, what: &'static str) -> Scenario {
    Scenario {
        name,
        what,
        cases: None,
    }
}

/// The one with this name; all without a name.
pub fn choose(name: Option<&str>) -> Result<Vec<Scenario>> {
    let Some(name) = name else {
        return Ok(SCENARIOS.to_vec());
    };
    match SCENARIOS.iter().find(|scenario| scenario.name == name) {
        Some(scenario) => Ok(vec![*scenario]),
        None => {
            let known: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
            bail!("no scenario is called `{name}`: {}", known.join(", "))
        }
    }
}

/// At 64 and at 512 connections, as fast as it goes.
fn saturated(body_bytes: usize) -> Vec<Case> {
    kept(Pace::Saturated, "saturated", body_bytes)
}

/// At 64 and at 512 connections, at a fixed rate.
fn paced(rate: u32, body_bytes: usize) -> Vec<Case> {
    kept(Pace::PerSecond(rate), &format!("at-{rate}"), body_bytes)
}

fn kept(pace: Pace, pace_name: &str, body_bytes: usize) -> Vec<Case> {
    let case = |connections| Case {
        name: format!("{connections}-{pace_name}"),
        site: Site::default(),
        exchange: Exchange {
            path: "/bench/answer".into(),
            body_bytes,
        },
        connections,
        reuse: true,
        work: Work::Exchanges(pace),
    };
    [64, 512].map(case).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_scenarios_and_of_their_cases_are_unique() {
        let mut names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        for scenario in SCENARIOS {
            let cases = scenario.cases.map(|cases| cases(1000)).unwrap_or_default();
            let mut of_cases: Vec<_> = cases.into_iter().map(|case| case.name).collect();
            let count = of_cases.len();
            of_cases.sort_unstable();
            of_cases.dedup();
            assert_eq!(of_cases.len(), count, "{}", scenario.name);
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_name_that_nobody_has_is_refused_with_those_that_exist() {
        let error = choose(Some("http1-smal"))
            .map(drop)
            .unwrap_err()
            .to_string();
        assert!(error.contains("http1-small"), "{error}");
    }
}
