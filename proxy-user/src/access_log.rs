//! The access log: a line of JSON for each exchange, gathered by the worker that served it, written by control.

mod line;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::config::LogField;
use crate::message::{RequestHead, ResponseHead};
use crate::metric;
use crate::report::queue;

/// Buffers that can wait at most, whatever `log.buffers_max` says; its own most.
const BUFFERS_MAX: usize = 4096;

/// What an exchange came to.
#[derive(Clone, Copy)]
pub struct Entry<'e> {
    pub listener: &'e str,
    /// Empty: none was found.
    pub route: &'e str,
    pub upstream: &'e str,
    pub endpoint: Option<SocketAddr>,
    /// Who asked; `None`: the peer.
    pub client: Option<std::net::IpAddr>,
    pub peer: &'e str,
    pub scheme: &'static str,
    /// The version of TLS; empty: none.
    pub tls: &'static str,
    /// Its head says nothing but its id where it was refused.
    pub request: &'e RequestHead,
    pub response: Option<&'e ResponseHead>,
    /// 0: none was sent.
    pub status: u16,
    /// Why it was refused; empty: it was not.
    pub reason: &'static str,
    /// Of the request's body.
    pub received_bytes: u64,
    /// Of the response's body.
    pub sent_bytes: u64,
    pub retries: u32,
    /// `None`: no endpoint was connected to.
    pub is_reused: Option<bool>,
    /// By [`Span`], where it took place.
    pub durations_us: [Option<u32>; Span::COUNT],
}

/// A part of an exchange's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// From the accept of its connection to the beginning of its service.
    Accept,
    /// The TLS handshake of its connection.
    Tls,
    /// From the first byte of the request to the end of its head.
    Head,
    /// Finding the route, and its policies.
    Route,
    /// Until there was a connection to an endpoint.
    Connect,
    /// From then to the head of the response.
    FirstByte,
    /// From then to the end of the response.
    Body,
    /// From the first byte of the request to the end of the response.
    Total,
}

impl Span {
    pub const COUNT: usize = 8;
}

/// Lines on their way to the file.
#[derive(Debug, Default)]
pub struct Lines {
    pub bytes: Vec<u8>,
    pub count: u32,
    /// See [`Queue`]; given back when they are dropped.
    waiting: Option<Arc<AtomicUsize>>,
}

impl Drop for Lines {
    fn drop(&mut self) {
        if let Some(waiting) = &self.waiting {
            waiting.fetch_sub(1, Relaxed);
        }
    }
}

/// Where workers hand lines over.
#[derive(Clone, Debug)]
pub struct Queue {
    queue: queue::Sender<Lines>,
    /// Buffers that were handed over and are not written yet.
    waiting: Arc<AtomicUsize>,
}

impl Queue {
    /// A queue, and the end that control reads.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<(Self, queue::Receiver<Lines>)> {
        let (queue, lines) = queue::bounded(BUFFERS_MAX)?;
        let waiting = Arc::default();
        Ok((Self { queue, waiting }, lines))
    }

    /// The end of one worker; what it drops is counted in its `metrics`.
    pub fn log(&self, metrics: Arc<metric::Worker>) -> Log {
        Log {
            queue: self.clone(),
            metrics,
            gathered: RefCell::default(),
            clock: line::Clock::default(),
        }
    }
}

/// The log as one worker has it.
#[derive(Debug)]
pub struct Log {
    queue: Queue,
    metrics: Arc<metric::Worker>,
    gathered: RefCell<Lines>,
    clock: line::Clock,
}

impl Log {
    /// Adds a line about an exchange that ended now. A buffer of so many bytes is handed over, if fewer than so many wait.
    pub fn add(
        &self,
        fields: &[LogField],
        entry: &Entry<'_>,
        buffer_bytes: usize,
        buffers_max: usize,
    ) {
        let mut lines = self.gathered.borrow_mut();
        if lines.bytes.capacity() == 0 {
            lines.bytes.reserve(buffer_bytes + line::USUAL_BYTES);
        }
        line::push(&mut lines.bytes, fields, entry, &self.clock);
        lines.count += 1;
        if lines.bytes.len() >= buffer_bytes {
            drop(lines);
            self.flush(buffers_max);
        }
    }

    /// Hands over what there is, full or not, unless so many wait that only full ones should: part-filled ones would take the
    /// room of whole ones behind a file that takes nothing.
    pub fn flush_early(&self, buffers_max: usize) {
        if self.queue.waiting.load(Relaxed) < buffers_max.div_ceil(2) {
            self.flush(buffers_max);
        }
    }

    /// Hands over what there is.
    fn flush(&self, buffers_max: usize) {
        let mut lines = self.gathered.take();
        if lines.count == 0 {
            return;
        }
        let count = u64::from(lines.count);
        let waiting = self.queue.waiting.fetch_add(1, Relaxed);
        lines.waiting = Some(Arc::clone(&self.queue.waiting));
        // Dropped, it waits no more.
        if waiting >= buffers_max || !self.queue.queue.send(lines) {
            self.metrics.log_dropped.add(count);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.flush(BUFFERS_MAX);
    }
}

#[cfg(test)]
mod tests;
