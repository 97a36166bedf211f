//! Files, written through tokio-uring; where control does without it, by tokio's threads for what may block.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Not at an offset, but where the descriptor stands (io_uring_prep_write(3)).
const WHERE_IT_IS: u64 = u64::MAX;

/// What carries writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Only on a thread that tokio-uring runs.
    Uring,
    /// On any thread of tokio's.
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
                match tokio::task::spawn_blocking(write).await {
                    Ok(done) => done,
                    Err(error) => (Err(io::Error::other(error)), Vec::new()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes two pieces behind what a file has; the second one from its third byte on.
    async fn append(path: &std::path::Path, carrier: Carrier) -> io::Result<()> {
        let file = File::options().append(true).open(path)?;
        let appender = Appender::new(file.into(), carrier);
        for (piece, from) in [("one ", 0), ("--two", 2)] {
            let bytes = piece.as_bytes().to_vec();
            let (written, back) = appender.write(bytes, from).await;
            assert_eq!(
                (written?, back),
                (piece.len() - from, piece.as_bytes().to_vec())
            );
        }
        Ok(())
    }

    #[test]
    fn either_carrier_writes_at_the_end() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("file");
        for carrier in [Carrier::Uring, Carrier::Threads] {
            std::fs::write(&path, "zero ")?;
            match carrier {
                Carrier::Uring => tokio_uring::start(append(&path, carrier))?,
                Carrier::Threads => tokio::runtime::Builder::new_current_thread()
                    .build()?
                    .block_on(append(&path, carrier))?,
            }
            assert_eq!(
                std::fs::read_to_string(&path)?,
                "zero one two",
                "{carrier:?}"
            );
        }
        Ok(())
    }
}
