//! HTTP/1.1 on a connection: heads and bodies out of what arrives, bodies framed anew for where they go (RFC 9112).

mod chunked;
mod encode;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod transfer;
mod wire;

use crate::message::{Framing, Limits, Reject};
use chunked::Chunks;
use std::ops::Range;

pub use encode::{BodyEncoder, Frame, LengthMismatch};
pub use transfer::{Pace, Transfer, TransferError};
pub use wire::{Body, BodyError, HeadError, Reader, Wire};

/// Finds the data of one body in the bytes of a connection.
#[derive(Debug)]
pub struct BodyDecoder {
    state: State,
    /// See [`Self::keep_trailers`].
    trailers: Vec<u8>,
}

#[derive(Debug)]
enum State {
    Ended,
    /// So many bytes are still to come; at least one.
    Length(u64),
    Chunked(Chunks),
    UntilClose,
}

/// What one call of `decode` found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of the input that are done with.
    pub consumed: usize,
    /// Where body data lies in the input; within `..consumed`, may be empty.
    pub data: Range<usize>,
    /// The body is complete: what follows `consumed` is the next message.
    pub end: bool,
}

impl BodyDecoder {
    /// For a body framed so; of the limits, those of chunk extensions and trailers count.
    pub fn new(framing: Framing, limits: &Limits) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Ended,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Chunked(Chunks::new(limits)),
            Framing::UntilClose => State::UntilClose,
        };
        Self {
            state,
            trailers: Vec::new(),
        }
    }

    /// Lets the trailer section be kept; to be called before the first byte.
    pub fn keep_trailers(&mut self) {
        if let State::Chunked(chunks) = &mut self.state {
            chunks.keep_trailers();
        }
    }

    /// The trailer section of a complete body, field lines as they came; empty where there is none.
    pub fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    /// The body is complete.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Finds the next run of data. Call again while input is left behind `consumed` and `end` is false; of an input that is
    /// not empty something is always consumed until the end is reached.
    pub fn decode(&mut self, input: &[u8]) -> Result<Piece, Reject> {
        let piece = match &mut self.state {
            State::Ended => Piece {
                consumed: 0,
                data: 0..0,
                end: true,
            },
            State::UntilClose => Piece {
                consumed: input.len(),
                data: 0..input.len(),
                end: false,
            },
            State::Chunked(chunks) => chunks.decode(input)?,
            State::Length(left) => {
                let len = usize::try_from(*left)
                    .unwrap_or(usize::MAX)
                    .min(input.len());
                *left -= len as u64;
                Piece {
                    consumed: len,
                    data: 0..len,
                    end: *left == 0,
                }
            }
        };
        if piece.end
            && let State::Chunked(chunks) = std::mem::replace(&mut self.state, State::Ended)
        {
            self.trailers = chunks.into_trailers();
        }
        Ok(piece)
    }

    /// What is still to come, where it is nothing but data; `u64::MAX` until the connection ends. None where the data has to be looked for.
    pub fn plain_left(&self) -> Option<u64> {
        match self.state {
            State::Length(left) => Some(left),
            State::UntilClose => Some(u64::MAX),
            State::Ended | State::Chunked(_) => None,
        }
    }

    /// So many bytes of it went another way.
    pub fn skip(&mut self, bytes: u64) {
        if let State::Length(left) = &mut self.state {
            *left = left.saturating_sub(bytes);
            if *left == 0 {
                self.state = State::Ended;
            }
        }
    }

    /// The peer has closed: fine after the end, and where closing is the end; else the body was cut short.
    pub fn close(&mut self) -> Result<(), Reject> {
        match self.state {
            State::Ended | State::UntilClose => {
                self.state = State::Ended;
                Ok(())
            }
            State::Length(_) | State::Chunked(_) => Err(Reject::bad("body_cut_short")),
        }
    }
}

#[cfg(test)]
mod tests;
