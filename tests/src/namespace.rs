//! Network namespaces: make one, run a program in it, run a thread in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::sandbox;

/// A network namespace. The kernel keeps it while a clone of this, a process or a socket of it lives.
#[derive(Clone)]
pub struct Namespace {
    label: String,
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Makes `sluice-<pid>-<label>`, with its loopback up. `ip netns` sees it inside the sandbox only.
    pub fn create(label: &str) -> Result<Self> {
        let name = format!("sluice-{}-{label}", sandbox::id());
        output(Command::new("ip").args(["netns", "add", &name]))?;
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        let namespace = Self {
            label: label.to_owned(),
            name,
            file: Arc::new(file),
        };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// What the test calls it: `client`, `edge`, `origin1`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What `ip netns` calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run in here. It dies with the thread that starts it, so start long-lived ones from the main thread.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        // SAFETY: between fork and exec only system calls are made; the descriptor is kept open by the closure.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) != 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.stdin(Stdio::null());
        command
    }

    /// Runs a program in here to its end and gives what it printed; an error holds what it complained of.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) = words.split_first().context("an empty command")?;
        output(self.command(program).args(arguments))
    }

    /// Runs `ip` in here with one line of words, or several lines as one batch.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start ip (package iproute2)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin
                .write_all(lines.as_bytes())
                .context("tell ip what to do")?;
        }
        let done = child.wait_with_output().context("wait for ip")?;
        if !done.status.success() {
            bail!(
                "ip in {}: {}\n{lines}",
                self.name,
                String::from_utf8_lossy(&done.stderr).trim()
            );
        }
        Ok(())
    }

    /// A thread that lives in here: every socket that it opens belongs to this namespace.
    pub fn thread<T: Send + 'static>(
        &self,
        name: &str,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>> {
        let file = Arc::clone(&self.file);
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                step_into(&file);
                body()
            })
            .with_context(|| format!("start thread {name}"))
    }

    /// Runs `body` in here and gives what it gave.
    pub fn inside<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let file = &self.file;
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                step_into(file);
                body()
            });
            match thread.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Writes a setting below `/proc/sys/net` of this namespace.
    pub fn set(&self, path: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{path}");
        self.inside(|| std::fs::write(&path, value))
            .with_context(|| format!("write {path}"))
    }
}

fn step_into(namespace: &File) {
    // A thread in the wrong namespace would test the machine instead of the proxy: nothing is worth going on for then.
    if let Err(error) = setns(namespace, CloneFlags::CLONE_NEWNET) {
        panic!("enter a network namespace: {error}");
    }
}

/// Runs a command to its end: what it printed, or an error with what it complained of.
pub fn output(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {name}"))?;
    let out = String::from_utf8_lossy(&done.stdout);
    if !done.status.success() {
        let err = String::from_utf8_lossy(&done.stderr);
        bail!(
            "{name} failed ({}): {}{}",
            done.status,
            out.trim(),
            err.trim()
        );
    }
    Ok(out.into_owned())
}
