//! Where the signals come from: `/proc/self/fd`, `/proc/self/statm`, the control group, the clock.

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
    group: Option<Group>,
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
            group: None,
            readings: 0,
            turns: [Duration::ZERO; LATE_TIMES],
        }
    }
}

impl Sensors {
    /// How much is used now; the loop took up to `turn` to come round.
    pub fn read(&mut self, turn: Duration, limits: &tunable::Values) -> Readings {
        if self.readings.is_multiple_of(LIMIT_READINGS) {
            self.group = Group::find();
        }
        self.turns[self.readings as usize % LATE_TIMES] = turn;
        self.readings = self.readings.wrapping_add(1);
        Readings([
            self.descriptors(limits),
            self.memory(limits),
            self.lag(limits),
        ])
    }

    fn descriptors(&self, limits: &tunable::Values) -> u32 {
        let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) else {
            return 0;
        };
        let reserve = u64::from(limits.worker.descriptors_reserve).min(limit / 2);
        // The size of this folder is the count of its entries, from Linux 6.2 on.
        let open = match std::fs::metadata("/proc/self/fd").map(|folder| folder.len()) {
            Ok(open @ 1..) => open,
            Ok(0) | Err(_) => self.lowest_free().unwrap_or(limit),
        };
        percent(open, limit - reserve)
    }

    /// The kernel gives the lowest descriptor that is free: all below it are open, and nothing is known of those above. None
    /// where none is free.
    fn lowest_free(&self) -> Option<u64> {
        let Some(any) = &self.statm else {
            return Some(0);
        };
        u64::try_from(any.try_clone().ok()?.as_raw_fd()).ok()
    }

    fn memory(&self, limits: &tunable::Values) -> u32 {
        let Some(resident) = self.resident_bytes() else {
            return 0;
        };
        match (limits.worker.memory_max, &self.group) {
            (0, Some(group)) => {
                // What sockets hold in the kernel counts there, too, and whoever else is in the group.
                let used = group.used_bytes().unwrap_or(0).max(resident);
                percent(used, group.bytes_max)
            }
            (0, None) => 0,
            (bytes_max, _) => percent(resident, bytes_max as u64),
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

/// The control group that limits this process: its own, or one above it.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    bytes_max: u64,
    files: &'static Files,
}

/// How the files of a group are called.
#[derive(Debug, PartialEq, Eq)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat`: what the kernel takes back before it kills.
    cached: [&'static str; 2],
}

const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};

const VERSION_2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    cached: ["inactive_file", "active_file"],
};

impl Group {
    fn find() -> Option<Self> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let (root, path, files) = group(&groups)?;
        Self::least(&Path::new("/sys/fs/cgroup").join(root), &path, files)
    }

    /// Of a group and those above it, the one that allows least.
    fn least(root: &Path, path: &Path, files: &'static Files) -> Option<Self> {
        let limited = path.ancestors().filter_map(|group| {
            let folder = root.join(group);
            // `max` where there is no limit, and with version 1 more than there can be.
            let bytes_max = number(&std::fs::read_to_string(folder.join(files.limit)).ok()?)?;
            Some(Self {
                folder,
                bytes_max,
                files,
            })
        });
        limited.min_by_key(|group| group.bytes_max)
    }

    /// What is used and cannot be taken back.
    fn used_bytes(&self) -> Option<u64> {
        let read = |file| std::fs::read_to_string(self.folder.join(file)).ok();
        let usage = number(&read(self.files.usage)?)?;
        let stat = read("memory.stat")?;
        let lines = stat.lines().filter_map(|line| line.split_once(' '));
        let cached = lines.filter(|(name, _)| self.files.cached.contains(name));
        let cached: u64 = cached.filter_map(|(_, bytes)| number(bytes)).sum();
        Some(usage.saturating_sub(cached))
    }
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Where the group stands: `0::/system.slice/sluice.service`, or `4:memory:/docker/1` where version 1 has the memory.
fn group(groups: &str) -> Option<(&'static str, PathBuf, &'static Files)> {
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
        Some(path) => Some(("memory", path, &VERSION_1)),
        None => Some(("", of("")?, &VERSION_2)),
    }
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
            Some(("", "a/b".into(), &VERSION_2))
        );
        assert_eq!(
            group("4:cpu,memory:/docker/1\n0::/\n"),
            Some(("memory", "docker/1".into(), &VERSION_1))
        );
        assert_eq!(group("3:pids:/docker/1\n"), None);
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        let write = |path: &str, text: &str| std::fs::write(root.path().join(path), text).unwrap();
        let least = || Group::least(root.path(), Path::new("a/b"), &VERSION_2);
        assert_eq!(least(), None);
        write("a/b/memory.max", "max\n");
        assert_eq!(least(), None);
        write("a/memory.max", "5000\n");
        write("a/b/memory.max", "9000\n");
        let group = least().unwrap();
        assert_eq!((group.bytes_max, group.used_bytes()), (5000, None));
        write("a/memory.current", "4000\n");
        write(
            "a/memory.stat",
            "anon 1\ninactive_file 1000\nactive_file 500\nfile 9999\n",
        );
        assert_eq!(group.used_bytes(), Some(2500));
    }
}
