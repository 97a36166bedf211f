//! What Sluice is meant to reach, and where it does not: against its goals, and against each peer beyond the spread.

use super::Record;
use crate::metric::Metric;
use crate::report::{Report, Row, shown};

/// A ratio that Sluice's figure should not exceed.
struct Goal {
    scenario: &'static str,
    /// The beginning of the case's name.
    case: &'static str,
    /// Whose figure it is a ratio to, in which case (None: the same), or an absolute limit.
    against: Against,
    most: f64,
    is_required: bool,
}

#[derive(Clone, Copy)]
enum Against {
    Peer(&'static str),
    /// A case of the floor.
    Floor(&'static str),
    /// Another case of our own.
    Own(&'static str),
    Nothing,
}

use Against::{Floor, Nothing, Own, Peer};

/// The figures of the packet path were set on a machine whose floor was 21 ns: they are multiples of the floor of the same run.
const GOALS: &[Goal] = &[
    required("http1-small", "64-saturated", Peer("haproxy"), 0.75),
    required("http1-small", "64-saturated", Peer("nginx"), 0.75),
    required("http1-small", "64-saturated", Peer("envoy"), 0.25),
    required("http1-small", "512-saturated", Peer("haproxy"), 0.75),
    required("http1-small", "512-saturated", Peer("nginx"), 0.75),
    required("http1-small", "512-saturated", Peer("envoy"), 0.25),
    required("http1-small", "64-at-", Peer("haproxy"), 0.9),
    wanted("http1-small", "64-saturated", Peer("haproxy"), 0.65),
    wanted("http1-small", "64-saturated", Peer("nginx"), 0.65),
    required("http1-16k", "", Peer("haproxy"), 0.85),
    required("download", "clear", Peer("haproxy"), 1.0),
    required("idle", "clear", Nothing, 4096.0),
    required("idle", "clear", Peer("haproxy"), 0.5),
    // Else epoll would have to be the default.
    required("http1-small", "64-saturated", Peer(EPOLL), 1.0),
    required("http1-16k", "64-saturated", Peer(EPOLL), 1.0),
    required("http1-connect", "", Peer(EPOLL), 1.0),
    required("http1-gateway", "", Peer(EPOLL), 1.0),
    required("tls-small", "", Peer(EPOLL), 1.0),
    required("download", "", Peer(EPOLL), 1.0),
    required("packet", "ipip-tcp4/1", Floor("floor/tx"), 80.0 / 21.0),
    required("packet", "ipip-tcp4/524288", Own("ipip-tcp4/1"), 1.1),
    required("packet", "gue-tcp4/1", Floor("floor/tx"), 130.0 / 21.0),
    required("packet", "nat-tcp4/1", Floor("floor/tx"), 130.0 / 21.0),
    required("packet", "not-ours/1", Floor("floor/pass"), 50.0 / 21.0),
    required("packet", "syn-new/524288", Own("ipip-tcp4/524288"), 1.1),
    required("endpoint-change", "in-daemon", Nothing, 2.0),
    wanted("endpoint-change", "by-command", Nothing, 2.0),
];

/// Ourselves, without the uring.
const EPOLL: &str = "sluice/epoll";

const fn required(scenario: &'static str, case: &'static str, against: Against, most: f64) -> Goal {
    Goal {
        scenario,
        case,
        against,
        most,
        is_required: true,
    }
}

const fn wanted(scenario: &'static str, case: &'static str, against: Against, most: f64) -> Goal {
    Goal {
        is_required: false,
        ..required(scenario, case, against, most)
    }
}

/// Why something is as it is, where that is known: by scenario and the beginning of the case.
const REASONS: &[(&str, &str, &str)] = &[
    (
        "packet",
        "nat-",
        "NAT needs an entry per flow by nature: with many flows, cache and TLB misses in the table are the price",
    ),
    (
        "endpoint-change",
        "by-reload",
        "a reload reads the whole configuration again; `sluice endpoint` does not",
    ),
];

/// Each goal that was measured, met or not, in one line.
pub fn verdicts(record: &Record) -> Vec<(bool, String)> {
    let mut lines = Vec::new();
    for goal in GOALS {
        let Some(report) = record.report(goal.scenario) else {
            continue;
        };
        for row in ours(report) {
            let named = match goal.against {
                // A packet's case is one row, not a group of them.
                Floor(_) | Own(_) => row.case == goal.case,
                Peer(_) | Nothing => row.case.starts_with(goal.case),
            };
            if !named || !is_main(report, row) {
                continue;
            }
            lines.extend(goal.judge(report, row));
        }
    }
    lines
}

/// Where another proxy did better than Sluice beyond the spread of both, or Sluice has no number where others have one.
pub fn losses(record: &Record) -> Vec<String> {
    let mut lines = Vec::new();
    for report in &record.reports {
        for row in ours(report) {
            let Some(metric) = Metric::find(&row.metric) else {
                continue;
            };
            if metric == Metric::RequestsPerS && !is_a_race(report, &row.case) {
                continue;
            }
            let others = report.rows.iter().filter(|other| {
                other.case == row.case
                    && other.metric == row.metric
                    && other.proxy != row.proxy
                    && !other.proxy.starts_with("floor")
                    && other.median.is_some()
            });
            for other in others {
                lines.extend(loss(report, metric, row, other));
            }
        }
    }
    lines
}

/// Whether more requests a second are better: a fixed rate is everybody's, and where packets are forwarded some have two cores for it.
fn is_a_race(report: &Report, case: &str) -> bool {
    let not = [Metric::P50Us, Metric::MachineUsPerRequest].map(Metric::name);
    let mut rows = report.rows.iter();
    !rows.any(|row| row.case == case && not.contains(&row.metric.as_str()))
}

fn loss(report: &Report, metric: Metric, row: &Row, other: &Row) -> Option<String> {
    let what = format!("{} {} {}", report.scenario, row.case, row.metric);
    let (Some(own), Some(others)) = (row.median, other.median) else {
        return Some(format!(
            "{what}: Sluice has no number, {} has {} {}",
            other.proxy,
            shown(other.median),
            other.unit
        ));
    };
    let is_worse = if metric.is_cost() {
        row.min > other.max
    } else {
        row.max < other.min
    };
    // One round has no spread: a tenth is taken for it.
    let spread = if row.rounds.min(other.rounds) < 2 {
        0.1
    } else {
        0.02
    };
    let matters = metric.is_exact() || (own / others - 1.0).abs() > spread;
    (is_worse && matters).then(|| {
        format!(
            "{what}: {} against {} {} of {} (x{:.2}){}",
            shown(row.median),
            shown(other.median),
            row.unit,
            other.proxy,
            own / others,
            reason(&report.scenario, &row.case)
        )
    })
}

impl Goal {
    fn judge(&self, report: &Report, row: &Row) -> Option<(bool, String)> {
        let own = row.median?;
        let figure = |proxy: &str, case: &str| {
            report
                .rows
                .iter()
                .find(|other| {
                    other.proxy == proxy && other.case == case && other.metric == row.metric
                })
                .and_then(|other| other.median)
        };
        let (of, unit, name) = match self.against {
            Peer(name) => (figure(name, &row.case)?, "", format!(" of {name}'s")),
            Floor(case) => (figure("floor", case)?, "", format!(" of {case}")),
            Own(case) => (figure("sluice", case)?, "", format!(" of {case}")),
            Nothing => (1.0, row.unit.as_str(), String::new()),
        };
        let (ratio, met) = (own / of, own / of <= self.most);
        let line = format!(
            "{} {} {}: {ratio:.2}{unit}{name}, {} at most {:.2}{}",
            self.scenario,
            row.case,
            row.metric,
            if self.is_required {
                "required"
            } else {
                "wanted"
            },
            self.most,
            if met {
                String::new()
            } else {
                reason(self.scenario, &row.case)
            }
        );
        Some((met, line))
    }
}

fn ours(report: &Report) -> impl Iterator<Item = &Row> {
    report.rows.iter().filter(|row| row.proxy == "sluice")
}

/// Whether a row is of the first metric of its case.
fn is_main(report: &Report, row: &Row) -> bool {
    let first = ours(report).find(|other| other.case == row.case);
    first.is_some_and(|first| first.metric == row.metric)
}

fn reason(scenario: &str, case: &str) -> String {
    REASONS
        .iter()
        .find(|(of, start, _)| *of == scenario && case.starts_with(start))
        .map_or(String::new(), |(_, _, why)| format!("; {why}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn a_goal_is_met_or_missed_by_the_ratio_of_medians() {
        let met = verdicts(&record("http1-small", &[14.0], &[20.0]));
        assert_eq!(
            met.iter().map(|(met, _)| *met).collect::<Vec<_>>(),
            [true, false]
        );
        assert!(
            met[0]
                .1
                .contains("0.70 of haproxy's, required at most 0.75"),
            "{met:?}"
        );
        assert!(verdicts(&record("http1-connect", &[99.0], &[1.0])).is_empty());
    }

    #[test]
    fn who_is_worse_beyond_the_spread_loses_and_nobody_else() {
        assert!(losses(&record("x", &[10.0, 12.0], &[11.0, 13.0])).is_empty());
        let lost = losses(&record("x", &[14.0, 15.0], &[11.0, 13.0]));
        assert_eq!(lost.len(), 1);
        assert!(lost[0].contains("of haproxy (x1.21)"), "{lost:?}");
        let lost = losses(&record("x", &[], &[11.0]));
        assert!(lost[0].contains("no number"), "{lost:?}");
    }
}
