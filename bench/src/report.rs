//! The report of a scenario: rows of medians and extremes, as a table or as JSON. What was not measured has no number.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::campaign::Course;
use crate::machine::Machine;
use crate::metric::Metric;
use crate::round::Discard;
use crate::scenario::Case;

/// Against whom others are held in the table.
const BESIDE: &str = "haproxy";

/// Everything about one scenario; its JSON form is an interface for scripts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub scenario: String,
    pub machine: Machine,
    pub rows: Vec<Row>,
    /// Why there is no number, or fewer rounds.
    #[serde(skip)]
    pub remarks: Vec<String>,
    #[serde(skip)]
    failed: usize,
}

/// One metric of one peer in one case; no numbers where no round counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub proxy: String,
    pub case: String,
    pub metric: String,
    pub unit: String,
    pub median: Option<f64>,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub rounds: usize,
    pub discarded: usize,
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
                let values = course.rounds.iter().flatten();
                let values = values.filter(|(of, _)| *of == metric);
                let values = values.map(|(_, value)| *value).collect();
                let mut row = Row::new(course.peer.name, &case.name, metric, values);
                row.discarded = course.discarded.len();
                self.rows.push(row);
            }
            self.explain(case, course);
        }
    }

    fn explain(&mut self, case: &Case, course: &Course) {
        let name = course.peer.name;
        match &course.failure {
            // The reason is the same in each case, and stands among the versions.
            Some(why) if why.starts_with("missing") => {}
            Some(why) if why.starts_with("not measured") => {
                self.remarks.push(format!("{name} in {}: {why}", case.name));
            }
            Some(why) => self.fail(format!("{name} in {}: {why}", case.name)),
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

    /// Something was wrong, and the command will say so with its exit code.
    pub fn fail(&mut self, why: String) {
        self.failed += 1;
        self.remarks.push(why);
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
            "\n{:<20}{:<15}{:<24}{:>12}{:>12}{:>12}{:>8}{:>11}{:>12}",
            "case", "proxy", "metric", "median", "min", "max", "rounds", "discarded", BESIDE
        );
        let mut last = "";
        for row in &self.rows {
            if last != row.case.as_str() && !last.is_empty() {
                text.push('\n');
            }
            last = &row.case;
            let _ = writeln!(
                text,
                "{:<20}{:<15}{:<24}{:>12}{:>12}{:>12}{:>8}{:>11}{:>12}",
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
    /// Of all values that count, in any order.
    pub fn new(proxy: &str, case: &str, metric: Metric, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            proxy: proxy.to_owned(),
            case: case.to_owned(),
            metric: metric.name().to_owned(),
            unit: metric.unit().to_owned(),
            median: median(&values),
            min: values.first().copied(),
            max: values.last().copied(),
            rounds: values.len(),
            discarded: 0,
        }
    }
}

/// Of sorted values; between the middle two of an even number.
fn median(values: &[f64]) -> Option<f64> {
    let upper = values.get(values.len() / 2)?;
    let lower = values.get((values.len() - 1) / 2)?;
    Some((upper + lower) / 2.0)
}

pub fn shown(value: Option<f64>) -> String {
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
        let row = Row::new("a", "b", Metric::P50Us, vec![]);
        let text = serde_json::to_string(&row).unwrap();
        assert!(text.contains("\"median\":null"), "{text}");
    }
}
