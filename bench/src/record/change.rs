//! What changed between two records, beyond the spread of both.

use std::fmt::Write;

use super::Record;
use crate::metric::Metric;
use crate::report::{Report, Row, shown};

/// Machines drift: peers that did not change show by how much, and Sluice's rows are told beside theirs.
pub fn compare(old: &Record, new: &Record) -> String {
    let mut text = String::new();
    let mut within = 0;
    for report in &new.reports {
        let Some(before) = old.report(&report.scenario) else {
            let _ = writeln!(text, "{}: not in the old record", report.scenario);
            continue;
        };
        for row in &report.rows {
            let Some(was) = before.rows.iter().find(|was| is_same(was, row)) else {
                continue;
            };
            match difference(was, row) {
                Some(line) => {
                    let drift = drift(before, report, row);
                    let _ = writeln!(text, "{} {line}{drift}", report.scenario);
                }
                None => within += 1,
            }
        }
    }
    let _ = writeln!(
        text,
        "{within} figures are within the spread of both records"
    );
    text
}

fn is_same(was: &Row, row: &Row) -> bool {
    (&was.proxy, &was.case, &was.metric) == (&row.proxy, &row.case, &row.metric)
}

fn difference(was: &Row, row: &Row) -> Option<String> {
    let metric = Metric::find(&row.metric)?;
    let name = format!("{} {} {}", row.case, row.proxy, row.metric);
    let (Some(old), Some(new)) = (was.median, row.median) else {
        return match (was.median, row.median) {
            (None, None) => None,
            (old, new) => Some(format!("{name}: {} -> {}", shown(old), shown(new))),
        };
    };
    let apart = row.min > was.max || row.max < was.min;
    // One round has no spread: a tenth is taken for it.
    let alone = was.rounds.min(row.rounds) < 2 && !metric.is_exact();
    let is_change = apart && (!alone || (new / old - 1.0).abs() > 0.1);
    is_change.then(|| {
        let word = if (new > old) == metric.is_cost() {
            "worse"
        } else {
            "better"
        };
        format!(
            "{name}: {} -> {} {} (x{:.2}, {word})",
            shown(Some(old)),
            shown(Some(new)),
            row.unit,
            new / old
        )
    })
}

/// By how much HAProxy, which did not change, is off in the same case.
fn drift(before: &Report, after: &Report, row: &Row) -> String {
    let reference = |report: &Report| {
        let same = |other: &&Row| {
            other.proxy == "haproxy" && other.case == row.case && other.metric == row.metric
        };
        report.rows.iter().find(same).and_then(|row| row.median)
    };
    match (reference(before), reference(after)) {
        (Some(old), Some(new)) if row.proxy != "haproxy" => {
            format!("; haproxy x{:.2} meanwhile", new / old)
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn only_what_left_the_spread_is_a_change() {
        let old = record("x", &[10.0, 12.0], &[20.0, 21.0]);
        let same = compare(&old, &record("x", &[11.0, 13.0], &[20.0, 21.0]));
        assert!(same.starts_with("2 figures are within"), "{same}");
        let worse = compare(&old, &record("x", &[13.0, 15.0], &[20.0, 21.0]));
        assert!(worse.contains("sluice cpu_us_per_request: 11.00 -> 14.00 us (x1.27, worse); haproxy x1.00 meanwhile"), "{worse}");
    }
}
