//! A record: the reports of one run, kept in `bench/results` as JSON and as Markdown with charts, to be read and compared.

mod change;
mod chart;
mod goal;
mod markdown;
mod readme;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub use self::change::compare;
pub use self::goal::{losses, verdicts};
pub use self::readme::renew;
use crate::report::Report;

/// What one run measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    pub reports: Vec<Report>,
    /// By scenario: why there is no number, or fewer rounds.
    pub remarks: BTreeMap<String, Vec<String>>,
    /// Scenarios that have no feature to measure.
    pub not_yet: Vec<String>,
    /// Since the first round.
    pub took_s: u64,
}

impl Record {
    /// Adds a scenario.
    pub fn add(&mut self, report: &Report) {
        self.reports.push(report.clone());
        if !report.remarks.is_empty() {
            let remarks = report.remarks.clone();
            self.remarks.insert(report.scenario.clone(), remarks);
        }
    }

    /// Writes `NAME.json`, `NAME.md` and the charts in `NAME/` into a folder, NAME being the time of its first report: where the
    /// Markdown is. What an earlier call wrote of the same record is written anew.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let first = self
            .reports
            .first()
            .context("a record without a scenario")?;
        // A name that sorts by time and needs no quoting.
        let name = first.machine.date.replace(':', "");
        let charts = folder.join(&name);
        fs::create_dir_all(&charts).with_context(|| format!("create {}", charts.display()))?;
        let put = |path: &Path, text: &str| {
            fs::write(path, text).with_context(|| format!("write {}", path.display()))
        };
        put(
            &folder.join(format!("{name}.json")),
            &(serde_json::to_string_pretty(self)? + "\n"),
        )?;
        let mut drawn = Vec::new();
        for report in &self.reports {
            for (metric, svg) in chart::draw(report)? {
                let file = format!("{}-{metric}.svg", report.scenario);
                put(&charts.join(&file), &svg)?;
                drawn.push((report.scenario.clone(), format!("{name}/{file}")));
            }
        }
        let path = folder.join(format!("{name}.md"));
        put(&path, &markdown::write(self, &drawn))?;
        Ok(path)
    }

    /// Reads what `write` or `--json` wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        if let Ok(record) = serde_json::from_str(&text) {
            return Ok(record);
        }
        let mut record = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let report = serde_json::from_str(line).with_context(|| {
                format!("{} is neither a record nor lines of --json", path.display())
            })?;
            record.reports.push(report);
        }
        if record.reports.is_empty() {
            bail!("{} holds no report", path.display());
        }
        Ok(record)
    }

    /// The newest one in a folder, and where it is.
    pub fn newest(folder: &Path) -> Result<(PathBuf, Self)> {
        let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
        let newest = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "json")
            })
            .max()
            .with_context(|| {
                format!(
                    "{} holds no record yet: `cargo xtask bench` without a name makes one",
                    folder.display()
                )
            })?;
        let record = Self::read(&newest)?;
        Ok((newest, record))
    }

    /// A scenario of it.
    pub fn report(&self, scenario: &str) -> Option<&Report> {
        self.reports
            .iter()
            .find(|report| report.scenario == scenario)
    }
}

/// Where records are kept: in the source tree, beside this program's own source.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("results")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Metric;
    use crate::report::Row;

    /// A record of one scenario with these costs of Sluice and HAProxy.
    pub fn record(scenario: &str, sluice: &[f64], haproxy: &[f64]) -> Record {
        let mut report = Report::new(scenario, crate::machine::tests::machine());
        for (proxy, values) in [("sluice", sluice), ("haproxy", haproxy)] {
            let metric = Metric::CpuUsPerRequest;
            report
                .rows
                .push(Row::new(proxy, "64-saturated", metric, values.to_vec()));
        }
        report.remarks.push("nothing else".into());
        let mut record = Record::default();
        record.add(&report);
        record
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_has_a_page_and_a_chart() {
        let folder = std::env::temp_dir().join(format!("sluice-{}-record", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let written = record("http1-small", &[10.0, 11.0], &[20.0, 21.0]);
        let page = written.write(&folder).unwrap();
        let text = fs::read_to_string(&page).unwrap();
        let (path, read) = Record::newest(&folder).unwrap();
        let chart = path
            .with_extension("")
            .join("http1-small-cpu_us_per_request.svg");
        let svg = fs::read_to_string(chart).unwrap();
        fs::remove_dir_all(&folder).unwrap();

        assert_eq!(read.reports[0].rows, written.reports[0].rows);
        assert_eq!(read.remarks, written.remarks);
        assert!(
            text.contains("nothing else") && text.contains(".svg"),
            "{text}"
        );
        assert!(
            svg.contains("haproxy") && svg.ends_with("</svg>\n"),
            "{svg}"
        );
    }
}
