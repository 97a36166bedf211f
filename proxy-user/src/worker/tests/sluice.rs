//! A worker with a configuration, and what its metrics say of it.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{tls, wait_until};
use crate::access_log::{self, Lines};
use crate::config::{self, Bundle};
use crate::metric::{Outside, Registry};
use crate::net;
use crate::offload::{Cells, Denied};
use crate::report::queue::Receiver;
use crate::report::{self, Reports};
use crate::snapshot::Snapshot;
use crate::tunable::Origin;
use crate::worker::{self, Command, Shared};

/// A worker that runs until it is dropped.
pub struct Sluice {
    pub address: SocketAddr,
    pub reports: Reports,
    pub lines: Receiver<Lines>,
    registry: Arc<Registry>,
    snapshot: Arc<Snapshot>,
    /// Of the listener.
    serve: String,
    origins: Vec<SocketAddr>,
    /// As the keeper has it.
    _socket: TcpListener,
    commands: Sender<Command>,
    denied: Arc<Denied>,
    doorbell: net::Doorbell,
    thread: Option<JoinHandle<()>>,
}

impl Sluice {
    /// Serves `/*` by these origins; `more` is further configuration, which may end in lines of `[tunables]`.
    pub fn start(origins: &[SocketAddr], more: &str) -> Self {
        Self::start_with(net::Settings::default(), origins, more)
    }

    pub fn start_with(settings: net::Settings, origins: &[SocketAddr], more: &str) -> Self {
        Self::start_as("", settings, origins, more)
    }

    /// Serves https with the certificate of `tls`.
    pub fn start_secure(origins: &[SocketAddr], more: &str) -> Self {
        let serve = "serve = \"https\"\ntls = { certificates = \"/etc/sluice/web.pem\" }\n";
        Self::start_as(serve, net::Settings::default(), origins, more)
    }

    /// With more lines of the listener.
    pub fn start_on(listener: &str, origins: &[SocketAddr], more: &str) -> Self {
        Self::start_as(listener, net::Settings::default(), origins, more)
    }

    fn start_as(serve: &str, settings: net::Settings, origins: &[SocketAddr], more: &str) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").expect("a listening socket");
        let address = socket.local_addr().expect("an address");
        let registry = Arc::new(Registry::new(1));
        let text = configuration(address, serve, origins, more);
        let snapshot = build(&text, None, &registry);
        let (commands, receiver) = mpsc::channel();
        let (queue, reports) = report::Queue::new().expect("a queue");
        let (access_log, lines) = access_log::Queue::new().expect("a queue");
        let doorbell = net::Doorbell::new().expect("a doorbell");
        let metrics = registry.worker(0);
        let denied = Arc::<Denied>::default();
        let shared = Shared {
            commands: receiver,
            doorbell: doorbell.clone(),
            reports: queue.sender(Arc::clone(&metrics)),
            access_log,
            cells: Arc::new(Cells::in_memory(1024).expect("memory")),
            denied: Arc::clone(&denied),
            metrics,
        };
        let thread = worker::start(0, 0, settings, shared).expect("a thread");
        let sluice = Self {
            address,
            reports,
            lines,
            registry,
            snapshot,
            serve: serve.to_owned(),
            origins: origins.to_vec(),
            commands,
            denied,
            doorbell,
            thread: Some(thread),
            _socket: socket.try_clone().expect("a descriptor"),
        };
        sluice.tell(Command::Apply {
            snapshot: Arc::clone(&sluice.snapshot),
            listeners: vec![(0, OwnedFd::from(socket))],
            close: Vec::new(),
        });
        sluice
    }

    pub fn tell(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.doorbell.ring();
        }
    }

    /// Goes over to another configuration on the same address.
    pub fn reload(&mut self, origins: &[SocketAddr], more: &str) {
        let text = configuration(self.address, &self.serve, origins, more);
        self.snapshot = build(&text, Some(&self.snapshot), &self.registry);
        self.apply(Vec::new());
    }

    /// Sets a tunable as `sysctl -w` does.
    pub fn set(&mut self, key: &str, value: &str) {
        let mut tunables = (*self.snapshot.tunables).clone();
        tunables
            .assign(key, value, Origin::Runtime)
            .expect("a value");
        self.snapshot = Arc::new(self.snapshot.with_tunables(Arc::new(tunables)));
        self.apply(Vec::new());
    }

    /// Goes over to a configuration that listens nowhere near.
    pub fn reload_without_listener(&mut self) {
        let elsewhere = SocketAddr::from(([127, 0, 0, 1], 1));
        let text = configuration(elsewhere, &self.serve, &self.origins, "");
        self.snapshot = build(&text, Some(&self.snapshot), &self.registry);
        self.apply(vec![self.address]);
    }

    fn apply(&self, close: Vec<SocketAddr>) {
        self.tell(Command::Apply {
            snapshot: Arc::clone(&self.snapshot),
            listeners: Vec::new(),
            close,
        });
        // A command is dropped when it was obeyed, and what it held with it.
        wait_until("it is in force", || Arc::strong_count(&self.snapshot) == 1);
    }

    pub fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        self.tell(Command::Drain { deadline });
    }

    /// Bans a source and closes what it has open.
    pub fn close_source(&self, source: IpAddr) {
        self.denied.insert(source, u64::MAX);
        let is_asked = Arc::new(AtomicBool::new(true));
        self.tell(Command::CloseDenied {
            is_asked: Arc::clone(&is_asked),
        });
        wait_until("the worker has heard it", || !is_asked.load(Relaxed));
    }

    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Client connections open now.
    pub fn open(&self) -> i64 {
        self.registry.listener("web").of(0).active.value()
    }

    /// Connections to this origin open now.
    pub fn open_to(&self, origin: SocketAddr) -> i64 {
        let endpoint = self.registry.endpoint("app", &origin.to_string());
        endpoint.of(0).active.value()
    }

    /// The metric of this name with its labels, as a reader of the text finds it; 0 if it is not there.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.registry.text(Outside::default());
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse().ok())
            .unwrap_or(0.0)
    }

    /// Refusals for this reason.
    pub fn rejected(&self, reason: &str) -> f64 {
        self.metric(&format!(
            "sluice_http_rejected_total{{reason=\"{reason}\"}}"
        ))
    }

    /// Client connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.registry.listener("web").of(0).accepted.value()
    }

    /// As a probe would find it out.
    pub fn believe(&self, endpoint: usize, is_good: bool) {
        let endpoint = &self.snapshot.upstreams[0].endpoints[endpoint];
        endpoint.health().record(is_good, 1, 1);
    }

    /// The same of every endpoint with this address.
    pub fn believe_at(&self, address: SocketAddr, is_good: bool) {
        let upstreams = self.snapshot.upstreams.iter();
        let endpoints = upstreams.flat_map(|upstream| &upstream.endpoints);
        for endpoint in endpoints.filter(|endpoint| endpoint.address == address) {
            endpoint.health().record(is_good, 1, 1);
        }
    }

    /// Requests that wait for room at an upstream.
    pub fn pending(&self, upstream: &str) -> u32 {
        let mut upstreams = self.snapshot.upstreams.iter();
        let upstream = upstreams.find(|one| one.name == upstream);
        upstream.map_or(0, |upstream| upstream.queue().facts().pending)
    }

    /// Nothing is open any more, on either side but for what waits in the pool.
    pub fn wait_until_all_clients_are_gone(&self) {
        wait_until("all clients are gone", || self.open() == 0);
    }

    pub fn wait_until_nothing_is_open_to(&self, origin: SocketAddr) {
        wait_until("the origin's connection is closed", || {
            self.open_to(origin) == 0
        });
    }
}

impl Drop for Sluice {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the worker has panicked");
        }
    }
}

fn configuration(listen: SocketAddr, serve: &str, origins: &[SocketAddr], more: &str) -> String {
    // An upstream has an endpoint; where a test brings its own upstream, nobody asks this one.
    let nobody = [SocketAddr::from(([127, 0, 0, 1], 1))];
    let origins = if origins.is_empty() { &nobody } else { origins };
    let endpoints: Vec<String> = origins
        .iter()
        .map(|origin| format!("\"{origin}\""))
        .collect();
    format!(
        "[[listener]]\nname = \"web\"\naddress = \"{listen}\"\n{serve}\
         [[upstream]]\nname = \"app\"\nendpoints = [{}]\n\
         [[route]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"app\"\n{more}",
        endpoints.join(", "),
    )
}

fn build(text: &str, previous: Option<&Snapshot>, registry: &Registry) -> Arc<Snapshot> {
    let files = Bundle::of_files([
        ("/etc/sluice/sluice.toml", text),
        ("/etc/sluice/web.pem", &tls::certificate().pem),
    ]);
    let loaded = match config::load(&files, Path::new("/etc/sluice/sluice.toml")) {
        Ok(loaded) => loaded,
        Err(found) => panic!("{text}\n{found:?}"),
    };
    let tunables = Arc::new(loaded.tunables.clone());
    let generation = previous.map_or(1, |previous| previous.generation + 1);
    let built = Snapshot::build(generation, loaded, tunables, previous, 1, registry, 7);
    Arc::new(built.expect("a snapshot"))
}
