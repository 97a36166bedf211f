//! A client's connection, clear or TLS 1.3.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore};
use sluice::net::{self, Chunk, Instant, Stream};

use super::{PATIENCE, Plan};

/// The name in the certificates of proxies.
pub const SERVER_NAME: &str = "bench.test";
/// A connection to the proxy.
pub enum Wire {
    Clear(Stream),
    Tls(Box<Secured>),
}

/// TLS on a stream.
pub struct Secured {
    stream: Stream,
    session: ClientConnection,
    /// What has been decrypted and not been taken.
    plain: Vec<u8>,
}

/// Tickets that are kept for resumption: each serves once.
const TICKETS_MAX: usize = 1024;

/// A client that trusts this authority alone, and resumes sessions or none.
///
/// It offers one suite and one group, so that all proxies do the same cryptography.
pub fn trusting(authority: &Path, resumes: bool) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(authority)
        .with_context(|| format!("read {}", authority.display()))?;
    roots.add(certificate).context("trust our authority")?;
    let provider = CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        kx_groups: vec![aws_lc_rs::kx_group::X25519],
        ..aws_lc_rs::default_provider()
    };
    let mut config = ClientConfig::builder_with_provider(provider.into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("make a client of TLS 1.3")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = match resumes {
        true => Resumption::in_memory_sessions(TICKETS_MAX),
        false => Resumption::disabled(),
    };
    Ok(config.into())
}

impl Wire {
    /// Connects, and shakes hands if the plan says so.
    pub async fn open(plan: &Plan) -> Result<Self> {
        let stream = net::timeout(Instant::read() + PATIENCE, net::connect(plan.proxy))
            .await
            .context("connect to the proxy")?
            .context("connect to the proxy")?;
        let Some(config) = &plan.tls else {
            return Ok(Self::Clear(stream));
        };
        let mut session =
            ClientConnection::new(config.clone(), ServerName::try_from(SERVER_NAME)?)?;
        // Whoever sends waits until it is sent: nothing piles up.
        session.set_buffer_limit(None);
        let mut secured = Secured {
            stream,
            session,
            plain: Vec::new(),
        };
        secured.shake_hands().await.context("shake hands")?;
        Ok(Self::Tls(Box::new(secured)))
    }

    /// Whether the handshake was a resumed one; None without TLS.
    pub fn was_resumed(&self) -> Option<bool> {
        match self {
            Self::Clear(_) => None,
            Self::Tls(secured) => {
                Some(secured.session.handshake_kind() == Some(HandshakeKind::Resumed))
            }
        }
    }

    /// Sends all of it.
    pub async fn send(&mut self, bytes: &Arc<[u8]>) -> Result<()> {
        match self {
            Self::Clear(stream) => Ok(stream.send(bytes.clone()).await?),
            Self::Tls(secured) => {
                secured.session.writer().write_all(bytes)?;
                secured.flush().await
            }
        }
    }

    /// What comes next; None at the end.
    pub async fn recv(&mut self) -> Result<Option<Chunk>> {
        match self {
            Self::Clear(stream) => Ok(stream.recv().await?),
            Self::Tls(secured) => secured.recv().await,
        }
    }
}

impl Secured {
    async fn shake_hands(&mut self) -> Result<()> {
        while self.session.is_handshaking() {
            self.flush().await?;
            if self.session.is_handshaking() && !self.feed().await? {
                anyhow::bail!("the proxy closed the connection");
            }
        }
        self.flush().await
    }

    async fn flush(&mut self) -> Result<()> {
        let mut records = Vec::new();
        while self.session.wants_write() {
            self.session.write_tls(&mut records)?;
        }
        if !records.is_empty() {
            self.stream.send(records).await?;
        }
        Ok(())
    }

    /// Takes in what has arrived; false at the end.
    async fn feed(&mut self) -> Result<bool> {
        let Some(chunk) = self.stream.recv().await? else {
            return Ok(false);
        };
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            self.session.read_tls(&mut rest)?;
            let bytes = self
                .session
                .process_new_packets()?
                .plaintext_bytes_to_read();
            // The session holds little: what it has is taken before it gets more.
            let before = self.plain.len();
            self.plain.resize(before + bytes, 0);
            self.session
                .reader()
                .read_exact(&mut self.plain[before..])?;
        }
        Ok(true)
    }

    async fn recv(&mut self) -> Result<Option<Chunk>> {
        while self.plain.is_empty() {
            if !self.feed().await? {
                return Ok(None);
            }
        }
        Ok(Some(std::mem::take(&mut self.plain).into()))
    }
}
