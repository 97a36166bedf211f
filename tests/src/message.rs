//! Messages on file: what is sent, what must become of it, byte for byte, in a form that people read.
//!
//! ```text
//! RFC 9112 section 6.1: a length beside a coding
//! answer: 400 length_and_coding
//! then: close
//! --- sent
//! POST / HTTP/1.1
//! Host: a.test
//! Content-Length: 4
//! Transfer-Encoding: chunked
//!
//! 0
//!
//! ```
//!
//! Each line of a section ends with CRLF on the wire; one that ends with a backslash ends with nothing. `\r`, `\n`, `\t`,
//! `\0`, `\\`, `\xff` are bytes, `\(300*ab)` is three hundred times `ab`. Of chunked bodies that go on, which may be cut
//! anywhere on their way, the data stands in one chunk. The sections:
//!
//! - `sent`: what the client sends; a second request follows it in the same breath. Else a GET of the message's own name.
//! - `reached`: what reached the origin, but for the fields by which a proxy says whom it speaks for.
//! - `origin`: what the origin says; else a 200 of two bytes.
//! - `got`: what the client got, but for `date`.
//!
//! The keys: `answer` (statuses in their order, with the reason that is counted, or `nothing`), `then` (the client's connection is
//! `open` for the second request, `close`d behind the answer, or `torn` within it), `client` (`ends` behind what it sent,
//! or `waits`, with no second request), `origin` (`closes` or `resets` behind what it said, or is `early`: says it before
//! it has read the body), `pool` (the origin's connection is `kept` for others or `dropped`).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// One message and what must become of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Case {
    /// The file's name without its ending; also the path of the request, where it says none itself.
    pub name: String,
    /// Which rule it is about.
    pub title: String,
    pub answers: Vec<Answer>,
    /// There is none, and that is right.
    pub is_unanswered: bool,
    pub then: Then,
    pub client: Client,
    pub origin: Origin,
    pub pool: Option<Pool>,
    pub sent: Vec<u8>,
    pub reached: Option<Vec<u8>>,
    pub said: Option<Vec<u8>>,
    pub got: Option<Vec<u8>>,
}

/// A status, and the reason that is counted where Sluice itself says it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub reason: Option<String>,
}

/// What becomes of the client's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Then {
    #[default]
    Open,
    Close,
    Torn,
}

/// What the client does behind what it sent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Client {
    /// Sends another request.
    #[default]
    GoesOn,
    Ends,
    Waits,
}

/// What the origin does behind what it said, or, `Early`, before it has read a body.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Origin {
    #[default]
    Stays,
    Closes,
    Resets,
    Early,
}

/// What becomes of the origin's connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pool {
    Kept,
    Dropped,
}

/// The messages of a folder of `tests/messages`, by name.
pub fn read_all(folder: &str) -> Result<Vec<Case>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("messages")
        .join(folder);
    let entries = fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = fs::read_to_string(path)?;
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            Case::parse(&name, &text)
        })
        .enumerate()
        .map(|(index, case)| case.with_context(|| paths[index].display().to_string()))
        .collect()
}

impl Case {
    /// Reads one file.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let title = lines.next().unwrap_or_default();
        ensure!(
            title.starts_with("RFC 9") && title.contains(": "),
            "the first line names the RFC, its section and the rule: {title:?}"
        );
        let mut case = Self {
            name: name.to_owned(),
            title: title.to_owned(),
            sent: format!("GET /{name} HTTP/1.1\r\nHost: a.test\r\n\r\n").into_bytes(),
            ..Self::default()
        };
        let mut section = None;
        for line in lines {
            if let Some(name) = line.strip_prefix("--- ") {
                case.section(name)?.clear();
                section = Some(name);
            } else if let Some(name) = section {
                wire(line, case.section(name)?)?;
            } else {
                let (key, value) = line.split_once(": ").context("a line without a key")?;
                case.take(key, value)?;
            }
        }
        ensure!(
            case.answers.is_empty() == case.is_unanswered,
            "no answer, or one beside `nothing`"
        );
        let is_served = case
            .answers
            .iter()
            .any(|answer| answer.reason.is_none() && (200..500).contains(&answer.status));
        ensure!(
            !is_served || case.reached.is_some() || case.said.is_some(),
            "what reached the origin?"
        );
        Ok(case)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<()> {
        match (key, value) {
            ("answer", "nothing") => self.is_unanswered = true,
            ("answer", list) => {
                for one in list.split(", ") {
                    let (status, reason) = one
                        .split_once(' ')
                        .map_or((one, None), |(status, reason)| (status, Some(reason)));
                    self.answers.push(Answer {
                        status: status.parse().context("no status")?,
                        reason: reason.map(str::to_owned),
                    });
                }
            }
            ("then", "open") => self.then = Then::Open,
            ("then", "close") => self.then = Then::Close,
            ("then", "torn") => self.then = Then::Torn,
            ("client", "ends") => self.client = Client::Ends,
            ("client", "waits") => self.client = Client::Waits,
            ("origin", "closes") => self.origin = Origin::Closes,
            ("origin", "resets") => self.origin = Origin::Resets,
            ("origin", "early") => self.origin = Origin::Early,
            ("pool", "kept") => self.pool = Some(Pool::Kept),
            ("pool", "dropped") => self.pool = Some(Pool::Dropped),
            _ => bail!("nobody knows `{key}: {value}`"),
        }
        Ok(())
    }

    /// The bytes of a section, to be filled.
    fn section(&mut self, name: &str) -> Result<&mut Vec<u8>> {
        Ok(match name {
            "sent" => &mut self.sent,
            "reached" => self.reached.get_or_insert_default(),
            "origin" => self.said.get_or_insert_default(),
            "got" => self.got.get_or_insert_default(),
            other => bail!("no section is called {other}"),
        })
    }

    /// The path of the first request, by which the origin knows what to say.
    pub fn path(&self) -> String {
        format!("/{}", self.name)
    }
}

/// Appends what a line of a section is on the wire.
fn wire(line: &str, bytes: &mut Vec<u8>) -> Result<()> {
    let is_open = line.ends_with('\\') && !line.ends_with("\\\\");
    unescape(
        line.strip_suffix('\\').filter(|_| is_open).unwrap_or(line),
        bytes,
    )?;
    if !is_open {
        bytes.extend_from_slice(b"\r\n");
    }
    Ok(())
}

fn unescape(line: &str, bytes: &mut Vec<u8>) -> Result<()> {
    let mut rest = line;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        bytes.extend_from_slice(plain.as_bytes());
        let kind = escaped.chars().next().context("a backslash alone")?;
        rest = &escaped[kind.len_utf8()..];
        match kind {
            'r' => bytes.push(b'\r'),
            'n' => bytes.push(b'\n'),
            't' => bytes.push(b'\t'),
            '0' => bytes.push(0),
            '\\' => bytes.push(b'\\'),
            'x' => {
                let digits = rest.get(..2).context("\\x without two digits")?;
                bytes.push(u8::from_str_radix(digits, 16).context("\\x without two digits")?);
                rest = &rest[2..];
            }
            '(' => {
                let (inner, behind) = rest.split_once(')').context("\\( without )")?;
                let (count, what) = inner.split_once('*').context("\\( without *")?;
                let mut once = Vec::new();
                unescape(what, &mut once)?;
                bytes.extend(once.repeat(count.parse().context("\\( without a count")?));
                rest = behind;
            }
            other => bail!("\\{other} means nothing"),
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_it_is_meant() {
        let text = "RFC 9112 section 2.2: a rule\nanswer: 100, 400 bare_lf\nthen: close\nclient: ends\npool: kept\n\
                    --- sent\nGET / HTTP/1.1\\n\\\nX: \\x01\\\\\\0\\(3*\\tb)\n\nbody\\\n";
        let case = Case::parse("one", text).expect("a case");
        assert_eq!(
            case.sent,
            b"GET / HTTP/1.1\nX: \x01\\\0\tb\tb\tb\r\n\r\nbody"
        );
        let reasons: Vec<_> = case.answers.iter().map(|answer| &answer.reason).collect();
        assert_eq!(reasons, [&None, &Some("bare_lf".to_owned())]);
        assert_eq!((case.then, case.client), (Then::Close, Client::Ends));
        assert_eq!((case.pool, case.path()), (Some(Pool::Kept), "/one".into()));
    }

    #[test]
    fn a_file_that_says_nothing_or_too_much_is_refused() {
        for text in [
            "a rule\nanswer: 400 x\n--- sent\nx",
            "RFC 9112 section 1: a rule\n--- sent\nx",
            "RFC 9112 section 1: a rule\nanswer: 200\n--- sent\nx",
            "RFC 9112 section 1: a rule\nanswer: 400 x\nthen: maybe\n--- sent\nx",
            "RFC 9112 section 1: a rule\nanswer: 400 x\n--- send\nx",
            "RFC 9112 section 1: a rule\nanswer: 400 x\n--- sent\n\\q",
        ] {
            assert!(Case::parse("one", text).is_err(), "{text}");
        }
    }
}
