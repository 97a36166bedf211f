//! TLS: certificates, the handshake on either side, the stream of a downstream connection. The only room that knows rustls.
//!
//! Records are decrypted where they arrived, and an idle connection holds no buffer but the keys (rustls' unbuffered interface).

mod acceptor;
mod certificate;
mod connector;
mod stream;
mod transport;

#[cfg(test)]
mod tests;

pub use self::{
    acceptor::{Acceptor, HandshakeError, Tickets},
    certificate::{Certificate, CertificateError},
    connector::{Connector, PeerName},
    stream::Stream,
    transport::Transport,
};
