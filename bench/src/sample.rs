//! Processor time: what the proxy used, what we used, and what others took from either core meanwhile.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sluice::net::Instant;

use crate::machine::Cores;

/// Readings of one moment; two of them make a [`Span`].
pub struct Sample {
    at: Instant,
    /// All threads of all processes of the proxy.
    proxy_ns: u64,
    own_ns: u64,
    load_core: Core,
    proxy_core: Core,
}

/// Times of one core from `/proc/stat`, in nanoseconds at a resolution of 10 ms.
struct Core {
    busy_ns: u64,
    idle_ns: u64,
    steal_ns: u64,
}

/// What happened between two moments. Shares are of the span's time on one core.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub ns: u64,
    /// Processor time of the proxy.
    pub proxy_ns: u64,
    /// How busy the proxy's core was, by whomever.
    pub proxy_core_busy: f64,
    /// How busy the core of clients and origin was.
    pub load_core_busy: f64,
    /// What neither the proxy nor we used: the worse of both cores.
    pub strangers: f64,
    /// What the hypervisor gave to somebody else: the worse of both cores.
    pub steal: f64,
}

impl Sample {
    /// Reads everything; takes less than a millisecond for a proxy with few threads.
    pub fn take(proxy: u32, cores: Cores) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let proxy_ns = tree(proxy)?
            .into_iter()
            .map(processor_ns)
            .sum::<Result<u64>>()?;
        Ok(Self {
            at: Instant::read(),
            proxy_ns,
            own_ns: processor_ns(std::process::id())?,
            load_core: Core::read(&stat, cores.load)?,
            proxy_core: Core::read(&stat, cores.proxy)?,
        })
    }

    /// From this moment to a later one.
    pub fn until(&self, end: &Self) -> Span {
        let ns = end.at.as_ns().saturating_sub(self.at.as_ns()).max(1);
        let share = |part: u64| part as f64 / ns as f64;
        let proxy_ns = end.proxy_ns.saturating_sub(self.proxy_ns);
        let own_ns = end.own_ns.saturating_sub(self.own_ns);
        let proxy_core = self.proxy_core.until(&end.proxy_core);
        let load_core = self.load_core.until(&end.load_core);
        Span {
            ns,
            proxy_ns,
            proxy_core_busy: proxy_core.busy_share(),
            load_core_busy: load_core.busy_share(),
            strangers: share(
                proxy_core
                    .busy_ns
                    .saturating_sub(proxy_ns)
                    .max(load_core.busy_ns.saturating_sub(own_ns)),
            ),
            steal: share(proxy_core.steal_ns.max(load_core.steal_ns)),
        }
    }
}

impl Core {
    /// The line `cpuN user nice system idle iowait irq softirq steal ...` (proc_stat(5)), in ticks of USER_HZ, which is 100 for every program.
    fn read(stat: &str, core: usize) -> Result<Self> {
        let name = format!("cpu{core} ");
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix(&name))
            .with_context(|| format!("/proc/stat knows no {name}"))?;
        let ns: Vec<u64> = line
            .split_ascii_whitespace()
            .map(|field| Ok(field.parse::<u64>()? * 10_000_000))
            .collect::<Result<_>>()?;
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ns[..] else {
            bail!("/proc/stat has too few columns: {line}");
        };
        Ok(Self {
            busy_ns: user + nice + system + irq + softirq,
            idle_ns: idle + iowait,
            steal_ns: steal,
        })
    }

    fn until(&self, end: &Self) -> Self {
        Self {
            busy_ns: end.busy_ns.saturating_sub(self.busy_ns),
            idle_ns: end.idle_ns.saturating_sub(self.idle_ns),
            steal_ns: end.steal_ns.saturating_sub(self.steal_ns),
        }
    }

    fn busy_share(&self) -> f64 {
        let all = self.busy_ns + self.idle_ns + self.steal_ns;
        self.busy_ns as f64 / all.max(1) as f64
    }
}

/// A process and all that descend from it.
pub fn tree(root: u32) -> Result<Vec<u32>> {
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next) {
        tree.extend(rig::process::children(*pid));
        next += 1;
    }
    Ok(tree)
}

/// Nanoseconds on a processor of all threads of a process: the first number of schedstat (sched-stats of the kernel's documentation).
fn processor_ns(pid: u32) -> Result<u64> {
    let threads = threads(pid)?;
    let mut sum = 0;
    for thread in &threads {
        // A thread may end between being listed and being read.
        let Ok(text) = fs::read_to_string(thread.join("schedstat")) else {
            continue;
        };
        let first = text.split_ascii_whitespace().next().unwrap_or_default();
        sum += first
            .parse::<u64>()
            .with_context(|| format!("{} says {text:?}", thread.display()))?;
    }
    ensure!(
        sum > 0,
        "schedstat of process {pid} says nothing: the bench needs a kernel with CONFIG_SCHED_INFO"
    );
    Ok(sum)
}

/// An error if a thread of the tree may run elsewhere than on the core of the proxy: it would be measured against nothing.
pub fn expect_on_core(root: u32, core: usize) -> Result<()> {
    for pid in tree(root)? {
        for thread in threads(pid)? {
            let Ok(status) = fs::read_to_string(thread.join("status")) else {
                continue;
            };
            let allowed = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
                .unwrap_or_default()
                .trim();
            ensure!(
                allowed == core.to_string(),
                "a thread of the proxy may run on cores {allowed} where it was started on core {core} alone"
            );
        }
    }
    Ok(())
}

fn threads(pid: u32) -> Result<Vec<std::path::PathBuf>> {
    let folder = format!("/proc/{pid}/task");
    let entries = fs::read_dir(Path::new(&folder))
        .with_context(|| format!("process {pid} is gone: list {folder}"))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_of_a_core_are_told_apart() {
        let stat =
            "cpu  9 9 9 9 9 9 9 9 0 0\ncpu1 1 2 3 400 5 6 7 8 0 0\ncpu10 0 0 0 0 0 0 0 0 0 0\n";
        let core = Core::read(stat, 1).unwrap();
        assert_eq!(
            (core.busy_ns, core.idle_ns, core.steal_ns),
            (190_000_000, 4_050_000_000, 80_000_000)
        );
        assert!(Core::read(stat, 2).is_err());
    }

    #[test]
    fn work_of_our_own_shows_in_our_time() {
        let before = processor_ns(std::process::id()).unwrap();
        let start = Instant::read();
        while Instant::read().since(start).as_millis() < 20 {}
        let used = processor_ns(std::process::id()).unwrap() - before;
        assert!(used > 0, "{used}");
    }
}
