//! The report of a scenario: rows of medians and extremes, as a table or as JSON. What was not measured has no number.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::campaign::Course;
use crate::machine::Machine;
use crate::round::{Discard, Metric};
use crate::scenario::Case;

/// Against whom others are held in the table.
const BESIDE: &str = "haproxy";

/// Everything about one scenario; its JSON form is an interface for scripts.
#[derive(Debug, Serialize)]
pub struct Report {
    scenario: String,
    machine: Machine,
    rows: Vec<Row>,
    /// Why there is no number, or fewer rounds.
    #[serde(skip)]
    remarks: Vec<String>,
    #[serde(skip)]
    failed: usize,
}

/// One metric of one peer in one case; no numbers where no round counts.
#[derive(Debug, Serialize)]
pub struct Row {
    proxy: &'static str,
    case: String,
    metric: &'static str,
    unit: &'static str,
    median: Option<f64>,
    min: Option<f64>,
    max: Option<f64>,
    rounds: usize,
    discarded: usize,
}

impl Report {
    pub fn new(scenario: &str, machine: Machine) -> Self {
        Self {
            scenario: scenario.to_owned(),
            machine,
            rows: Vec::new(),
            remarks: Vec::new(),
            failed: 0,
        }
    }

    /// Adds what a case came to.
    pub fn add(&mut self, case: &Case, courses: &[Course]) {
        for course in courses {
            for metric in Metric::of(case) {
                self.rows.push(Row::new(case, course, *metric));
            }
            self.remark(case, course);
        }
    }

    fn remark(&mut self, case: &Case, course: &Course) {
        let name = course.peer.name;
        match &course.failure {
            // The reason is the same in each case, and stands among the versions.
            Some(why) if why.starts_with("missing") => {}
            Some(why) => {
                self.failed += 1;
                self.remarks.push(format!("{name} in {}: {why}", case.name));
            }
            None => {}
        }
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for why in &course.discarded {
            *reasons.entry(Discard::words(*why)).or_default() += 1;
        }
        for (words, count) in reasons {
            let what = format!("{name} in {}: {count} discarded, {words}", case.name);
            self.remarks.push(what);
        }
    }

    /// How many peers failed in a case; missing is not failing.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// Whether there is something to show.
    pub fn has_rows(&self) -> bool {
        !self.rows.is_empty()
    }

    /// One line of JSON.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "{} on {}, Linux {}, {} cores, {}; rounds of {} s",
            self.scenario,
            self.machine.cpu,
            self.machine.kernel,
            self.machine.cores,
            self.machine.congestion_control,
            self.machine.round_s
        );
        for (peer, version) in &self.machine.peers {
            let _ = writeln!(text, "  {peer:<15} {version}");
        }
        let _ = writeln!(
            text,
            "\n{:<16}{:<15}{:<20}{:>12}{:>12}{:>12}{:>8}{:>11}{:>12}",
            "case", "proxy", "metric", "median", "min", "max", "rounds", "discarded", BESIDE
        );
        let mut last = "";
        for row in &self.rows {
            if last != row.case && !last.is_empty() {
                text.push('\n');
            }
            last = &row.case;
            let _ = writeln!(
                text,
                "{:<16}{:<15}{:<20}{:>12}{:>12}{:>12}{:>8}{:>11}{:>12}",
                row.case,
                row.proxy,
                row.metric,
                shown(row.median),
                shown(row.min),
                shown(row.max),
                row.rounds,
                row.discarded,
                self.beside(row)
            );
        }
        if !self.remarks.is_empty() {
            text.push('\n');
        }
        for remark in &self.remarks {
            let _ = writeln!(text, "  {remark}");
        }
        text
    }

    /// `x0.65`: a row's median as a multiple of the other peer's in the same case.
    fn beside(&self, row: &Row) -> String {
        let other = self.rows.iter().find(|other| {
            other.proxy == BESIDE && other.case == row.case && other.metric == row.metric
        });
        match (row.median, other.and_then(|other| other.median)) {
            (Some(median), Some(other)) if row.proxy != BESIDE && other > 0.0 => {
                format!("x{:.2}", median / other)
            }
            _ => String::new(),
        }
    }
}

impl Row {
    fn new(case: &Case, course: &Course, metric: Metric) -> Self {
        let mut values: Vec<f64> = course
            .rounds
            .iter()
            .flatten()
            .filter(|(of, _)| *of == metric)
            .map(|(_, value)| *value)
            .collect();
        values.sort_by(f64::total_cmp);
        Self {
            proxy: course.peer.name,
            case: case.name.clone(),
            metric: metric.name(),
            unit: metric.unit(),
            median: median(&values),
            min: values.first().copied(),
            max: values.last().copied(),
            rounds: values.len(),
            discarded: course.discarded.len(),
        }
    }
}

/// Of sorted values; between the middle two of an even number.
fn median(values: &[f64]) -> Option<f64> {
    let upper = values.get(values.len() / 2)?;
    let lower = values.get((values.len() - 1) / 2)?;
    Some((upper + lower) / 2.0)
}

fn shown(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value >= 1000.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_any_number_of_rounds() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
    }

    #[test]
    fn what_was_not_measured_has_no_number() {
        assert_eq!(shown(None), "-");
        let row = Row {
            proxy: "a",
            case: "b".into(),
            metric: "c",
            unit: "d",
            median: None,
            min: None,
            max: None,
            rounds: 0,
            discarded: 2,
        };
        let text = serde_json::to_string(&row).unwrap();
        assert!(text.contains("\"median\":null"), "{text}");
    }
}
