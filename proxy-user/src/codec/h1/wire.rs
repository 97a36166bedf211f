//! One HTTP/1.1 connection: heads and bodies out of what arrives, in order, and what has arrived too early kept for later.

use super::BodyDecoder;
use crate::message::{Parse, Reject};
use crate::net::{self, Chunk, Instant};
use crate::tls::Transport;

/// A connection of either side. It holds a receive buffer only while something in it is unread.
pub struct Wire {
    transport: Transport,
    input: Input,
}

/// What has arrived and was not read yet.
#[derive(Default)]
struct Input {
    /// The beginning of a head of which more is to come. It is copied out of its receive buffers: a slow head must not hold one.
    begun: Vec<u8>,
    /// Else: the beginning of a body, or a request that did not wait for the answer to the one before.
    unread: Option<Chunk>,
}

/// The receiving half of a wire between two messages.
pub struct Reader<'w> {
    from: &'w Transport,
    input: &'w mut Input,
}

/// The receiving half of a wire inside a message, behind its head.
pub struct Body<'w> {
    reader: Reader<'w>,
    decoder: BodyDecoder,
    /// There is none.
    is_empty: bool,
    /// What was handed out, as long as it can be handed out again.
    kept: Option<Box<Kept>>,
}

/// The beginning of a body, kept to be read once more.
struct Kept {
    data: Vec<u8>,
    /// So much of it was handed out since the body began anew.
    read: usize,
    bytes_max: usize,
}

/// Why there is no head.
#[derive(Debug)]
pub enum HeadError {
    /// The peer ended or broke the connection before the first byte, or said nothing but the empty line that some clients
    /// send behind a body (RFC 9112 section 2.2): it waits for no answer.
    Gone,
    /// It did so in the middle of the head.
    CutShort,
    /// The deadline came first.
    Late,
    /// The head is none, or none that is taken.
    Refused(Reject),
}

/// Why a body has no end.
#[derive(Debug)]
pub enum BodyError {
    /// The connection ended or broke before the body did.
    CutShort,
    /// Its framing is broken.
    Refused(Reject),
}

impl Wire {
    pub fn new(transport: impl Into<Transport>) -> Self {
        Self {
            transport: transport.into(),
            input: Input::default(),
        }
    }

    /// The connection below.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Both halves, for whoever reads while somebody else writes.
    pub fn split(&mut self) -> (Reader<'_>, &Transport) {
        let reader = Reader {
            from: &self.transport,
            input: &mut self.input,
        };
        (reader, &self.transport)
    }

    /// Nothing has arrived that nobody asked for, the end of the connection neither: fit for another message.
    pub fn is_quiet(&self) -> bool {
        self.input.is_empty() && !self.transport.has_input()
    }
}

impl Input {
    fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.unread.is_none()
    }

    /// All that has arrived of the head.
    fn head(&self) -> &[u8] {
        if self.begun.is_empty() {
            self.unread.as_deref().unwrap_or_default()
        } else {
            &self.begun
        }
    }

    /// The head took so many bytes.
    fn read(&mut self, n: usize) {
        if !self.begun.is_empty() {
            let rest = std::mem::take(&mut self.begun).split_off(n);
            self.unread = Some(rest.into());
        } else if let Some(chunk) = &mut self.unread {
            chunk.advance(n);
        }
        self.unread.take_if(|rest| rest.is_empty());
    }

    /// More of the head.
    fn append(&mut self, more: Chunk) {
        if self.begun.is_empty() {
            self.unread = Some(more);
        } else {
            self.begun.extend_from_slice(&more);
        }
    }
}

impl<'w> Reader<'w> {
    /// Waits for the first byte of the next message; false when the connection ends or breaks before it.
    pub async fn wait(&mut self) -> bool {
        while self.input.is_empty() {
            match self.from.recv().await {
                Ok(Some(chunk)) => {
                    self.input.unread = Some(chunk).filter(|chunk| !chunk.is_empty())
                }
                Ok(None) | Err(_) => return false,
            }
        }
        true
    }

    /// Reads one head with a parser that is given all bytes since its beginning. Dropping the future loses nothing.
    ///
    /// # Errors
    /// See [`HeadError`]; the wire is of no more use then.
    pub async fn head(
        &mut self,
        deadline: Instant,
        mut parse: impl FnMut(&[u8]) -> Result<Parse, Reject>,
    ) -> Result<(), HeadError> {
        loop {
            if !self.input.is_empty()
                && let Parse::Complete(n) = parse(self.input.head()).map_err(HeadError::Refused)?
            {
                self.input.read(n);
                return Ok(());
            }
            if let Some(first) = self.input.unread.take() {
                self.input.begun = first.to_vec();
            }
            let more = net::timeout(deadline, self.from.recv()).await;
            let late = || match self.input.head() {
                b"\r\n" => HeadError::Gone,
                _ => HeadError::Late,
            };
            match more.map_err(|_| late())? {
                Ok(Some(more)) => self.input.append(more),
                Ok(None) | Err(_) if self.input.is_empty() => return Err(HeadError::Gone),
                Ok(None) | Err(_) => return Err(HeadError::CutShort),
            }
        }
    }

    /// Goes on with the body behind the head.
    pub fn body(self, decoder: BodyDecoder) -> Body<'w> {
        Body {
            reader: self,
            is_empty: decoder.is_ended(),
            decoder,
            kept: None,
        }
    }
}

impl<'w> Body<'w> {
    /// The body has ended and all its data was handed out.
    pub fn is_ended(&self) -> bool {
        self.decoder.is_ended() && self.kept_rest() == 0
    }

    /// Keeps what is handed out from now on, up to a length, so that [`Self::rewind`] can hand it out again.
    pub fn keep(&mut self, bytes_max: usize) {
        self.kept = Some(Box::new(Kept {
            data: Vec::new(),
            read: 0,
            bytes_max,
        }));
    }

    /// Everything that was handed out is kept. Without [`Self::keep`], only a body that is none can be read again.
    pub fn can_rewind(&self) -> bool {
        self.is_empty || self.kept.is_some()
    }

    /// Begins anew with what was kept.
    pub fn rewind(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.read = 0;
        }
    }

    fn kept_rest(&self) -> usize {
        self.kept
            .as_ref()
            .map_or(0, |kept| kept.data.len() - kept.read)
    }

    /// See [`BodyDecoder::keep_trailers`].
    pub fn keep_trailers(&mut self) {
        self.decoder.keep_trailers();
    }

    /// See [`BodyDecoder::trailers`].
    pub fn trailers(&self) -> &[u8] {
        self.decoder.trailers()
    }

    /// Where the rest of the body comes from, and how much, if nobody has to look at it: clear, and without framing. `u64::MAX` until the connection ends.
    pub fn passage(&self) -> Option<(&'w net::Stream, u64)> {
        let from: &'w Transport = self.reader.from;
        let left = self.decoder.plain_left()?;
        from.plain()
            .filter(|_| self.reader.input.is_empty() && self.kept_rest() == 0)
            .map(|from| (from, left))
    }

    /// So many bytes of the body were taken from there.
    pub fn skip(&mut self, bytes: u64) {
        self.kept = None;
        self.decoder.skip(bytes);
    }

    /// The next data, or None at the end. Dropping the future loses nothing.
    ///
    /// # Errors
    /// See [`BodyError`]; the wire is of no more use then.
    pub async fn next(&mut self) -> Result<Option<Chunk>, BodyError> {
        loop {
            if let Some(data) = self.ready()? {
                return Ok(Some(data));
            }
            if self.is_ended() {
                return Ok(None);
            }
            match self.reader.from.recv().await {
                Ok(Some(chunk)) => self.reader.input.unread = Some(chunk),
                Ok(None) => self.decoder.close().map_err(|_| BodyError::CutShort)?,
                Err(_) => return Err(BodyError::CutShort),
            }
        }
    }

    /// The data that lies here already, if there is any.
    ///
    /// # Errors
    /// When the framing is broken.
    pub fn ready(&mut self) -> Result<Option<Chunk>, BodyError> {
        if let Some(kept) = &mut self.kept
            && kept.read < kept.data.len()
        {
            let again = kept.data[kept.read..].to_vec();
            kept.read = kept.data.len();
            return Ok(Some(again.into()));
        }
        let data = self.arrived()?;
        if let (Some(data), Some(kept)) = (&data, &mut self.kept) {
            if kept.data.len() + data.len() > kept.bytes_max {
                self.kept = None;
            } else {
                kept.data.extend_from_slice(data);
                kept.read = kept.data.len();
            }
        }
        Ok(data)
    }

    /// As above, of what comes for the first time.
    fn arrived(&mut self) -> Result<Option<Chunk>, BodyError> {
        if self.decoder.is_ended() {
            return Ok(None);
        }
        let Some(mut chunk) = self.reader.input.unread.take() else {
            return Ok(None);
        };
        // What chunked framing holds apart is moved together, so that each receive buffer makes one piece however finely it was chunked.
        let (mut read, mut data) = (0, 0..0);
        while read < chunk.len() && !self.decoder.is_ended() {
            let piece = self
                .decoder
                .decode(&chunk[read..])
                .map_err(BodyError::Refused)?;
            let found = read + piece.data.start..read + piece.data.end;
            if data.is_empty() {
                data = found;
            } else {
                chunk.copy_within(found.clone(), data.end);
                data.end += found.len();
            }
            read += piece.consumed;
        }
        let mut front = chunk.split_to(read);
        self.reader.input.unread = Some(chunk).filter(|rest| !rest.is_empty());
        front.truncate(data.end);
        front.advance(data.start);
        Ok(Some(front).filter(|front| !front.is_empty()))
    }
}
