//! Processor time: what the proxy used, what we used, and what others took from either core meanwhile.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sluice::net::Instant;

use crate::machine::Cores;

/// How long a look at the idle time is, and which share of it both cores must be idle to call it calm.
const CALM_LOOK: Duration = Duration::from_millis(100);
const CALM_SHARE: f64 = 0.85;

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
///
/// Idle time is a sum of exact spans. Busy time is what the timer's ticks happened to meet, which for a proxy that sleeps and wakes
/// fifty times a tick is anything (37 % were seen where 48 % were true), so it is not read: whoever is not idle is busy.
struct Core {
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
    /// What neither the proxy used of its core, nor we of ours.
    pub strangers: f64,
    pub strangers_of_load: f64,
    /// What the hypervisor gave to somebody else: the worse of both cores.
    pub steal: f64,
}

impl Sample {
    /// Reads everything; takes less than a millisecond for a proxy with few threads. None: the kernel does the work.
    pub fn take(proxy: Option<u32>, cores: Cores) -> Result<Self> {
        let stat = stat()?;
        let mut proxy_ns = 0;
        for pid in proxy.map(tree).transpose()?.unwrap_or_default() {
            proxy_ns += processor_ns(pid)?;
        }
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
        let share = |part: u64| (part as f64 / ns as f64).min(1.0);
        let proxy_ns = end.proxy_ns.saturating_sub(self.proxy_ns);
        let own_ns = end.own_ns.saturating_sub(self.own_ns);
        let proxy_core = self.proxy_core.until(&end.proxy_core);
        let load_core = self.load_core.until(&end.load_core);
        let strangers = |core: &Core, known_ns| core.busy_ns(ns).saturating_sub(known_ns);
        Span {
            ns,
            proxy_ns,
            proxy_core_busy: share(proxy_core.busy_ns(ns)),
            load_core_busy: share(load_core.busy_ns(ns)),
            strangers: share(strangers(&proxy_core, proxy_ns)),
            strangers_of_load: share(strangers(&load_core, own_ns)),
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
        let [_, _, _, idle, iowait, _, _, steal, ..] = ns[..] else {
            bail!("/proc/stat has too few columns: {line}");
        };
        Ok(Self {
            idle_ns: idle + iowait,
            steal_ns: steal,
        })
    }

    fn until(&self, end: &Self) -> Self {
        Self {
            idle_ns: end.idle_ns.saturating_sub(self.idle_ns),
            steal_ns: end.steal_ns.saturating_sub(self.steal_ns),
        }
    }

    /// Of a time of `wall_ns`.
    fn busy_ns(&self, wall_ns: u64) -> u64 {
        wall_ns.saturating_sub(self.idle_ns + self.steal_ns)
    }
}

/// Waits until both cores have little to do, or until `limit` is over: strangers that work now would disturb whatever begins now.
pub fn wait_for_calm(cores: Cores, limit: Duration) -> Result<()> {
    let start = Instant::read();
    loop {
        let before = Idle::read(cores)?;
        thread::sleep(CALM_LOOK);
        let both = Idle::read(cores)?.since(&before);
        if both.as_secs_f64() >= 2.0 * CALM_LOOK.as_secs_f64() * CALM_SHARE
            || Instant::read().since(start) >= limit
        {
            return Ok(());
        }
    }
}

/// Idle time of both cores together.
struct Idle(u64);

impl Idle {
    fn read(cores: Cores) -> Result<Self> {
        let stat = stat()?;
        let idle = |core| Core::read(&stat, core).map(|core| core.idle_ns);
        Ok(Self(idle(cores.load)? + idle(cores.proxy)?))
    }

    fn since(&self, earlier: &Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

fn stat() -> Result<String> {
    fs::read_to_string("/proc/stat").context("read /proc/stat")
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

/// Resident memory of a process and all that descend from it; pages that they share count in each, before and after alike.
pub fn resident_bytes(root: u32) -> Result<u64> {
    let mut sum = 0;
    for pid in tree(root)? {
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB"))
            .and_then(|number| number.parse::<u64>().ok())
            .with_context(|| format!("{path} says nothing of VmRSS"))?;
        sum += kib << 10;
    }
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
        assert_eq!((core.idle_ns, core.steal_ns), (4_050_000_000, 80_000_000));
        assert_eq!(core.busy_ns(5_000_000_000), 870_000_000);
        assert!(Core::read(stat, 2).is_err());
    }

    #[test]
    fn the_work_of_a_process_shows_in_its_time() {
        // A process of its own: threads of this one end at any time, and take theirs with them.
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let start = Instant::read();
        let mut used = 0;
        while used < 10_000_000 && Instant::read().since(start).as_secs() < 10 {
            thread::sleep(Duration::from_millis(5));
            used = processor_ns(child.id()).unwrap_or_default();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(used >= 10_000_000, "{used}");
    }
}
