//! One request of ours to one upstream: choose an endpoint, get a connection, send the request, wait for the head of the response.

mod quantile;
mod room;

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::codec::h1::{HeadError, Reader, Transfer, TransferError};
use crate::config::RetryOn;
use crate::message::{Limits, Method, ResponseHead};
use crate::metric;
use crate::net::{self, Either, Instant};
use crate::origin::{OriginConnection, Pool};
use crate::report::{Report, Sender};
use crate::snapshot::Snapshot;
use crate::upstream::{Active, Ask, Endpoint, Trial, Turn, Upstream, Wish};
use quantile::Quantile;

/// How often the time before a retry is doubled: beyond, a client has waited long enough.
const BACKOFF_DOUBLED_MAX: u32 = 4;

/// The index of an endpoint, and room for a call to it.
pub type Room<'s> = (usize, Active<'s>);

/// Makes the calls of one worker.
pub struct Caller {
    worker: usize,
    pool: Pool,
    reports: Sender,
    random: Cell<u64>,
    long_calls: RefCell<LongCalls>,
}

/// How long the calls of each route take, as far as somebody wants to know; learned anew in each generation.
#[derive(Default)]
struct LongCalls {
    generation: u64,
    by_route: Vec<Quantile>,
}

/// A call under way: dropped, its connection is closed; see [`Call::succeed`] and [`Call::fail`].
pub struct Call<'s> {
    pub connection: OriginConnection,
    /// The connection has served a call before, so the endpoint may have closed it while this one was sent.
    pub is_reused: bool,
    /// Which of its upstream's endpoints it is.
    pub index: usize,
    pub endpoint: &'s Endpoint,
    upstream: &'s Upstream,
    metrics: &'s Arc<metric::Endpoint>,
    /// Counts it while it is under way.
    pub active: Active<'s>,
    wish: Wish,
    /// What the breaker of its upstream learns from it.
    pub trial: Trial<'s>,
}

/// The tries that a request has.
#[derive(Clone, Copy, Debug)]
pub struct Tries {
    /// Tries after this one.
    pub left: u32,
    /// Which failures are worth one.
    pub on: RetryOn,
    pub connect_timeout: Duration,
    /// Longest time of one try.
    pub per_try: Option<Duration>,
    /// Longest wait before the first retry.
    pub backoff: Duration,
    /// No try goes on beyond it.
    pub deadline: Instant,
    /// The endpoint that the last one failed with.
    pub avoid: Option<usize>,
    /// What of the request has a say in whom it is for.
    pub wish: Wish,
    /// Where all room is taken, it may be waited for.
    pub may_wait: bool,
    /// Retries so far.
    pub made: u32,
    /// When the present try has to have a response.
    pub try_ends: Instant,
}

/// How long a response is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// From the end of the request to the next head.
    pub head: Duration,
    /// In any case.
    pub latest: Instant,
}

/// Why a call has failed, as a route's `retry.on` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Connect,
    Reset,
    ServerError,
    Timeout,
}

/// Why there is no connection for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError {
    /// No endpoint is healthy, or none takes new work.
    NoEndpoint,
    /// The last endpoint that was tried refused, or cannot be reached.
    Refused,
    /// It did not answer in time.
    Late,
    /// All endpoints have as many calls as they may, and so many requests wait that no more may.
    Full,
    /// It waited for room in vain.
    PendingLate,
    /// We have no descriptor, port or memory left for a connection: no endpoint's fault, and no other would help.
    Exhausted,
    /// The upstream has failed so often that nobody is asked for so many nanoseconds.
    Open(u64),
}

/// Why there is no response.
#[derive(Debug)]
pub enum AnswerError {
    /// The endpoint is to blame.
    Head(HeadError),
    /// The client's body is.
    Upload(TransferError),
}

impl<'s> Call<'s> {
    /// The `Set-Cookie` that brings the client back to this endpoint, if it does not have it.
    pub fn set_cookie(&self, is_tls: bool) -> Option<String> {
        self.upstream.set_cookie(self.index, self.wish, is_tls)
    }

    /// Its connection is closed; its room is left to whoever asks the same endpoint on another one.
    pub fn give_up(self) -> Room<'s> {
        (self.index, self.active)
    }
}

impl Caller {
    /// `seed` is any number that differs between workers and that nobody can foresee.
    pub fn new(worker: usize, reports: Sender, seed: u64) -> Self {
        Self {
            worker,
            pool: Pool::default(),
            reports,
            random: Cell::new(seed | 1),
            long_calls: RefCell::default(),
        }
    }

    /// The next number of a sequence that outsiders do not know (xorshift64*, Marsaglia 2003, Vigna 2016).
    pub fn random(&self) -> u64 {
        let mut x = self.random.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.random.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Connections that wait for a call.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Chooses an endpoint of an upstream and gets a connection to it. An endpoint that cannot be reached costs a try:
    /// nothing was sent yet, so that any request may go to another one.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn begin<'s>(
        &self,
        snapshot: &'s Snapshot,
        upstream: usize,
        tries: &mut Tries,
    ) -> Result<Call<'s>, ConnectError> {
        let endpoints = snapshot
            .upstreams
            .get(upstream)
            .ok_or(ConnectError::NoEndpoint)?;
        if tries.made == 0 {
            let percent = snapshot.tunables.upstream.retry_budget_percent;
            endpoints.earn_retry(self.worker, percent);
        }
        self.go_on(snapshot, upstream, tries, None).await
    }

    /// The same for a request whose call has met a connection that its endpoint had closed: that endpoint is asked again, on
    /// a new one, in the room that the call had.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn renew<'s>(
        &self,
        snapshot: &'s Snapshot,
        upstream: usize,
        tries: &mut Tries,
        room: Room<'s>,
    ) -> Result<Call<'s>, ConnectError> {
        self.go_on(snapshot, upstream, tries, Some(room)).await
    }

    async fn go_on<'s>(
        &self,
        snapshot: &'s Snapshot,
        upstream: usize,
        tries: &mut Tries,
        mut renewed: Option<Room<'s>>,
    ) -> Result<Call<'s>, ConnectError> {
        let endpoints = snapshot
            .upstreams
            .get(upstream)
            .ok_or(ConnectError::NoEndpoint)?;
        loop {
            let trial = endpoints
                .admit(self.worker, net::now().as_ns())
                .map_err(ConnectError::Open)?;
            let may_reuse = renewed.is_none();
            let room = match renewed.take() {
                Some(room) => room,
                None => {
                    let ask = || self.ask(tries);
                    room::enter(endpoints, &snapshot.tunables, tries.may_wait, ask).await?
                }
            };
            let index = room.0;
            tries.start(net::now());
            let call = self
                .connect(snapshot, upstream, room, may_reuse, trial, tries)
                .await;
            match call {
                Err(error @ (ConnectError::Refused | ConnectError::Late)) => {
                    let cause = Cause::Connect;
                    if !self.retry(snapshot, upstream, index, tries, cause).await {
                        return Err(error);
                    }
                }
                done => return done,
            }
        }
    }

    fn ask(&self, tries: &Tries) -> Ask {
        Ask {
            worker: self.worker,
            avoid: tries.avoid,
            random: self.random(),
            now_ns: net::now().as_ns(),
            wish: tries.wish,
        }
    }

    /// Whether there is another try after a call to this endpoint that failed, with another endpoint if there is one; the
    /// time before it has passed then. Whether the request may be sent twice is for the caller to know.
    pub async fn retry(
        &self,
        snapshot: &Snapshot,
        upstream: usize,
        index: usize,
        tries: &mut Tries,
        cause: Cause,
    ) -> bool {
        if tries.left == 0 || !tries.is_worth(cause) || net::now() >= tries.deadline {
            return false;
        }
        if !self.spend(snapshot, upstream, index) {
            return false;
        }
        // Another endpoint is asked at once; whoever asks the same ones again gives them time.
        let is_at_once = tries.made == 0 && snapshot.upstreams[upstream].endpoints.len() > 1;
        let wait = tries.count(index);
        let metrics = &snapshot.endpoint_metrics[upstream][index];
        metrics.of(self.worker).retries.add(1);
        if !is_at_once && !wait.is_zero() {
            net::sleep_until(net::now() + jittered(wait, self.random())).await;
        }
        true
    }

    /// A call beside the one to this endpoint, which takes long; None where the budget of retries is spent, or nobody is there.
    pub async fn begin_hedge<'s>(
        &self,
        snapshot: &'s Snapshot,
        upstream: usize,
        tries: &mut Tries,
    ) -> Option<Call<'s>> {
        if !self.spend(snapshot, upstream, tries.avoid?) {
            return None;
        }
        let call = self.begin(snapshot, upstream, tries).await.ok()?;
        call.metrics.of(self.worker).hedges.add(1);
        Some(call)
    }

    /// A call was the first to be answered, and not the first to be made.
    pub fn count_hedge_won(&self, call: &Call<'_>) {
        call.metrics.of(self.worker).hedges_won.add(1);
    }

    /// What is long for a call of this route, once enough is known.
    pub fn long_call(&self, snapshot: &Snapshot, route: usize) -> Option<Duration> {
        let long_calls = self.long_calls.borrow();
        let is_known = long_calls.generation == snapshot.generation;
        let quantile = long_calls.by_route.get(route).filter(|_| is_known)?;
        quantile.estimate_ns().map(Duration::from_nanos)
    }

    /// A call of this route took so long, of which `percent` of a hundred are to be below what is called long.
    pub fn learn_call(&self, snapshot: &Snapshot, route: usize, took: Duration, percent: u32) {
        let mut long_calls = self.long_calls.borrow_mut();
        if long_calls.generation != snapshot.generation {
            *long_calls = LongCalls {
                generation: snapshot.generation,
                by_route: vec![Quantile::default(); snapshot.config.routes.len()],
            };
        }
        if let Some(quantile) = long_calls.by_route.get_mut(route) {
            quantile.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), percent);
        }
    }

    /// Takes one retry out of the budget of an upstream.
    fn spend(&self, snapshot: &Snapshot, upstream: usize, index: usize) -> bool {
        let per_second = snapshot.tunables.upstream.retries_per_second_min;
        let now_ns = net::now().as_ns();
        let is_spent = snapshot.upstreams[upstream].spend_retry(self.worker, now_ns, per_second);
        if !is_spent {
            let metrics = &snapshot.endpoint_metrics[upstream][index];
            metrics.of(self.worker).retries_denied.add(1);
        }
        is_spent
    }

    /// A connection for a call to this endpoint: a waiting one, or, if `may_reuse` is false or none waits, a new one.
    ///
    /// # Errors
    /// See [`ConnectError`].
    async fn connect<'s>(
        &self,
        snapshot: &'s Snapshot,
        upstream: usize,
        (index, active): Room<'s>,
        may_reuse: bool,
        mut trial: Trial<'s>,
        tries: &Tries,
    ) -> Result<Call<'s>, ConnectError> {
        let metrics = &snapshot.endpoint_metrics[upstream][index];
        let of_index = upstream;
        let upstream = &*snapshot.upstreams[upstream];
        let (endpoint, wish) = (&upstream.endpoints[index], tries.wish);
        metrics.of(self.worker).calls.add(1);
        let waiting = if may_reuse {
            self.pool.acquire(endpoint.address)
        } else {
            None
        };
        if let Some(connection) = waiting {
            return Ok(Call {
                connection,
                is_reused: true,
                index,
                endpoint,
                upstream,
                metrics,
                active,
                wish,
                trial,
            });
        }
        let deadline = tries.try_ends.min(net::now() + tries.connect_timeout);
        let error = match net::timeout(deadline, net::connect(endpoint.address)).await {
            Ok(Ok(stream)) => {
                let connection = OriginConnection::new(stream, self.worker, Arc::clone(metrics));
                return Ok(Call {
                    connection,
                    is_reused: false,
                    index,
                    endpoint,
                    upstream,
                    metrics,
                    active,
                    wish,
                    trial,
                });
            }
            Ok(Err(error)) if is_ours(&error) => return Err(ConnectError::Exhausted),
            Ok(Err(_)) => ConnectError::Refused,
            Err(net::Elapsed) => ConnectError::Late,
        };
        let hold = snapshot.tunables.upstream.failed_hold;
        endpoint.hold((net::now() + hold).as_ns());
        self.conclude(snapshot, of_index, &mut trial, false);
        self.blame(endpoint, metrics, active);
        Err(error)
    }

    /// The call has brought the head of a response, or it will not: what the breaker of its upstream learns.
    pub fn conclude(
        &self,
        snapshot: &Snapshot,
        upstream: usize,
        trial: &mut Trial<'_>,
        is_good: bool,
    ) {
        let name = || &snapshot.upstreams[upstream].name;
        match trial.settle(is_good, net::now().as_ns()) {
            Turn::Nothing => {}
            Turn::Opened => log::warn!(
                "upstream {}: too many calls fail, nobody is asked for a while",
                name()
            ),
            Turn::Closed => log::info!("upstream {}: it answers again", name()),
        }
    }

    /// The call has brought a whole response; its connection can serve another one if both sides let it live. `is_good`
    /// says whether the response itself speaks for the endpoint.
    pub fn succeed(&self, call: Call<'_>, is_good: bool, keep_alive: bool, idle_max: usize) {
        if is_good {
            call.endpoint.praise();
        } else {
            self.blame(call.endpoint, call.metrics, call.active);
        }
        if keep_alive {
            self.pool.release(call.connection, idle_max, net::now());
        }
    }

    /// The call has failed by the endpoint's fault; its connection is closed.
    pub fn fail(&self, call: Call<'_>) {
        self.blame(call.endpoint, call.metrics, call.active);
    }

    fn blame(&self, endpoint: &Endpoint, metrics: &metric::Endpoint, active: Active<'_>) {
        active.fail(net::now().as_ns());
        endpoint.blame();
        metrics.of(self.worker).failures.add(1);
        self.reports.send(Report::EndpointFailed {
            address: endpoint.address,
        });
    }
}

impl Default for Tries {
    /// One try, with all the time there is.
    fn default() -> Self {
        Self {
            left: 0,
            on: RetryOn::default(),
            connect_timeout: Duration::MAX,
            per_try: None,
            backoff: Duration::ZERO,
            deadline: Instant::NEVER,
            avoid: None,
            wish: Wish::default(),
            may_wait: true,
            made: 0,
            try_ends: Instant::NEVER,
        }
    }
}

impl Tries {
    /// For one call beside that to this endpoint.
    #[must_use]
    pub fn beside(self, index: usize) -> Self {
        Self {
            left: 0,
            made: self.made + 1,
            avoid: Some(index),
            may_wait: false,
            ..self
        }
    }

    fn start(&mut self, now: Instant) {
        let try_ends = self.per_try.map_or(Instant::NEVER, |per_try| now + per_try);
        self.try_ends = self.deadline.min(try_ends);
    }

    fn is_worth(&self, cause: Cause) -> bool {
        match cause {
            Cause::Connect => self.on.connect,
            Cause::Reset => self.on.reset,
            Cause::ServerError => self.on.server_error,
            Cause::Timeout => self.on.timeout,
        }
    }

    /// One more; the longest time before it.
    fn count(&mut self, index: usize) -> Duration {
        let doubled = 1 << self.made.min(BACKOFF_DOUBLED_MAX);
        self.left = self.left.saturating_sub(1);
        self.made += 1;
        self.avoid = Some(index);
        self.backoff * doubled
    }
}

/// Any time up to the longest ("full jitter": Brooker, Exponential Backoff And Jitter, 2015): who failed together does not
/// come back together.
fn jittered(most: Duration, random: u64) -> Duration {
    let most_ns = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(((u128::from(random) * u128::from(most_ns)) >> 64) as u64)
}

/// What connect(2) and socket(2) say when it is this host that has run out of something.
fn is_ours(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL)
    )
}

/// Reads the head of the response, an interim one or the final one, while the request is being sent.
///
/// The endpoint's time starts when it has the whole request, but no call goes on beyond its latest. When it takes no more of the
/// request, it may have answered already.
///
/// # Errors
/// See [`AnswerError`].
pub async fn answer(
    reader: &mut Reader<'_>,
    upload: Option<&mut Transfer<'_, '_>>,
    response: &mut ResponseHead,
    method: Method,
    limits: &Limits,
    times: Times,
) -> Result<(), AnswerError> {
    let mut parse = |bytes: &[u8]| response.parse(bytes, method, limits);
    if let Some(upload) = upload.filter(|upload| !upload.is_done()) {
        match net::select(upload.run(), reader.head(times.latest, &mut parse)).await {
            Either::Left(Ok(()) | Err(TransferError::Sink | TransferError::SinkLate)) => {}
            Either::Left(Err(error)) => return Err(AnswerError::Upload(error)),
            Either::Right(head) => return head.map_err(AnswerError::Head),
        }
    }
    let deadline = times.latest.min(net::now() + times.head);
    reader
        .head(deadline, &mut parse)
        .await
        .map_err(AnswerError::Head)
}
