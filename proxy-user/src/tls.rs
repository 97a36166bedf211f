//! TLS of downstream connections: certificates, the handshake, the stream. The only room that knows rustls.
//!
//! Records are decrypted where they arrived, and an idle connection holds no buffer but the keys (rustls' unbuffered interface).

mod acceptor;
mod certificate;
mod stream;
mod transport;

#[cfg(test)]
mod tests;

pub use self::{
    acceptor::{Acceptor, HandshakeError, Tickets},
    certificate::{Certificate, CertificateError},
    stream::Stream,
    transport::Transport,
};
