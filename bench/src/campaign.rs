//! The rounds of a scenario: interleaved over the peers in rotated order, judged one by one, repeated where strangers disturbed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rig::namespace::Namespace;
use rig::sandbox;

use crate::load::{self, Outcome, Pace, Plan};
use crate::machine::Cores;
use crate::peer::{LISTEN, ORIGIN, Peer};
use crate::sample;
use crate::say;
use crate::scenario::Case;

/// Before a round counts: connections are made, caches are warm, pools are full.
const WARM_UP: Duration = Duration::from_millis(500);
/// How long a round waits for others to finish what they are doing; then it begins anyway, and is judged.
const CALM_MAX: Duration = Duration::from_secs(20);
/// Shares of a core; more disturbs a round. On a quiet machine 1 to 5 % belong to nobody: interrupts, ticks, the way into and out of idleness.
const STRANGERS_MAX: f64 = 0.06;
const STEAL_MAX: f64 = 0.02;
/// A saturated round with an idler core measured the load instead of the proxy.
const BUSY_MIN: f64 = 0.95;
/// A paced round that answers a smaller share of what was asked has a queue without end instead of a latency.
const KEPT_MIN: f64 = 0.98;

/// How a campaign is led.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Rounds that must count, for each peer and case.
    pub rounds: usize,
    pub window: Duration,
    /// Rounds that strangers disturbed count too.
    pub noisy: bool,
}

/// Where it takes place.
pub struct Stage {
    pub namespace: Namespace,
    pub cores: Cores,
    /// That each proxy may have.
    pub descriptors: u64,
}

/// A peer, and why it cannot be measured if it cannot.
pub struct Candidate {
    pub peer: Peer,
    pub missing: Option<String>,
}

/// A figure's name and unit, as reports have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    CpuUsPerRequest,
    RequestsPerS,
    P50Us,
    P99Us,
}

/// What one round that counts measured.
pub type Figures = Vec<(Metric, f64)>;

/// All rounds of one peer in one case.
pub struct Course {
    pub peer: Peer,
    pub rounds: Vec<Figures>,
    /// Why rounds did not count.
    pub discarded: Vec<Discard>,
    /// Why there is nothing to count: missing, did not start, answered wrongly.
    pub failure: Option<String>,
}

/// Why a round does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    Strangers,
    Steal,
    /// Clients and origin were the bottleneck.
    NotSaturated,
    /// The proxy could not keep the rate.
    FellBehind,
}

impl Stage {
    /// A network of our own, in which no port is taken and none runs out.
    pub fn set(cores: Cores, descriptors: u64) -> Result<Self> {
        let namespace = Namespace::create("bench")?;
        namespace.set("ipv4/ip_local_port_range", "10000 65535")?;
        namespace.set("core/somaxconn", "8192")?;
        // Clients of `http1-connect` use a port again a second after its connection has ended.
        namespace.set("ipv4/tcp_tw_reuse", "1")?;
        Ok(Self {
            namespace,
            cores,
            descriptors,
        })
    }

    /// All rounds of one case. Peers with a reason to be missing are not measured.
    pub fn play(
        &self,
        case: &Case,
        candidates: &[Candidate],
        settings: Settings,
    ) -> Result<Vec<Course>> {
        let mut courses: Vec<Course> = candidates
            .iter()
            .map(|candidate| Course {
                peer: candidate.peer,
                rounds: Vec::new(),
                discarded: Vec::new(),
                failure: candidate
                    .missing
                    .as_ref()
                    .map(|why| format!("missing: {why}")),
            })
            .collect();
        for attempt in 0..2 * settings.rounds {
            for number in 0..courses.len() {
                let at = (number + attempt) % courses.len();
                let course = &mut courses[at];
                if course.wants_more(attempt, settings) {
                    course.attempt(self, case, settings);
                }
            }
        }
        Ok(courses)
    }

    fn round(&self, peer: &Peer, case: &Case, window: Duration) -> Result<Outcome> {
        let folder = sandbox::folder("bench")?;
        let proxy = peer.start(self, &folder, case.site)?;
        let plan = Plan {
            proxy: LISTEN.parse().context("where proxies listen")?,
            origin: ORIGIN.parse().context("where the origin listens")?,
            proxy_pid: proxy.pid(),
            cores: self.cores,
            exchange: case.exchange.clone(),
            connections: case.connections,
            pace: case.pace,
            reuse: case.reuse,
            warm_up: WARM_UP,
            window,
        };
        let load = self.namespace.thread("load", move || load::run(plan))?;
        let outcome = load.join().map_err(|_| anyhow!("the load panicked"))?;
        outcome.with_context(|| match proxy.last_words() {
            words if words.is_empty() => "it printed nothing".to_owned(),
            words => format!("it printed:\n{words}"),
        })
    }
}

impl Course {
    fn wants_more(&self, attempt: usize, settings: Settings) -> bool {
        // What the load or the proxy itself cannot do, it will not do at the tenth time either.
        let hopeless = attempt >= settings.rounds
            && self.rounds.is_empty()
            && !self.discarded.iter().any(Discard::is_passing);
        self.failure.is_none() && self.rounds.len() < settings.rounds && !hopeless
    }

    fn attempt(&mut self, stage: &Stage, case: &Case, settings: Settings) {
        let start = Instant::now();
        let calm = if settings.noisy {
            Ok(())
        } else {
            sample::wait_for_calm(stage.cores, CALM_MAX)
        };
        let outcome = match calm.and_then(|()| stage.round(&self.peer, case, settings.window)) {
            Ok(outcome) => outcome,
            Err(error) => {
                say::failed(&format!("{} in {}: {error:#}", self.peer.name, case.name));
                self.failure = Some(format!("failed: {error:#}"));
                return;
            }
        };
        let figures = figures(&outcome, case.pace);
        let verdict = judge(&outcome, case.pace, settings.noisy);
        say::round(
            self.peer.name,
            &case.name,
            &figures,
            &outcome,
            verdict,
            start,
        );
        match verdict {
            None => self.rounds.push(figures),
            Some(why) => self.discarded.push(why),
        }
    }
}

fn figures(outcome: &Outcome, pace: Pace) -> Figures {
    let answers = outcome.answers as f64;
    let mut figures = vec![
        (
            Metric::CpuUsPerRequest,
            outcome.span.proxy_ns as f64 / 1e3 / answers,
        ),
        (Metric::RequestsPerS, answers * 1e9 / outcome.span.ns as f64),
    ];
    if pace != Pace::Saturated {
        for (metric, share) in [(Metric::P50Us, 0.5), (Metric::P99Us, 0.99)] {
            let ns = outcome.latencies.quantile(share);
            figures.extend(ns.map(|ns| (metric, ns as f64 / 1e3)));
        }
    }
    figures
}

/// Why a round does not count; None if it does.
fn judge(outcome: &Outcome, pace: Pace, noisy: bool) -> Option<Discard> {
    let span = &outcome.span;
    if !noisy && span.steal > STEAL_MAX {
        return Some(Discard::Steal);
    }
    if !noisy && span.strangers > STRANGERS_MAX {
        return Some(Discard::Strangers);
    }
    match pace {
        Pace::Saturated if span.proxy_core_busy < BUSY_MIN => Some(Discard::NotSaturated),
        Pace::PerSecond(rate) => {
            let asked = f64::from(rate) * span.ns as f64 / 1e9;
            ((outcome.answers as f64) < asked * KEPT_MIN).then_some(Discard::FellBehind)
        }
        Pace::Saturated => None,
    }
}

impl Discard {
    /// Another round may be better.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Strangers | Self::Steal)
    }

    /// In a few words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Strangers => "other processes disturbed",
            Self::Steal => "the hypervisor took time away",
            Self::NotSaturated => "clients and origin were the bottleneck",
            Self::FellBehind => "the rate was not kept",
        }
    }
}

impl Metric {
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuUsPerRequest => "cpu_us_per_request",
            Self::RequestsPerS => "requests_per_s",
            Self::P50Us => "p50_us",
            Self::P99Us => "p99_us",
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::CpuUsPerRequest | Self::P50Us | Self::P99Us => "us",
            Self::RequestsPerS => "1/s",
        }
    }

    /// Those that a case has.
    pub fn of(case: &Case) -> &'static [Self] {
        match case.pace {
            Pace::Saturated => &[Self::CpuUsPerRequest, Self::RequestsPerS],
            Pace::PerSecond(_) => &[
                Self::CpuUsPerRequest,
                Self::RequestsPerS,
                Self::P50Us,
                Self::P99Us,
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::Histogram;
    use crate::sample::Span;

    const CALM: Span = Span {
        ns: 1_000_000_000,
        proxy_ns: 980_000_000,
        proxy_core_busy: 0.99,
        load_core_busy: 0.9,
        strangers: 0.01,
        steal: 0.0,
    };

    fn outcome(span: Span) -> Outcome {
        Outcome {
            span,
            answers: 49_000,
            latencies: Histogram::new(),
        }
    }

    #[test]
    fn a_calm_round_counts_and_a_disturbed_one_does_not() {
        let judged = |span| judge(&outcome(span), Pace::Saturated, false);
        assert_eq!(judged(CALM), None);
        assert_eq!(
            judged(Span {
                strangers: 0.2,
                ..CALM
            }),
            Some(Discard::Strangers)
        );
        assert_eq!(judged(Span { steal: 0.2, ..CALM }), Some(Discard::Steal));
        assert_eq!(
            judged(Span {
                proxy_core_busy: 0.9,
                ..CALM
            }),
            Some(Discard::NotSaturated)
        );
    }

    #[test]
    fn a_paced_round_counts_if_the_rate_was_kept() {
        let judged = |rate| judge(&outcome(CALM), Pace::PerSecond(rate), false);
        assert_eq!(judged(49_500), None);
        assert_eq!(judged(60_000), Some(Discard::FellBehind));
    }

    #[test]
    fn figures_are_those_of_the_case() {
        let figures = figures(&outcome(CALM), Pace::Saturated);
        assert_eq!(
            figures,
            [
                (Metric::CpuUsPerRequest, 20.0),
                (Metric::RequestsPerS, 49_000.0)
            ]
        );
    }
}
