//! The server's side of the handshake: which certificate, which protocol, which ticket.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt, io,
    sync::Arc,
};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert},
    sign::CertifiedKey,
};

use super::{certificate::Certificate, stream::Stream};
use crate::net;

/// So many handshakes may do their public-key work in one turn of a worker's loop, each some tenths of a millisecond;
/// the rest wait for the next turn, and the connections that are already open are served in between.
const HANDSHAKES_PER_TURN: u32 = 4;

/// Accepts TLS 1.2 and 1.3 under a set of certificates. Cheap to clone, and shared by all workers.
#[derive(Clone, Debug)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
}

/// The keys that session tickets are made with; they change every six hours, and the last ones are accepted as long again.
///
/// Keep them across reloads, and give them to every acceptor, so that clients resume their sessions.
#[derive(Clone, Debug)]
pub struct Tickets {
    keys: Arc<dyn ProducesTickets>,
}

/// Why there is no TLS connection.
#[derive(Debug)]
pub enum HandshakeError {
    /// The connection failed.
    Io(io::Error),
    /// The client closed it.
    Closed,
    /// The client does not speak TLS: plain HTTP, or noise.
    NotTls,
    /// The client did something wrong, or there is no protocol that both know; it was told with an alert.
    Refused(rustls::Error),
}

impl Tickets {
    /// New random keys.
    ///
    /// # Errors
    /// When there is no randomness to be had.
    pub fn new() -> Result<Self, rustls::Error> {
        aws_lc_rs::Ticketer::new().map(|keys| Self { keys })
    }
}

impl Acceptor {
    /// An acceptor that presents the certificate for the name that the client asks for: an exact name before a wildcard, else the first certificate.
    ///
    /// Of several for one name (an ECDSA and an RSA one) it presents the first with which the client can do something.
    /// `alpn` lists the protocols spoken inside, the preferred one first; a client that offers only others is refused (RFC 7301 section 3.2).
    ///
    /// # Errors
    /// When `certificates` is empty.
    pub fn new(
        certificates: &[Certificate],
        tickets: &Tickets,
        alpn: &[&[u8]],
    ) -> Result<Self, rustls::Error> {
        if certificates.is_empty() {
            return Err(rustls::Error::NoCertificatesPresented);
        }
        // Of the key exchanges X25519MLKEM768 comes first, by rustls' feature prefer-post-quantum.
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(Names::new(certificates)));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // Sessions live in tickets, at the clients; nothing is kept here.
        config.ticketer = tickets.keys.clone();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self {
            config: Arc::new(config),
        })
    }

    /// The same with so many session tickets sent after each TLS 1.3 handshake, rustls' default being two; each can be used once.
    #[must_use]
    pub fn tickets_sent(mut self, count: usize) -> Self {
        Arc::make_mut(&mut self.config).send_tls13_tickets = count;
        self
    }

    /// Shakes hands over a new connection. The deadline is the caller's; dropping the future closes the connection.
    ///
    /// # Errors
    /// When there is no TLS connection in the end.
    pub async fn accept(&self, transport: net::Stream) -> Result<Stream, HandshakeError> {
        let mut stream = Stream::new(self.config.clone(), transport)?;
        let mut first = true;
        while stream.is_handshaking() {
            let chunk = stream.next_chunk().await?.ok_or(HandshakeError::Closed)?;
            if std::mem::take(&mut first) && chunk.first() != Some(&HANDSHAKE_RECORD) {
                return Err(HandshakeError::NotTls);
            }
            take_turn().await;
            SERVER_NAME.set(None);
            let taken = stream.take(chunk);
            if let Some(name) = SERVER_NAME.take() {
                stream.name(name);
            }
            // Also when it failed: then it is the alert that is sent.
            let flushed = stream.flush().await;
            taken.map_err(HandshakeError::Refused)?;
            flushed?;
        }
        stream.established();
        Ok(stream)
    }
}

/// Content type 22 (RFC 8446 section 5.1): what the first byte of every TLS connection is.
const HANDSHAKE_RECORD: u8 = 22;

/// Waits until this turn of the worker's loop has room for a handshake's work.
async fn take_turn() {
    thread_local! {
        static TAKEN: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
    }
    loop {
        let turn = net::turns();
        let taken = match TAKEN.get() {
            (last, count) if last == turn => count,
            _ => 0,
        };
        if taken < HANDSHAKES_PER_TURN {
            TAKEN.set((turn, taken + 1));
            return;
        }
        net::yield_now().await;
    }
}

thread_local! {
    /// The name in the hello that was just resolved. rustls' unbuffered connection does not tell it, but asks for the certificate
    /// inside the call that reads the hello, on the same thread.
    static SERVER_NAME: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Certificates by name.
#[derive(Debug)]
struct Names {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    default: Vec<Arc<CertifiedKey>>,
}

impl Names {
    fn new(certificates: &[Certificate]) -> Self {
        let mut names = Self {
            exact: HashMap::new(),
            wildcard: HashMap::new(),
            default: Vec::new(),
        };
        for certificate in certificates {
            for name in certificate.names() {
                let place = match name.strip_prefix("*.") {
                    Some(parent) => names.wildcard.entry(parent.to_owned()),
                    None => names.exact.entry(name.clone()),
                };
                place.or_default().push(certificate.key.clone());
            }
        }
        if let Some(first) = certificates.first() {
            // Those with the very same names stand in for the first where the client cannot use its kind of key.
            names.default = certificates
                .iter()
                .filter(|other| other.names() == first.names())
                .map(|other| other.key.clone())
                .collect();
        }
        names
    }

    fn find(&self, name: &str) -> &[Arc<CertifiedKey>] {
        self.exact
            .get(name)
            .or_else(|| self.wildcard.get(name.split_once('.')?.1))
            .unwrap_or(&self.default)
    }
}

impl ResolvesServerCert for Names {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().map(str::to_ascii_lowercase);
        let found = name
            .as_deref()
            .map_or(&*self.default, |name| self.find(name));
        SERVER_NAME.set(name);
        let usable = found
            .iter()
            .find(|key| key.key.choose_scheme(hello.signature_schemes()).is_some());
        usable.or(found.first()).cloned()
    }
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        Self::Refused(error)
    }
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the connection failed in the TLS handshake: {error}"),
            Self::Closed => f.write_str("the client closed the connection in the TLS handshake"),
            Self::NotTls => f.write_str("the client does not speak TLS"),
            Self::Refused(error) => write!(f, "the TLS handshake failed: {error}"),
        }
    }
}

impl std::error::Error for HandshakeError {}
