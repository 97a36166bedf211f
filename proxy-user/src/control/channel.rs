//! The channel between keeper and daemon: JSON in frames over a socket pair, descriptors beside it.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message to a daemon; a configuration with ten thousand certificates stays far below it.
const FRAME_BYTES_MAX: usize = 256 << 20;

/// Longest message to the keeper: the diagnostics of a configuration, or the bans of a daemon without a datapath.
const WORDS_BYTES_MAX: usize = 32 << 20;

/// Descriptors in one message of the kernel's: SCM_MAX_FD is 253.
const DESCRIPTORS_PER_MESSAGE: usize = 200;

/// What is written at a time when time counts: no more than one buffer of the kernel's, for it would wait anew for each.
const PIECE_BYTES: usize = 16 << 10;

/// Most descriptors that one frame may carry.
const DESCRIPTORS_MAX: usize = 65_536;

/// Length of the frame's body, then the number of descriptors, each as u32 in host order: both ends are one binary.
const HEAD_BYTES: usize = 8;

/// What one end puts up with from the other.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    body_bytes_max: usize,
    descriptors_max: usize,
    /// For one whole message, however it comes in pieces; `None` = any time.
    limit: Option<Duration>,
}

impl Patience {
    /// A daemon's with its keeper, whom it trusts.
    pub const WITH_KEEPER: Self = Self {
        body_bytes_max: FRAME_BYTES_MAX,
        descriptors_max: DESCRIPTORS_MAX,
        limit: None,
    };

    /// The keeper's with a daemon, which reads what strangers send and may be a stranger's own by now: it must neither
    /// fill the keeper's memory nor keep it from its signals.
    pub const fn with_daemon(limit: Duration) -> Self {
        Self {
            body_bytes_max: WORDS_BYTES_MAX,
            descriptors_max: 0,
            limit: Some(limit),
        }
    }

    /// When it ends for a message that begins now.
    fn end(self) -> Option<Instant> {
        self.limit.map(|limit| Instant::now() + limit)
    }
}

/// Sends one message and copies of `descriptors`. Waits until the other end has room.
///
/// A frame is its head, the body, and then one byte for each 200 descriptors that carries them, so that the
/// number of descriptors has no limit of the kernel's and none can slip into another frame.
///
/// # Errors
/// What `sendmsg(2)` says; `InvalidInput` when the message is too long; `TimedOut` or `WouldBlock` when patience ends.
pub fn send(
    stream: &UnixStream,
    patience: Patience,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let end = patience.end();
    let mut frame = vec![0; HEAD_BYTES];
    serde_json::to_writer(&mut frame, message)?;
    let body_bytes = frame.len() - HEAD_BYTES;
    if body_bytes > FRAME_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "the message to the other process is too long",
        ));
    }
    frame[..4].copy_from_slice(&(body_bytes as u32).to_ne_bytes());
    frame[4..8].copy_from_slice(&(descriptors.len() as u32).to_ne_bytes());
    write_all(stream, &frame, end)?;
    for some in descriptors.chunks(DESCRIPTORS_PER_MESSAGE) {
        if let Some(left) = left(end)? {
            stream.set_write_timeout(Some(left))?;
        }
        let raw: Vec<_> = some.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
    }
    Ok(())
}

/// Receives one message and its descriptors; waits for it. `None` when the other end was closed.
///
/// # Errors
/// What `recvmsg(2)` says; `InvalidData` for a frame that is none; `TimedOut` or `WouldBlock` when patience ends.
pub fn receive<T: DeserializeOwned>(
    stream: &UnixStream,
    patience: Patience,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let end = patience.end();
    let mut head = [0; HEAD_BYTES];
    match read_exact(stream, &mut head, end) {
        Ok(()) => {}
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    let [a, b, c, d, e, f, g, h] = head;
    let body_bytes = u32::from_ne_bytes([a, b, c, d]) as usize;
    let descriptor_count = u32::from_ne_bytes([e, f, g, h]) as usize;
    if body_bytes > patience.body_bytes_max || descriptor_count > patience.descriptors_max {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "a frame of the other process is too long",
        ));
    }
    let mut body = vec![0; body_bytes];
    read_exact(stream, &mut body, end)?;
    let mut descriptors = Vec::with_capacity(descriptor_count);
    while descriptors.len() < descriptor_count {
        receive_descriptors(stream, &mut descriptors)?;
    }
    Ok(Some((serde_json::from_slice(&body)?, descriptors)))
}

/// How long there is; `None` = as long as it takes.
fn left(end: Option<Instant>) -> io::Result<Option<Duration>> {
    let Some(end) = end else { return Ok(None) };
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok(Some(left))
}

fn write_all(mut stream: &UnixStream, bytes: &[u8], end: Option<Instant>) -> io::Result<()> {
    for piece in bytes.chunks(PIECE_BYTES) {
        if let Some(left) = left(end)? {
            stream.set_write_timeout(Some(left))?;
        }
        stream.write_all(piece)?;
    }
    Ok(())
}

fn read_exact(mut stream: &UnixStream, bytes: &mut [u8], end: Option<Instant>) -> io::Result<()> {
    let mut read = 0;
    while read < bytes.len() {
        if let Some(left) = left(end)? {
            stream.set_read_timeout(Some(left))?;
        }
        match stream.read(&mut bytes[read..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => read += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn receive_descriptors(stream: &UnixStream, descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut byte = [0];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS_PER_MESSAGE]);
    let mut slices = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = loop {
        match recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => {}
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let before = descriptors.len();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
            descriptors.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    if descriptors.len() == before {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "descriptors were announced but did not come",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Seek;
    use std::os::fd::AsFd;

    #[test]
    fn messages_and_their_descriptors_stay_together() -> io::Result<()> {
        let (ours, theirs) = UnixStream::pair()?;
        let sender = std::thread::spawn(move || -> io::Result<()> {
            for round in 0..3usize {
                let files: Vec<_> = (0..round * 230)
                    .map(|_| tempfile::tempfile())
                    .collect::<io::Result<_>>()?;
                for (n, mut file) in files.iter().enumerate() {
                    file.write_all(format!("{round}:{n}").as_bytes())?;
                }
                let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                send(
                    &ours,
                    Patience::WITH_KEEPER,
                    &vec!["x".repeat(100_000); round + 1],
                    &borrowed,
                )?;
            }
            Ok(())
        });
        for round in 0..3usize {
            let Some((message, descriptors)) =
                receive::<Vec<String>>(&theirs, Patience::WITH_KEEPER)?
            else {
                panic!("no frame {round}");
            };
            assert_eq!(message.len(), round + 1);
            assert_eq!(descriptors.len(), round * 230);
            for (n, descriptor) in descriptors.into_iter().enumerate() {
                let mut file = std::fs::File::from(descriptor);
                file.rewind()?;
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                assert_eq!(text, format!("{round}:{n}"));
            }
        }
        assert!(sender.join().is_ok_and(|result| result.is_ok()));
        assert!(receive::<Vec<String>>(&theirs, Patience::WITH_KEEPER)?.is_none());
        Ok(())
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused() -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.write_all(&[0xff; HEAD_BYTES])?;
        assert_eq!(
            receive::<()>(&theirs, Patience::WITH_KEEPER)
                .err()
                .map(|e| e.kind()),
            Some(ErrorKind::InvalidData)
        );
        Ok(())
    }

    #[test]
    fn an_end_within_a_frame_is_an_error() -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.write_all(&[9, 0, 0, 0, 0, 0, 0, 0, b'{'])?;
        drop(ours);
        assert!(receive::<()>(&theirs, Patience::WITH_KEEPER).is_err());
        Ok(())
    }

    const SHORT: Patience = Patience::with_daemon(Duration::from_millis(200));

    #[test]
    fn what_a_daemon_claims_is_refused_before_there_is_memory_for_it() -> io::Result<()> {
        for (body_bytes, descriptors) in [(WORDS_BYTES_MAX as u32 + 1, 0u32), (2, 1)] {
            let (mut ours, theirs) = UnixStream::pair()?;
            ours.write_all(&body_bytes.to_ne_bytes())?;
            ours.write_all(&descriptors.to_ne_bytes())?;
            let refused = receive::<()>(&theirs, SHORT).err().map(|e| e.kind());
            assert_eq!(refused, Some(ErrorKind::InvalidData));
        }
        Ok(())
    }

    #[test]
    fn a_daemon_that_talks_or_listens_drop_by_drop_does_not_hold_its_keeper() -> io::Result<()> {
        let pace = Duration::from_millis(20);
        let (mut ours, theirs) = UnixStream::pair()?;
        let talker = std::thread::spawn(move || -> io::Result<()> {
            ours.write_all(&[100, 0, 0, 0, 0, 0, 0, 0])?;
            for byte in format!("{:100}", 7).bytes() {
                std::thread::sleep(pace);
                ours.write_all(&[byte])?;
            }
            Ok(())
        });
        assert!(receive::<u32>(&theirs, SHORT).is_err());
        drop(theirs);
        assert!(talker.join().is_ok_and(|talked| talked.is_err()));

        let (ours, mut theirs) = UnixStream::pair()?;
        let listener = std::thread::spawn(move || {
            let mut drop_of = [0; 1024];
            for _ in 0..100 {
                std::thread::sleep(pace);
                if !theirs.read(&mut drop_of).is_ok_and(|read| read > 0) {
                    return;
                }
            }
            let _ = io::copy(&mut theirs, &mut io::sink());
        });
        assert!(send(&ours, SHORT, &"x".repeat(4 << 20), &[]).is_err());
        drop(ours);
        assert!(listener.join().is_ok());
        Ok(())
    }
}
