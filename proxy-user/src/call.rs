//! One request of ours to one upstream: choose an endpoint, get a connection, send the request, wait for the head of the response.

mod room;

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::codec::h1::{HeadError, Reader, Transfer, TransferError};
use crate::message::{Limits, Method, ResponseHead};
use crate::metric;
use crate::net::{self, Either, Instant};
use crate::origin::{OriginConnection, Pool};
use crate::report::{Report, Sender};
use crate::snapshot::Snapshot;
use crate::upstream::{Active, Ask, Endpoint, Upstream, Wish};

/// Makes the calls of one worker.
pub struct Caller {
    worker: usize,
    pool: Pool,
    reports: Sender,
    random: Cell<u64>,
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
}

/// The tries that a request has.
#[derive(Debug)]
pub struct Tries<'s> {
    /// Tries after this one.
    pub left: u32,
    /// The endpoint that the last one failed with.
    pub avoid: Option<usize>,
    /// An endpoint that had closed a connection of the pool: it is asked again, on a new one, in the room that it had.
    pub renew: Option<(usize, Active<'s>)>,
    /// What of the request has a say in whom it is for.
    pub wish: Wish,
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
}

/// Why there is no response.
#[derive(Debug)]
pub enum AnswerError {
    /// The endpoint is to blame.
    Head(HeadError),
    /// The client's body is.
    Upload(TransferError),
}

impl Call<'_> {
    /// The `Set-Cookie` that brings the client back to this endpoint, if it does not have it.
    pub fn set_cookie(&self, is_tls: bool) -> Option<String> {
        self.upstream.set_cookie(self.index, self.wish, is_tls)
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
        tries: &mut Tries<'s>,
    ) -> Result<Call<'s>, ConnectError> {
        let endpoints = snapshot
            .upstreams
            .get(upstream)
            .ok_or(ConnectError::NoEndpoint)?;
        loop {
            let renewed = tries.renew.take();
            let may_reuse = renewed.is_none();
            let (index, active) = match renewed {
                Some(renewed) => renewed,
                None => {
                    let ask = || self.ask(tries);
                    room::enter(endpoints, &snapshot.tunables, ask).await?
                }
            };
            let begun = (index, active, tries.wish);
            match self.connect(snapshot, upstream, begun, may_reuse).await {
                Err(ConnectError::Refused | ConnectError::Late) if tries.left > 0 => {
                    self.count_retry(snapshot, upstream, index, tries);
                }
                done => return done,
            }
        }
    }

    fn ask(&self, tries: &Tries<'_>) -> Ask {
        Ask {
            worker: self.worker,
            avoid: tries.avoid,
            random: self.random(),
            now_ns: net::now().as_ns(),
            wish: tries.wish,
        }
    }

    /// Another try after a call that failed, with another endpoint if there is one.
    pub fn count_retry(
        &self,
        snapshot: &Snapshot,
        upstream: usize,
        index: usize,
        tries: &mut Tries<'_>,
    ) {
        tries.left = tries.left.saturating_sub(1);
        tries.avoid = Some(index);
        snapshot.endpoint_metrics[upstream][index]
            .of(self.worker)
            .retries
            .add(1);
    }

    /// A connection for a call to this endpoint: a waiting one, or, if `may_reuse` is false or none waits, a new one.
    ///
    /// # Errors
    /// See [`ConnectError`].
    async fn connect<'s>(
        &self,
        snapshot: &'s Snapshot,
        upstream: usize,
        (index, active, wish): (usize, Active<'s>, Wish),
        may_reuse: bool,
    ) -> Result<Call<'s>, ConnectError> {
        let metrics = &snapshot.endpoint_metrics[upstream][index];
        let upstream = &*snapshot.upstreams[upstream];
        let endpoint = &upstream.endpoints[index];
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
            });
        }
        let limits = &snapshot.tunables.upstream;
        let deadline = net::now() + limits.connect_timeout;
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
                });
            }
            Ok(Err(error)) if is_ours(&error) => return Err(ConnectError::Exhausted),
            Ok(Err(_)) => ConnectError::Refused,
            Err(net::Elapsed) => ConnectError::Late,
        };
        endpoint.hold((net::now() + limits.failed_hold).as_ns());
        self.blame(endpoint, metrics, active);
        Err(error)
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

/// What connect(2) and socket(2) say when it is this host that has run out of something.
fn is_ours(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL)
    )
}

/// Reads the head of the response, an interim one or the final one, while the request is being sent.
///
/// The endpoint's time starts when it has the whole request. When it takes no more of it, it may have answered already.
///
/// # Errors
/// See [`AnswerError`].
pub async fn answer(
    reader: &mut Reader<'_>,
    upload: &mut Transfer<'_, '_>,
    response: &mut ResponseHead,
    method: Method,
    limits: &Limits,
    timeout: Duration,
) -> Result<(), AnswerError> {
    let mut parse = |bytes: &[u8]| response.parse(bytes, method, limits);
    if !upload.is_done() {
        match net::select(upload.run(), reader.head(Instant::NEVER, &mut parse)).await {
            Either::Left(Ok(()) | Err(TransferError::Sink | TransferError::SinkLate)) => {}
            Either::Left(Err(error)) => return Err(AnswerError::Upload(error)),
            Either::Right(head) => return head.map_err(AnswerError::Head),
        }
    }
    let deadline = net::now() + timeout;
    reader
        .head(deadline, &mut parse)
        .await
        .map_err(AnswerError::Head)
}
