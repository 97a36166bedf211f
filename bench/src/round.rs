//! What one round came to: its figures, and whether they count.

use crate::load::{Held, Outcome, Pace};
use crate::metric::Metric;
use crate::peer::Layer;
use crate::scenario::{Case, Work};

/// Shares of a core that belong to nobody we know; more disturbs a round. A core that is always busy has 0 to 4 % of it on a quiet machine.
const STRANGERS_MAX: f64 = 0.06;
/// One that sleeps and wakes has more: interrupts, and the way into and out of idleness, which no process has on its account. On a quiet
/// virtual machine 2 to 14 % were found, the most where few clients wait for a slow proxy. So strangers are seen less well there: those that
/// take less than this, and leave the core idle time. Those that fill it fall under the limit above.
const STRANGERS_MAX_IF_IDLE: f64 = 0.15;
const STEAL_MAX: f64 = 0.02;
/// A saturated round with an idler core measured the load instead of the proxy.
const BUSY_MIN: f64 = 0.95;
/// A paced round that answers less than was asked has a queue without end instead of a latency; one that answers more works off a
/// queue from before it began. So much of what was asked may be missing or too much.
const KEPT_WITHIN: f64 = 0.01;

/// One round of one peer.
#[derive(Debug)]
pub struct Round {
    pub figures: Figures,
    /// Why it does not count, if it does not.
    pub discard: Option<Discard>,
    /// How it went, for whoever watches.
    pub facts: String,
}

/// What one round that counts measured.
pub type Figures = Vec<(Metric, f64)>;

/// Why a round does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    Strangers,
    Steal,
    /// Clients and origin were the bottleneck.
    NotSaturated,
    /// The proxy could not keep the rate, or was still catching up.
    RateNotKept,
}

impl Round {
    /// `noisy`: what strangers did does not matter.
    pub fn of_work(outcome: &Outcome, case: &Case, noisy: bool) -> Self {
        let span = &outcome.span;
        let percent = |share: f64| (share * 100.0).round();
        Self {
            figures: figures(outcome, case),
            discard: judge(outcome, case, noisy),
            facts: format!(
                "cores {} % and {} %, strangers {} % and {} %, steal {} %",
                percent(span.proxy_core_busy),
                percent(span.load_core_busy),
                percent(span.strangers),
                percent(span.strangers_of_load),
                percent(span.steal),
            ),
        }
    }

    /// Memory is nobody else's: no stranger disturbs it.
    pub fn of_idle(held: &Held) -> Self {
        let more = held.after_bytes.saturating_sub(held.before_bytes);
        Self {
            figures: vec![(
                Metric::RssBytesPerConnection,
                more as f64 / held.connections as f64,
            )],
            discard: None,
            facts: format!(
                "{} connections, {} KiB before and {} KiB with them",
                held.connections,
                held.before_bytes >> 10,
                held.after_bytes >> 10
            ),
        }
    }
}

fn figures(outcome: &Outcome, case: &Case) -> Figures {
    Metric::of(case)
        .into_iter()
        .filter_map(|metric| Some((metric, value(metric, outcome)?)))
        .collect()
}

fn value(metric: Metric, outcome: &Outcome) -> Option<f64> {
    let (span, answers) = (&outcome.span, outcome.answers as f64);
    let gib = outcome.bytes as f64 / f64::from(1 << 30);
    let (proxy_s, wall_s) = (span.proxy_ns as f64 / 1e9, span.ns as f64 / 1e9);
    let machine_s = (span.proxy_core_busy + span.load_core_busy) * wall_s;
    let quantile_us = |share| Some(outcome.latencies.quantile(share)? as f64 / 1e3);
    match metric {
        Metric::CpuUsPerRequest => Some(proxy_s * 1e6 / answers),
        Metric::MachineUsPerRequest => Some(machine_s * 1e6 / answers),
        Metric::CpuSPerGib => Some(proxy_s / gib),
        Metric::MachineSPerGib => Some(machine_s / gib),
        Metric::RequestsPerS => Some(answers / wall_s),
        Metric::P50Us => quantile_us(0.5),
        Metric::P99Us => quantile_us(0.99),
        _ => None,
    }
}

/// Why a round does not count; None if it does.
fn judge(outcome: &Outcome, case: &Case, noisy: bool) -> Option<Discard> {
    let span = &outcome.span;
    if !noisy && span.steal > STEAL_MAX {
        return Some(Discard::Steal);
    }
    let cores = [
        (span.proxy_core_busy, span.strangers),
        (span.load_core_busy, span.strangers_of_load),
    ];
    if !noisy && cores.iter().any(|core| is_disturbed(*core)) {
        return Some(Discard::Strangers);
    }
    let busy = match case.site.layer {
        Layer::Requests => span.proxy_core_busy,
        // Packets are forwarded on the core of whoever sends them.
        Layer::Packets => span.proxy_core_busy.max(span.load_core_busy),
    };
    match case.work {
        Work::Exchanges(Pace::Saturated) if busy < BUSY_MIN => Some(Discard::NotSaturated),
        Work::Exchanges(Pace::PerSecond(rate)) if !noisy => {
            let asked = f64::from(rate) * span.ns as f64 / 1e9;
            let off = (outcome.answers as f64 - asked).abs();
            // At low rates a whole number of requests is never quite the rate.
            (off > (asked * KEPT_WITHIN).max(4.0)).then_some(Discard::RateNotKept)
        }
        _ => None,
    }
}

/// How busy a core was, and how much of that was nobody's.
fn is_disturbed((busy, strangers): (f64, f64)) -> bool {
    let limit = match busy >= BUSY_MIN {
        true => STRANGERS_MAX,
        false => STRANGERS_MAX_IF_IDLE,
    };
    strangers > limit
}

impl Discard {
    /// Another round may be better.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Strangers | Self::Steal)
    }

    /// In a few words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Strangers => "other processes disturbed",
            Self::Steal => "the hypervisor took time away",
            Self::NotSaturated => "clients and origin were the bottleneck",
            Self::RateNotKept => "the rate was not kept",
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
        strangers_of_load: 0.01,
        steal: 0.0,
    };

    fn outcome(span: Span) -> Outcome {
        Outcome {
            span,
            answers: 49_000,
            bytes: 0,
            latencies: Histogram::new(),
        }
    }

    fn case(pace: Pace) -> Case {
        crate::scenario::kept(pace, "", 128).remove(0)
    }

    #[test]
    fn a_calm_round_counts_and_a_disturbed_one_does_not() {
        let judged = |span| judge(&outcome(span), &case(Pace::Saturated), false);
        assert_eq!(judged(CALM), None);
        assert_eq!(
            judged(Span {
                strangers: 0.2,
                ..CALM
            }),
            Some(Discard::Strangers)
        );
        // A load that often waits is not a disturbed one, unless somebody fills its idle time.
        let waits = Span {
            load_core_busy: 0.8,
            strangers_of_load: 0.13,
            ..CALM
        };
        assert_eq!(judged(waits), None);
        for busy in [0.8, 1.0] {
            let filled = Span {
                load_core_busy: busy,
                strangers_of_load: if busy < 0.9 { 0.2 } else { 0.08 },
                ..waits
            };
            assert_eq!(judged(filled), Some(Discard::Strangers));
        }
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
        let judged = |rate| judge(&outcome(CALM), &case(Pace::PerSecond(rate)), false);
        assert_eq!(judged(49_200), None);
        for rate in [60_000, 40_000] {
            assert_eq!(judged(rate), Some(Discard::RateNotKept), "{rate}");
        }
    }

    #[test]
    fn figures_are_those_of_the_case() {
        let figures = figures(&outcome(CALM), &case(Pace::Saturated));
        assert_eq!(
            figures,
            [
                (Metric::CpuUsPerRequest, 20.0),
                (Metric::RequestsPerS, 49_000.0)
            ]
        );
    }
}
