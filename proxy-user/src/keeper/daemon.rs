//! The child process: started without a privilege from its first instruction on, and watched.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::User;

use crate::control::CHANNEL_FD;
use crate::control::channel::{self, Patience};
use crate::control::message::{ToDaemon, ToKeeper};

/// A message may take so long: a daemon that needs longer to read or to say one hangs.
const PATIENCE: Patience = Patience::with_daemon(Duration::from_secs(10));

/// Variables that the daemon inherits; what the configuration needs of the environment comes with it.
const ENVIRONMENT: [&str; 2] = ["RUST_BACKTRACE", "NO_COLOR"];

/// The daemon as the keeper sees it.
pub struct Daemon {
    child: Child,
    /// Readable once the child has ended.
    end: OwnedFd,
    channel: UnixStream,
    pub started: Instant,
    /// It has said that its configuration is in force.
    pub ready: bool,
}

impl Daemon {
    /// Starts this very program again (also where the file has been replaced meanwhile), as `user`.
    ///
    /// # Errors
    /// No process can be made, or the user may not be become.
    pub fn start(user: Option<&User>) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("make a channel")?;
        let ids = user.map(|user| (user.uid.as_raw(), user.gid.as_raw()));
        let keeper = std::process::id();
        let theirs_fd = theirs.as_raw_fd();
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("sluice")
            .arg("daemon")
            .current_dir("/")
            .stdin(Stdio::null())
            .env_clear();
        command.envs(
            ENVIRONMENT
                .iter()
                .filter_map(|name| Some((name, std::env::var_os(name)?))),
        );
        // SAFETY: between fork and exec only system calls are made, and no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                give_channel(theirs_fd)?;
                keep_other_descriptors()?;
                drop_privileges(ids)?;
                die_with(keeper)
            });
        }
        let child = command.spawn().context("start the daemon")?;
        let end = pidfd(child.id()).context("watch the daemon")?;
        Ok(Self {
            child,
            end,
            channel: ours,
            started: Instant::now(),
            ready: false,
        })
    }

    /// Says something, with descriptors.
    ///
    /// # Errors
    /// It does not listen.
    pub fn say(&self, message: &ToDaemon, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        channel::send(&self.channel, PATIENCE, message, descriptors)
    }

    /// What it said; `None` when it has closed its end. Waits: ask only when the channel is readable.
    ///
    /// # Errors
    /// It makes no sense, or stops in the middle.
    pub fn hear(&self) -> io::Result<Option<ToKeeper>> {
        Ok(channel::receive(&self.channel, PATIENCE)?.map(|(message, _)| message))
    }

    /// Readable when it says something.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Readable when it has ended.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it by force and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Lets it end by itself within `limit`, and by force after that.
    pub fn end_within(&mut self, limit: Duration) {
        let mut polled = [PollFd::new(self.end.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO);
        if !poll(&mut polled, timeout).is_ok_and(|ended| ended > 0) {
            self.kill();
        }
    }

    /// How it ended; `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Puts the channel where the daemon looks for it.
fn give_channel(theirs: RawFd) -> io::Result<()> {
    // SAFETY: both calls take numbers. A descriptor that is in its place already only has to outlive exec.
    let done = unsafe {
        if theirs == CHANNEL_FD {
            libc::fcntl(theirs, libc::F_SETFD, 0)
        } else {
            libc::dup2(theirs, CHANNEL_FD)
        }
    };
    check(done)
}

/// Whatever we were started with and is open in us, a file of root's perhaps, does not pass exec. What stands before
/// the channel are the standard streams. Marked and not closed: std tells of a failed exec through one of them.
fn keep_other_descriptors() -> io::Result<()> {
    // SAFETY: the call takes three numbers.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            CHANNEL_FD + 1,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(marked as i32)
}

/// No capability in any set, another user, and no way back.
fn drop_privileges(ids: Option<(u32, u32)>) -> io::Result<()> {
    // SAFETY: all of these take numbers, a null pointer with the length 0, or pointers to locals.
    unsafe {
        for capability in 0..64 {
            // Refused for numbers that this kernel does not know, and where we have no right to: then there is nothing to drop.
            libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        );
        if let Some((uid, gid)) = ids {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(gid, gid, gid))?;
            check(libc::setresuid(uid, uid, uid))?;
        }
        // linux/capability.h: version 3 takes two words of each set.
        let header: [u32; 2] = [0x2008_0522, 0];
        let none = [0u32; 6];
        check(libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) as i32)?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    }
}

/// The daemon ends with its keeper, and Ctrl-C in a terminal is the keeper's alone to take. It has no terminal: into
/// one that it had it could type, as root's shell hears it (TIOCSTI).
fn die_with(keeper: u32) -> io::Result<()> {
    // SAFETY: the calls take numbers.
    unsafe {
        check(libc::setsid())?;
        // After the change of user, which clears it.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        if libc::getppid() as u32 != keeper {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
    Ok(())
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
