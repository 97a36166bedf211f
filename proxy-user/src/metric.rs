//! Every counter and histogram, by name: integers that one worker writes and a reader sums.

mod text;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use text::{Outside, Waiting};

/// Label sets of one kind that are kept apart; those that come after share one named `other`.
pub const SERIES_MAX: usize = 16_384;

/// Reasons of refusals that are kept apart, about twice as many as there are; the last one is `other`.
const REASONS_MAX: usize = 128;

/// A count with one writer, so that counting is a plain load and store: no locked instruction on the way of a request.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only ever called by the one thread that owns this counter.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The count so far; any thread.
    pub fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down, with one writer.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Adds `n`, which may be negative. Only ever called by the one thread that owns this gauge.
    #[inline]
    pub fn add(&self, n: i64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Becomes `n`. Only ever called by the one thread that owns this gauge.
    pub fn set(&self, n: i64) {
        self.0.store(n, Relaxed);
    }

    /// The present value; any thread.
    pub fn value(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of the buckets of a duration, in microseconds; a last bucket has none.
pub const DURATION_BOUNDS_US: [u64; 16] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000, 30_000_000,
];

/// Durations by bucket, with one writer.
#[derive(Debug, Default)]
pub struct Durations {
    buckets: [Counter; DURATION_BOUNDS_US.len() + 1],
    sum_us: Counter,
}

impl Durations {
    /// Counts one duration, in microseconds. Only ever called by the thread that owns it.
    #[inline]
    pub fn add(&self, duration_us: u64) {
        let bucket = DURATION_BOUNDS_US.partition_point(|bound| *bound < duration_us);
        self.buckets[bucket].add(1);
        self.sum_us.add(duration_us);
    }
}

/// One value of `T` per worker, each on cache lines of its own, so that no worker slows down another.
#[derive(Debug)]
pub struct Sharded<T>(Box<[Padded<T>]>);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

impl<T: Default> Sharded<T> {
    fn new(workers: usize) -> Self {
        Self((0..workers.max(1)).map(|_| Padded::default()).collect())
    }

    /// The part that belongs to the worker of this index. An index beyond the workers shares the last part.
    #[inline]
    pub fn of(&self, worker: usize) -> &T {
        &self.0[worker.min(self.0.len() - 1)].0
    }

    fn sum(&self, part: impl Fn(&T) -> u64) -> u64 {
        self.0
            .iter()
            .map(|shard| part(&shard.0))
            .fold(0, u64::wrapping_add)
    }

    fn sum_signed(&self, part: impl Fn(&T) -> i64) -> i64 {
        self.0.iter().map(|shard| part(&shard.0)).sum()
    }
}

/// What one worker counts that has no label of configuration; on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Worker {
    /// TLS handshakes that were completed.
    pub handshakes: Counter,
    /// TLS handshakes that failed or ran out of time.
    pub handshakes_failed: Counter,
    /// Exchanges that ended by a panic: each cost one exchange.
    pub panics: Counter,
    /// Reports to control that found the queue full.
    pub reports_dropped: Counter,
    /// Lines of the access log that nobody was ready to write.
    pub log_dropped: Counter,
    /// Connections closed because their source was banned.
    pub connections_banned: Counter,
    /// By signal, in the order of `overload::Signal::ALL`.
    pub overload: [Overload; 3],
    rejected: Rejected,
}

/// What one signal of overload says to one worker.
#[derive(Debug, Default)]
pub struct Overload {
    pub used_percent: Gauge,
    /// Number of the stage, 0 for none.
    pub stage: Gauge,
    /// Times that each stage was entered, from above or below.
    pub entered: [Counter; 5],
}

impl Overload {
    /// Notes the present state.
    pub fn set(&self, used_percent: u32, stage: usize) {
        self.used_percent.set(used_percent.into());
        self.stage.set(i64::try_from(stage).unwrap_or(0));
    }
}

impl Worker {
    /// Counts one refusal for a reason: a short name in snake case.
    pub fn reject(&self, reason: &'static str) {
        let last = self.rejected.0.len() - 1;
        for (slot, counter) in &self.rejected.0[..last] {
            if *slot.get_or_init(|| reason) == reason {
                return counter.add(1);
            }
        }
        self.rejected.0[last].1.add(1);
    }
}

#[derive(Debug)]
struct Rejected([(OnceLock<&'static str>, Counter); REASONS_MAX]);

impl Default for Rejected {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Default::default()))
    }
}

/// What is counted for one listener.
#[derive(Debug)]
pub struct Listener {
    shards: Sharded<ListenerShard>,
}

/// One worker's part of a listener.
#[derive(Debug, Default)]
pub struct ListenerShard {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections open now.
    pub active: Gauge,
    /// Bytes read from clients: as they came, so with TLS the encrypted ones.
    pub received_bytes: Counter,
    /// Bytes written to clients.
    pub sent_bytes: Counter,
}

impl Listener {
    /// The part of one worker.
    #[inline]
    pub fn of(&self, worker: usize) -> &ListenerShard {
        self.shards.of(worker)
    }
}

/// What is counted for the requests of one route that came in on one listener.
#[derive(Debug)]
pub struct Route {
    shards: Sharded<RouteShard>,
}

#[derive(Debug, Default)]
struct RouteShard {
    /// Per hundred (1xx to 5xx) a table by status, made when the first answer of that hundred is counted.
    codes: [OnceLock<Box<[Counter; 100]>>; 5],
    durations: Durations,
}

impl Route {
    /// Counts one exchange that worker `worker` ended with `status` (100 to 599) after `duration_us` microseconds.
    #[inline]
    pub fn count(&self, worker: usize, status: u16, duration_us: u64) {
        let shard = self.shards.of(worker);
        let status = usize::from(status.clamp(100, 599));
        let table = shard.codes[status / 100 - 1]
            .get_or_init(|| Box::new(std::array::from_fn(|_| Counter::default())));
        table[status % 100].add(1);
        shard.durations.add(duration_us);
    }

    fn status_counts(&self) -> Vec<(u16, u64)> {
        let count = |status: u16| {
            self.shards.sum(|shard| {
                let table = shard.codes[usize::from(status / 100) - 1].get();
                table.map_or(0, |table| table[usize::from(status % 100)].value())
            })
        };
        (100..600)
            .map(|status| (status, count(status)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

/// What is counted for one endpoint of an upstream.
#[derive(Debug)]
pub struct Endpoint {
    shards: Sharded<EndpointShard>,
    healthy: AtomicBool,
    ejected: AtomicBool,
    ejections: AtomicU64,
    ejections_spared: AtomicU64,
}

/// One worker's part of an endpoint.
#[derive(Debug, Default)]
pub struct EndpointShard {
    /// Calls begun.
    pub calls: Counter,
    /// Calls that did not bring a whole response.
    pub failures: Counter,
    /// Calls that were tried again because the one before failed.
    pub retries: Counter,
    /// Calls that would have been tried again, had there been more of a budget.
    pub retries_denied: Counter,
    /// Calls begun because the one before took long.
    pub hedges: Counter,
    /// Those of them that answered first.
    pub hedges_won: Counter,
    /// Connections opened.
    pub connects: Counter,
    /// Connections open now, in use or idle.
    pub active: Gauge,
    /// Bytes read from it.
    pub received_bytes: Counter,
    /// Bytes written to it.
    pub sent_bytes: Counter,
}

impl Endpoint {
    /// The part of one worker.
    #[inline]
    pub fn of(&self, worker: usize) -> &EndpointShard {
        self.shards.of(worker)
    }

    /// Notes what is believed of it, for `sluice_upstream_healthy`; any thread.
    pub fn believe(&self, healthy: bool) {
        self.healthy.store(healthy, Relaxed);
    }

    /// Counts an ejection, or notes its end; control's thread only.
    pub fn eject(&self, ejected: bool) {
        self.ejected.store(ejected, Relaxed);
        self.ejections.fetch_add(u64::from(ejected), Relaxed);
    }

    /// Counts an ejection that was not done, because too few endpoints would have been left.
    pub fn spare(&self) {
        self.ejections_spared.fetch_add(1, Relaxed);
    }
}

/// What is counted for one upstream.
#[derive(Debug, Default)]
pub struct Upstream {
    panics: AtomicBool,
    panicked: AtomicU64,
}

impl Upstream {
    /// Notes whether health is ignored for want of healthy endpoints, and counts how often that began.
    pub fn panic(&self, panics: bool) {
        let before = self.panics.swap(panics, Relaxed);
        self.panicked
            .fetch_add(u64::from(panics && !before), Relaxed);
    }

    /// Health is ignored.
    pub fn panics(&self) -> bool {
        self.panics.load(Relaxed)
    }
}

/// What control counts and notes: rare, so plain atomics that any thread may write.
#[derive(Debug, Default)]
pub struct Control {
    pub generation: AtomicU64,
    pub last_reload_success: AtomicBool,
    pub reloads_refused: AtomicU64,
    pub bans_issued: AtomicU64,
    /// Offences for which no ban was issued because many users stand behind the address.
    pub bans_spared: AtomicU64,
    /// Times the keeper had to start a daemon again.
    pub daemon_restarts: AtomicU64,
    pub probes: AtomicU64,
    pub probes_failed: AtomicU64,
    /// Lines of the access log that could not be written.
    pub log_failed: AtomicU64,
    /// Names looked up, all rounds.
    pub lookups: AtomicU64,
    pub lookups_failed: AtomicU64,
}

/// Everything counted. A name that is registered again, after a reload, is the same counter.
#[derive(Debug)]
pub struct Registry {
    /// What control counts.
    pub control: Control,
    workers: Box<[Arc<Worker>]>,
    listeners: Series<[String; 1], Listener>,
    routes: Series<[String; 2], Route>,
    endpoints: Series<[String; 2], Endpoint>,
    upstreams: Series<[String; 1], Upstream>,
}

type Series<K, V> = Mutex<BTreeMap<K, Arc<V>>>;

impl Registry {
    /// Counters for `workers` workers, all zero.
    pub fn new(workers: usize) -> Self {
        Self {
            control: Control::default(),
            workers: (0..workers.max(1)).map(|_| Arc::default()).collect(),
            listeners: Mutex::default(),
            routes: Mutex::default(),
            endpoints: Mutex::default(),
            upstreams: Mutex::default(),
        }
    }

    /// The counters of the worker of this index.
    pub fn worker(&self, index: usize) -> Arc<Worker> {
        Arc::clone(&self.workers[index.min(self.workers.len() - 1)])
    }

    /// The worst that any worker says of each signal of overload: percent used, and number of the stage.
    pub fn overload(&self) -> [(i64, i64); 3] {
        let worst = |signal: usize, part: fn(&Overload) -> &Gauge| {
            let workers = self.workers.iter();
            workers
                .map(|worker| part(&worker.overload[signal]).value())
                .max()
                .unwrap_or(0)
        };
        [0, 1, 2].map(|signal| {
            (
                worst(signal, |overload| &overload.used_percent),
                worst(signal, |overload| &overload.stage),
            )
        })
    }

    /// The counters of a listener, made when its name is new.
    pub fn listener(&self, name: &str) -> Arc<Listener> {
        let made = || Listener {
            shards: Sharded::new(self.workers.len()),
        };
        registered(&self.listeners, [name.to_owned()], made)
    }

    /// The counters of a route on a listener, made when the pair is new.
    pub fn route(&self, listener: &str, route: &str) -> Arc<Route> {
        let made = || Route {
            shards: Sharded::new(self.workers.len()),
        };
        registered(&self.routes, [listener.to_owned(), route.to_owned()], made)
    }

    /// The counters of an endpoint (written `address:port`) of an upstream, made when the pair is new.
    pub fn endpoint(&self, upstream: &str, endpoint: &str) -> Arc<Endpoint> {
        let made = || Endpoint {
            shards: Sharded::new(self.workers.len()),
            healthy: AtomicBool::new(true),
            ejected: AtomicBool::new(false),
            ejections: AtomicU64::new(0),
            ejections_spared: AtomicU64::new(0),
        };
        registered(
            &self.endpoints,
            [upstream.to_owned(), endpoint.to_owned()],
            made,
        )
    }

    /// What is counted for an upstream, made when its name is new.
    pub fn upstream(&self, upstream: &str) -> Arc<Upstream> {
        registered(&self.upstreams, [upstream.to_owned()], Upstream::default)
    }

    /// Everything as Prometheus reads it (OpenMetrics 1.0 text), with what only others can know.
    pub fn text(self: &Arc<Self>, outside: Outside) -> String {
        text::encode(self, outside)
    }
}

fn registered<const N: usize, V>(
    series: &Series<[String; N], V>,
    key: [String; N],
    made: impl Fn() -> V,
) -> Arc<V> {
    let mut series = locked(series);
    if series.len() >= SERIES_MAX && !series.contains_key(&key) {
        // Endpoints come and go: what nobody counts any more makes room.
        series.retain(|_, counted| Arc::strong_count(counted) > 1);
    }
    let full = series.len() >= SERIES_MAX && !series.contains_key(&key);
    let key = if full {
        std::array::from_fn(|_| "other".to_owned())
    } else {
        key
    };
    Arc::clone(series.entry(key).or_insert_with(|| Arc::new(made())))
}

/// A poisoned lock still guards a valid map: an insert is the only change, and it cannot be half done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_is_the_same_counter_after_a_reload() {
        let registry = Registry::new(2);
        registry.route("web", "orders").count(0, 200, 900);
        registry.route("web", "orders").count(1, 200, 1_100);
        registry.route("web", "orders").count(1, 503, 5);
        assert_eq!(
            registry.route("web", "orders").status_counts(),
            [(200, 2), (503, 1)]
        );
        assert_eq!(registry.route("tls", "orders").status_counts(), []);
    }

    #[test]
    fn a_status_out_of_range_is_counted_at_its_end() {
        let registry = Registry::new(1);
        let route = registry.route("web", "a");
        route.count(0, 0, 0);
        route.count(7, 65_535, u64::MAX);
        assert_eq!(route.status_counts(), [(100, 1), (599, 1)]);
    }

    #[test]
    fn names_beyond_the_limit_share_one() {
        let registry = Registry::new(1);
        let mut counted: Vec<_> = (0..SERIES_MAX)
            .map(|n| registry.listener(&format!("l{n}")))
            .collect();
        assert!(Arc::ptr_eq(
            &registry.listener("more"),
            &registry.listener("still more")
        ));
        assert!(!Arc::ptr_eq(
            &registry.listener("l0"),
            &registry.listener("more")
        ));
        let other = registry.listener("more");
        counted.truncate(SERIES_MAX - 2);
        let own = registry.listener("one that finds room");
        assert!(
            !Arc::ptr_eq(&own, &other),
            "nobody counts the last ones any more"
        );
    }

    #[test]
    fn a_duration_on_a_bound_belongs_to_that_bucket() {
        let durations = Durations::default();
        durations.add(250);
        durations.add(251);
        durations.add(u64::from(u32::MAX));
        assert_eq!(durations.buckets[0].value(), 1);
        assert_eq!(durations.buckets[1].value(), 1);
        assert_eq!(durations.buckets[DURATION_BOUNDS_US.len()].value(), 1);
    }

    #[test]
    fn reasons_beyond_the_limit_are_counted_as_other() {
        let worker = Worker::default();
        for n in 0..REASONS_MAX + 5 {
            worker.reject(Box::leak(format!("r{n}").into_boxed_str()));
            worker.reject("r0");
        }
        let last = REASONS_MAX - 1;
        assert_eq!(worker.rejected.0[last].1.value(), 6);
        assert_eq!(worker.rejected.0[0].1.value(), (REASONS_MAX + 6) as u64);
    }
}
