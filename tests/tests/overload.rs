//! A control group that allows little memory: under an attack Sluice sheds load and lives, and is itself again afterwards.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::field::{Field, WEB_V4};
use rig::harness::Skip;
use rig::http::KeepAlive;
use rig::origin::HTTP_PORT;
use rig::sluice::{PATIENCE, Sluice};
use rig::world::socket;
use rig::{harness, sandbox, tests, wait};

/// What the group may use. The daemon holds about 30 MiB of it when it begins, of a build without optimisation.
const LIMIT_BYTES: u64 = 96 << 20;

/// Connections of the attack, and what each makes the daemon keep: a head that never ends.
const ATTACKERS: usize = 4000;
const HEAD_BYTES: usize = 30_000;

fn main() -> ExitCode {
    harness::main(
        Field::build,
        |_| String::new(),
        tests![an_attack_on_memory_is_shed_before_the_kernel_kills],
    )
}

fn an_attack_on_memory_is_shed_before_the_kernel_kills(field: &mut Field) -> Result<()> {
    let path = sandbox::folder("etc")?.join("overload.toml");
    let text = format!(
        "[[listener]]\nname = \"web\"\naddress = \"{WEB_V4}:{HTTP_PORT}\"\n\n\
         [[route]]\nmatch = {{ path = \"/*\" }}\nrespond = {{ status = 200 }}\n\n\
         [tunables]\n\"http.head_timeout\" = \"5s\"\n"
    );
    fs::write(&path, text)?;
    let group = Group::create()?;
    let sluice = group.around(|| Sluice::start(&field.edge, &path))?;
    let daemon = sluice.daemon()?;
    let to = socket(WEB_V4, HTTP_PORT)?;
    let asked = || -> Result<u16> {
        let answer = KeepAlive::connect(None, to)?.get("a", "/", "Connection: close\r\n")?;
        Ok(answer.status)
    };
    ensure!(field.client.inside(asked)? == 200);
    let before = resident_bytes(daemon)?;

    let stages = field.client.inside(|| -> Result<Vec<String>> {
        let head = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n", "x".repeat(100));
        let mut head = head.into_bytes();
        while head.len() < HEAD_BYTES {
            head.extend_from_slice(format!("x{}: {}\r\n", head.len(), "y".repeat(900)).as_bytes());
        }
        let mut attackers = Vec::new();
        for _ in 0..ATTACKERS {
            let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_millis(200)) else {
                break;
            };
            stream.set_write_timeout(Some(Duration::from_millis(200)))?;
            // Whoever is not accepted any more has nobody who reads it.
            let _ = stream.write_all(&head);
            attackers.push(stream);
        }
        stages(&sluice)
    })?;
    ensure!(
        stages
            .iter()
            .any(|stage| stage == "refuse" || stage == "rest"),
        "it was never short of memory: {stages:?}, {before} and then {} bytes",
        resident_bytes(daemon)?
    );
    ensure!(sluice.daemon()? == daemon, "the kernel has killed it");
    wait::until_true("requests to be served again", PATIENCE, || {
        field.client.inside(asked).is_ok_and(|status| status == 200)
    })?;
    // Receive buffers that the kernel was given come back as they are used.
    wait::until_true("memory to be back", PATIENCE, || {
        let served = (0..100).all(|_| field.client.inside(asked).is_ok_and(|status| status == 200));
        served && resident_bytes(daemon).is_ok_and(|now| now < before + before / 5)
    })
    .with_context(|| format!("{before} before, {:?} now", resident_bytes(daemon)))?;
    ensure!(sluice.daemon()? == daemon && !group.has_killed()?);
    sluice.stop()
}

/// The stages that memory has led to so far.
fn stages(sluice: &Sluice) -> Result<Vec<String>> {
    let metrics = sluice.metrics()?;
    let entered = metrics.0.iter().filter(|(series, count)| {
        series.starts_with("sluice_overload_entered_total")
            && series.contains("signal=\"memory\"")
            && **count > 0.0
    });
    let stage = |series: &str| {
        Some(
            series
                .split_once("stage=\"")?
                .1
                .split('"')
                .next()?
                .to_owned(),
        )
    };
    Ok(entered.filter_map(|(series, _)| stage(series)).collect())
}

fn resident_bytes(pid: u32) -> Result<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = statm
        .split(' ')
        .nth(1)
        .context("statm has fields")?
        .parse()?;
    Ok(pages * 4096)
}

/// A memory control group of our own, of either version, which goes with this value.
struct Group {
    path: PathBuf,
    /// Where this process was before.
    home: PathBuf,
    is_v1: bool,
}

impl Group {
    fn create() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let v1 = own
            .lines()
            .find_map(|line| line.split_once(":memory:/").map(|(_, path)| path));
        let (root, home, is_v1) = match v1 {
            Some(path) => ("/sys/fs/cgroup/memory", path, true),
            None => {
                let path = own.lines().find_map(|line| line.strip_prefix("0::/"));
                ("/sys/fs/cgroup", path.context("a group")?, false)
            }
        };
        let group = Self {
            path: Path::new(root).join(format!("sluice-{}", std::process::id())),
            home: Path::new(root).join(home),
            is_v1,
        };
        let limit = if is_v1 {
            "memory.limit_in_bytes"
        } else {
            "memory.max"
        };
        let made = fs::create_dir(&group.path)
            .and_then(|()| fs::write(group.path.join(limit), LIMIT_BYTES.to_string()));
        made.map_err(|error| Skip(format!("no memory control group can be made: {error}")))?;
        Ok(group)
    }

    /// Does something as a member of the group; what it starts stays one.
    fn around<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let join = |group: &Path| fs::write(group.join("cgroup.procs"), "0");
        join(&self.path).context("join the group")?;
        let done = body();
        join(&self.home).context("leave the group")?;
        done
    }

    /// The kernel had to kill somebody.
    fn has_killed(&self) -> Result<bool> {
        let file = if self.is_v1 {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        let text = fs::read_to_string(self.path.join(file))?;
        let kills = text
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .context("a count of kills")?;
        Ok(kills.trim() != "0")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is empty when all of ours have ended, which may take the kernel a moment.
        for _ in 0..50 {
            if fs::remove_dir(&self.path).is_ok() || !self.path.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
