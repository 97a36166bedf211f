//! Sluice under test: the keeper as a child of ours, and the commands an operator gives it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::namespace::{Namespace, output};
use crate::process::{self, Process};
use crate::{http, sandbox, wait};

/// How long a start, a reload or a restart of the daemon may take. On two busy cores a start takes about half a second.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The variable by which a whole test run is made on one back-end of the workers: `uring` or `epoll`.
pub const BACKEND: &str = "SLUICE_NET_BACKEND";

/// A running Sluice.
pub struct Sluice {
    namespace: Namespace,
    keeper: Process,
}

/// The metrics of one moment, by name with labels: `sluice_datapath_packets_total{verdict="serve"}`.
#[derive(Clone, Debug, Default)]
pub struct Metrics(pub BTreeMap<String, f64>);

impl Sluice {
    /// Starts `sluice run -c FILE` in a namespace and waits until it is ready.
    pub fn start(namespace: &Namespace, configuration: &Path) -> Result<Self> {
        Self::start_with(namespace, configuration, &[])
    }

    /// The same with more arguments, and on the back-end that `SLUICE_NET_BACKEND` names, if it names one.
    pub fn start_with(
        namespace: &Namespace,
        configuration: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let wanted = std::env::var(BACKEND).ok();
        let sluice = Self::start_as(namespace, configuration, |command| {
            command.args(arguments);
            if let Some(wanted) = &wanted {
                command.arg("--set").arg(format!("net.backend={wanted}"));
            }
        })?;
        if let Some(wanted) = wanted {
            let status = sluice.status()?;
            let used = status.pointer("/net/backend").and_then(Value::as_str);
            ensure!(
                used == Some(&*wanted),
                "{BACKEND}={wanted}, and it uses {used:?}"
            );
        }
        Ok(sluice)
    }

    /// The same with whatever is done to the command before, and nothing else.
    pub fn start_as(
        namespace: &Namespace,
        configuration: &Path,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let mut command = command(namespace)?;
        command.arg("run").arg("-c").arg(configuration);
        prepare(&mut command);
        let keeper = Process::start("sluice", command)?;
        let mut sluice = Self {
            namespace: namespace.clone(),
            keeper,
        };
        sluice.wait_ready()?;
        Ok(sluice)
    }

    /// Waits until the daemon answers `status`, and its first generation is in force: it answers before.
    pub fn wait_ready(&mut self) -> Result<()> {
        wait::until("Sluice to be ready", PATIENCE, || {
            match self.keeper.expect_running() {
                Ok(()) => {
                    let status = self.status();
                    let is_in_force = |status: Value| status["generation"].as_u64() > Some(0);
                    status.is_ok_and(is_in_force).then_some(Ok(()))
                }
                Err(error) => Some(Err(error)),
            }
        })
        .and_then(|ready| ready)
        .with_context(|| format!("Sluice said:\n{}", self.keeper.tail(30)))
    }

    /// The keeper.
    pub fn keeper(&mut self) -> &mut Process {
        &mut self.keeper
    }

    /// Sends the keeper a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.keeper.signal(signal)
    }

    /// The keeper's process id.
    pub fn keeper_pid(&self) -> u32 {
        self.keeper.pid()
    }

    /// What both processes have printed.
    pub fn log(&self) -> String {
        self.keeper.log()
    }

    /// The last of it, for the report of a failure.
    pub fn last_words(&self) -> String {
        self.keeper.tail(30)
    }

    /// The daemon's process id.
    pub fn daemon(&self) -> Result<u32> {
        match process::children(self.keeper.pid()).as_slice() {
            [pid] => Ok(*pid),
            others => bail!(
                "the keeper has {} children where one daemon should be",
                others.len()
            ),
        }
    }

    /// Kills the daemon as nothing else does, and gives the process id it had.
    pub fn kill_daemon(&self) -> Result<u32> {
        let daemon = self.daemon()?;
        kill(Pid::from_raw(daemon as i32), Signal::SIGKILL).context("kill the daemon")?;
        Ok(daemon)
    }

    /// Waits until another daemon than `old` is ready.
    pub fn wait_for_other_daemon(&mut self, old: u32) -> Result<u32> {
        let new = wait::until("a new daemon", PATIENCE, || {
            self.daemon().ok().filter(|pid| *pid != old)
        })
        .with_context(|| format!("Sluice said:\n{}", self.keeper.tail(30)))?;
        self.wait_ready()?;
        Ok(new)
    }

    /// Asks it to stop and waits for its end, which must be a success.
    pub fn stop(mut self) -> Result<()> {
        self.keeper.signal(Signal::SIGTERM)?;
        let status = self.keeper.wait(PATIENCE)?;
        ensure!(
            status.success(),
            "SIGTERM ended it with {status}:\n{}",
            self.keeper.tail(20)
        );
        Ok(())
    }

    /// Runs one of its commands: what it printed.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        output(command(&self.namespace)?.args(arguments))
    }

    /// Runs one of its commands that prints facts as JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.command(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("sluice {arguments:?} --json printed {text:?}"))
    }

    /// `sluice status --json`.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// The generation of the configuration that is in force.
    pub fn generation(&self) -> Result<u64> {
        Ok(self.metrics()?.value("sluice_config_generation") as u64)
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        let response = http::get_unix(Path::new("/run/sluice/main/admin.sock"), "/metrics")?;
        ensure!(
            response.status == 200,
            "GET /metrics answered {}",
            response.status
        );
        Ok(Metrics::parse(&response.text()))
    }

    /// Sends SIGHUP and waits until the next generation is in force: its number.
    pub fn reload(&self) -> Result<u64> {
        let before = self.generation()?;
        self.keeper.signal(Signal::SIGHUP)?;
        wait::until("the next generation", PATIENCE, || {
            self.generation().ok().filter(|now| *now > before)
        })
        .with_context(|| format!("Sluice said:\n{}", self.keeper.tail(20)))
    }

    /// Inodes of its listening TCP sockets, as the keeper holds them.
    pub fn listening_inodes(&self) -> Result<Vec<u64>> {
        let table = self.namespace.inside(|| -> Result<String> {
            let mut text = fs::read_to_string("/proc/thread-self/net/tcp")?;
            text.push_str(&fs::read_to_string("/proc/thread-self/net/tcp6")?);
            Ok(text)
        })?;
        // Column 4 is the state, 0A is LISTEN; column 10 the inode (proc(5)).
        let listening: Vec<u64> = table
            .lines()
            .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
            .filter(|columns| columns.get(3) == Some(&"0A"))
            .filter_map(|columns| columns.get(9)?.parse().ok())
            .collect();
        let mut held: Vec<u64> = fs::read_dir(format!("/proc/{}/fd", self.keeper.pid()))
            .context("look at the keeper's descriptors")?
            .flatten()
            .filter_map(|entry| fs::metadata(entry.path()).ok())
            .map(|metadata| metadata.ino())
            .filter(|inode| listening.contains(inode))
            .collect();
        held.sort_unstable();
        held.dedup();
        Ok(held)
    }
}

/// `sluice` in a namespace, with arguments to come.
pub fn command(namespace: &Namespace) -> Result<Command> {
    Ok(namespace.command(binary()?))
}

/// Where the program under test is: `SLUICE_BIN`, else what cargo built beside us. Inside the sandbox it stands at a
/// path that the unprivileged daemon may read, wherever the work tree is.
fn binary() -> Result<PathBuf> {
    let inside = Path::new(sandbox::WORK).join("sluice");
    if inside.exists() {
        return Ok(inside);
    }
    let built = built()?;
    fs::write(&inside, b"").context("make a place for the program")?;
    mount(
        Some(&built),
        &inside,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .context("bind the program into the sandbox")?;
    Ok(inside)
}

/// Where the program under test was built: `SLUICE_BIN`, else beside us.
pub fn built() -> Result<PathBuf> {
    let built = match std::env::var_os("SLUICE_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let own = std::env::current_exe().context("find our own program")?;
            let folder = own.parent().context("our own program's folder")?;
            // A test program stands in target/<profile>/deps, xtask in target/<profile>.
            let folder = if folder.ends_with("deps") {
                folder.parent().unwrap_or(folder)
            } else {
                folder
            };
            folder.join("sluice")
        }
    };
    ensure!(
        built.exists(),
        "{} is not there: cargo build -p proxy-user",
        built.display()
    );
    Ok(built)
}

impl Metrics {
    /// Reads Prometheus text.
    pub fn parse(text: &str) -> Self {
        let samples = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)));
        Self(samples.collect())
    }

    /// The sum of all series of a name, whatever their labels; 0 where there is none.
    pub fn value(&self, name: &str) -> f64 {
        self.0
            .iter()
            .filter(|(series, _)| series.split('{').next() == Some(name))
            .fold(0.0, |sum, (_, value)| sum + value)
    }

    /// The value of the series of a name that has this label, 0 where there is none.
    pub fn labelled(&self, name: &str, label: &str, value: &str) -> f64 {
        let wanted = format!("{label}=\"{value}\"");
        self.0
            .iter()
            .filter(|(series, _)| {
                series.split('{').next() == Some(name) && series.contains(&wanted)
            })
            .fold(0.0, |sum, (_, value)| sum + value)
    }

    /// All values of a label of a name.
    pub fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, u64> {
        let mark = format!("{label}=\"");
        let mut found = BTreeMap::new();
        for (series, value) in &self.0 {
            if series.split('{').next() == Some(name)
                && let Some((_, rest)) = series.split_once(&mark)
                && let Some((label, _)) = rest.split_once('"')
            {
                *found.entry(label.to_owned()).or_default() += *value as u64;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_found_by_name_and_label() {
        let metrics = Metrics::parse(
            "# HELP a b\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"2\"} 4\na_totals 9\nplain 1.5\n",
        );
        assert_eq!(metrics.value("a_total"), 7.0);
        assert_eq!(metrics.labelled("a_total", "x", "2"), 4.0);
        assert_eq!(metrics.value("plain"), 1.5);
        assert_eq!(
            metrics.by_label("a_total", "x"),
            BTreeMap::from([("1".into(), 3), ("2".into(), 4)])
        );
    }
}
