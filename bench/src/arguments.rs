//! The command line of the bench.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::campaign::Settings;
use crate::report::Report;

#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    about = "Measures Sluice beside other proxies"
)]
pub struct Arguments {
    /// A scenario; all without one, which is recorded in bench/results
    pub name: Option<String>,
    /// Lists the scenarios
    #[arg(long)]
    pub list: bool,
    /// Measures only these
    #[arg(long, value_delimiter = ',')]
    pub peers: Vec<String>,
    /// Three short rounds: a scenario takes less than five minutes
    #[arg(long)]
    pub quick: bool,
    /// Prints one JSON object per scenario on standard output, and nothing else there
    #[arg(long)]
    pub json: bool,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    pub case: String,
    /// Rounds that must count, for each peer and case (5; 3 of all scenarios, or with --quick)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Length of a round (4; 1.5 of all scenarios, 0.7 with --quick)
    #[arg(long)]
    seconds: Option<f64>,
    /// Requests per second of paced cases
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub rate: u32,
    /// Counts rounds that other processes disturbed, too: for looking at the bench, not at the proxies
    #[arg(long)]
    noisy: bool,
    /// Writes a record to bench/results, also of one scenario
    #[arg(long)]
    record: bool,
    /// Says what changed since an older record, or a file of --json, beyond the spread of both
    #[arg(long, value_name = "OLD")]
    pub compare: Option<PathBuf>,
    /// Takes the figures from a record instead of measuring
    #[arg(long, value_name = "RECORD")]
    pub from: Option<PathBuf>,
    /// Puts the figures of the newest record into the README, and measures nothing
    #[arg(long)]
    pub readme: bool,
    /// Prints the Debian packages that are needed, one a line
    #[arg(long)]
    pub packages: bool,
    /// Does the work of a pure room, for valgrind to count
    #[arg(long, hide = true)]
    pub room: Option<String>,
    /// So often
    #[arg(long, hide = true, default_value_t = 1)]
    pub times: u32,
    /// Is the peer `floor/relay`
    #[arg(long, hide = true, num_args = 2, value_names = ["LISTEN", "ORIGIN"])]
    pub relay: Option<Vec<SocketAddr>>,
}

impl Arguments {
    pub fn settings(&self) -> Result<Settings> {
        let (rounds, seconds) = match (self.quick, &self.name) {
            (true, _) => (3, 0.7),
            (false, None) => (3, 1.5),
            (false, Some(_)) => (5, 4.0),
        };
        let seconds = self.seconds.unwrap_or(seconds);
        ensure!(
            (0.1..=600.0).contains(&seconds),
            "--seconds must be within 0.1 and 600"
        );
        Ok(Settings {
            rounds: self.rounds.map_or(rounds, |rounds| rounds as usize),
            window: Duration::from_secs_f64(seconds),
            noisy: self.noisy,
        })
    }

    /// Whether a record is written.
    pub fn is_recorded(&self) -> bool {
        self.record || self.name.is_none()
    }

    pub fn print(&self, report: &Report) -> Result<()> {
        if self.json {
            println!("{}", report.json().context("write JSON")?);
        } else if report.has_rows() {
            println!("\n{}", report.table());
        }
        Ok(())
    }
}
