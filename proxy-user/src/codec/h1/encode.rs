//! Frames body data for the wire, and holds the sender to the length it announced.

use crate::message::Framing;

/// Frames one body.
#[derive(Debug)]
pub struct BodyEncoder {
    framing: Framing,
    /// Of `Framing::Length`: bytes still to be sent.
    left: u64,
}

/// What surrounds a run of data on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    prefix: [u8; 18],
    prefix_len: u8,
    suffix: &'static [u8],
}

/// More or fewer bytes than announced: the message on the wire is broken and its connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LengthMismatch;

impl BodyEncoder {
    /// For a body announced with this framing.
    pub fn new(framing: Framing) -> Self {
        let left = if let Framing::Length(length) = framing {
            length
        } else {
            0
        };
        Self { framing, left }
    }

    /// Nothing surrounds the data, ever.
    pub fn is_plain(&self) -> bool {
        matches!(self.framing, Framing::Length(_) | Framing::UntilClose)
    }

    /// What surrounds the next `len` bytes of data. Nothing surrounds no data: an empty chunk would be the end.
    pub fn frame(&mut self, len: usize) -> Result<Frame, LengthMismatch> {
        match self.framing {
            _ if len == 0 => Ok(Frame::NONE),
            Framing::None => Err(LengthMismatch),
            Framing::Length(_) => {
                self.left = self.left.checked_sub(len as u64).ok_or(LengthMismatch)?;
                Ok(Frame::NONE)
            }
            Framing::Chunked => Ok(Frame::chunk(len as u64)),
            Framing::UntilClose => Ok(Frame::NONE),
        }
    }

    /// Behind the data there is room for trailers: they stand between the last chunk and the empty line.
    pub fn takes_trailers(&self) -> bool {
        self.framing == Framing::Chunked
    }

    /// What is sent after all data. Not to be called for a body that was cut short: that one must not look whole.
    pub fn end(&mut self) -> Result<&'static [u8], LengthMismatch> {
        match self.framing {
            Framing::Length(_) if self.left > 0 => Err(LengthMismatch),
            Framing::Chunked => Ok(b"0\r\n\r\n"),
            Framing::None | Framing::Length(_) | Framing::UntilClose => Ok(b""),
        }
    }
}

impl Frame {
    const NONE: Self = Self {
        prefix: [0; 18],
        prefix_len: 0,
        suffix: b"",
    };

    fn chunk(len: u64) -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let count = (16 - len.leading_zeros() / 4).max(1) as usize;
        let mut prefix = [0; 18];
        for (index, digit) in prefix[..count].iter_mut().enumerate() {
            *digit = DIGITS[(len >> (4 * (count - 1 - index)) & 15) as usize];
        }
        prefix[count..count + 2].copy_from_slice(b"\r\n");
        Self {
            prefix,
            prefix_len: count as u8 + 2,
            suffix: b"\r\n",
        }
    }

    /// Sent before the data.
    pub fn prefix(&self) -> &[u8] {
        &self.prefix[..usize::from(self.prefix_len)]
    }

    /// Sent behind it.
    pub fn suffix(&self) -> &'static [u8] {
        self.suffix
    }
}
