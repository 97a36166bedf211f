//! A client's connection, encrypted or not: what everything above the handshake reads from and writes to.

use std::{io, net::SocketAddr};

use super::stream::Stream;
use crate::net::{self, Chunk, Payload};

/// Plain TCP or TLS over it, with the same methods.
pub enum Transport {
    Plain(net::Stream),
    Tls(Box<Stream>),
}

impl Transport {
    /// As [`net::Stream::recv`] and [`Stream::recv`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn recv(&self) -> io::Result<Option<Chunk>> {
        match self {
            Self::Plain(stream) => stream.recv().await,
            Self::Tls(stream) => stream.recv().await,
        }
    }

    /// As [`net::Stream::has_input`].
    pub fn has_input(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.has_input(),
            Self::Tls(stream) => stream.has_input(),
        }
    }

    /// As [`net::Stream::readable`].
    pub async fn readable(&self) {
        match self {
            Self::Plain(stream) => stream.readable().await,
            Self::Tls(stream) => stream.readable().await,
        }
    }

    /// As [`net::Stream::send`] and [`Stream::send`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn send(&self, payload: impl Into<Payload>) -> io::Result<()> {
        self.send_vectored([payload.into()]).await
    }

    /// As [`net::Stream::send_vectored`] and [`Stream::send_vectored`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn send_vectored<const N: usize>(&self, parts: [Payload; N]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.send_vectored(parts).await,
            Self::Tls(stream) => stream.send_vectored(parts).await,
        }
    }

    /// As [`net::Stream::queue`] and [`Stream::queue`].
    ///
    /// # Errors
    /// As that of TLS.
    pub fn queue(&self, parts: impl IntoIterator<Item = Payload>) -> io::Result<()> {
        match self {
            Self::Plain(stream) => {
                stream.queue(parts);
                Ok(())
            }
            Self::Tls(stream) => stream.queue(parts),
        }
    }

    /// As [`net::Stream::idle`] and [`Stream::idle`].
    ///
    /// # Errors
    /// When a send has failed.
    pub async fn idle(&self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.idle().await,
            Self::Tls(stream) => stream.idle().await,
        }
    }

    /// As [`net::Stream::shutdown`] and [`Stream::shutdown`].
    ///
    /// # Errors
    /// As theirs.
    pub async fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.shutdown().await,
            Self::Tls(stream) => stream.shutdown().await,
        }
    }

    /// The TCP connection: its addresses, its progress, its abort.
    pub fn tcp(&self) -> &net::Stream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.transport(),
        }
    }

    /// The connection, if what it carries is nothing but what is sent.
    pub fn plain(&self) -> Option<&net::Stream> {
        match self {
            Self::Plain(stream) => Some(stream),
            Self::Tls(_) => None,
        }
    }

    /// The TLS session, if it is one.
    pub fn tls(&self) -> Option<&Stream> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => Some(stream),
        }
    }

    /// As [`net::Stream::abort`].
    pub fn abort(&self) {
        self.tcp().abort();
    }

    /// As [`net::Stream::peer`].
    pub fn peer(&self) -> SocketAddr {
        self.tcp().peer()
    }

    /// As [`net::Stream::local`].
    pub fn local(&self) -> SocketAddr {
        self.tcp().local()
    }
}

impl From<net::Stream> for Transport {
    fn from(stream: net::Stream) -> Self {
        Self::Plain(stream)
    }
}

impl From<Stream> for Transport {
    fn from(stream: Stream) -> Self {
        Self::Tls(Box::new(stream))
    }
}
