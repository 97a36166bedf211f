//! The channel between keeper and daemon: JSON in frames over a socket pair, descriptors beside it.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message; a configuration with ten thousand certificates stays far below it.
const FRAME_BYTES_MAX: usize = 256 << 20;

/// Descriptors in one message of the kernel's: SCM_MAX_FD is 253.
const DESCRIPTORS_PER_MESSAGE: usize = 200;

/// Most descriptors that one frame may carry.
const DESCRIPTORS_MAX: usize = 65_536;

/// Length of the frame's body, then the number of descriptors, each as u32 in host order: both ends are one binary.
const HEAD_BYTES: usize = 8;

/// Sends one message and copies of `descriptors`. Waits until the other end has room.
///
/// A frame is its head, the body, and then one byte for each 200 descriptors that carries them, so that the
/// number of descriptors has no limit of the kernel's and none can slip into another frame.
///
/// # Errors
/// What `sendmsg(2)` says; `InvalidInput` when the message is too long.
pub fn send(
    mut stream: &UnixStream,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
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
    stream.write_all(&frame)?;
    for some in descriptors.chunks(DESCRIPTORS_PER_MESSAGE) {
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
/// What `recvmsg(2)` says; `InvalidData` for a frame that is none.
pub fn receive<T: DeserializeOwned>(
    mut stream: &UnixStream,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut head = [0; HEAD_BYTES];
    match stream.read_exact(&mut head) {
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
    if body_bytes > FRAME_BYTES_MAX || descriptor_count > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "a frame of the other process is too long",
        ));
    }
    let mut body = vec![0; body_bytes];
    stream.read_exact(&mut body)?;
    let mut descriptors = Vec::with_capacity(descriptor_count);
    while descriptors.len() < descriptor_count {
        receive_descriptors(stream, &mut descriptors)?;
    }
    Ok(Some((serde_json::from_slice(&body)?, descriptors)))
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
                send(&ours, &vec!["x".repeat(100_000); round + 1], &borrowed)?;
            }
            Ok(())
        });
        for round in 0..3usize {
            let Some((message, descriptors)) = receive::<Vec<String>>(&theirs)? else {
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
        assert!(receive::<Vec<String>>(&theirs)?.is_none());
        Ok(())
    }

    #[test]
    fn a_frame_that_claims_too_much_is_refused() -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.write_all(&[0xff; HEAD_BYTES])?;
        assert_eq!(
            receive::<()>(&theirs).err().map(|e| e.kind()),
            Some(ErrorKind::InvalidData)
        );
        Ok(())
    }

    #[test]
    fn an_end_within_a_frame_is_an_error() -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.write_all(&[9, 0, 0, 0, 0, 0, 0, 0, b'{'])?;
        drop(ours);
        assert!(receive::<()>(&theirs).is_err());
        Ok(())
    }
}
