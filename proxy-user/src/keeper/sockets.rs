//! Listening sockets: opened by the keeper, named by their address, kept over reloads and daemons.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::config::{Config, Diagnostic, ListenerMode, Protocol};

/// How long the start of a keeper waits for a port that is taken: of a daemon that was killed, the kernel closes sockets a moment later than
/// the process ends, once its urings are gone.
pub const RELEASE_MAX: Duration = Duration::from_secs(2);
const RELEASE_STEP: Duration = Duration::from_millis(20);

/// For each address a socket for each worker.
#[derive(Debug, Default)]
pub struct Sockets(BTreeMap<SocketAddr, Vec<OwnedFd>>);

impl Sockets {
    /// Addresses that workers listen on by `config`.
    pub fn wanted(config: &Config) -> Vec<SocketAddr> {
        let serving = config
            .listeners
            .iter()
            .filter(|listener| matches!(listener.mode, ListenerMode::Serve { .. }));
        let addresses = serving.flat_map(|listener| &listener.addresses);
        addresses
            .filter(|address| address.protocol == Protocol::Tcp)
            .map(|address| address.socket)
            .collect()
    }

    /// Opens what `config` names and we have not. All are bound before one listens: what cannot be bound is found out
    /// while nobody has noticed anything. A port that is taken gets `patience` to become free.
    ///
    /// # Errors
    /// For each address that cannot be listened on, why.
    pub fn open_missing(
        &self,
        config: &Config,
        workers: usize,
        backlog: u32,
        patience: Duration,
    ) -> Result<Self, Vec<Diagnostic>> {
        let mut bound: Vec<(SocketAddr, Vec<Socket>)> = Vec::new();
        let mut faults = Vec::new();
        let deadline = Instant::now() + patience;
        for address in Self::wanted(config) {
            if self.0.contains_key(&address) {
                continue;
            }
            match bind_by(deadline, address, workers) {
                Ok(group) => bound.push((address, group)),
                Err(error) => faults.push(fault(config, address, &error)),
            }
        }
        let mut opened = BTreeMap::new();
        for (address, group) in bound {
            let listening = group
                .iter()
                .try_for_each(|socket| socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX)));
            match listening {
                Ok(()) => {
                    drop(opened.insert(address, group.into_iter().map(OwnedFd::from).collect()))
                }
                Err(error) => faults.push(fault(config, address, &error)),
            }
        }
        if faults.is_empty() {
            Ok(Self(opened))
        } else {
            Err(faults)
        }
    }

    /// Addresses that `config` does not name any more.
    pub fn surplus(&self, config: &Config) -> Vec<SocketAddr> {
        let wanted: HashSet<SocketAddr> = Self::wanted(config).into_iter().collect();
        self.0
            .keys()
            .filter(|address| !wanted.contains(address))
            .copied()
            .collect()
    }

    /// Adds those of another.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Closes our copies; a worker that still has its own goes on until it closes that.
    pub fn close(&mut self, addresses: &[SocketAddr]) {
        self.0.retain(|address, _| !addresses.contains(address));
    }

    /// Address and sockets, by worker.
    pub fn iter(&self) -> impl Iterator<Item = (SocketAddr, &[OwnedFd])> {
        self.0
            .iter()
            .map(|(address, sockets)| (*address, &sockets[..]))
    }

    /// Every socket with its address and the worker it is for.
    pub fn each(&self) -> impl Iterator<Item = (SocketAddr, usize, BorrowedFd<'_>)> {
        self.iter().flat_map(|(address, sockets)| {
            sockets
                .iter()
                .enumerate()
                .map(move |(worker, socket)| (address, worker, socket.as_fd()))
        })
    }
}

/// As `bind_group`, and once more until then while the port is taken.
fn bind_by(deadline: Instant, address: SocketAddr, workers: usize) -> io::Result<Vec<Socket>> {
    loop {
        match bind_group(address, workers) {
            Err(error)
                if error.raw_os_error() == Some(libc::EADDRINUSE) && Instant::now() < deadline =>
            {
                std::thread::sleep(RELEASE_STEP);
            }
            done => return done,
        }
    }
}

/// One socket for each worker, bound and not yet listening.
fn bind_group(address: SocketAddr, workers: usize) -> io::Result<Vec<Socket>> {
    // SO_REUSEPORT would let us share a port with another process of our user without a word: ask without it first.
    drop(bind(address, false)?);
    (0..workers).map(|_| bind(address, true)).collect()
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // An IPv4 listener is written as one.
        socket.set_only_v6(true)?;
    }
    if shared {
        socket.set_reuse_port(true)?;
        // Accepted sockets inherit it.
        socket.set_tcp_nodelay(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn fault(config: &Config, address: SocketAddr, error: &io::Error) -> Diagnostic {
    let listener = config
        .listeners
        .iter()
        .find(|listener| listener.addresses.iter().any(|a| a.socket == address));
    let name = listener.map_or("", |listener| listener.name.as_str());
    let (reason, help) = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => (
            "another process listens there".to_owned(),
            format!(
                "find it by `ss -ltnp sport = :{}` and stop it, or choose another address",
                address.port()
            ),
        ),
        Some(libc::EADDRNOTAVAIL) => (
            "no interface has this address".to_owned(),
            format!(
                "give it to one (ip address add {}/... dev ...), or choose another address",
                address.ip()
            ),
        ),
        Some(libc::EACCES) => (
            "ports below 1024 need a privilege".to_owned(),
            "start as root or with CAP_NET_BIND_SERVICE, or choose a higher port".to_owned(),
        ),
        Some(libc::EMFILE | libc::ENFILE) => (
            "no file descriptor is left".to_owned(),
            "raise the limit (LimitNOFILE=, ulimit -n)".to_owned(),
        ),
        _ => (error.to_string(), "choose another address".to_owned()),
    };
    let diagnostic =
        Diagnostic::error(format!("cannot listen on {address} for `{name}`: {reason}")).help(help);
    listener.map_or(diagnostic.clone(), |listener| diagnostic.at(&listener.at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Bundle, load};
    use std::net::{TcpListener, TcpStream};
    use std::path::Path;

    fn config(addresses: &[SocketAddr]) -> Config {
        let list: Vec<String> = addresses
            .iter()
            .map(|address| format!("\"{address}\""))
            .collect();
        let text = format!(
            "[[listener]]\nname = \"web\"\naddress = [{}]\n[[route]]\nmatch = {{ path = \"/*\" }}\nrespond = {{ status = 204 }}\n",
            list.join(", ")
        );
        let loaded = load(
            &Bundle::of_files([("/c/s.toml", text)]),
            Path::new("/c/s.toml"),
        );
        loaded
            .unwrap_or_else(|diagnostics| panic!("{diagnostics:?}"))
            .config
    }

    fn free_address() -> io::Result<SocketAddr> {
        TcpListener::bind("127.0.0.1:0")?.local_addr()
    }

    #[test]
    fn each_worker_gets_a_socket_and_a_reload_keeps_it() -> io::Result<()> {
        let (one, two) = (free_address()?, free_address()?);
        let mut sockets = Sockets::default();
        let opened = sockets
            .open_missing(&config(&[one]), 3, 16, Duration::ZERO)
            .expect("free");
        sockets.extend(opened);
        assert_eq!(sockets.each().count(), 3);
        TcpStream::connect(one)?;
        let added = sockets
            .open_missing(&config(&[one, two]), 3, 16, Duration::ZERO)
            .expect("free");
        assert_eq!(
            added.iter().map(|(address, _)| address).collect::<Vec<_>>(),
            [two]
        );
        assert_eq!(sockets.surplus(&config(&[two])), [one]);
        sockets.close(&[one]);
        assert!(TcpStream::connect(one).is_err());
        Ok(())
    }

    #[test]
    fn a_start_waits_for_a_port_that_is_released_a_moment_later() -> io::Result<()> {
        let other = TcpListener::bind("127.0.0.1:0")?;
        let address = other.local_addr()?;
        let releasing = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(other);
        });
        let sockets = Sockets::default().open_missing(&config(&[address]), 1, 16, RELEASE_MAX);
        assert!(sockets.is_ok(), "{sockets:?}");
        assert!(releasing.join().is_ok());
        Ok(())
    }

    #[test]
    fn a_port_in_use_is_told_with_its_listener_and_what_to_do() -> io::Result<()> {
        let taken = TcpListener::bind("127.0.0.1:0")?;
        let address = taken.local_addr()?;
        let free = free_address()?;
        let faults = Sockets::default()
            .open_missing(&config(&[free, address]), 2, 16, Duration::ZERO)
            .expect_err("taken");
        assert_eq!(faults.len(), 1);
        assert!(
            faults[0].message.contains(&address.to_string()) && faults[0].message.contains("`web`"),
            "{faults:?}"
        );
        assert!(faults[0].help[0].contains("ss -ltnp"), "{faults:?}");
        // Nothing is half-open.
        assert!(TcpStream::connect(free).is_err());
        Ok(())
    }
}
