//! HTTP clients: curl for what a user does, raw bytes for what an attacker does.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::client;
use crate::namespace::Namespace;

/// A response, as far as tests look at it.
#[derive(Clone, Debug, Default)]
pub struct Response {
    pub status: u16,
    /// Names in lower case, in the order in which they came.
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// `TLSv1.3`, where curl spoke TLS.
    pub tls: Option<String>,
}

impl Response {
    /// The first value of a field.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Who answered, where an origin of the rig did.
    pub fn origin(&self) -> Option<&str> {
        self.field("x-origin")
    }
}

/// curl in a namespace, trusting one authority, resolving every name to one address.
#[derive(Clone)]
pub struct Curl {
    namespace: Namespace,
    authority: Option<PathBuf>,
    to: String,
    from: Option<String>,
}

impl Curl {
    /// A curl that sends whatever is asked to `to`, whatever the name in the URL.
    pub fn new(namespace: &Namespace, to: &str) -> Self {
        Self {
            namespace: namespace.clone(),
            authority: None,
            to: to.to_owned(),
            from: None,
        }
    }

    /// Trusts this authority, and no other.
    pub fn trusting(mut self, authority: &Path) -> Self {
        self.authority = Some(authority.to_owned());
        self
    }

    /// Sends from this address.
    pub fn from(mut self, address: &str) -> Self {
        self.from = Some(address.to_owned());
        self
    }

    /// One request; `arguments` are curl's own.
    pub fn fetch(&self, url: &str, arguments: &[&str]) -> Result<Response> {
        let mut command = self.command();
        let done = command
            .args(["--include", "--verbose", "--max-time", "30"])
            .args(arguments)
            .arg(url)
            .output()
            .context("start curl")?;
        let said = String::from_utf8_lossy(&done.stderr);
        if !done.status.success() {
            bail!(
                "curl {url} failed ({}): {}",
                done.status,
                said.lines().last().unwrap_or_default()
            );
        }
        let mut response = parse(&done.stdout)?;
        response.tls = said
            .lines()
            .find_map(|line| line.split_once("SSL connection using "))
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .map(str::to_owned);
        Ok(response)
    }

    /// The command so far: quiet, verified, aimed.
    pub fn command(&self) -> Command {
        let to = if self.to.contains(':') {
            format!("[{}]", self.to)
        } else {
            self.to.clone()
        };
        let mut command = self.namespace.command("curl");
        command.args([
            "--silent",
            "--show-error",
            "--http1.1",
            "--noproxy",
            "*",
            "--connect-timeout",
            "5",
        ]);
        command.args(["--connect-to", &format!("::{to}:")]);
        if let Some(authority) = &self.authority {
            command.arg("--cacert").arg(authority);
        }
        if let Some(from) = &self.from {
            command.args(["--interface", from]);
        }
        command
    }
}

/// Reads one response that ends with its connection. Of several heads (100, 103) the last counts.
pub fn parse(bytes: &[u8]) -> Result<Response> {
    let mut rest = bytes;
    loop {
        let Some(end) = find(rest, b"\r\n\r\n") else {
            bail!("no whole head in {:?}", String::from_utf8_lossy(rest));
        };
        let head = std::str::from_utf8(&rest[..end]).context("a head that is no text")?;
        rest = &rest[end + 4..];
        let mut lines = head.split("\r\n");
        let status_line = lines.next().unwrap_or_default();
        ensure!(
            status_line.starts_with("HTTP/1."),
            "not a status line: {status_line:?}"
        );
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .context("no status code")?;
        if (100..200).contains(&status) && status != 101 {
            continue;
        }
        let fields = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        return Ok(Response {
            status,
            fields,
            body: rest.to_vec(),
            tls: None,
        });
    }
}

/// What a server did with raw bytes.
#[derive(Debug)]
pub struct Reaction {
    /// All that it sent.
    pub bytes: Vec<u8>,
    /// Whether it closed the connection, cleanly or by reset.
    pub closed: bool,
    /// How long that took.
    pub after: Duration,
}

impl Reaction {
    /// The status of the first response, 0 where there was none.
    pub fn status(&self) -> u16 {
        parse(&self.bytes)
            .map(|response| response.status)
            .unwrap_or(0)
    }

    /// How many responses it holds.
    pub fn responses(&self) -> usize {
        self.bytes
            .windows(9)
            .filter(|window| window.starts_with(b"HTTP/1.1 "))
            .count()
    }
}

/// Sends `bytes` in clear and reads until the server closes or is quiet for `limit`. Run it inside a namespace.
pub fn send_raw(
    from: Option<IpAddr>,
    to: SocketAddr,
    bytes: &[u8],
    limit: Duration,
) -> Result<Reaction> {
    let start = Instant::now();
    let mut stream = client::connect(from, to)?;
    // A server that refuses early may close before it has read all: what it said still counts.
    let _ = stream.write_all(bytes);
    read_reaction(&mut stream, start, limit)
}

/// Reads until the server closes or is quiet for `limit`.
pub fn read_reaction(stream: &mut TcpStream, start: Instant, limit: Duration) -> Result<Reaction> {
    stream.set_read_timeout(Some(limit))?;
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 * 1024];
    let closed = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break true,
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                break false;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break true,
        }
    };
    Ok(Reaction {
        bytes,
        closed,
        after: start.elapsed(),
    })
}

/// A keep-alive connection that sends one request after the other: `Content-Length` bodies only, as our origins send them.
pub struct KeepAlive {
    stream: TcpStream,
    read: Vec<u8>,
}

impl KeepAlive {
    /// Connects. Run it inside a namespace.
    pub fn connect(from: Option<IpAddr>, to: SocketAddr) -> Result<Self> {
        Ok(Self {
            stream: client::connect(from, to)?,
            read: Vec::new(),
        })
    }

    /// One GET and its response.
    pub fn get(&mut self, host: &str, path: &str, fields: &str) -> Result<Response> {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n").as_bytes())
    }

    /// Sends a request as it stands and reads one response.
    pub fn send(&mut self, request: &[u8]) -> Result<Response> {
        self.stream.write_all(request).context("send a request")?;
        self.receive()
    }

    /// Reads one response.
    pub fn receive(&mut self) -> Result<Response> {
        let head_end = loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                break end + 4;
            }
            self.fill("the head of a response")?;
        };
        let mut response = parse(&self.read[..head_end])?;
        let length: usize = match response.field("content-length") {
            Some(text) => text.parse().context("an odd Content-Length")?,
            None if matches!(response.status, 204 | 304) => 0,
            None => bail!("a response without Content-Length: {}", response.status),
        };
        while self.read.len() < head_end + length {
            self.fill("the body of a response")?;
        }
        response.body = self.read[head_end..head_end + length].to_vec();
        self.read.drain(..head_end + length);
        Ok(response)
    }

    /// Waits until the server closes: how long that took, or nothing when it did not within `limit`.
    pub fn closed_within(&mut self, limit: Duration) -> Result<Option<Duration>> {
        let reaction = read_reaction(&mut self.stream, Instant::now(), limit)?;
        Ok(reaction.closed.then_some(reaction.after))
    }

    fn fill(&mut self, what: &str) -> Result<()> {
        let mut buffer = [0; 16 * 1024];
        let length = self
            .stream
            .read(&mut buffer)
            .with_context(|| format!("read {what}"))?;
        ensure!(length > 0, "closed within {what}");
        self.read.extend_from_slice(&buffer[..length]);
        Ok(())
    }
}

/// A GET to a server behind a unix socket.
pub fn get_unix(socket: &Path, path: &str) -> Result<Response> {
    ask_unix(socket, &format!("GET {path}"), "")
}

/// A POST of JSON to a server behind a unix socket.
pub fn post_unix(socket: &Path, path: &str, body: &str) -> Result<Response> {
    ask_unix(socket, &format!("POST {path}"), body)
}

fn ask_unix(socket: &Path, what: &str, body: &str) -> Result<Response> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(client::PATIENCE))?;
    stream.write_all(
        format!(
            "{what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .as_bytes(),
    )?;
    let mut bytes = Vec::new();
    stream
        .read_to_end(&mut bytes)
        .context("read the response")?;
    let mut response = parse(&bytes)?;
    if response.field("transfer-encoding").is_some() {
        response.body = unchunk(&response.body)?;
    }
    Ok(response)
}

/// The payload of a chunked body without trailers.
fn unchunk(mut bytes: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = find(bytes, b"\r\n").context("no chunk size")?;
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..line])?.trim(), 16)
            .context("an odd chunk size")?;
        bytes = &bytes[line + 2..];
        if size == 0 {
            return Ok(body);
        }
        body.extend_from_slice(bytes.get(..size).context("a chunk cut short")?);
        bytes = bytes.get(size + 2..).context("no end of a chunk")?;
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
