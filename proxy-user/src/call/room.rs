//! Room for one more call at an upstream: taken at once, or waited for in its line.

use std::time::Duration;

use super::{ConnectError, Room};
use crate::net;
use crate::tunable::Tunables;
use crate::upstream::{Ask, Entry, Upstream};

/// How often whoever waits looks for room that nobody left: an endpoint came back, a limit was raised.
const LOOK: Duration = Duration::from_millis(100);

/// Begins a call to an endpoint that `ask` chooses. Where all that it may have are full, or others wait already, it takes
/// its turn in the line, if it may wait.
///
/// # Errors
/// `NoEndpoint`, `Full` and `PendingLate` of [`ConnectError`].
pub(super) async fn enter<'u>(
    upstream: &'u Upstream,
    tunables: &Tunables,
    may_wait: bool,
    ask: impl Fn() -> Ask,
) -> Result<Room<'u>, ConnectError> {
    if upstream.queue().is_empty() {
        match upstream.enter(&ask()) {
            Entry::Begun(index, active) => return Ok((index, active)),
            Entry::Nobody => return Err(ConnectError::NoEndpoint),
            Entry::Full => {}
        }
    }
    if !may_wait {
        return Err(ConnectError::Full);
    }
    // Boxed, as it is rare, and each connection's task is as large as its largest state.
    Box::pin(wait(upstream, tunables, ask)).await
}

async fn wait<'u>(
    upstream: &'u Upstream,
    tunables: &Tunables,
    ask: impl Fn() -> Ask,
) -> Result<Room<'u>, ConnectError> {
    let (since, waiting) = (net::now(), &upstream.waiting);
    let deadline = since + waiting.wait.unwrap_or(tunables.upstream.pending_timeout);
    let pending_max = waiting.pending_max.unwrap_or(tunables.upstream.pending_max);
    let queue = upstream.queue();
    let place = queue.join(pending_max).ok_or(ConnectError::Full)?;
    loop {
        let look = deadline.min(net::now() + LOOK);
        if net::timeout(look, place.turn()).await.is_err() {
            if net::now() >= deadline {
                place.give_up();
                return Err(ConnectError::PendingLate);
            }
            queue.nudge();
            continue;
        }
        let ask = ask();
        match upstream.enter(&ask) {
            Entry::Begun(index, active) => {
                let waited = net::now() - since;
                place.served(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
                return Ok((index, active));
            }
            Entry::Nobody => return Err(ConnectError::NoEndpoint),
            Entry::Full => place.wait_on(upstream.is_bound(ask.wish)),
        }
    }
}
