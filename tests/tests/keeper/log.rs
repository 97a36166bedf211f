//! The access log of a whole Sluice: whose file it is, rotation, and disks and readers that take nothing.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::field::WEB_V4;
use rig::http::{self, KeepAlive};
use rig::sluice::{self, Metrics, PATIENCE, Sluice};
use rig::world::socket;
use rig::{sandbox, wait};
use serde_json::Value;

use crate::stage::{PLAIN, Stage, last_words};

fn logging_to(path: &Path) -> String {
    format!(
        "[log]\naccess = {{ file = \"{}\" }}\n{PLAIN}",
        path.display()
    )
}

/// An empty folder of root's.
fn fresh(name: &str) -> Result<PathBuf> {
    let folder = sandbox::folder(name)?;
    for entry in fs::read_dir(&folder)? {
        fs::remove_file(entry?.path())?;
    }
    Ok(folder)
}

/// Requests of one connection, each with a path of its own.
fn ask(stage: &Stage, paths: impl Iterator<Item = String> + Send) -> Result<()> {
    let to = socket(WEB_V4, 8080)?;
    stage.field.client.inside(|| {
        let mut client = KeepAlive::connect(None, to)?;
        for path in paths {
            let answer = client.get("web.test", &path, "")?;
            ensure!(answer.status == 204, "{path}: {}", answer.status);
        }
        Ok(())
    })
}

fn paths(name: &str, count: usize) -> impl Iterator<Item = String> + Send {
    let name = name.to_owned();
    (0..count).map(move |n| format!("/{name}/{n}"))
}

/// The paths of the lines in a file, each of which is JSON.
fn logged(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let path = |line: &str| -> Result<String> {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        Ok(line["path"].as_str().context("no path")?.to_owned())
    };
    text.lines().map(path).collect()
}

fn dropped(sluice: &Sluice) -> Result<f64> {
    Ok(sluice.metrics()?.value("sluice_log_dropped_total"))
}

pub fn the_log_is_roots_file_and_usr1_opens_it_anew(stage: &mut Stage) -> Result<()> {
    let folder = fresh("log")?;
    let (path, moved) = (folder.join("access.log"), folder.join("access.log.1"));
    let sluice = stage.start(&logging_to(&path), &[])?;
    ask(stage, paths("before", 50))?;
    let metadata = fs::metadata(&path)?;
    ensure!(
        (metadata.uid(), metadata.mode() & 0o777) == (0, 0o640),
        "{metadata:?}"
    );
    fs::rename(&path, &moved)?;
    sluice.signal(Signal::SIGUSR1)?;
    wait::until_true("the new file", PATIENCE, || path.exists())?;
    // What is on its way may go to either; nothing goes to both or to none.
    ask(stage, paths("after", 50))?;
    let all = || -> Result<Vec<String>> { Ok([logged(&moved)?, logged(&path)?].concat()) };
    wait::until_true("all lines", PATIENCE, || {
        all().is_ok_and(|lines| lines.len() >= 100)
    })?;
    let (mut all, mut asked) = (
        all()?,
        Vec::from_iter(paths("before", 50).chain(paths("after", 50))),
    );
    all.sort();
    asked.sort();
    ensure!(all == asked, "{all:?}");
    ensure!(
        logged(&path)?
            .iter()
            .any(|line| line.starts_with("/after/"))
    );
    ensure!(dropped(&sluice)? == 0.0);

    // A daemon that dies loses what it had gathered, and the next one goes on in the same file.
    let daemon = sluice.kill_daemon()?;
    let mut sluice = sluice;
    sluice.wait_for_other_daemon(daemon)?;
    ask(stage, paths("again", 20))?;
    // And nothing is lost by an orderly end, however soon.
    stage.end(sluice)?;
    let lines = logged(&path)?;
    ensure!(
        lines.ends_with(&paths("again", 20).collect::<Vec<_>>()),
        "{lines:?}"
    );
    Ok(())
}

pub fn a_log_that_must_not_be_written_refuses_start_and_reload(stage: &mut Stage) -> Result<()> {
    let (good, bad) = (fresh("log")?, fresh("open")?);
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o777))?;
    let bad_log = logging_to(&bad.join("access.log"));
    ensure!(stage.start(&bad_log, &[]).is_err(), "it started");
    ensure!(
        last_words().contains("others may write to"),
        "{}",
        last_words()
    );

    let path = good.join("access.log");
    let sluice = stage.start(&logging_to(&path), &[])?;
    stage.write(&bad_log)?;
    let Err(said) = sluice.command(&["reload"]) else {
        anyhow::bail!("it was reloaded");
    };
    ensure!(
        format!("{said:#}").contains("others may write to"),
        "{said:#}"
    );
    ensure!(sluice.generation()? == 1);
    ask(stage, paths("old", 3))?;
    wait::until_true("the lines", PATIENCE, || {
        logged(&path).is_ok_and(|lines| lines.len() == 3)
    })?;
    // Another file, by a reload.
    let other = good.join("other.log");
    stage.write(&logging_to(&other))?;
    sluice.command(&["reload"])?;
    wait::until_true("the other file in use", PATIENCE, || {
        ask(stage, paths("new", 1)).is_ok() && logged(&other).is_ok_and(|lines| !lines.is_empty())
    })?;
    stage.end(sluice)?;
    ensure!(logged(&path)? == paths("old", 3).collect::<Vec<_>>());
    ensure!(!bad.join("access.log").exists());
    Ok(())
}

pub fn a_full_disk_costs_lines_that_are_counted_and_no_request(stage: &mut Stage) -> Result<()> {
    let folder = sandbox::folder("small")?;
    let (none, size) = (None::<&str>, Some("size=64k,mode=755"));
    mount(none, &folder, Some("tmpfs"), MsFlags::empty(), size).context("mount a small disk")?;
    let path = folder.join("access.log");
    let sluice = stage.start(&logging_to(&path), &["--set", "log.buffer_bytes=4KiB"])?;
    ask(stage, paths("full", 1000))?;
    wait::until_true("lines to be dropped", PATIENCE, || {
        dropped(&sluice).is_ok_and(|dropped| dropped > 0.0)
    })?;
    // Everything that has a line was written or counted.
    wait::until_true("every line to be accounted for", PATIENCE, || {
        let (Ok(text), Ok(dropped)) = (fs::read_to_string(&path), dropped(&sluice)) else {
            return false;
        };
        let lines = text.lines();
        let whole = lines.filter(|line| serde_json::from_str::<Value>(line).is_ok());
        whole.count() as f64 + dropped == 1000.0
    })?;
    ensure!(
        last_words().contains("the access log cannot be written"),
        "{}",
        last_words()
    );

    // Room again, and the log goes on, on a line of its own behind the one that was cut.
    let size = Some("size=1m,mode=755");
    mount(none, &folder, none, MsFlags::MS_REMOUNT, size).context("enlarge the disk")?;
    ask(stage, paths("room", 20))?;
    wait::until_true("lines to be written again", PATIENCE, || {
        fs::read_to_string(&path).is_ok_and(|text| text.contains("/room/19\""))
    })?;
    let whole = fs::read_to_string(&path)?;
    let written = whole.lines().filter(|line| line.contains("/room/"));
    ensure!(written.clone().count() == 20, "{whole}");
    for line in written {
        serde_json::from_str::<Value>(line).context(line.to_owned())?;
    }
    ensure!(
        last_words().contains("can be written again"),
        "{}",
        last_words()
    );
    stage.end(sluice)?;
    umount(&folder).context("unmount the small disk")
}

pub fn the_standard_output_may_be_a_file(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(&format!("[log]\naccess = \"stdout\"\n{PLAIN}"), &[])?;
    for (round, count) in [("one", 30), ("two", 60)] {
        ask(stage, paths(round, 30))?;
        wait::until_true("its lines", PATIENCE, || {
            let log = sluice.log();
            let lines = log.lines().filter(|line| line.starts_with('{'));
            lines
                .filter(|line| serde_json::from_str::<Value>(line).is_ok())
                .count()
                == count
        })?;
    }
    stage.end(sluice)
}

/// Sluice with its log on a standard output that is a pipe, and the end of the pipe that somebody may read.
fn piped(stage: &Stage, tunables: &[&str]) -> Result<(Child, ChildStdout)> {
    stage.write(&format!("[log]\naccess = \"stdout\"\n{PLAIN}"))?;
    let mut command = sluice::command(&stage.field.edge)?;
    command.args(["run", "-c"]).arg(stage.path()?);
    let backend = std::env::var(sluice::BACKEND).map(|backend| format!("net.backend={backend}"));
    for tunable in tunables.iter().copied().chain(backend.as_deref().ok()) {
        command.args(["--set", tunable]);
    }
    let errors = fs::File::create("/run/rig/log/sluice.log")?;
    command.stdout(Stdio::piped()).stderr(errors);
    let mut keeper = command.spawn().context("start Sluice")?;
    let reader = keeper.stdout.take().context("no pipe")?;
    Ok((keeper, reader))
}

/// Its status, once it has ended; whoever does not end is killed, and the test has failed.
fn ended(keeper: &mut Child) -> Result<ExitStatus> {
    let ended = wait::until("Sluice to end", PATIENCE, || keeper.try_wait().transpose());
    if ended.is_err() {
        keeper.kill()?;
    }
    Ok(ended??)
}

/// A reader that stands still, then one that is gone.
pub fn a_reader_that_takes_nothing_holds_up_nobody(stage: &mut Stage) -> Result<()> {
    let (mut keeper, mut reader) = piped(stage, &["log.buffer_bytes=1KiB", "log.buffers_max=8"])?;
    let metrics = || -> Result<Metrics> {
        let answer = http::get_unix(Path::new("/run/sluice/main/admin.sock"), "/metrics")?;
        Ok(Metrics::parse(&answer.text()))
    };
    let dropped = || metrics().map_or(0.0, |metrics| metrics.value("sluice_log_dropped_total"));
    wait::until_true("Sluice to be ready", PATIENCE, || metrics().is_ok())?;
    wait::until_true("lines to be dropped", PATIENCE, || {
        ask(stage, paths("stuck", 500)).is_ok() && dropped() > 0.0
    })?;
    let mut first = [0; 4096];
    reader.read_exact(&mut first)?;
    ensure!(
        first.starts_with(b"{\"time\":\""),
        "{}",
        String::from_utf8_lossy(&first)
    );
    drop(reader);
    let before = dropped();
    wait::until_true("lines that nobody reads to be dropped", PATIENCE, || {
        ask(stage, paths("gone", 100)).is_ok() && dropped() > before + 50.0
    })?;
    ensure!(
        last_words().contains("the access log cannot be written"),
        "{}",
        last_words()
    );
    kill(Pid::from_raw(keeper.id() as i32), Signal::SIGTERM)?;
    let status = ended(&mut keeper)?;
    ensure!(status.success(), "{status}: {}", last_words());
    Ok(())
}

/// The end does not wait for a reader that stands still.
pub fn an_end_does_not_wait_for_a_reader_that_takes_nothing(stage: &mut Stage) -> Result<()> {
    let (mut keeper, _reader) = piped(stage, &["log.buffer_bytes=1KiB"])?;
    wait::until_true("Sluice to serve", PATIENCE, || {
        ask(stage, paths("stuck", 1000)).is_ok()
    })?;
    kill(Pid::from_raw(keeper.id() as i32), Signal::SIGTERM)?;
    let status = ended(&mut keeper)?;
    let said = last_words();
    ensure!(
        status.success() && said.contains("the last lines"),
        "{status}: {said}"
    );
    ensure!(!said.contains("is killed"), "{said}");
    Ok(())
}
