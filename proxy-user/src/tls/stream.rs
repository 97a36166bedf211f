//! An encrypted connection with the methods of a plain one.

use std::{cell::RefCell, collections::VecDeque, io, net::SocketAddr, sync::Arc};

use rustls::{
    ProtocolVersion, ServerConfig,
    server::UnbufferedServerConnection,
    unbuffered::{
        ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
    },
};

use crate::net::{self, Chunk, Payload};

/// Ciphertext that waits for its rest: never more than the longest handshake message (64 KiB) and a record.
const INCOMING_BYTES_MAX: usize = 96 << 10;

/// What a record adds at most to 16 KiB of plaintext (RFC 8446 section 5.2, RFC 5246 section 6.2.3).
const RECORD_OVERHEAD_BYTES: usize = 64;
const RECORD_BYTES: usize = 16 << 10;

/// Parts that are together no longer than this are sent in one record.
const MERGED_BYTES_MAX: usize = RECORD_BYTES;

/// A TLS connection. Dropping it closes the transport without a word; see [`Self::shutdown`].
pub struct Stream {
    transport: net::Stream,
    session: RefCell<Session>,
    server_name: Option<String>,
    alpn: Option<Vec<u8>>,
    version: &'static str,
}

struct Session {
    connection: UnbufferedServerConnection,
    /// Records of which not all has arrived.
    incoming: Option<Chunk>,
    plain: VecDeque<Chunk>,
    /// Records that wait to be sent, in the order in which they were encrypted.
    outgoing: Vec<u8>,
    /// The peer has said that it will send no more.
    ended: bool,
    /// We have said so.
    shut: bool,
    failed: Option<rustls::Error>,
}

/// What there is to write once the connection can.
#[derive(Clone, Copy)]
enum Write<'a> {
    Bytes(&'a [u8]),
    CloseNotify,
}

impl Stream {
    pub(super) fn new(
        config: Arc<ServerConfig>,
        transport: net::Stream,
    ) -> Result<Self, rustls::Error> {
        Ok(Self {
            transport,
            session: RefCell::new(Session {
                connection: UnbufferedServerConnection::new(config)?,
                incoming: None,
                plain: VecDeque::new(),
                outgoing: Vec::new(),
                ended: false,
                shut: false,
                failed: None,
            }),
            server_name: None,
            alpn: None,
            version: "",
        })
    }

    // The handshake's part, for the acceptor.

    pub(super) fn is_handshaking(&self) -> bool {
        self.session.borrow().connection.is_handshaking()
    }

    pub(super) async fn next_chunk(&self) -> io::Result<Option<Chunk>> {
        self.transport.recv().await
    }

    pub(super) fn take(&self, chunk: Chunk) -> Result<(), rustls::Error> {
        self.session.borrow_mut().take(chunk)
    }

    pub(super) fn name(&mut self, server_name: String) {
        self.server_name = Some(server_name);
    }

    pub(super) fn established(&mut self) {
        let connection = &self.session.get_mut().connection;
        self.alpn = connection.alpn_protocol().map(<[u8]>::to_vec);
        self.version = match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            _ => "unknown",
        };
    }

    // The methods of a plain stream.

    /// The next bytes, or None when the peer has ended the session (close_notify). Dropping the future loses nothing.
    ///
    /// # Errors
    /// UnexpectedEof when the connection ends without a close_notify: what arrived may have been cut short by a third party.
    /// InvalidData for what is no TLS, or was changed on its way. Else what the transport says.
    pub async fn recv(&self) -> io::Result<Option<Chunk>> {
        loop {
            if self.session.borrow().has_outgoing() {
                self.flush().await?;
            }
            if let Some(outcome) = self.session.borrow_mut().next() {
                return outcome;
            }
            let Some(chunk) = self.transport.recv().await? else {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the connection ended without the end of its TLS session",
                ));
            };
            if let Err(error) = self.take(chunk) {
                // The alert may not reach the peer; that the session failed is what matters here.
                let _ = self.flush().await;
                return Err(invalid(error));
            }
        }
    }

    /// As [`net::Stream::has_input`]; here ciphertext counts, and it may turn out to hold no data.
    pub fn has_input(&self) -> bool {
        self.session.borrow().has_input() || self.transport.has_input()
    }

    /// As [`net::Stream::readable`].
    pub async fn readable(&self) {
        if !self.session.borrow().has_input() {
            self.transport.readable().await;
        }
    }

    /// Sends all of it, as [`net::Stream::send`] does. It is encrypted at once and whole: for a moment there is as much ciphertext.
    ///
    /// # Errors
    /// What the transport says; NotConnected after [`Self::shutdown`].
    pub async fn send(&self, payload: impl Into<Payload>) -> io::Result<()> {
        self.send_vectored([payload.into()]).await
    }

    /// Sends all of several parts, in one record if they fit.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn send_vectored<const N: usize>(&self, parts: [Payload; N]) -> io::Result<()> {
        self.session.borrow_mut().encrypt(&parts)?;
        drop(parts);
        self.flush().await
    }

    /// As [`net::Stream::queue`]: encrypted at once, sent in the background.
    ///
    /// # Errors
    /// NotConnected after [`Self::shutdown`]; InvalidData when the session has failed.
    pub fn queue(&self, parts: impl IntoIterator<Item = Payload>) -> io::Result<()> {
        let parts: Vec<Payload> = parts.into_iter().collect();
        let mut session = self.session.borrow_mut();
        session.encrypt(&parts)?;
        // In order also with what `flush` takes: both take all there is, and the transport keeps the order in which it is given.
        let records = std::mem::take(&mut session.outgoing);
        self.transport.queue([records.into()]);
        Ok(())
    }

    /// As [`net::Stream::idle`].
    ///
    /// # Errors
    /// When a send has failed.
    pub async fn idle(&self) -> io::Result<()> {
        self.flush().await
    }

    /// Ends the session (close_notify) and the sending half of the connection.
    ///
    /// # Errors
    /// What the transport says.
    pub async fn shutdown(&self) -> io::Result<()> {
        self.session.borrow_mut().end();
        self.flush().await?;
        self.transport.shutdown().await
    }

    /// As [`net::Stream::abort`].
    pub fn abort(&self) {
        self.transport.abort();
    }

    /// As [`net::Stream::peer`].
    pub fn peer(&self) -> SocketAddr {
        self.transport.peer()
    }

    /// As [`net::Stream::local`].
    pub fn local(&self) -> SocketAddr {
        self.transport.local()
    }

    /// The connection below.
    pub fn transport(&self) -> &net::Stream {
        &self.transport
    }

    /// The name that the client asked for (SNI), in lower case.
    pub fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// The protocol that was agreed upon for the inside (ALPN), if the client named any.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.alpn.as_deref()
    }

    /// `TLSv1.3` or `TLSv1.2`.
    pub fn protocol_version(&self) -> &'static str {
        self.version
    }

    /// Whether the session was resumed with a ticket.
    pub fn resumed(&self) -> bool {
        self.session.borrow().connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    /// Hands the records that wait to the transport, in order, and waits until they are sent.
    ///
    /// Whoever comes first takes along what others have encrypted; they find nothing left when their turn comes, and it is sent then.
    pub(super) async fn flush(&self) -> io::Result<()> {
        loop {
            self.transport.idle().await?;
            let records = std::mem::take(&mut self.session.borrow_mut().outgoing);
            if records.is_empty() {
                return Ok(());
            }
            // Begins within this poll, for the transport is idle; from then on it goes on by itself.
            self.transport.send(records).await?;
        }
    }
}

impl Session {
    fn has_input(&self) -> bool {
        !self.plain.is_empty() || self.ended || self.failed.is_some()
    }

    fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// What can be told without more from the transport.
    fn next(&mut self) -> Option<io::Result<Option<Chunk>>> {
        if let Some(chunk) = self.plain.pop_front() {
            return Some(Ok(Some(chunk)));
        }
        if let Some(error) = &self.failed {
            return Some(Err(invalid(error.clone())));
        }
        self.ended.then_some(Ok(None))
    }

    /// Takes what has arrived, behind the records that are not complete yet.
    fn take(&mut self, chunk: Chunk) -> Result<(), rustls::Error> {
        self.incoming = Some(match self.incoming.take() {
            None => chunk,
            Some(rest) => {
                if rest.len() + chunk.len() > INCOMING_BYTES_MAX {
                    let error = rustls::InvalidMessage::HandshakePayloadTooLarge;
                    return Err(self.fail(error.into()));
                }
                [&rest[..], &chunk[..]].concat().into()
            }
        });
        self.process(None)
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.shut, true) {
            // When the session has failed there is nothing to end any more.
            let _ = self.process(Some(Write::CloseNotify));
        }
    }

    fn encrypt(&mut self, parts: &[Payload]) -> io::Result<()> {
        if self.shut {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if parts.len() > 1 && total <= MERGED_BYTES_MAX {
            let merged: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
            return self.encrypt_one(&merged);
        }
        // Room for all at once: grown record by record it would be copied again and again.
        let records = total / RECORD_BYTES + parts.len();
        self.outgoing
            .reserve(total + records * RECORD_OVERHEAD_BYTES);
        parts.iter().try_for_each(|part| self.encrypt_one(part))
    }

    fn encrypt_one(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.process(Some(Write::Bytes(bytes))).map_err(invalid)
    }

    /// Drives the connection as far as what has arrived carries it, and then writes.
    fn process(&mut self, mut write: Option<Write<'_>>) -> Result<(), rustls::Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        loop {
            let incoming = self.incoming.as_deref_mut().unwrap_or_default();
            let UnbufferedStatus { discard, state, .. } =
                self.connection.process_tls_records(incoming);
            let mut blocked = false;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let payload = record?.payload;
                        if !payload.is_empty() {
                            self.plain.push_back(payload.to_vec().into());
                        }
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    fill(&mut self.outgoing, RECORD_BYTES, |space| data.encode(space))?;
                }
                // Nothing can overtake what lies in `outgoing`, so for the connection it is as good as sent.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => self.ended = true,
                Ok(ConnectionState::WriteTraffic(mut traffic)) => match write.take() {
                    Some(Write::Bytes(bytes)) => {
                        let records = bytes.len() / RECORD_BYTES + 1;
                        let room = bytes.len() + records * RECORD_OVERHEAD_BYTES;
                        fill(&mut self.outgoing, room, |space| {
                            traffic.encrypt(bytes, space)
                        })?;
                    }
                    Some(Write::CloseNotify) => {
                        fill(&mut self.outgoing, RECORD_OVERHEAD_BYTES, |space| {
                            traffic.queue_close_notify(space)
                        })?;
                    }
                    None => blocked = true,
                },
                Ok(_) => blocked = true,
                Err(error) => {
                    self.discard(discard);
                    return Err(self.fail(error));
                }
            }
            self.discard(discard);
            if blocked {
                return match write {
                    None => Ok(()),
                    Some(_) => Err(rustls::Error::HandshakeNotComplete),
                };
            }
        }
    }

    /// Keeps the error, and lays the alert out that tells the peer.
    fn fail(&mut self, error: rustls::Error) -> rustls::Error {
        self.failed = Some(error.clone());
        // Only as long as there is something to say: asked once more, the connection would look at the faulty record again.
        while self.connection.wants_write() {
            let incoming = self.incoming.as_deref_mut().unwrap_or_default();
            let Ok(ConnectionState::EncodeTlsData(mut data)) =
                self.connection.process_tls_records(incoming).state
            else {
                break;
            };
            if fill(&mut self.outgoing, RECORD_OVERHEAD_BYTES, |space| {
                data.encode(space)
            })
            .is_err()
            {
                break;
            }
        }
        self.incoming = None;
        error
    }

    fn discard(&mut self, n: usize) {
        if let Some(incoming) = &mut self.incoming {
            incoming.advance(n.min(incoming.len()));
            if incoming.is_empty() {
                self.incoming = None;
            }
        }
    }
}

/// What rustls answers when it is given too little room.
trait TooSmall: std::fmt::Display {
    fn required_bytes(&self) -> Option<usize>;
}

impl TooSmall for EncodeError {
    fn required_bytes(&self) -> Option<usize> {
        match self {
            Self::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
            Self::AlreadyEncoded => None,
        }
    }
}

impl TooSmall for EncryptError {
    fn required_bytes(&self) -> Option<usize> {
        match self {
            Self::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
            Self::EncryptExhausted => None,
        }
    }
}

/// Appends what `write` lays into a space of `room` bytes, or of as many as it asks for.
fn fill<E: TooSmall>(
    into: &mut Vec<u8>,
    room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
) -> Result<(), rustls::Error> {
    let start = into.len();
    into.resize(start + room, 0);
    let mut written = write(&mut into[start..]);
    if let Err(error) = &written
        && let Some(required) = error.required_bytes()
    {
        into.resize(start + required, 0);
        written = write(&mut into[start..]);
    }
    into.truncate(start + *written.as_ref().unwrap_or(&0));
    written
        .map(drop)
        .map_err(|error| rustls::Error::General(error.to_string()))
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
