//! Writes the access log: takes what workers gathered, and gives it to the file that the keeper opened.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::access_log::{Lines, Queue};
use crate::file::{Appender, Carrier};
use crate::metric::Registry;
use crate::report::queue::Receiver;

/// How long the last lines may take when everything ends.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// The task that writes.
pub struct AccessLog {
    queue: Queue,
    said: mpsc::UnboundedSender<Said>,
    task: JoinHandle<()>,
}

/// What the task is told.
enum Said {
    /// Lines go to this file from now on.
    File(OwnedFd),
    /// No more lines will come.
    End,
}

impl AccessLog {
    /// Starts the task. It takes no lines before it has a file.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn start(carrier: Carrier, registry: Arc<Registry>) -> Result<Self> {
        let (queue, lines) = Queue::new().context("make the queue of the access log")?;
        // SAFETY: `Receiver` holds a share of its eventfd, which stays the same and open as long as it lives.
        let lines = unsafe { AsyncFd::register_with_interest(lines, Interest::READABLE) }
            .map_err(std::io::Error::from)
            .context("wait for lines of the access log")?;
        let (said, orders) = mpsc::unbounded_channel();
        let writer = Writer {
            carrier,
            registry,
            file: None,
            is_failing: false,
            is_torn: false,
        };
        Ok(Self {
            queue,
            said,
            task: tokio::task::spawn_local(writer.run(lines, orders)),
        })
    }

    /// Where workers hand lines over.
    pub fn queue(&self) -> Queue {
        self.queue.clone()
    }

    /// Lets lines go to this file from now on.
    pub fn write_to(&self, file: OwnedFd) {
        let _ = self.said.send(Said::File(file));
    }

    /// Writes what there is, if that does not take too long; nothing comes behind it.
    pub async fn end(self) {
        let _ = self.said.send(Said::End);
        if timeout(END_PATIENCE, self.task).await.is_err() {
            log::warn!(
                "the last lines of the access log are lost: its file or reader takes nothing"
            );
        }
    }
}

struct Writer {
    carrier: Carrier,
    registry: Arc<Registry>,
    file: Option<Appender>,
    /// The last write came to nothing, which was said.
    is_failing: bool,
    /// The file ends in the middle of a line.
    is_torn: bool,
}

impl Writer {
    async fn run(
        mut self,
        lines: AsyncFd<Receiver<Lines>>,
        mut orders: mpsc::UnboundedReceiver<Said>,
    ) {
        loop {
            tokio::select! {
                biased;
                said = orders.recv() => match said {
                    Some(Said::File(file)) => self.turn_to(file),
                    Some(Said::End) | None => break,
                },
                ready = lines.readable(), if self.file.is_some() => {
                    let Ok(mut ready) = ready else { return };
                    ready.clear_ready();
                    for gathered in lines.get_ref().take() {
                        // Who rotates files waits for the new one, however much is on its way to the old one.
                        if let Ok(Said::File(file)) = orders.try_recv() {
                            self.turn_to(file);
                        }
                        self.write(gathered).await;
                    }
                }
            }
        }
        while self.file.is_some() {
            let rest = lines.get_ref().take();
            if rest.is_empty() {
                return;
            }
            for gathered in rest {
                self.write(gathered).await;
            }
        }
    }

    fn turn_to(&mut self, file: OwnedFd) {
        self.file = Some(Appender::new(file, self.carrier));
        self.is_torn = false;
    }

    /// Writes lines, or counts those that could not be written.
    async fn write(&mut self, mut gathered: Lines) {
        let Some(file) = &self.file else { return };
        let mut bytes = std::mem::take(&mut gathered.bytes);
        let mended = usize::from(self.is_torn);
        if self.is_torn {
            bytes.insert(0, b'\n');
        }
        let mut at = 0;
        let mut failed = None;
        while at < bytes.len() && failed.is_none() {
            let (written, back) = file.write(bytes, at).await;
            bytes = back;
            match written {
                Ok(0) => failed = Some(std::io::ErrorKind::WriteZero.into()),
                Ok(count) => at += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => failed = Some(error),
            }
        }
        if at > 0 {
            self.is_torn = bytes.get(at - 1) != Some(&b'\n');
        }
        match failed {
            Some(error) => {
                let rest = bytes.get(at.max(mended)..).unwrap_or_default();
                let lost = match bytes.is_empty() {
                    true => u64::from(gathered.count),
                    false => memchr::memchr_iter(b'\n', rest).count() as u64,
                };
                self.registry.control.log_failed.fetch_add(lost, Relaxed);
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::error!(
                        "the access log cannot be written: {error}; its lines are dropped and counted"
                    );
                }
            }
            None if std::mem::replace(&mut self.is_failing, false) => {
                log::info!("the access log can be written again");
            }
            None => {}
        }
    }
}
