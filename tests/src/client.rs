//! Clients of `forward` listeners: TCP and UDP, checking every byte that comes back.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

/// How long a client waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a number of connections or datagrams came to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Connections or datagrams tried.
    pub tried: u64,
    /// Bytes of payload that came back right.
    pub bytes: u64,
    /// What went wrong, in words.
    pub failures: Vec<String>,
    /// How many each endpoint answered.
    pub per_endpoint: BTreeMap<String, u64>,
}

impl Tally {
    /// Counts one attempt: who answered and how many bytes, or why not.
    pub fn count(&mut self, result: Result<(String, u64)>) {
        self.tried += 1;
        match result {
            Ok((endpoint, bytes)) => {
                self.bytes += bytes;
                *self.per_endpoint.entry(endpoint).or_default() += 1;
            }
            Err(error) => self.failures.push(format!("{error:#}")),
        }
    }

    /// Adds what another one counted.
    pub fn add(&mut self, other: &Self) {
        self.tried += other.tried;
        self.bytes += other.bytes;
        self.failures.extend(other.failures.iter().cloned());
        for (endpoint, count) in &other.per_endpoint {
            *self.per_endpoint.entry(endpoint.clone()).or_default() += count;
        }
    }

    /// An error that names the first failures, if there are any.
    pub fn expect_no_failure(&self) -> Result<()> {
        let shown = self
            .failures
            .iter()
            .take(3)
            .cloned()
            .collect::<Vec<_>>()
            .join("; ");
        ensure!(
            self.failures.is_empty(),
            "{} of {} failed: {shown}",
            self.failures.len(),
            self.tried
        );
        Ok(())
    }
}

/// So many connections and datagrams, in turn, until one fails: what became of the connections, and of the datagrams.
pub fn tcp_and_udp(to: SocketAddr, rounds: u8) -> [Tally; 2] {
    let [mut tcp, mut udp] = [Tally::default(), Tally::default()];
    for number in 0..rounds {
        if !tcp.failures.is_empty() || !udp.failures.is_empty() {
            break;
        }
        tcp.count(tcp_echo(to, 20_000, number));
        udp.count(udp_echo(to, &[number; 100]));
    }
    [tcp, udp]
}

/// A connection to an echo, from a source address if one is given.
pub fn connect(from: Option<IpAddr>, to: SocketAddr) -> Result<TcpStream> {
    let socket =
        Socket::new(Domain::for_address(to), Type::STREAM, None).context("make a socket")?;
    if let Some(address) = from {
        socket
            .bind(&SocketAddr::new(address, 0).into())
            .with_context(|| format!("bind to {address}"))?;
    }
    socket
        .connect_timeout(&to.into(), PATIENCE)
        .with_context(|| format!("connect to {to}"))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One connection to a TCP echo: reads who it is, sends `length` bytes, checks what comes back and that the end comes too.
pub fn tcp_echo(to: SocketAddr, length: usize, seed: u8) -> Result<(String, u64)> {
    let mut stream = connect(None, to)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut name = String::new();
    reader
        .read_line(&mut name)
        .context("read the endpoint's name")?;
    let mut done = 0;
    while done < length {
        let sent: Vec<u8> = (done..length.min(done + 8192))
            .map(|index| (index as u8).wrapping_mul(31) ^ seed)
            .collect();
        stream.write_all(&sent).context("send")?;
        let mut back = vec![0; sent.len()];
        reader
            .read_exact(&mut back)
            .with_context(|| format!("read the echo after {done} bytes"))?;
        ensure!(sent == back, "the echo differs after {done} bytes");
        done += sent.len();
    }
    stream.shutdown(Shutdown::Write).context("half-close")?;
    let rest = reader.read(&mut [0]).context("wait for the end")?;
    ensure!(rest == 0, "bytes after the end of the echo");
    Ok((name.trim_end().to_owned(), length as u64))
}

/// A UDP socket that only hears `to`.
pub fn udp_socket(to: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).context("bind a UDP socket")?;
    socket.connect(to).with_context(|| format!("aim at {to}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// One datagram to a UDP echo, from a socket of its own.
pub fn udp_echo(to: SocketAddr, payload: &[u8]) -> Result<(String, u64)> {
    exchange_datagram(&udp_socket(to)?, payload)
}

/// One datagram to a UDP echo and the answer to it.
pub fn exchange_datagram(socket: &UdpSocket, payload: &[u8]) -> Result<(String, u64)> {
    socket.send(payload).context("send a datagram")?;
    let mut buffer = vec![0; 65_536];
    let length = socket
        .recv(&mut buffer)
        .context("wait for the echo of a datagram")?;
    let (name, back) = split_echo(&buffer[..length])?;
    ensure!(back == payload, "the echoed datagram differs");
    Ok((name.to_owned(), payload.len() as u64))
}

/// The name and the payload of an echoed datagram.
pub fn split_echo(datagram: &[u8]) -> Result<(&str, &[u8])> {
    let Some(space) = datagram.iter().position(|byte| *byte == b' ') else {
        bail!(
            "an echo without a name: {:?}",
            String::from_utf8_lossy(datagram)
        );
    };
    Ok((
        std::str::from_utf8(&datagram[..space])?,
        &datagram[space + 1..],
    ))
}

/// Whether a SYN from `from` to `to` stays unanswered for `limit`. An answer of any kind, a refusal too, is an answer.
pub fn syn_is_ignored(from: IpAddr, to: SocketAddr, limit: Duration) -> Result<bool> {
    let socket =
        Socket::new(Domain::for_address(to), Type::STREAM, None).context("make a socket")?;
    socket
        .bind(&SocketAddr::new(from, 0).into())
        .with_context(|| format!("bind to {from}"))?;
    let start = Instant::now();
    match socket.connect_timeout(&to.into(), limit) {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
            Ok(start.elapsed() >= limit / 2)
        }
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error).with_context(|| format!("connect from {from} to {to}")),
    }
}
