//! One body on its way from one wire to another, behind the head that announces it: framed anew, with backpressure and deadlines.

use std::{borrow::Cow, cell::Cell, iter::once, time::Duration};

use super::wire::{Body, BodyError};
use super::{BodyEncoder, Frame, LengthMismatch};
use crate::message::push_trailers;
use crate::net::{self, Chunk, Instant, Payload, Splice};
use crate::tls::Transport;

/// Data up to this length is copied behind the head: one buffer to send is cheaper than several, and the receive buffer is free at once.
const COPIED_BYTES_MAX: usize = 4 << 10;

/// Trailers stand behind it.
const LAST_CHUNK: &[u8] = b"0\r\n";

/// A receiver that has taken so much within [`Pace::send`] gets another one for the rest.
const TAKEN_BYTES_MIN: u64 = 16 << 10;

/// What a transfer may take.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Longest wait for the next data.
    pub wait: Duration,
    /// Slowest average at which data may come, in bytes per second, after one `wait`; 0 = any.
    pub rate_min: u64,
    /// Longest wait until the peer has taken what was sent before, or [`TAKEN_BYTES_MIN`] of it.
    pub send: Duration,
    /// Longest body.
    pub bytes_max: u64,
    /// What has arrived is sent together up to this length, if not beyond it by one receive buffer: one system call of the kernel's for many buffers.
    pub batch_bytes_max: usize,
    /// With so much left of a body that nobody has to look at, it stays inside the kernel; 0 = never.
    pub splice_bytes_min: u64,
}

/// A body, and where it goes. What one [`Transfer::run`] has begun the next one continues, so it can be dropped at any time.
pub struct Transfer<'t, 'w> {
    body: &'t mut Body<'w>,
    to: &'t Transport,
    encoder: BodyEncoder,
    /// The head, until it is sent.
    head: Option<Vec<u8>>,
    /// Data that waits for the sending side, and what is to go with it.
    data: Option<Chunk>,
    more: Vec<Chunk>,
    /// Found behind data that is to be sent before.
    fault: Option<BodyError>,
    /// The way through the kernel, once it is taken.
    splice: Option<Splice<'t>>,
    pace: Pace,
    started: Instant,
    bytes: u64,
    /// Where somebody else reads how many.
    counted: Option<&'t Cell<u64>>,
    /// Trailers that go on.
    trailers: &'t [String],
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
            more: Vec::new(),
            fault: None,
            splice: None,
            pace,
            started: net::now(),
            bytes: 0,
            counted: None,
            trailers: &[],
            is_done: false,
        }
    }

    /// Tells how much of the body was sent, from now on.
    pub fn counted(mut self, count: &'t Cell<u64>) -> Self {
        count.set(0);
        self.counted = Some(count);
        self
    }

    /// Lets trailers of these names (lower case) go on, if both sides are chunked.
    pub fn with_trailers(mut self, names: &'t [String]) -> Self {
        if !names.is_empty() {
            self.body.keep_trailers();
            self.trailers = names;
        }
        self
    }

    /// All of it is with the kernel, or next in the queue for it.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// The whole body, as far as it has gone, can be sent once more.
    pub fn can_repeat(&self) -> bool {
        self.body.can_rewind()
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
            if let Some(fault) = self.fault.take() {
                return Err(TransferError::Body(fault));
            }
            if self.splice().await? {
                continue;
            }
            self.look()?;
            if self.data.is_none() && self.head.is_none() && !self.body.is_ended() {
                let next = net::timeout(self.deadline(), self.body.next()).await;
                self.data = next
                    .map_err(|_| TransferError::Late)?
                    .map_err(TransferError::Body)?;
            }
            let before = net::now();
            self.wait_until_taken().await?;
            // Time that the receiver took is not held against the sender.
            self.started = self.started + (net::now() - before);
            self.gather().await;
            self.send()?;
        }
        Ok(())
    }

    /// Waits until the receiver has taken what was sent, as long as it takes any.
    async fn wait_until_taken(&self) -> Result<(), TransferError> {
        if let Some(idle) = net::at_once(self.to.idle()).await {
            return idle.map_err(|_| TransferError::Sink);
        }
        loop {
            let before = self.to.tcp().acknowledged_bytes();
            match net::timeout(net::now() + self.pace.send, self.to.idle()).await {
                Ok(idle) => return idle.map_err(|_| TransferError::Sink),
                Err(net::Elapsed) => self.expect_taken(before)?,
            }
        }
    }

    /// Another wait is due to a receiver that has taken enough since then.
    fn expect_taken(&self, before: u64) -> Result<(), TransferError> {
        let now = self.to.tcp().acknowledged_bytes();
        if now.saturating_sub(before) < TAKEN_BYTES_MIN {
            return Err(TransferError::SinkLate);
        }
        Ok(())
    }

    /// Takes along what has arrived meanwhile, and does not wait for any.
    async fn gather(&mut self) {
        let mut len = self.data.as_ref().map_or(0, |data| data.len());
        while len < self.pace.batch_bytes_max && !self.body.is_ended() && self.fault.is_none() {
            match net::at_once(self.body.next()).await {
                Some(Ok(Some(data))) => {
                    len += data.len();
                    if self.data.is_none() {
                        self.data = Some(data);
                    } else {
                        self.more.push(data);
                    }
                }
                Some(Err(fault)) => self.fault = Some(fault),
                // Nothing is here yet, or nothing will come any more.
                Some(Ok(None)) | None => return,
            }
        }
    }

    /// Moves some of the body inside the kernel; false where it has to go through user space.
    async fn splice(&mut self) -> Result<bool, TransferError> {
        let Some(left) = self.find_passage() else {
            return Ok(false);
        };
        let deadline = self.deadline();
        let Some(splice) = &mut self.splice else {
            return Ok(false);
        };
        if splice.held() == 0 {
            if splice.is_behind().await {
                return Ok(false);
            }
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let taken = net::timeout(deadline, splice.take(most)).await;
            let taken = taken.map_err(|_| TransferError::Late)?;
            if taken == 0 {
                self.splice = None;
                self.pace.splice_bytes_min = 0;
                return Ok(false);
            }
            self.body.skip(taken as u64);
            self.account(taken)?;
        }
        let before = net::now();
        self.give().await?;
        self.started = self.started + (net::now() - before);
        if self.body.is_ended() {
            self.encoder.end().map_err(cut_short)?;
            self.is_done = true;
        }
        Ok(true)
    }

    /// How much can go through the kernel from now on; None where user space has something to send first, or to look at, or too little is left.
    fn find_passage(&mut self) -> Option<u64> {
        if let Some(splice) = &self.splice
            && splice.held() > 0
        {
            return Some(0);
        }
        let is_first = self.splice.is_none();
        let least = self.pace.splice_bytes_min;
        if least == 0 || self.head.is_some() || self.data.is_some() || !self.encoder.is_plain() {
            return None;
        }
        let (to, (from, left)) = (self.to.plain()?, self.body.passage()?);
        // Of a body without a length, what has come already lets expect more.
        let expected = if left == u64::MAX { self.bytes } else { left };
        if is_first && expected < least {
            return None;
        }
        if is_first {
            self.splice = Splice::new(from, to);
        }
        if self.splice.is_none() {
            self.pace.splice_bytes_min = 0;
        }
        Some(left)
    }

    /// Sends what the kernel holds.
    async fn give(&mut self) -> Result<(), TransferError> {
        let to = self.to.tcp();
        let acknowledged = || to.acknowledged_bytes();
        let (mut deadline, mut before) = (net::now() + self.pace.send, acknowledged());
        while let Some(splice) = &mut self.splice
            && splice.held() > 0
        {
            match net::timeout(deadline, splice.give()).await {
                Ok(given) => given.map(drop).map_err(|_| TransferError::Sink)?,
                Err(net::Elapsed) => {
                    self.expect_taken(before)?;
                    (deadline, before) = (net::now() + self.pace.send, acknowledged());
                }
            }
        }
        Ok(())
    }

    /// So many bytes more, as the limit and the framing see them.
    fn account(&mut self, len: usize) -> Result<Frame, TransferError> {
        self.bytes += len as u64;
        if let Some(count) = self.counted {
            count.set(self.bytes);
        }
        if self.bytes > self.pace.bytes_max {
            return Err(TransferError::TooLarge);
        }
        self.encoder.frame(len).map_err(cut_short)
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

    fn parts(&self) -> impl Iterator<Item = &Chunk> {
        self.data.iter().chain(&self.more)
    }

    /// What ends the body on the wire.
    fn end(&mut self) -> Result<Cow<'static, [u8]>, LengthMismatch> {
        let end = self.encoder.end()?;
        if self.trailers.is_empty() || !self.encoder.takes_trailers() {
            return Ok(Cow::Borrowed(end));
        }
        let mut end = LAST_CHUNK.to_vec();
        push_trailers(&mut end, self.body.trailers(), self.trailers);
        end.extend_from_slice(b"\r\n");
        Ok(Cow::Owned(end))
    }

    /// Queues what there is: head, data, and the end once the body has ended.
    fn send(&mut self) -> Result<(), TransferError> {
        let len = self.parts().map(|part| part.len()).sum();
        let frame = self.account(len)?;
        let is_ended = self.body.is_ended();
        let end: Cow<'static, [u8]> = if is_ended {
            self.end().map_err(cut_short)?
        } else {
            Cow::Borrowed(b"")
        };
        let mut out = self.head.take().unwrap_or_default();
        out.extend_from_slice(frame.prefix());
        let sent = if len > COPIED_BYTES_MAX {
            let data = self.data.take().into_iter().chain(self.more.drain(..));
            let ends = [frame.suffix().into(), end.into_owned().into()];
            let data = data.map(Payload::from);
            self.to.queue(once(out.into()).chain(data).chain(ends))
        } else {
            self.parts().for_each(|part| out.extend_from_slice(part));
            out.extend_from_slice(frame.suffix());
            out.extend_from_slice(&end);
            self.data = None;
            self.more.clear();
            self.to.queue([out.into()])
        };
        self.is_done = is_ended;
        sent.map_err(|_| TransferError::Sink)
    }
}

/// What the decoder of a length lets through is what the encoder of the same length expects.
fn cut_short(_: LengthMismatch) -> TransferError {
    TransferError::Body(BodyError::CutShort)
}
