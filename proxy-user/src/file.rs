//! Files, written through tokio-uring; where control does without it, by threads that may block.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use tokio::sync::oneshot;

/// Not at an offset, but where the descriptor stands (io_uring_prep_write(3)).
const WHERE_IT_IS: u64 = u64::MAX;

/// What carries writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Only on a thread that tokio-uring runs.
    Uring,
    /// Anywhere.
    Threads,
}

/// A file, pipe or terminal at whose end is written.
pub enum Appender {
    Uring(tokio_uring::fs::File),
    Threads(Arc<File>),
}

impl Appender {
    /// Of a descriptor that was opened with O_APPEND, or stands at its end, or has no other place to write at.
    pub fn new(descriptor: OwnedFd, carrier: Carrier) -> Self {
        let file = File::from(descriptor);
        match carrier {
            Carrier::Uring => Self::Uring(tokio_uring::fs::File::from_std(file)),
            Carrier::Threads => Self::Threads(Arc::new(file)),
        }
    }

    /// Writes as much as is taken at once: how many bytes, and the bytes again.
    pub async fn write(&self, bytes: Vec<u8>, from: usize) -> (io::Result<usize>, Vec<u8>) {
        match self {
            Self::Uring(file) => {
                use tokio_uring::buf::BoundedBuf;
                let rest = bytes.slice(from..);
                let (written, rest) = file.write_at(rest, WHERE_IT_IS).submit().await;
                (written, rest.into_inner())
            }
            Self::Threads(file) => {
                let file = Arc::clone(file);
                let write = move || {
                    let written = (&*file).write(bytes.get(from..).unwrap_or_default());
                    (written, bytes)
                };
                let (done, answer) = oneshot::channel();
                // Not by tokio's own threads: at the end it would wait for a write that is never taken.
                let started = thread::Builder::new()
                    .name("file".to_owned())
                    .spawn(move || drop(done.send(write())));
                match (started, answer.await) {
                    (Err(error), _) => (Err(error), Vec::new()),
                    (Ok(_), Ok(done)) => done,
                    (Ok(_), Err(error)) => (Err(io::Error::other(error)), Vec::new()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    /// Writes two pieces; the second one from its third byte on.
    async fn write(file: File, carrier: Carrier) -> io::Result<()> {
        let appender = Appender::new(file.into(), carrier);
        for (piece, from) in [("one ", 0), ("--two", 2)] {
            let bytes = piece.as_bytes().to_vec();
            let (written, back) = appender.write(bytes.clone(), from).await;
            assert_eq!((written?, back), (bytes.len() - from, bytes));
        }
        Ok(())
    }

    #[test]
    fn either_carrier_writes_behind_what_is_there() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("file");
        for carrier in [Carrier::Uring, Carrier::Threads] {
            for is_append in [true, false] {
                std::fs::write(&path, "zero ")?;
                let mut file = File::options().write(true).append(is_append).open(&path)?;
                // As a shell leaves it that redirects by `>`, and has printed something itself.
                if !is_append {
                    file.seek(SeekFrom::End(0))?;
                }
                match carrier {
                    Carrier::Uring => tokio_uring::start(write(file, carrier))?,
                    Carrier::Threads => tokio::runtime::Builder::new_current_thread()
                        .build()?
                        .block_on(write(file, carrier))?,
                }
                let text = std::fs::read_to_string(&path)?;
                assert_eq!(text, "zero one two", "{carrier:?} {is_append}");
            }
        }
        Ok(())
    }
}
