//! The chunked coding, byte by byte and to the letter: what any lenient reader might take otherwise is refused.

use super::Piece;
use crate::message::{Limits, Reject, is_field_name};

/// Where in a chunked body the reader stands, and what it has left to spend.
#[derive(Debug)]
pub(super) struct Chunks {
    at: At,
    /// Of the present chunk: its size as read so far, then what is left of its data.
    left: u64,
    /// Digits of the present size.
    digits: u8,
    extension_bytes_left: usize,
    trailer_bytes_left: usize,
    /// The trailer section as it came, where somebody wants it.
    trailers: Option<Vec<u8>>,
}

/// The next byte belongs to this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// A trailer's name, or the empty line that ends the body.
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    LastLf,
}

impl At {
    fn is_trailer(self) -> bool {
        matches!(
            self,
            Self::TrailerStart
                | Self::TrailerName
                | Self::TrailerValue
                | Self::TrailerLf
                | Self::LastLf
        )
    }
}

/// Sixteen hexadecimal digits fill 64 bits; more are refused even if they are zeros.
const DIGITS_MAX: u8 = 16;

impl Chunks {
    pub fn new(limits: &Limits) -> Self {
        Self {
            at: At::Size,
            left: 0,
            digits: 0,
            extension_bytes_left: limits.chunk_extension_bytes_max,
            trailer_bytes_left: limits.trailer_bytes_max,
            trailers: None,
        }
    }

    /// Lets the trailer section be kept.
    pub fn keep_trailers(&mut self) {
        self.trailers = Some(Vec::new());
    }

    /// What was kept: whole lines, and the empty one that ends them.
    pub fn into_trailers(self) -> Vec<u8> {
        self.trailers.unwrap_or_default()
    }

    pub fn decode(&mut self, input: &[u8]) -> Result<Piece, Reject> {
        for (index, byte) in input.iter().enumerate() {
            if self.at == At::Data {
                let len = usize::try_from(self.left)
                    .unwrap_or(usize::MAX)
                    .min(input.len() - index);
                self.left -= len as u64;
                if self.left == 0 {
                    self.at = At::DataCr;
                }
                return Ok(Piece {
                    consumed: index + len,
                    data: index..index + len,
                    end: false,
                });
            }
            if let Some(trailers) = &mut self.trailers
                && self.at.is_trailer()
            {
                trailers.push(*byte);
            }
            let is_last = self.at == At::LastLf;
            self.at = self.step(*byte)?;
            if is_last {
                return Ok(Piece {
                    consumed: index + 1,
                    data: 0..0,
                    end: true,
                });
            }
        }
        Ok(Piece {
            consumed: input.len(),
            data: 0..0,
            end: false,
        })
    }

    /// Takes one byte of framing; answers what the next one belongs to.
    fn step(&mut self, byte: u8) -> Result<At, Reject> {
        match (self.at, byte) {
            (At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => self.take_digit(byte),
            (At::Size, b';') if self.digits > 0 => self.take_extension(byte),
            (At::Size, b'\r') if self.digits > 0 => Ok(At::SizeLf),
            (At::Extension, b'\r') => Ok(At::SizeLf),
            (At::Extension, _) => self.take_extension(byte),
            (At::SizeLf, b'\n') => {
                self.digits = 0;
                Ok(if self.left == 0 {
                    At::TrailerStart
                } else {
                    At::Data
                })
            }
            (At::Size | At::SizeLf, _) => Err(Reject::bad("chunk_size")),
            (At::DataCr, b'\r') => Ok(At::DataLf),
            (At::DataLf, b'\n') => Ok(At::Size),
            (At::Data | At::DataCr | At::DataLf, _) => Err(Reject::bad("chunk_data_end")),
            (At::TrailerStart, b'\r') => Ok(At::LastLf),
            (At::LastLf, b'\n') => Ok(At::LastLf),
            (At::TrailerName, b':') => self.take_trailer(At::TrailerValue),
            (At::TrailerStart | At::TrailerName, _) if is_field_name(&[byte]) => {
                self.take_trailer(At::TrailerName)
            }
            (At::TrailerValue, b'\r') => Ok(At::TrailerLf),
            (At::TrailerValue, b'\t' | b' '..=0x7e | 0x80..) => self.take_trailer(At::TrailerValue),
            (At::TrailerLf, b'\n') => Ok(At::TrailerStart),
            (
                At::TrailerStart | At::TrailerName | At::TrailerValue | At::TrailerLf | At::LastLf,
                _,
            ) => Err(Reject::bad("trailer")),
        }
    }

    fn take_digit(&mut self, digit: u8) -> Result<At, Reject> {
        if self.digits == DIGITS_MAX {
            return Err(Reject::bad("chunk_size"));
        }
        self.digits += 1;
        self.left = self.left << 4 | u64::from((digit as char).to_digit(16).unwrap_or_default());
        Ok(At::Size)
    }

    /// Extensions are read over, within a bound for the whole body.
    fn take_extension(&mut self, byte: u8) -> Result<At, Reject> {
        if !matches!(byte, b'\t' | b' '..=0x7e | 0x80..) {
            return Err(Reject::bad("chunk_extension"));
        }
        self.extension_bytes_left = self
            .extension_bytes_left
            .checked_sub(1)
            .ok_or(Reject::bad("chunk_extension_too_long"))?;
        Ok(At::Extension)
    }

    /// Trailers are checked, and dropped unless a route lists them: nobody behind us can be led to believe them (RFC 9110
    /// section 6.5.1).
    fn take_trailer(&mut self, next: At) -> Result<At, Reject> {
        self.trailer_bytes_left = self
            .trailer_bytes_left
            .checked_sub(1)
            .ok_or(Reject::bad("trailer_too_long"))?;
        Ok(next)
    }
}
