//! One thread on one CPU with one uring or epoll: takes control's commands, and owns everything that its connections share.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Release};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{self, Duration};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::config::ListenerMode;
use crate::drain::Stop;
use crate::exchange::Gateway;
use crate::listener::{Accepting, Listening};
use crate::net::{self, Either, Instant};
use crate::offload::{self, Cells, Denied};
use crate::overload::{self, Sensors};
use crate::snapshot::Snapshot;
use crate::{access_log, metric, report};

/// How often idle connections to endpoints are looked through and lines of the log handed over, and how often an end of
/// draining is looked for.
const SWEEP: Duration = Duration::from_millis(500);
const DRAIN_SWEEP: Duration = Duration::from_millis(20);

/// How often memory that is free is given back to the system, where it is short, and for how long afterwards: whoever needed it
/// goes away little by little.
const TRIM: Duration = Duration::from_secs(1);
const TRIM_AFTER: Duration = Duration::from_secs(30);

/// What control tells a worker.
#[derive(Debug)]
pub enum Command {
    /// Go over to a snapshot; exchanges that have begun end with the one they began with.
    Apply {
        snapshot: Arc<Snapshot>,
        /// Listening sockets that are new, with their index in `Config::listeners`.
        listeners: Vec<(usize, OwnedFd)>,
        /// Addresses that are listened on no more.
        close: Vec<SocketAddr>,
    },
    /// Close all connections of sources that are denied by now, at once. `is_asked` is taken back before: until then there
    /// need be no second one, so that a flood of bans fills no queue.
    CloseDenied { is_asked: Arc<AtomicBool> },
    /// Accept nothing more, let exchanges end until the deadline, then end.
    Drain { deadline: time::Instant },
    /// End.
    Stop,
}

/// What a worker shares with control.
#[derive(Debug)]
pub struct Shared {
    pub commands: Receiver<Command>,
    /// Rung after a command was sent.
    pub doorbell: net::Doorbell,
    pub reports: report::Sender,
    pub access_log: access_log::Queue,
    pub cells: Arc<Cells>,
    pub denied: Arc<Denied>,
    pub metrics: Arc<metric::Worker>,
}

/// Starts a worker and pins it to a CPU. It ends with `Command::Stop`, after `Command::Drain`, or when control is gone.
///
/// # Errors
/// No thread is left.
pub fn start(
    index: usize,
    cpu: usize,
    settings: net::Settings,
    shared: Shared,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            pin_to(cpu);
            PANICS.set(Some(Arc::clone(&shared.metrics)));
            let settings = net::Settings {
                task_panicked: |_| count_panic(),
                ..settings
            };
            if let Err(error) = net::run(&settings, work(index, shared)) {
                log::error!("worker {index} cannot go on: {error}");
            }
        })
}

thread_local! {
    /// For the hook that is told of panics, which has no other way to know its worker.
    static PANICS: RefCell<Option<Arc<metric::Worker>>> = const { RefCell::new(None) };
}

/// A panic has ended one connection and nothing else; the message was printed by the panic itself.
fn count_panic() {
    PANICS.with_borrow(|metrics| {
        if let Some(metrics) = metrics {
            metrics.panics.add(1);
        }
    });
}

fn pin_to(cpu: usize) {
    let mut set = CpuSet::new();
    let pinned = set
        .set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        log::warn!("a worker is not pinned to CPU {cpu}: {error}");
    }
}

/// A worker's life: the first command brings its first snapshot.
async fn work(index: usize, shared: Shared) {
    let bell = shared.doorbell.receiver();
    let mut worker: Option<Worker> = None;
    let mut ends: Option<Instant> = None;
    loop {
        loop {
            match shared.commands.try_recv() {
                Ok(Command::Apply {
                    snapshot,
                    listeners,
                    close,
                }) => worker
                    .get_or_insert_with(|| Worker::new(index, &shared, &snapshot))
                    .apply(&snapshot, listeners, &close),
                Ok(Command::CloseDenied { is_asked }) => {
                    is_asked.store(false, Release);
                    worker.iter().for_each(Worker::close_denied);
                }
                Ok(Command::Drain { deadline }) => {
                    worker.iter().for_each(Worker::drain);
                    ends = Some(net::now() + (deadline - time::Instant::now()));
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => break,
            }
        }
        let is_over = worker
            .as_ref()
            .is_none_or(|worker| worker.accepting.is_over());
        if ends.is_some_and(|deadline| is_over || net::now() >= deadline) {
            return;
        }
        worker.iter().for_each(Worker::sweep);
        let rest = if ends.is_some() { DRAIN_SWEEP } else { SWEEP };
        match net::select(bell.wait(), net::sleep_until(net::now() + rest)).await {
            Either::Left(Ok(())) | Either::Right(()) => {}
            Either::Left(Err(_)) => return,
        }
    }
}

struct Worker {
    accepting: Rc<Accepting>,
    listening: Vec<Listening>,
}

impl Worker {
    fn new(index: usize, shared: &Shared, snapshot: &Snapshot) -> Self {
        let (cells, metrics) = (Arc::clone(&shared.cells), Arc::clone(&shared.metrics));
        let access_log = shared.access_log.log(Arc::clone(&shared.metrics));
        let gateway = Gateway::new(
            index,
            snapshot,
            cells,
            metrics,
            shared.reports.clone(),
            access_log,
        );
        let accepting = Rc::new(Accepting::new(gateway, Arc::clone(&shared.denied)));
        net::spawn(watch_overload(Rc::clone(&accepting)));
        Self {
            accepting,
            listening: Vec::new(),
        }
    }

    fn apply(
        &mut self,
        snapshot: &Snapshot,
        listeners: Vec<(usize, OwnedFd)>,
        close: &[SocketAddr],
    ) {
        let before = self.accepting.gateway.snapshot();
        self.accepting.gateway.replace(snapshot);
        if !Arc::ptr_eq(&before.config, &snapshot.config) {
            self.find_listeners(snapshot);
        }
        for listening in &self.listening {
            let address = listening.place.address;
            if close.contains(&address) {
                listening.stop();
            }
        }
        // Connections stay at their place after it is listened on no more: they end with their exchange.
        self.accepting
            .connections
            .stop(Stop::Soon, |_, place| place.drain.is(Stop::Soon));
        self.listening
            .retain(|listening| !listening.place.drain.is(Stop::Soon));
        for (listener, fd) in listeners {
            match Listening::start(&self.accepting, fd, listener) {
                Ok(listening) => self.listening.push(listening),
                Err(error) => log::error!("a listening socket is of no use: {error}"),
            }
        }
    }

    /// Where each listener stands in another configuration.
    fn find_listeners(&self, snapshot: &Snapshot) {
        let listeners = (0..).zip(&snapshot.config.listeners);
        let serving = listeners
            .filter(|(_, listener)| matches!(listener.mode, ListenerMode::Serve { .. }))
            .flat_map(|(index, listener)| {
                let addresses = listener.addresses.iter();
                addresses.map(move |address| (address.socket, index))
            });
        // Were an address named twice, the first would be meant.
        let mut places: HashMap<SocketAddr, usize> = HashMap::new();
        for (address, index) in serving {
            places.entry(address).or_insert(index);
        }
        for listening in &self.listening {
            let place = &listening.place;
            place.listener.set(places.get(&place.address).copied());
        }
    }

    fn close_denied(&self) {
        let (denied, now_ns) = (&self.accepting.denied, offload::now_ns());
        let closed = self
            .accepting
            .connections
            .stop(Stop::Now, |peer, _| denied.denies(peer, now_ns));
        self.accepting
            .gateway
            .metrics()
            .connections_banned
            .add(closed as u64);
    }

    fn drain(&self) {
        self.listening.iter().for_each(Listening::stop);
        self.accepting.connections.stop(Stop::Soon, |_, _| true);
    }

    fn sweep(&self) {
        let gateway = &self.accepting.gateway;
        let buffers_max = gateway.snapshot().tunables.log.buffers_max;
        gateway.access_log().flush_early(buffers_max as usize);
        let idle_timeout = gateway.snapshot().tunables.upstream.idle_timeout;
        let now_ns = net::now().as_ns();
        let idle_ns = u64::try_from(idle_timeout.as_nanos()).unwrap_or(u64::MAX);
        let oldest = match gateway.overload().closes() {
            true => Instant::NEVER,
            false => Instant::from_ns(now_ns.saturating_sub(idle_ns)),
        };
        gateway.caller().pool().sweep(oldest);
    }
}

/// Looks at what the worker is short of, for as long as it lives.
async fn watch_overload(accepting: Rc<Accepting>) {
    let (mut sensors, gateway) = (Sensors::default(), &accepting.gateway);
    let mut readings = overload::Readings::default();
    let (mut short, mut trimmed) = (None, Instant::default());
    loop {
        net::sleep_until(net::now() + readings.next_tick()).await;
        let mut turn = Duration::ZERO;
        for _ in 0..overload::TURNS {
            // Once round the loop: what anybody waits who is ready.
            let before = Instant::read();
            net::yield_now().await;
            turn = turn.max(Instant::read() - before);
        }
        let snapshot = gateway.snapshot();
        readings = sensors.read(turn, &snapshot.tunables);
        let overload = gateway.overload();
        if overload.update(gateway.worker(), readings, &snapshot.tunables) {
            accepting.connections.stop(Stop::Soon, |_, _| true);
        }
        if let Some(reason) = overload.ends_unbegun() {
            for _ in 0..accepting.connections.end_unbegun() {
                gateway.metrics().reject(reason);
            }
        }
        net::keep_lean(overload.is_lean());
        let now = net::now();
        if overload.is_short_of_memory() {
            short = Some(now);
        }
        if short.is_some_and(|short| now < short + TRIM_AFTER) && now >= trimmed + TRIM {
            trimmed = now;
            net::trim();
            overload::trim();
        }
    }
}

#[cfg(test)]
mod tests;
