//! Waiting for something to become true, with a deadline: what tests do instead of sleeping.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::sandbox;

/// How often a condition is looked at again.
const PACE: Duration = Duration::from_millis(5);

/// Polls `condition` until it gives a value; after `limit` an error that says what was waited for.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if sandbox::interrupted() {
            bail!("interrupted while waiting for {what}");
        }
        if start.elapsed() >= limit {
            bail!("waited {limit:?} in vain for {what}");
        }
        thread::sleep(PACE);
    }
}

/// Polls `condition` until it is true.
pub fn until_true(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    until(what, limit, || condition().then_some(()))
}
