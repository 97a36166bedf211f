//! An answer as it arrives, held against what the origin sent. Written apart from the product's own parser, as a witness.

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;

/// Bytes of a head as the proxy sends it on.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// How far an answer has come.
pub struct Answer<'a> {
    body: &'a [u8],
    state: State,
}

enum State {
    /// The beginning of a head whose end has not come.
    Head(Vec<u8>),
    /// So many bytes of the body have come.
    Body { arrived: usize, goes_on: bool },
}

#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    More,
    /// It is all there. `goes_on`: the connection may be used again.
    Whole {
        goes_on: bool,
    },
}

impl<'a> Answer<'a> {
    /// An answer with this body is expected.
    pub fn new(body: &'a [u8]) -> Self {
        Self {
            body,
            state: State::Head(Vec::new()),
        }
    }

    /// Looks at what has arrived; an error says in what it differs.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Progress> {
        match &mut self.state {
            State::Body { arrived, goes_on } => {
                let (from, goes_on) = (*arrived, *goes_on);
                self.take_body(bytes, from, goes_on)
            }
            State::Head(head) if head.is_empty() => match memmem::find(bytes, b"\r\n\r\n") {
                Some(end) => {
                    let goes_on = check_head(&bytes[..end], self.body.len())?;
                    self.take_body(&bytes[end + 4..], 0, goes_on)
                }
                None => {
                    head.extend_from_slice(bytes);
                    Ok(Progress::More)
                }
            },
            State::Head(head) => {
                head.extend_from_slice(bytes);
                ensure!(
                    head.len() <= HEAD_BYTES_MAX + self.body.len(),
                    "a head without an end"
                );
                let all = std::mem::take(head);
                if memmem::find(&all, b"\r\n\r\n").is_some() {
                    return self.take(&all);
                }
                self.state = State::Head(all);
                Ok(Progress::More)
            }
        }
    }

    fn take_body(&mut self, bytes: &[u8], from: usize, goes_on: bool) -> Result<Progress> {
        let expected = &self.body[from..];
        ensure!(
            bytes.len() <= expected.len(),
            "{} bytes follow the end of an answer",
            bytes.len() - expected.len()
        );
        ensure!(
            bytes == &expected[..bytes.len()],
            "the body of an answer is not what the origin sent"
        );
        let arrived = from + bytes.len();
        if arrived == self.body.len() {
            return Ok(Progress::Whole { goes_on });
        }
        self.state = State::Body { arrived, goes_on };
        Ok(Progress::More)
    }
}

/// Status and length of a head without its empty line: whether the connection goes on afterwards.
fn check_head(head: &[u8], body_bytes: usize) -> Result<bool> {
    let mut lines = memmem::find_iter(head, b"\r\n");
    let first = lines.next().unwrap_or(head.len());
    if !head.starts_with(b"HTTP/1.1 200") {
        bail!("answered {:?}", String::from_utf8_lossy(&head[..first]));
    }
    let (mut length, mut goes_on) = (None, true);
    let mut start = first + 2;
    for end in lines.chain([head.len()]) {
        let line = head.get(start..end).unwrap_or_default();
        start = end + 2;
        // Most fields are told apart from these two by their length and first letter.
        match line.first() {
            Some(b'C' | b'c') => {}
            Some(b'T' | b't') if value(line, b"transfer-encoding:").is_some() => {
                bail!("an answer has transfer-encoding where the origin sent content-length")
            }
            _ => continue,
        }
        if let Some(value) = value(line, b"content-length:") {
            let text = std::str::from_utf8(value).context("content-length")?;
            length = Some(text.parse::<usize>().context("content-length")?);
        } else if let Some(value) = value(line, b"connection:") {
            goes_on = !value.eq_ignore_ascii_case(b"close");
        }
    }
    ensure!(
        length == Some(body_bytes),
        "an answer has content-length {length:?} where {body_bytes} were sent"
    );
    Ok(goes_on)
}

fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, value) = line.split_at_checked(name.len())?;
    start.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &[u8] =
        b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 4\r\nCache-Control: no\r\n\r\nbody";

    fn all_at_once(bytes: &[u8]) -> Result<Progress> {
        Answer::new(b"body").take(bytes)
    }

    fn with(from: &str, to: &str) -> Vec<u8> {
        let text = String::from_utf8(GOOD.to_vec()).unwrap();
        assert!(text.contains(from));
        text.replace(from, to).into_bytes()
    }

    #[test]
    fn an_answer_is_whole_however_it_is_cut() {
        for cut in 1..GOOD.len() {
            let mut answer = Answer::new(b"body");
            assert_eq!(answer.take(&GOOD[..cut]).unwrap(), Progress::More, "{cut}");
            let last = answer.take(&GOOD[cut..]).unwrap();
            assert_eq!(last, Progress::Whole { goes_on: true }, "{cut}");
        }
    }

    #[test]
    fn whatever_differs_from_what_the_origin_sent_is_an_error() {
        for wrong in [
            with("200 OK", "502 Bad Gateway"),
            with("length: 4", "length: 5"),
            with("content-length: 4", "x-length: 4"),
            with("Server: x", "Transfer-Encoding: chunked"),
            with("body", "bodi"),
            with("body", "bodybody"),
        ] {
            let text = String::from_utf8_lossy(&wrong).into_owned();
            assert!(all_at_once(&wrong).is_err(), "{text}");
        }
    }

    #[test]
    fn an_announced_end_of_the_connection_is_heeded() {
        let closing = with("Server: x", "Connection: Close");
        assert_eq!(
            all_at_once(&closing).unwrap(),
            Progress::Whole { goes_on: false }
        );
    }
}
