//! An origin that says what its script says, and keeps what it hears, byte for byte.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::message::Origin as Manner;
use crate::namespace::Namespace;

/// What it says to the request of one path.
#[derive(Clone, Debug, Default)]
pub struct Script {
    pub said: Vec<u8>,
    pub manner: Manner,
    /// Each byte is sent by itself.
    pub is_dribbled: bool,
}

impl Script {
    fn say(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        let size = if self.is_dribbled { 1 } else { usize::MAX };
        let mut pieces = self.said.chunks(size.min(self.said.len()).max(1));
        pieces.try_for_each(|piece| stream.write_all(piece))
    }
}

/// One request as it was heard.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Which connection it came on, counted from 0.
    pub connection: u64,
    pub head: Vec<u8>,
    /// As it stood on the wire, framing included.
    pub body: Vec<u8>,
    /// It came to its end.
    pub is_whole: bool,
}

/// A running origin.
#[derive(Clone, Default)]
pub struct Scripted(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    scripts: HashMap<String, Script>,
    heard: Vec<Heard>,
    connections: u64,
    /// Connections that the other side has ended.
    ended: Vec<u64>,
}

/// Requests that every test may send beside its own, and that are answered by their path and not kept.
pub const BYSTANDER: &str = "/bystander/";

/// A connection without a byte for so long is forgotten.
const PATIENCE: Duration = Duration::from_secs(60);
const HEAD_BYTES_MAX: usize = 256 << 10;

impl Scripted {
    /// Listens in a namespace.
    pub fn start(namespace: &Namespace, port: u16) -> Result<Self> {
        let listener = namespace
            .inside(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))
            .with_context(|| format!("bind an origin to port {port}"))?;
        let origin = Self::default();
        let own = origin.clone();
        namespace.thread("scripted", move || {
            for stream in listener.incoming().flatten() {
                let (own, number) = (own.clone(), own.count());
                // Who cannot be heard is closed, which a test sees.
                let _ = thread::Builder::new().stack_size(128 << 10).spawn(move || {
                    let _ = own.serve(stream, number);
                    own.state().ended.push(number);
                });
            }
        })?;
        Ok(origin)
    }

    /// Says this from now on to whoever asks for the path.
    pub fn say(&self, path: &str, script: Script) {
        self.state().scripts.insert(path.to_owned(), script);
    }

    /// All that was heard since the last time.
    pub fn take_heard(&self) -> Vec<Heard> {
        std::mem::take(&mut self.state().heard)
    }

    /// Whether the other side has ended a connection.
    pub fn has_ended(&self, connection: u64) -> bool {
        self.state().ended.contains(&connection)
    }

    fn count(&self) -> u64 {
        let mut state = self.state();
        state.connections += 1;
        state.connections - 1
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut stream: TcpStream, number: u64) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut read = Vec::new();
        while let Some(head) = take_head(&mut stream, &mut read)? {
            let path = path_of(&head);
            let is_head = head.starts_with(b"HEAD ");
            let script = self.state().scripts.get(&path).cloned();
            let script = script.unwrap_or_else(|| plain(&path, is_head));
            let mut heard = Heard {
                connection: number,
                head,
                ..Heard::default()
            };
            if script.manner == Manner::Early {
                script.say(&mut stream)?;
            }
            heard.is_whole = take_body(&mut stream, &mut read, &mut heard)?;
            let is_whole = heard.is_whole;
            if !path.starts_with(BYSTANDER) {
                self.state().heard.push(heard);
            }
            if !is_whole {
                return Ok(());
            }
            match script.manner {
                Manner::Stays => script.say(&mut stream)?,
                Manner::Early => {}
                Manner::Closes => {
                    script.say(&mut stream)?;
                    stream.shutdown(Shutdown::Write)?;
                    // Whoever closes at once resets what still comes, and with it what was said.
                    while stream.read(&mut [0; 4096])? > 0 {}
                    return Ok(());
                }
                Manner::Resets => {
                    script.say(&mut stream)?;
                    // What was said is to arrive before the reset does.
                    thread::sleep(Duration::from_millis(100));
                    return socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                }
            }
        }
        Ok(())
    }
}

/// A 200 that says `ok`, or to a bystander its own path.
fn plain(path: &str, is_head: bool) -> Script {
    let body = if path.starts_with(BYSTANDER) {
        path
    } else {
        "ok"
    };
    let mut said = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    if !is_head {
        said.push_str(body);
    }
    Script {
        said: said.into_bytes(),
        ..Script::default()
    }
}

/// The path of a request's target.
pub fn path_of(head: &[u8]) -> String {
    let target = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    let path = target.split(|byte| *byte == b'?').next();
    String::from_utf8_lossy(path.unwrap_or_default()).into_owned()
}

/// The next head; None at the end of the connection. Bytes in front of an end that are no head are none either.
pub fn take_head(stream: &mut TcpStream, read: &mut Vec<u8>) -> std::io::Result<Option<Vec<u8>>> {
    loop {
        if let Some(end) = find(read, b"\r\n\r\n") {
            let rest = read.split_off(end + 4);
            return Ok(Some(std::mem::replace(read, rest)));
        }
        if read.len() > HEAD_BYTES_MAX || !fill(stream, read)? {
            return Ok(None);
        }
    }
}

/// Reads the body behind a head; whether it came to its end. Two framings in one head would be read as none, and seen.
pub fn take_body(
    stream: &mut TcpStream,
    read: &mut Vec<u8>,
    heard: &mut Heard,
) -> std::io::Result<bool> {
    let length = field(&heard.head, "content-length");
    let coding = field(&heard.head, "transfer-encoding");
    let end = match (length, coding) {
        (Some(length), None) => {
            let length = length.parse().unwrap_or(0);
            while read.len() < length {
                if !fill(stream, read)? {
                    break;
                }
            }
            Some(length).filter(|length| *length <= read.len())
        }
        (None, Some(_)) => loop {
            if let Some(end) = chunks_end(read) {
                break Some(end);
            }
            if !fill(stream, read)? {
                break None;
            }
        },
        _ => Some(0),
    };
    let rest = read.split_off(end.unwrap_or(read.len()));
    heard.body = std::mem::replace(read, rest);
    Ok(end.is_some())
}

/// The value of a field, where the head has it once.
pub fn field(head: &[u8], name: &str) -> Option<String> {
    let text = String::from_utf8_lossy(head);
    let mut values = text
        .split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .filter(|(found, _)| found.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim().to_owned());
    values.next().filter(|_| values.next().is_none())
}

/// Where a chunked body without trailers ends; what Sluice, nginx and HAProxy write is read without further ado.
pub fn chunks_end(bytes: &[u8]) -> Option<usize> {
    walk_chunks(bytes, |_| {})
}

/// The data of a body as it stood on the wire behind this head.
pub fn data_of(head: &[u8], body: &[u8]) -> Vec<u8> {
    if field(head, "transfer-encoding").is_none() {
        return body.to_vec();
    }
    let mut data = Vec::new();
    walk_chunks(body, |chunk| data.extend_from_slice(chunk));
    data
}

/// The body with its data in one chunk, if it is chunked and whole; chunks may be cut and joined on their way.
pub fn in_one_chunk(head: &[u8], body: &[u8]) -> Vec<u8> {
    if field(head, "transfer-encoding").is_none() || chunks_end(body) != Some(body.len()) {
        return body.to_vec();
    }
    let data = data_of(head, body);
    match data.len() {
        0 => b"0\r\n\r\n".to_vec(),
        length => [
            format!("{length:x}\r\n").as_bytes(),
            &data,
            b"\r\n0\r\n\r\n",
        ]
        .concat(),
    }
}

/// Where the data of a chunked body stands, chunk by chunk; where the body ends, if it does.
fn walk_chunks(bytes: &[u8], mut take: impl FnMut(&[u8])) -> Option<usize> {
    let mut at = 0;
    loop {
        let line = find(&bytes[at..], b"\r\n")?;
        let digits = std::str::from_utf8(&bytes[at..at + line]).ok()?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let size = usize::from_str_radix(digits, 16).ok()?;
        at += line + 2;
        let data = bytes.get(at..at + size)?;
        take(data);
        at += size + 2;
        if at > bytes.len() {
            return None;
        }
        if size == 0 {
            return Some(at);
        }
    }
}

fn fill(stream: &mut TcpStream, read: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut buffer = [0; 16 << 10];
    let length = stream.read(&mut buffer)?;
    read.extend_from_slice(&buffer[..length]);
    Ok(length > 0)
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_body_has_an_end_and_data() {
        let head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        let body = b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n";
        assert_eq!(chunks_end(body), Some(body.len()));
        assert_eq!(chunks_end(&body[..body.len() - 1]), None);
        assert_eq!(data_of(head, body), b"hello!");
        assert_eq!(in_one_chunk(head, body), b"6\r\nhello!\r\n0\r\n\r\n");
    }
}
