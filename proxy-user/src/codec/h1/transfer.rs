//! One body on its way from one wire to another, behind the head that announces it: framed anew, with backpressure and deadlines.

use std::time::Duration;

use super::BodyEncoder;
use super::wire::{Body, BodyError};
use crate::net::{self, Chunk, Instant};
use crate::tls::Transport;

/// Data up to this length is copied behind the head: one buffer to send is cheaper than several, and the receive buffer is free at once.
const COPIED_BYTES_MAX: usize = 4 << 10;

/// What a transfer may take.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Longest wait for the next data.
    pub wait: Duration,
    /// Slowest average at which data may come, in bytes per second, after one `wait`; 0 = any.
    pub rate_min: u64,
    /// Longest wait until the peer has taken what was sent before.
    pub send: Duration,
    /// Longest body.
    pub bytes_max: u64,
}

/// A body, and where it goes. What one [`Transfer::run`] has begun the next one continues, so it can be dropped at any time.
pub struct Transfer<'t, 'w> {
    body: &'t mut Body<'w>,
    to: &'t Transport,
    encoder: BodyEncoder,
    /// The head, until it is sent.
    head: Option<Vec<u8>>,
    /// Data that waits for the sending side.
    data: Option<Chunk>,
    pace: Pace,
    started: Instant,
    bytes: u64,
    is_done: bool,
}

/// Why a transfer came to no end.
#[derive(Debug)]
pub enum TransferError {
    /// The body broke off, or is none.
    Body(BodyError),
    /// It came too slowly.
    Late,
    /// It is longer than allowed.
    TooLarge,
    /// The receiver is gone.
    Sink,
    /// The receiver takes nothing any more.
    SinkLate,
}

impl<'t, 'w> Transfer<'t, 'w> {
    /// Of this body, behind this head.
    pub fn new(
        head: Vec<u8>,
        body: &'t mut Body<'w>,
        encoder: BodyEncoder,
        to: &'t Transport,
        pace: Pace,
    ) -> Self {
        Self {
            body,
            to,
            encoder,
            head: Some(head),
            data: None,
            pace,
            started: net::now(),
            bytes: 0,
            is_done: false,
        }
    }

    /// All of it is with the kernel, or next in the queue for it.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Looks at what has arrived of the body, so that a fault in it is known before the head is sent.
    ///
    /// # Errors
    /// When its framing is broken.
    pub fn look(&mut self) -> Result<(), TransferError> {
        if self.data.is_none() {
            self.data = self.body.ready().map_err(TransferError::Body)?;
        }
        Ok(())
    }

    /// Goes on until all is sent. The head does not wait for the body, but takes along what has arrived of it.
    ///
    /// # Errors
    /// See [`TransferError`]; nothing more can be sent then.
    pub async fn run(&mut self) -> Result<(), TransferError> {
        while !self.is_done {
            self.look()?;
            if self.data.is_none() && self.head.is_none() && !self.body.is_ended() {
                let next = net::timeout(self.deadline(), self.body.next()).await;
                self.data = next
                    .map_err(|_| TransferError::Late)?
                    .map_err(TransferError::Body)?;
            }
            let before = net::now();
            let idle = net::timeout(before + self.pace.send, self.to.idle()).await;
            idle.map_err(|_| TransferError::SinkLate)?
                .map_err(|_| TransferError::Sink)?;
            // Time that the receiver took is not held against the sender.
            self.started = self.started + (net::now() - before);
            self.send()?;
        }
        Ok(())
    }

    /// The next data must be here by then: soon, and not so late that the average falls below the slowest allowed.
    fn deadline(&self) -> Instant {
        let soon = net::now() + self.pace.wait;
        let Some(rate_min) = std::num::NonZero::new(self.pace.rate_min) else {
            return soon;
        };
        // The same grace for what has not come yet; from then on each byte buys its time.
        let earned = Duration::from_secs(self.bytes / rate_min);
        soon.min(self.started + self.pace.wait + earned)
    }

    /// Queues what there is: head, data, and the end once the body has ended.
    fn send(&mut self) -> Result<(), TransferError> {
        let data = self.data.take();
        let len = data.as_ref().map_or(0, |data| data.len());
        self.bytes += len as u64;
        if self.bytes > self.pace.bytes_max {
            return Err(TransferError::TooLarge);
        }
        // What the decoder of a length lets through is what the encoder of the same length expects.
        let cut_short = |_| TransferError::Body(BodyError::CutShort);
        let frame = self.encoder.frame(len).map_err(cut_short)?;
        let is_ended = self.body.is_ended();
        let end = if is_ended {
            self.encoder.end().map_err(cut_short)?
        } else {
            b""
        };
        let mut out = self.head.take().unwrap_or_default();
        out.extend_from_slice(frame.prefix());
        let sent = match data {
            Some(data) if len > COPIED_BYTES_MAX => {
                self.to
                    .queue([out.into(), data.into(), frame.suffix().into(), end.into()])
            }
            data => {
                for part in [data.as_deref().unwrap_or_default(), frame.suffix(), end] {
                    out.extend_from_slice(part);
                }
                self.to.queue([out.into()])
            }
        };
        self.is_done = is_ended;
        sent.map_err(|_| TransferError::Sink)
    }
}
