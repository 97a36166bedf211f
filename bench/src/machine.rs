//! The machine: which core is whose, and what a reader of the report must know about it.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Descriptors that a proxy is told to make do with: twice the most connections of a scenario, and some.
const DESCRIPTORS_MAX: u64 = 65_536;

/// One core for the proxy, one for everything else.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    pub load: usize,
    pub proxy: usize,
}

impl Cores {
    /// The last core that we may use is the proxy's, the first one ours.
    pub fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask which cores we may use")?;
        let mut cores = (0..CpuSet::count()).filter(|core| allowed.is_set(*core) == Ok(true));
        let first = cores.next();
        let last = cores.next_back();
        let (Some(load), Some(proxy)) = (first, last) else {
            anyhow::bail!(
                "the bench needs two cores: one for the proxy, one for clients and origin"
            );
        };
        Ok(Self { load, proxy })
    }

    /// Keeps this process, and all threads that it makes, on the core of the load.
    pub fn settle(self) -> Result<()> {
        pin(self.load).context("stay on one core")
    }
}

/// Keeps the calling thread on one core. Allocates nothing, so it may be called between fork and exec.
pub fn pin(core: usize) -> nix::Result<()> {
    let mut only = CpuSet::new();
    only.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &only)
}

/// Lets this process, and what it starts, hold as many descriptors as it may: how many that is, within reason.
pub fn raise_limits() -> Result<u64> {
    let (_, most) =
        getrlimit(Resource::RLIMIT_NOFILE).context("ask how many descriptors we may have")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .with_context(|| format!("allow {most} descriptors"))?;
    Ok(most.min(DESCRIPTORS_MAX))
}

/// Where and with what a report was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// UTC, RFC 3339.
    pub date: String,
    pub kernel: String,
    pub cpu: String,
    pub cores: usize,
    pub congestion_control: String,
    pub rounds: usize,
    pub round_s: f64,
    /// By peer: its version, or why it is missing.
    pub peers: BTreeMap<String, String>,
}

impl Machine {
    /// Looks around.
    pub fn describe(rounds: usize, round_s: f64, peers: BTreeMap<String, String>) -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
        let cpu = cpuinfo
            .lines()
            .find(|line| line.starts_with("model name"))
            .and_then(|line| line.split_once(": "))
            .map_or("unknown", |(_, name)| name);
        let date = Command::new("date")
            .args(["-u", "+%Y-%m-%dT%H:%M:%SZ"])
            .output()
            .context("ask for the date")?;
        ensure!(date.status.success(), "date ({})", date.status);
        Ok(Self {
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            kernel: read("/proc/sys/kernel/osrelease")?,
            cpu: cpu.to_owned(),
            cores: cpuinfo
                .lines()
                .filter(|line| line.starts_with("processor"))
                .count(),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control")?,
            rounds,
            round_s,
            peers,
        })
    }
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// One that does not exist.
    pub fn machine() -> Machine {
        Machine {
            date: "2026-11-24T09:30:00Z".into(),
            kernel: "6.18".into(),
            cpu: "a processor".into(),
            cores: 2,
            congestion_control: "cubic".into(),
            rounds: 2,
            round_s: 1.0,
            peers: BTreeMap::new(),
        }
    }
}
