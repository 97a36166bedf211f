//! Files, written through tokio-uring; where control does without it, by tokio's threads for what may block.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

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
    /// Of a descriptor that was opened with O_APPEND, or has no place to write at but its end.
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
                // The kernel appends wherever a write to such a file wants to be.
                let (written, rest) = file.write_at(bytes.slice(from..), 0).submit().await;
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
