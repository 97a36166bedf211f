//! The only code that changes a running daemon: reload, drain, bans, health, tunables. One thread, tokio on tokio-uring or alone.

mod access_log;
mod bans;
pub mod channel;
pub mod configuration;
mod ejections;
mod endpoints;
pub mod message;
mod names;
mod offences;
mod probes;
mod request;
mod state;
pub mod status;

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::{MissedTickBehavior, interval};

pub use bans::{BanStatus, OPERATOR};
pub use endpoints::{Changes, EndpointAct, EndpointChange, EndpointRequest};
pub use request::{Handle, SysctlRequest};

use crate::datapath::Writer;
use crate::metric::Registry;
use crate::offload::Cells;
use crate::{net, report, worker};
use channel::Patience;
use message::{Apply, Start, ToDaemon};
use request::Request;
use state::Control;

/// The descriptor at which a daemon finds its end of the channel.
pub const CHANNEL_FD: i32 = 3;

/// How often workers are looked after.
const TICK: Duration = Duration::from_millis(50);

/// How often neighbours are looked at and bans swept.
const SLOW_TICK: Duration = Duration::from_secs(1);

/// How often it is looked whether a new neighbour has answered, while there is one.
const SEEK_PACE: Duration = Duration::from_millis(2);

/// What the daemon's other threads and tasks send to control.
const QUEUE: usize = 256;

/// The daemon, from its first instruction to its last. `serve_admin` is given the admin socket and a handle to us.
///
/// # Errors
/// The keeper says nothing that makes sense, or the system refuses what every daemon needs.
pub fn run(serve_admin: impl FnOnce(UnixListener, Handle)) -> Result<ExitCode> {
    // It was started as /proc/self/exe, and would be called `exe`.
    let _ = nix::sys::prctl::set_name(c"sluice");
    // Private keys are in our memory: other processes of our user may be `nobody`'s as well, and neither they may look
    // into it, nor may it lie around in a core dump.
    nix::sys::prctl::set_dumpable(false).context("protect the memory of this process")?;
    let by_nobody_else = "this command is started by `sluice run` and by nobody else";
    if !is_socket(CHANNEL_FD) {
        bail!(by_nobody_else);
    }
    // SAFETY: it is open. The keeper put the channel there before it started us, and nobody else knows of it.
    let channel = UnixStream::from(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) });
    let first = channel::receive::<ToDaemon>(&channel, Patience::WITH_KEEPER)
        .context("read from the keeper")?;
    let Some((ToDaemon::Apply(mut apply), mut descriptors)) = first else {
        bail!(by_nobody_else);
    };
    let start = apply
        .start
        .take()
        .ok_or_else(|| anyhow!("the keeper did not say how to start"))?;
    let sockets = descriptors.split_off(descriptors.len().saturating_sub(apply.sockets.len()));
    let choice = net::choose(start.backend).context("net.backend is \"uring\"")?;
    match &choice.refused {
        Some(refused) => log::warn!("workers use epoll: {refused}"),
        None => log::info!("workers use {}", choice.backend.name()),
    }
    let backend = choice.backend;
    on_tokio(backend, async move {
        let (requests, queue) = mpsc::channel(QUEUE);
        let (control, admin, reports) = assemble(channel, start, choice, descriptors)?;
        serve_admin(admin, Handle::new(requests));
        serve(control, reports, queue, (apply, sockets)).await
    })
}

/// Runs control on tokio-uring, or on tokio alone where workers use epoll: it cannot start where io_uring is refused.
fn on_tokio<T>(backend: net::Backend, main: impl Future<Output = Result<T>>) -> Result<T> {
    match backend {
        net::Backend::Uring => {
            let mut builder = tokio_uring::builder();
            builder.entries(256);
            let mut uring = tokio_uring::uring_builder();
            uring.setup_coop_taskrun();
            builder.uring_builder(&uring).start(main)
        }
        net::Backend::Epoll => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("start tokio")?;
            LocalSet::new().block_on(&runtime, main)
        }
    }
}

/// Whether a descriptor is open, and a socket.
fn is_socket(descriptor: RawFd) -> bool {
    // SAFETY: `stat` is plain data, which the kernel writes into a local.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        libc::fstat(descriptor, &raw mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
    }
}

/// Puts the parts together; no worker runs yet.
fn assemble(
    channel: UnixStream,
    start: Start,
    choice: net::Choice,
    descriptors: Vec<OwnedFd>,
) -> Result<(Control, UnixListener, report::Reports)> {
    let mut descriptors = descriptors.into_iter();
    let admin = UnixListener::from(
        descriptors
            .next()
            .ok_or_else(|| anyhow!("there is no admin socket"))?,
    );
    let cells = descriptors
        .next()
        .ok_or_else(|| anyhow!("there are no rate cells"))?;
    let maps: BTreeMap<String, OwnedFd> = start.maps.iter().cloned().zip(descriptors).collect();
    let cells = Arc::new(Cells::map(cells, start.cells).context("map the rate cells")?);
    let datapath = if maps.is_empty() {
        None
    } else {
        let indices = start
            .interfaces
            .iter()
            .map(|interface| interface.index)
            .collect();
        Some(
            Writer::open(maps, start.memory.names.clone(), indices)
                .context("open the kernel half")?,
        )
    };
    let registry = Arc::new(Registry::new(start.cpus.len()));
    let (queue, reports) = report::Queue::new().context("make the queue of reports")?;
    let control = Control::new(
        Arc::new(channel),
        start,
        choice,
        registry,
        cells,
        queue,
        datapath,
    )?;
    Ok((control, admin, reports))
}

/// Starts the workers and serves until there is nothing left to do.
async fn serve(
    mut control: Control,
    reports: report::Reports,
    mut requests: mpsc::Receiver<Request>,
    (first, sockets): (Box<Apply>, Vec<OwnedFd>),
) -> Result<ExitCode> {
    let (answers, mut probed) = mpsc::channel(QUEUE);
    control.start_probes(answers);
    control.start_access_log()?;
    let (answers, mut named) = mpsc::channel(QUEUE);
    control.start_names(answers);
    control.apply(*first, sockets)?;
    let mut keeper = listen_to_keeper(control.channel())?;
    // SAFETY: `Reports` holds a share of its eventfd, which stays the same and open as long as it lives.
    let reports = unsafe { AsyncFd::register_with_interest(reports, Interest::READABLE) }
        .map_err(std::io::Error::from)
        .context("wait for reports")?;
    let mut tick = interval(TICK);
    let mut slow = interval(SLOW_TICK);
    let mut pace = interval(SEEK_PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    slow.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            said = keeper.recv() => match said {
                Some((ToDaemon::Apply(apply), sockets)) => control.apply(*apply, sockets)?,
                Some((ToDaemon::NotApplied { asked, diagnostics }, _)) => {
                    control.not_applied(asked, diagnostics);
                }
                Some((ToDaemon::Attached(interfaces), _)) => control.attached(interfaces),
                Some((ToDaemon::AccessLog, files)) => control.log_to(files),
                Some((ToDaemon::Drain, _)) => control.drain(),
                Some((ToDaemon::Stop, _)) => control.stop(),
                // The keeper is gone, and with it whoever would look after us.
                None => return Ok(ExitCode::FAILURE),
            },
            Some(request) = requests.recv() => control.take(request),
            ready = reports.readable() => {
                ready.context("wait for reports")?.clear_ready();
                control.learn(reports.get_ref().take());
            }
            Some(answer) = probed.recv() => control.probed(&answer),
            Some(answer) = named.recv() => control.named(answer),
            _ = pace.tick(), if control.is_seeking() => control.seek()?,
            _ = tick.tick() => {
                if let Some(code) = control.look_after_workers()? {
                    control.end_log().await;
                    return Ok(code);
                }
            }
            _ = slow.tick() => control.housekeeping(),
        }
    }
}

/// A thread that waits for the keeper: its messages come with descriptors, which tokio's sockets do not carry.
fn listen_to_keeper(channel: Arc<UnixStream>) -> Result<mpsc::Receiver<(ToDaemon, Vec<OwnedFd>)>> {
    let (sender, receiver) = mpsc::channel(4);
    let listen = move || {
        loop {
            match channel::receive(&channel, Patience::WITH_KEEPER) {
                Ok(Some(message)) => {
                    if sender.blocking_send(message).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => return log::error!("the keeper cannot be understood: {error}"),
            }
        }
    };
    std::thread::Builder::new()
        .name("keeper-channel".to_owned())
        .spawn(listen)
        .context("start a thread")?;
    Ok(receiver)
}

/// How a worker's loop is made.
fn net_settings(backend: net::Backend, tunables: &crate::tunable::Tunables) -> net::Settings {
    net::Settings {
        backend,
        entries: tunables.net.uring_entries,
        buffers: u16::try_from(tunables.net.buffers).unwrap_or(32_768),
        buffer_bytes: u32::try_from(tunables.net.buffer_bytes).unwrap_or(16 << 10),
        ..net::Settings::default()
    }
}

/// A worker as control holds it.
struct WorkerThread {
    commands: std::sync::mpsc::Sender<worker::Command>,
    doorbell: net::Doorbell,
    thread: std::thread::JoinHandle<()>,
    /// A `CloseDenied` is on its way.
    is_closing: Arc<AtomicBool>,
}

impl WorkerThread {
    /// Lets it close the connections of those who are banned by now.
    fn close_denied(&self) {
        if !self.is_closing.swap(true, AcqRel) {
            let is_asked = Arc::clone(&self.is_closing);
            self.tell(worker::Command::CloseDenied { is_asked });
        }
    }

    fn tell(&self, command: worker::Command) {
        // A worker that is gone is noticed by `look_after_workers`.
        if self.commands.send(command).is_ok() {
            self.doorbell.ring();
        }
    }
}
