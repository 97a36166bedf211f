//! A private world for a test process: its own mounts, `/run` and process ids, gone with it however it ends.
//!
//! Namespaces, pinned maps, attached programs and children all hang on this process: when it dies, by `kill -9` too,
//! the kernel takes them down. So no test can leave anything behind, and none needs to tidy up to be safe.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, geteuid, setpgid};

/// What Ctrl-C and SIGTERM do to the process inside.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// It ends at once, and all of its world with it.
    Ends,
    /// `interrupted` becomes true, and the process ends in its own time; a second signal ends it at once.
    IsNoted,
}

static OUTER_ID: OnceLock<u32> = OnceLock::new();
static INSIDE: AtomicI32 = AtomicI32::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Where everything that a test writes goes: a tmpfs that only this process and its children see.
pub const WORK: &str = "/run/rig";

/// The process id by which the rest of the machine knows this sandbox; it stands in the names of namespaces.
pub fn id() -> u32 {
    *OUTER_ID.get_or_init(std::process::id)
}

/// Whether somebody asked this process to end (`Interrupt::IsNoted`).
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Whether this process may make namespaces at all.
pub fn may_enter() -> bool {
    geteuid().is_root()
}

/// A new folder of that name below `WORK`, readable by the unprivileged daemon.
pub fn folder(name: &str) -> Result<PathBuf> {
    let path = Path::new(WORK).join(name);
    fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Moves the rest of this program into a sandbox. Call it first thing in `main`, while there is one thread.
///
/// The calling process stays outside, passes signals on and ends with the status of the one inside; only the latter returns.
pub fn enter(interrupt: Interrupt) -> Result<()> {
    if !may_enter() {
        bail!("making network namespaces needs root: run this with sudo");
    }
    id();
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .context("unshare mounts and process ids")?;
    // SAFETY: this process has one thread, by the contract of this function.
    match unsafe { fork() }.context("fork into the sandbox")? {
        ForkResult::Parent { child } => stay_outside(child),
        ForkResult::Child => settle_inside(interrupt),
    }
}

/// Waits for the process inside, passing on what is sent to us, and ends as it did.
fn stay_outside(inside: Pid) -> ! {
    INSIDE.store(inside.as_raw(), Ordering::Relaxed);
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        // SAFETY: the function only reads an atomic and calls kill(2), which is async-signal-safe.
        let _ = unsafe { sigaction(signal, &on(pass_on)) };
    }
    let status = loop {
        match waitpid(inside, None) {
            Ok(WaitStatus::Exited(_, code)) => break code,
            Ok(WaitStatus::Signaled(_, signal, _)) => break 128 + signal as i32,
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => {
                eprintln!("sandbox: wait for the process inside: {error}");
                break 1;
            }
        }
    };
    std::process::exit(status)
}

fn settle_inside(interrupt: Interrupt) -> Result<()> {
    // A group of our own: a Ctrl-C at the terminal reaches us once, through the process outside.
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).context("leave the terminal's process group")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("die with the process outside")?;
    let noted = match interrupt {
        Interrupt::Ends => end_at_once,
        Interrupt::IsNoted => note,
    };
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        // SAFETY: both functions only touch an atomic or call _exit(2).
        unsafe { sigaction(signal, &on(noted)) }.context("take signals")?;
    }

    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("make mounts private")?;
    fresh("proc", "/proc", None)?;
    // What is in /run is a socket of somebody else at most; name resolution is not used inside.
    fresh("tmpfs", "/run", Some("mode=755"))?;
    fs::create_dir("/run/netns").context("create /run/netns")?;
    fresh("bpf", "/sys/fs/bpf", None)?;
    folder("").map(drop)
}

fn fresh(kind: &str, target: &str, options: Option<&str>) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mount a private {kind} on {target}"))
}

fn on(function: extern "C" fn(i32)) -> SigAction {
    SigAction::new(
        SigHandler::Handler(function),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    )
}

extern "C" fn pass_on(signal: i32) {
    // SAFETY: kill(2) takes any numbers.
    unsafe { libc::kill(INSIDE.load(Ordering::Relaxed), signal) };
}

extern "C" fn end_at_once(_: i32) {
    // SAFETY: _exit(2) does not return and runs nothing of ours.
    unsafe { libc::_exit(130) };
}

extern "C" fn note(_: i32) {
    if INTERRUPTED.swap(true, Ordering::Relaxed) {
        end_at_once(0);
    }
}
