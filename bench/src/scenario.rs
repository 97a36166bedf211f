//! What is measured: each scenario is a list of cases, or a way of its own, in its own file; what has no feature yet is listed as such.

mod endpoint_change;
mod flood;
mod http1_16k;
mod http1_connect;
mod http1_gateway;
mod http1_routes;
mod http1_small;
mod idle;
mod layer4;
mod life;
mod packet;
mod recorded;
mod tls_handshake;
mod tls_small;
mod transfer;

use anyhow::{Result, bail};

use crate::campaign::{Candidate, Settings, Stage};
use crate::load::{Direction, Exchange, Pace};
use crate::peer::{Feature, Layer, Peer, Site};
use crate::report::Report;

/// A named group of cases.
#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    pub what: &'static str,
    /// Whose peers it has.
    pub layer: Layer,
    pub way: Way,
}

/// How a scenario is measured.
#[derive(Clone, Copy)]
pub enum Way {
    /// By rounds of cases, interleaved over the peers. With the rate of paced cases, in requests per second.
    Cases(fn(u32) -> Vec<Case>),
    /// In its own way, which fills the report; it takes about so many seconds.
    Own(fn(&Bench<'_>, &mut Report) -> Result<()>, u64),
    NotYet,
}

/// What a scenario measures with.
pub struct Bench<'a> {
    pub stage: &'a Stage,
    pub candidates: &'a [Candidate],
    pub settings: Settings,
    /// Only cases whose name contains this.
    pub case: &'a str,
}

impl Bench<'_> {
    /// Whether a case is wanted.
    pub fn wants(&self, case: &str) -> bool {
        case.contains(self.case)
    }

    /// Whether somebody is to be measured.
    pub fn has(&self, peer: &str) -> bool {
        self.candidates
            .iter()
            .any(|candidate| candidate.peer.name == peer)
    }
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
    /// Sessions of TLS are resumed.
    pub resumes: bool,
    pub work: Work,
}

/// What clients do with their connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Exchanges(Pace),
    /// One exchange each, and then nothing.
    Idle,
    /// One body, so long that nothing else counts.
    Transfer(Direction),
    /// UDP, as fast as answers come.
    Datagrams,
}

impl Case {
    /// What a peer must be able to do for it.
    pub fn needs(&self) -> Option<Feature> {
        match self.work {
            Work::Datagrams => Some(Feature::Datagrams),
            _ if self.site.gateway => Some(Feature::Gateway),
            _ if self.site.tls => Some(Feature::Tls),
            _ if self.site.routes > 0 => Some(Feature::Routes),
            _ => None,
        }
    }

    /// Seconds that a round takes in all: start, warming up, the round itself, the end. As found on two cores of a virtual machine.
    fn round_s(&self, window_s: f64) -> f64 {
        const AROUND_S: f64 = 0.9;
        match self.work {
            Work::Exchanges(_) | Work::Datagrams => AROUND_S + window_s,
            Work::Transfer(_) => AROUND_S + 1.5,
            Work::Idle => AROUND_S + 6.0,
        }
    }

    /// Bodies are so long that their bytes count and not their number.
    pub fn is_bulk(&self) -> bool {
        self.exchange.body_bytes >= 1 << 20
    }
}

/// All of them: those that count first.
pub const SCENARIOS: &[Scenario] = &[
    cases(
        "http1-small",
        "128 B over kept connections",
        http1_small::cases,
    ),
    cases(
        "http1-16k",
        "16 KiB over kept connections",
        http1_16k::cases,
    ),
    cases(
        "http1-connect",
        "128 B, a new connection each",
        http1_connect::cases,
    ),
    cases(
        "tls-small",
        "128 B over kept TLS connections",
        tls_small::cases,
    ),
    cases(
        "tls-handshake",
        "full and resumed handshakes",
        tls_handshake::cases,
    ),
    cases(
        "tls-bulk",
        "1 MiB over kept TLS connections",
        transfer::bulk,
    ),
    cases(
        "http1-routes",
        "10, 1 000 and 10 000 routes",
        http1_routes::cases,
    ),
    cases(
        "http1-gateway",
        "API key, rate limit, three header rules; no JWT and no access log yet",
        http1_gateway::cases,
    ),
    cases("download", "1 GiB, clear and TLS", transfer::download),
    cases("upload", "1 GiB, clear and TLS", transfer::upload),
    cases("idle", "memory per idle connection", idle::cases),
    on_packets("l4-tcp", "forwarded TCP", Way::Cases(layer4::tcp)),
    on_packets(
        "l4-connect",
        "forwarded TCP, a new connection each",
        Way::Cases(layer4::connect),
    ),
    on_packets("l4-udp", "forwarded UDP", Way::Cases(layer4::udp)),
    on_packets(
        "packet",
        "ns per packet in the kernel half",
        Way::Own(packet::measure, 60),
    ),
    on_packets(
        "packet-rate",
        "live frames per second",
        Way::Own(flood::rate, 20),
    ),
    on_packets("drop", "a flood against bans", Way::Own(flood::refuse, 40)),
    on_packets(
        "endpoint-change",
        "time until a change has effect",
        Way::Own(endpoint_change::measure, 30),
    ),
    own("start", "time until it serves", life::start, 120),
    own(
        "reload",
        "time until a new configuration serves",
        life::reload,
        120,
    ),
    own(
        "recorded",
        "instructions and sizes, which no noise changes",
        recorded::measure,
        30,
    ),
    not_yet("http2-small", "128 B over HTTP/2"),
    not_yet("grpc", "unary calls"),
    not_yet("websocket", "messages both ways"),
];

const fn cases(name: &'static str, what: &'static str, cases: fn(u32) -> Vec<Case>) -> Scenario {
    Scenario {
        name,
        what,
        layer: Layer::Requests,
        way: Way::Cases(cases),
    }
}

const fn own(
    name: &'static str,
    what: &'static str,
    measure: fn(&Bench<'_>, &mut Report) -> Result<()>,
    seconds: u64,
) -> Scenario {
    Scenario {
        name,
        what,
        layer: Layer::Requests,
        way: Way::Own(measure, seconds),
    }
}

const fn on_packets(name: &'static str, what: &'static str, way: Way) -> Scenario {
    Scenario {
        name,
        what,
        layer: Layer::Packets,
        way,
    }
}

const fn not_yet(name: &'static str, what: &'static str) -> Scenario {
    Scenario {
        name,
        what,
        layer: Layer::Requests,
        way: Way::NotYet,
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

/// What some scenarios need beside the peers.
pub const PACKAGES: &[&str] = &["valgrind", "ethtool", "iproute2"];

/// Seconds that these take on a quiet machine, installing aside.
pub fn estimate_s(scenarios: &[Scenario], peers: &[Peer], settings: Settings, rate: u32) -> u64 {
    let mut seconds = 0.0;
    for scenario in scenarios {
        let peers = peers
            .iter()
            .filter(|peer| peer.layer == scenario.layer)
            .count();
        match scenario.way {
            Way::NotYet => {}
            Way::Own(_, own_s) => seconds += own_s as f64,
            Way::Cases(cases) => {
                for case in cases(rate) {
                    let rounds = (peers * settings.rounds) as f64;
                    seconds += rounds * case.round_s(settings.window.as_secs_f64());
                }
            }
        }
    }
    seconds as u64
}

/// At 64 and at 512 connections, as fast as it goes.
fn saturated(body_bytes: usize) -> Vec<Case> {
    kept(Pace::Saturated, "saturated", body_bytes)
}

/// At 64 and at 512 connections, at a fixed rate.
fn paced(rate: u32, body_bytes: usize) -> Vec<Case> {
    kept(Pace::PerSecond(rate), &format!("at-{rate}"), body_bytes)
}

pub fn kept(pace: Pace, pace_name: &str, body_bytes: usize) -> Vec<Case> {
    let case = |connections| Case {
        name: format!("{connections}-{pace_name}"),
        site: Site::default(),
        exchange: Exchange {
            path: "/bench/answer".into(),
            body_bytes,
            fields: "",
        },
        connections,
        reuse: true,
        resumes: false,
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
            let Way::Cases(cases) = scenario.way else {
                continue;
            };
            let cases = cases(1000);
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
