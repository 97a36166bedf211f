//! What must hold of any bytes taken for a chunked body: fed by fuzzing, and by the corpus that fuzzing left.

use super::{BodyDecoder, BodyEncoder};
use crate::message::{Framing, Limits};

/// What is small enough to be reached by a fuzzer.
const EXTENSION_BYTES_MAX: usize = 24;
const TRAILER_BYTES_MAX: usize = 40;

/// A target of fuzzing: the first byte is the size of the pieces in which the rest arrives.
pub fn chunked(data: &[u8]) {
    if let Some((size, wire)) = data.split_first() {
        check(wire, usize::from(*size).max(1));
    }
}

/// Decodes a body that arrives in pieces of this size: whether it is taken.
///
/// Wherever it is cut it comes to the same; it is taken where a reader written from the grammar takes it; and what is
/// taken is written as a body of the same data.
pub(super) fn check(wire: &[u8], size: usize) -> bool {
    let whole = decode(wire, wire.len().max(1));
    assert_eq!(decode(wire, size), whole);
    assert_eq!(read_by_the_grammar(wire), whole);
    let Some((body, _)) = whole else {
        return false;
    };
    let mut encoder = BodyEncoder::new(Framing::Chunked);
    let mut anew = Vec::new();
    for run in body.chunks(size) {
        let frame = encoder.frame(run.len());
        assert!(frame.is_ok());
        anew.extend(frame.iter().flat_map(|frame| frame.prefix()));
        anew.extend(run);
        anew.extend(frame.iter().flat_map(|frame| frame.suffix()));
    }
    anew.extend(encoder.end().unwrap_or_default());
    let length = anew.len();
    assert_eq!(decode(&anew, 7), Some((body, length)));
    true
}

/// The data of a body that arrives in pieces of this size, and where it ends; None for one that is refused or has no end.
fn decode(wire: &[u8], size: usize) -> Option<(Vec<u8>, usize)> {
    let limits = Limits {
        chunk_extension_bytes_max: EXTENSION_BYTES_MAX,
        trailer_bytes_max: TRAILER_BYTES_MAX,
        ..Limits::default()
    };
    let mut decoder = BodyDecoder::new(Framing::Chunked, &limits);
    let (mut data, mut at) = (Vec::new(), 0);
    for piece in wire.chunks(size) {
        let mut rest = piece;
        while !rest.is_empty() && !decoder.is_ended() {
            let found = decoder.decode(rest).ok()?;
            assert!(found.consumed > 0 && found.data.end <= found.consumed);
            assert_eq!(found.end, decoder.is_ended());
            data.extend_from_slice(&rest[found.data]);
            rest = &rest[found.consumed..];
            at += found.consumed;
        }
    }
    decoder.close().ok()?;
    Some((data, at))
}

/// The same, read at leisure from the grammar of RFC 9112 section 7.1, with all of the body at hand.
fn read_by_the_grammar(wire: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut data, mut at) = (Vec::new(), 0);
    let (mut extensions, mut trailers) = (0, 0);
    loop {
        let line = line_at(wire, at)?;
        at += line.len() + 2;
        let digits = line.iter().position(|byte| *byte == b';');
        let (digits, extension) = line.split_at(digits.unwrap_or(line.len()));
        extensions += extension.len();
        let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
        let is_visible = extension.iter().all(is_text);
        if !(1..=16).contains(&digits.len()) || !is_hex || !is_visible {
            return None;
        }
        let size = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        if extensions > EXTENSION_BYTES_MAX {
            return None;
        }
        if size == 0 {
            break;
        }
        let end = at.checked_add(usize::try_from(size).ok()?)?;
        data.extend_from_slice(wire.get(at..end)?);
        at = end + 2;
        if wire.get(end..at)? != b"\r\n" {
            return None;
        }
    }
    loop {
        let line = line_at(wire, at)?;
        at += line.len() + 2;
        trailers += line.len();
        if line.is_empty() {
            return Some((data, at));
        }
        let colon = line.iter().position(|byte| *byte == b':')?;
        let is_field = crate::message::is_field_name(&line[..colon]);
        if trailers > TRAILER_BYTES_MAX || !is_field || !line.iter().all(is_text) {
            return None;
        }
    }
}

/// Up to the CRLF; no line holds either of the two.
fn line_at(wire: &[u8], at: usize) -> Option<&[u8]> {
    let rest = wire.get(at..)?;
    let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
    Some(&rest[..end]).filter(|line| !line.contains(&b'\n') && !line.contains(&b'\r'))
}

fn is_text(byte: &u8) -> bool {
    *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f)
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_fuzzing_left_of_chunked_bodies_keeps_the_rules() {
        crate::message::fuzz::replay("chunked", super::chunked);
    }
}
