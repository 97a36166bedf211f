//! Where the signals come from: the lowest free descriptor, `/proc/self/statm`, the control group, the clock.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use super::Readings;
use crate::tunable;

/// Times in a row that the loop must be late: once is a burst, which goes by (as CoDel looks at queues, RFC 8289).
const LATE_TIMES: usize = 5;

/// How many readings the limit of the control group is believed for.
const LIMIT_READINGS: u32 = 50;

/// What one worker reads.
pub struct Sensors {
    /// None where there is no /proc.
    statm: Option<File>,
    page_bytes: u64,
    group_bytes_max: Option<u64>,
    readings: u32,
    turns: [Duration; LATE_TIMES],
}

impl Default for Sensors {
    fn default() -> Self {
        Self {
            statm: File::open("/proc/self/statm").ok(),
            page_bytes: nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
                .ok()
                .flatten()
                .and_then(|bytes| u64::try_from(bytes).ok())
                .unwrap_or(4096),
            group_bytes_max: None,
            readings: 0,
            turns: [Duration::ZERO; LATE_TIMES],
        }
    }
}

impl Sensors {
    /// How much is used now; the loop took up to `turn` to come round.
    pub fn read(&mut self, turn: Duration, limits: &tunable::Values) -> Readings {
        if self.readings.is_multiple_of(LIMIT_READINGS) {
            self.group_bytes_max = group_bytes_max();
        }
        self.turns[self.readings as usize % LATE_TIMES] = turn;
        self.readings = self.readings.wrapping_add(1);
        Readings([
            self.descriptors(limits),
            self.memory(limits),
            self.lag(limits),
        ])
    }

    /// The kernel gives the lowest descriptor that is free. So there is room for as many as lie between it and the limit, at
    /// least, and none is left when it reaches the limit.
    fn descriptors(&self, limits: &tunable::Values) -> u32 {
        let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else {
            return 0;
        };
        let reserve = u64::from(limits.worker.descriptors_reserve).min(limit / 2);
        let Some(any) = &self.statm else {
            return 0;
        };
        let free = match any.try_clone() {
            Ok(copy) => u64::try_from(copy.as_raw_fd()).unwrap_or(0),
            // There is none.
            Err(_) => limit,
        };
        percent(free, limit - reserve)
    }

    fn memory(&self, limits: &tunable::Values) -> u32 {
        let bytes_max = match limits.worker.memory_max {
            0 => self.group_bytes_max,
            bytes => Some(bytes as u64),
        };
        match (self.resident_bytes(), bytes_max) {
            (Some(used), Some(bytes_max)) => percent(used, bytes_max),
            _ => 0,
        }
    }

    fn resident_bytes(&self) -> Option<u64> {
        let mut text = [0; 128];
        let n = self.statm.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..n]).ok()?;
        let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
        Some(pages * self.page_bytes)
    }

    fn lag(&self, limits: &tunable::Values) -> u32 {
        let least = self.turns.iter().min().copied().unwrap_or_default();
        let longest = limits.worker.lag_max.as_micros();
        let used = u64::try_from(least.as_micros()).unwrap_or(u64::MAX);
        percent(used, u64::try_from(longest).unwrap_or(u64::MAX))
    }
}

fn percent(used: u64, most: u64) -> u32 {
    let percent = u128::from(used) * 100 / u128::from(most.max(1));
    u32::try_from(percent).unwrap_or(u32::MAX)
}

/// Has the allocator give back what it holds and nobody uses: what is freed in the middle of its heap counts as used else.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no pointer and may be called by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The least memory that the control group of this process, or one above it, may use: version 2, else version 1.
fn group_bytes_max() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let (root, path, file) = group(&groups)?;
    least_limit(&Path::new("/sys/fs/cgroup").join(root), &path, file)
}

/// Where the group stands: `0::/system.slice/sluice.service`, or `4:memory:/docker/1` where version 1 has the memory.
fn group(groups: &str) -> Option<(&'static str, PathBuf, &'static str)> {
    let of = |wanted: &'static str| {
        groups.lines().find_map(move |entry| {
            let (_, rest) = entry.split_once(':')?;
            let (controllers, path) = rest.split_once(":/")?;
            let is_there = controllers
                .split(',')
                .any(|controller| controller == wanted);
            is_there.then(|| PathBuf::from(path))
        })
    };
    match of("memory") {
        Some(path) => Some(("memory", path, "memory.limit_in_bytes")),
        None => Some(("", of("")?, "memory.max")),
    }
}

fn least_limit(root: &Path, path: &Path, file: &str) -> Option<u64> {
    let limits = path.ancestors().filter_map(|group| {
        let text = std::fs::read_to_string(root.join(group).join(file)).ok()?;
        // `max` where there is none, and with version 1 more than there can be.
        text.trim().parse().ok()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunable::{Origin, Tunables};

    fn with(key: &str, value: &str) -> Tunables {
        let mut tunables = Tunables::default();
        tunables.assign(key, value, Origin::Runtime).unwrap();
        tunables
    }

    #[test]
    fn memory_is_what_is_resident() {
        let sensors = Sensors::default();
        let before = sensors.resident_bytes().unwrap();
        let filled = vec![1_u8; 64 << 20];
        let after = sensors.resident_bytes().unwrap();
        assert!(after >= before + (48 << 20), "{before} to {after}");
        let limit = format!("{}B", after * 2);
        let used = sensors.memory(&with("worker.memory_max", &limit));
        assert!((40..=60).contains(&used), "{used} %");
        drop(filled);
    }

    #[test]
    fn only_turns_that_are_all_late_are_a_lag() {
        let (mut sensors, tunables) = (Sensors::default(), with("worker.lag_max", "100ms"));
        let ms = Duration::from_millis;
        for _ in 0..LATE_TIMES - 1 {
            assert_eq!(sensors.read(ms(90), &tunables).0[2], 0);
        }
        assert_eq!(sensors.read(ms(80), &tunables).0[2], 80);
        assert_eq!(sensors.read(ms(500), &tunables).0[2], 80);
        assert_eq!(sensors.read(ms(1), &tunables).0[2], 1);
    }

    #[test]
    fn the_least_limit_of_a_group_and_those_above_it_counts() {
        assert_eq!(
            group("12:pids:/x\n0::/a/b\n"),
            Some(("", "a/b".into(), "memory.max"))
        );
        assert_eq!(
            group("4:cpu,memory:/docker/1\n0::/\n"),
            Some(("memory", "docker/1".into(), "memory.limit_in_bytes"))
        );
        assert_eq!(group("3:pids:/docker/1\n"), None);
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let limit = |path: &str, text: &str| {
            std::fs::write(root.path().join(path).join("memory.max"), text).unwrap();
        };
        let least = || least_limit(root.path(), Path::new("a/b"), "memory.max");
        assert_eq!(least(), None);
        limit("a/b", "max\n");
        assert_eq!(least(), None);
        limit("a", "5000\n");
        limit("a/b", "9000\n");
        assert_eq!(least(), Some(5000));
    }
}
