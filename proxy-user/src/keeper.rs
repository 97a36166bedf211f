//! The process with the privileges: opens sockets, holds the kernel half, starts and watches the daemon, takes the signals.
//!
//! It reads files and signals and what the daemon says, and never a byte from the network.

mod access_log;
mod daemon;
pub mod host;
mod privilege;
mod signal;
mod sockets;
mod state;

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Uid, User, chown};

use crate::config::{Bundle, Diagnostic, Disk, Loaded, RecordingReader, diagnostic};
use crate::control::configuration::{self, Flags};
use crate::datapath::Kernel;
use crate::tunable::Tunables;
use sockets::{RELEASE_MAX, Sockets};
use state::{Held, Keeper, RateCells};

/// What `sluice run` was asked to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The main file, absolute; `config::EMBEDDED` = the one that is built in.
    pub main: PathBuf,
    pub flags: Flags,
    /// Worker threads; `None` = as `worker.count` says.
    pub workers: Option<u32>,
    /// Who the daemon runs as; `None` = `sluice`, or `nobody` where there is no such user.
    pub user: Option<String>,
    pub instance: String,
    /// The admin socket.
    pub admin: PathBuf,
    /// Whether diagnostics are coloured.
    pub colour: bool,
}

/// Files that are opened at a time: each connection takes two.
const DESCRIPTORS_WANTED: u64 = 1 << 20;

/// Where an instance keeps what lives as long as it does: `/run/sluice/<instance>`, or below `$XDG_RUNTIME_DIR` without root.
pub fn runtime_folder(instance: &str) -> PathBuf {
    if Uid::effective().is_root() {
        return PathBuf::from("/run/sluice").join(instance);
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("sluice").join(instance),
        None => PathBuf::from(format!("/tmp/sluice-{}", Uid::effective())).join(instance),
    }
}

/// Runs until told to stop.
///
/// # Errors
/// Whatever keeps Sluice from starting, each with what the operator can do about it.
pub fn run(settings: Settings) -> Result<ExitCode> {
    // Before any thread exists and before anything takes long: a signal from now on waits until it is read.
    let signals = signal::Signals::open().context("take the signals")?;
    let (loaded, bundle) = match read(&settings) {
        Ok(read) => read,
        Err(diagnostics) => {
            eprint!("{}", diagnostic::render(&diagnostics, settings.colour));
            eprintln!("{}", diagnostic::summary(&diagnostics));
            return Ok(ExitCode::FAILURE);
        }
    };
    tell(&loaded.warnings, settings.colour);
    let faults = host::faults(&loaded.config, &loaded.tunables, &settings.instance);
    tell(&faults, settings.colour);
    if faults.iter().any(Diagnostic::is_error) {
        return Ok(ExitCode::FAILURE);
    }
    raise_descriptor_limit();
    let user = daemon_user(settings.user.as_deref())?;
    let _instance = hold_instance(&settings.instance)?;
    let folder = runtime_folder(&settings.instance);
    let cpus = cpus(&settings, &loaded.tunables)?;
    // Sockets before the kernel half: what another process has is found out while nothing has changed.
    let backlog = loaded.tunables.net.backlog;
    let opened = Sockets::default().open_missing(&loaded.config, cpus.len(), backlog, RELEASE_MAX);
    let sockets = match opened {
        Ok(sockets) => sockets,
        Err(faults) => {
            tell(&faults, settings.colour);
            return Ok(ExitCode::FAILURE);
        }
    };
    // Before rights are given up, so that a folder that root must force is good for the start.
    let access_log = match access_log::open(&loaded.config) {
        Ok(file) => file,
        Err(faults) => {
            tell(&faults, settings.colour);
            return Ok(ExitCode::FAILURE);
        }
    };
    let admin = admin_socket(&settings.admin, user.as_ref())?;
    let kernel = start_kernel(&settings, &loaded)?;
    let cells = rate_cells(kernel.as_ref(), &loaded.tunables)?;
    privilege::give_up().context("give up capabilities that are not needed")?;
    let keeper = Keeper::new(Held {
        settings,
        signals,
        user,
        cpus,
        admin,
        folder,
        kernel,
        cells,
    });
    keeper.run(loaded, bundle, sockets, access_log)
}

/// Addresses that cannot be listened on. While the instance runs its own addresses are taken by itself, so that
/// nothing can be said.
pub fn ports_in_use(config: &crate::config::Config, instance: &str) -> Vec<Diagnostic> {
    if runs(instance) {
        return Vec::new();
    }
    Sockets::default()
        .open_missing(config, 1, 1, Duration::ZERO)
        .err()
        .unwrap_or_default()
}

/// Reads the configuration and records what was read.
fn read(settings: &Settings) -> Result<(Loaded, Bundle), Vec<Diagnostic>> {
    let recorder = RecordingReader::new(&Disk);
    let loaded = configuration::load(&recorder, &settings.main, &settings.flags)?;
    Ok((loaded, recorder.into_bundle()))
}

fn tell(warnings: &[Diagnostic], colour: bool) {
    if !warnings.is_empty() {
        eprint!("{}", diagnostic::render(warnings, colour));
    }
}

/// As far as the hard limit goes, and the hard limit too where we may.
fn raise_descriptor_limit() {
    let wanted = DESCRIPTORS_WANTED;
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return;
    }
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Who the daemon runs as; `None` = as we do, for we have no privileges to drop.
fn daemon_user(name: Option<&str>) -> Result<Option<User>> {
    if !Uid::effective().is_root() {
        if let Some(name) = name {
            let own = User::from_uid(Uid::effective()).ok().flatten();
            if own.is_none_or(|own| own.name != name) {
                bail!(
                    "only root can start the daemon as {name}: leave --user out, or start as root"
                );
            }
        }
        return Ok(None);
    }
    let find =
        |name: &str| User::from_name(name).with_context(|| format!("look for the user {name}"));
    if let Some(name) = name {
        let user = find(name)?
            .ok_or_else(|| anyhow!("there is no user {name}: useradd --system {name}"))?;
        if user.uid.is_root() {
            bail!(
                "the daemon does not run as root: it reads what strangers send; name another --user"
            );
        }
        return Ok(Some(user));
    }
    match find("sluice")? {
        Some(user) => Ok(Some(user)),
        None => {
            let nobody = find("nobody")?.ok_or_else(|| {
                anyhow!("there is neither a user sluice nor nobody; name one by --user")
            })?;
            log::info!("there is no user sluice, so the daemon runs as nobody");
            Ok(Some(nobody))
        }
    }
}

/// Makes the instance ours until the answer goes: who comes second is told who came first.
///
/// # Errors
/// It is somebody else's, or its folder cannot be made.
pub fn hold_instance(instance: &str) -> Result<Flock<File>> {
    let folder = runtime_folder(instance);
    let (file, path) = open_lock(&folder)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())?;
            Ok(lock)
        }
        Err((_, nix::Error::EWOULDBLOCK)) => {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "the instance {instance} runs already, as process {}: stop it, or give this one another name with --instance",
                pid.trim()
            )
        }
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// The lock in an instance's folder, with its path; both are made where they are missing. Others may neither have laid
/// the folder out for us, as they can below `/tmp`, nor hold the lock in our stead: flock(2) asks for no right to write.
fn open_lock(folder: &Path) -> Result<(File, PathBuf)> {
    let own = Uid::effective();
    let mut builder = fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(if own.is_root() { 0o755 } else { 0o700 })
        .create(folder)
        .with_context(|| format!("make {}", folder.display()))?;
    for folder in folder.ancestors().take(2) {
        let found = fs::symlink_metadata(folder)
            .with_context(|| format!("look at {}", folder.display()))?;
        if !found.is_dir() || found.uid() != own.as_raw() || found.mode() & 0o022 != 0 {
            bail!(
                "{} must be a folder of uid {own} that nobody else may write to: remove it, or see who made it",
                folder.display()
            );
        }
    }
    let path = folder.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    // One that an earlier version made may be anybody's to open.
    file.set_permissions(fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protect {}", path.display()))?;
    Ok((file, path))
}

/// Whether a keeper of this instance runs.
pub fn runs(instance: &str) -> bool {
    File::open(runtime_folder(instance).join("lock"))
        .is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err())
}

fn start_kernel(settings: &Settings, loaded: &Loaded) -> Result<Option<Kernel>> {
    let datapath = &loaded.config.datapath;
    if !configuration::has_datapath(&loaded.config) {
        return Ok(None);
    }
    let mut kernel = Kernel::up(&settings.instance, datapath, &loaded.tunables)?;
    for note in kernel.notes.drain(..) {
        log::warn!("{note}");
    }
    for interface in &kernel.interfaces {
        log::info!(
            "XDP attached: interface={} mode={:?} program={}",
            interface.name,
            interface.mode,
            interface.program
        );
    }
    Ok(Some(kernel))
}

/// The CPU of each worker: one for each CPU that we may run on, or as many as were asked for, in turn.
fn cpus(settings: &Settings, tunables: &Tunables) -> Result<Vec<usize>> {
    let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))
        .context("read the CPU affinity")?;
    let allowed: Vec<usize> = (0..nix::sched::CpuSet::count())
        .filter(|cpu| allowed.is_set(*cpu).unwrap_or(false))
        .collect();
    let wanted = settings.workers.unwrap_or(tunables.worker.count) as usize;
    let count = if wanted == 0 { allowed.len() } else { wanted };
    Ok(allowed.iter().copied().cycle().take(count.max(1)).collect())
}

/// Those of the kernel half, which outlive us, or else our own.
fn rate_cells(kernel: Option<&Kernel>, tunables: &Tunables) -> Result<RateCells> {
    let count = tunables.guard.cells_max as usize;
    let memory = match kernel {
        Some(kernel) => kernel.cells()?,
        None => memory_file(count * 8).context("make the rate cells")?,
    };
    let seed = RandomState::new().hash_one(std::process::id());
    Ok(RateCells {
        memory,
        count,
        seed,
    })
}

/// Memory with a descriptor, so that a daemon can leave it to the next.
fn memory_file(bytes: usize) -> Result<OwnedFd> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = nix::sys::memfd::memfd_create("sluice-cells", flags)?;
    nix::unistd::ftruncate(&file, i64::try_from(bytes)?)?;
    Ok(file)
}

/// The admin socket, listening; its name goes with it.
struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Opens it. One that nobody answers any more is replaced: we hold the instance's lock.
fn admin_socket(path: &Path, user: Option<&User>) -> Result<AdminSocket> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    if UnixStream::connect(path).is_ok() {
        bail!(
            "{} is in use by another process: give this one its own with --admin",
            path.display()
        );
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            bail!(
                "{} is there and is no socket: remove it, or name another with --admin",
                path.display()
            )
        }
        Ok(_) => fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?,
        Err(_) => {}
    }
    // Nobody may connect before the owner is set.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = bound.with_context(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protect {}", path.display()))?;
    if user.is_some() {
        // Only root may ask; the daemon has the socket as a descriptor and need not own it.
        chown(path, Some(Uid::from_raw(0)), None)
            .with_context(|| format!("own {}", path.display()))?;
    }
    Ok(AdminSocket {
        listener,
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_ours_alone_and_no_link_to_something_else() -> Result<()> {
        let place = tempfile::tempdir()?;
        let folder = place.path().join("sluice").join("main");
        let (file, path) = open_lock(&folder)?;
        assert_eq!(file.metadata()?.mode() & 0o777, 0o600);
        let precious = place.path().join("precious");
        fs::write(&precious, "precious")?;
        fs::remove_file(&path)?;
        std::os::unix::fs::symlink(&precious, &path)?;
        assert!(open_lock(&folder).is_err());
        assert_eq!(fs::read_to_string(&precious)?, "precious");
        Ok(())
    }

    #[test]
    fn a_folder_that_somebody_else_laid_out_is_refused() -> Result<()> {
        let place = tempfile::tempdir()?;
        let outer = place.path().join("sluice");
        let folder = outer.join("main");
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&outer, fs::Permissions::from_mode(0o777))?;
        let refused = open_lock(&folder).expect_err("others may write there");
        assert!(refused.to_string().contains("nobody else"), "{refused:#}");
        fs::remove_dir_all(&outer)?;
        let elsewhere = place.path().join("elsewhere");
        fs::create_dir_all(elsewhere.join("main"))?;
        std::os::unix::fs::symlink(&elsewhere, &outer)?;
        assert!(open_lock(&folder).is_err(), "it leads somewhere else");
        Ok(())
    }
}
