//! A client that sends any bytes, and reads responses as strictly as a test needs.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use socket2::{Domain, SockRef, Socket, Type};

use super::{PATIENCE, Sluice};

pub struct Client {
    pub stream: TcpStream,
    unread: Vec<u8>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    Reset,
}

#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    pub fn value(&self, name: &str) -> Option<&str> {
        value_of(&self.head, name)
    }

    /// It says that the connection ends behind it.
    pub fn closes(&self) -> bool {
        self.value("connection") == Some("close")
    }
}

impl Client {
    pub fn connect(sluice: &Sluice) -> Self {
        let stream = TcpStream::connect(sluice.address).expect("connected");
        Self::of(stream)
    }

    /// One whose receive buffer is small: the proxy feels at once that it does not read.
    pub fn connect_with_buffer(sluice: &Sluice, bytes: usize) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_recv_buffer_size(bytes).expect("a size");
        socket.connect(&sluice.address.into()).expect("connected");
        Self::of(socket.into())
    }

    pub fn of(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("an option");
        Self {
            stream,
            unread: Vec::new(),
        }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("sent");
    }

    /// Sends what can be sent: the other side may end the connection meanwhile.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    pub fn get(&mut self, path: &str) -> Response {
        self.send(get(path));
        self.response()
    }

    /// The next response, whole; interim ones too.
    pub fn response(&mut self) -> Response {
        let mut response = self.head();
        let bodiless = response.status < 200 || matches!(response.status, 204 | 304);
        if !bodiless {
            response.body = self.body(&response.head);
        }
        response
    }

    /// The head of the next response, for one to a HEAD.
    pub fn head(&mut self) -> Response {
        let end = loop {
            if let Some(end) = find_head_end(&self.unread) {
                break end;
            }
            if let Some(end) = self.receive() {
                panic!(
                    "{end:?} in place of a head, behind {:?}",
                    String::from_utf8_lossy(&self.unread)
                );
            }
        };
        let rest = self.unread.split_off(end);
        let head = std::mem::replace(&mut self.unread, rest);
        let head = String::from_utf8(head).expect("text");
        let status = head.get(9..12).and_then(|code| code.parse().ok());
        Response {
            status: status.expect("a status"),
            head,
            body: Vec::new(),
        }
    }

    fn body(&mut self, head: &str) -> Vec<u8> {
        if value_of(head, "transfer-encoding").is_some() {
            loop {
                if let Some((body, end)) = decode_chunked(&self.unread) {
                    self.unread.drain(..end);
                    return body;
                }
                assert_eq!(self.receive(), None, "in the body of {head}");
            }
        }
        let Some(length) = value_of(head, "content-length") else {
            let (body, end) = self.rest();
            assert_eq!(end, End::Finished);
            return body;
        };
        let length = length.parse().expect("a number");
        while self.unread.len() < length {
            assert_eq!(self.receive(), None, "in the body of {head}");
        }
        let rest = self.unread.split_off(length);
        std::mem::replace(&mut self.unread, rest)
    }

    fn receive(&mut self) -> Option<End> {
        let mut buffer = [0; 64 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => Some(End::Finished),
            Ok(n) => {
                self.unread.extend_from_slice(&buffer[..n]);
                None
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(End::Reset),
            Err(error) => panic!("neither bytes nor an end: {error}"),
        }
    }

    /// Reads over what comes until this has come.
    pub fn read_until(&mut self, text: &str) {
        let find = |unread: &[u8]| {
            let windows = unread.windows(text.len());
            windows
                .into_iter()
                .position(|window| window == text.as_bytes())
        };
        loop {
            if let Some(at) = find(&self.unread) {
                self.unread.drain(..at + text.len());
                return;
            }
            assert_eq!(self.receive(), None, "in place of {text}");
        }
    }

    /// All that comes until the connection ends.
    pub fn rest(&mut self) -> (Vec<u8>, End) {
        loop {
            if let Some(end) = self.receive() {
                return (std::mem::take(&mut self.unread), end);
            }
        }
    }

    /// The connection ends, in order, and nothing more comes.
    pub fn expect_end(&mut self) {
        let (rest, end) = self.rest();
        let rest = String::from_utf8_lossy(&rest);
        assert_eq!((&*rest, end), ("", End::Finished));
    }

    pub fn shutdown(&mut self) {
        self.stream.shutdown(Shutdown::Write).expect("shut");
    }

    pub fn reset(self) {
        let socket = SockRef::from(&self.stream);
        socket
            .set_linger(Some(std::time::Duration::ZERO))
            .expect("an option");
    }
}

pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")
}

/// One byte behind the empty line.
pub fn find_head_end(bytes: &[u8]) -> Option<usize> {
    let at = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some(at + 4)
}

/// The value of a field.
pub fn value_of<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().skip(1).find_map(|line| {
        let (field, value) = line.split_once(':')?;
        field.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// The body and where it ends; None while it is not whole.
pub fn decode_chunked(bytes: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let line = bytes[at..]
            .windows(2)
            .position(|window| window == b"\r\n")?;
        let digits = std::str::from_utf8(&bytes[at..at + line]).expect("a size");
        let size = usize::from_str_radix(digits, 16).expect("a size");
        at += line + 2;
        let data = bytes.get(at..at + size)?;
        assert_eq!(bytes.get(at + size..at + size + 2)?, b"\r\n");
        body.extend_from_slice(data);
        at += size + 2;
        if size == 0 {
            return Some((body, at));
        }
    }
}

/// The body as chunks of so many bytes.
pub fn encode_chunked(body: &[u8], chunk: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for data in body.chunks(chunk) {
        bytes.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
        bytes.extend_from_slice(data);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}
