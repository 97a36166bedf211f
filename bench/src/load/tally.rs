//! What the clients and the origin of one round count, and what they found wrong.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use sluice::net::{self, Instant};

use crate::histogram::Histogram;

/// How often clients are looked after that should end.
const LOOK: Duration = Duration::from_millis(2);

/// Shared by all tasks of a round.
pub struct Tally {
    stopping: Cell<bool>,
    /// Clients that have not ended.
    running: Cell<usize>,
    /// Answers since the first connection, and requests that the origin saw.
    answers: Cell<u64>,
    requests: Cell<u64>,
    /// While the window is open.
    window: Cell<Option<u64>>,
    latencies: RefCell<Histogram>,
    /// Handshakes within the window, and how many of them were resumed.
    handshakes: Cell<(u64, u64)>,
    faults: Cell<u64>,
    first_fault: RefCell<Option<String>>,
}

impl Tally {
    pub fn new() -> Self {
        Self {
            stopping: Cell::new(false),
            running: Cell::new(0),
            answers: Cell::new(0),
            requests: Cell::new(0),
            window: Cell::new(None),
            latencies: RefCell::new(Histogram::new()),
            handshakes: Cell::new((0, 0)),
            faults: Cell::new(0),
            first_fault: RefCell::default(),
        }
    }

    /// Starts a client; its error is a fault of the round.
    pub fn spawn(self: &Rc<Self>, client: impl Future<Output = Result<()>> + 'static) {
        self.running.set(self.running.get() + 1);
        let tally = self.clone();
        net::spawn(async move {
            if let Err(error) = client.await {
                tally.fault(&format!("{error:#}"));
            }
            tally.running.set(tally.running.get() - 1);
        });
    }

    /// A request has arrived at the origin.
    pub fn request(&self) {
        self.requests.set(self.requests.get() + 1);
    }

    /// An exchange has ended well. `intended`: when its request should have been sent.
    pub fn answer(&self, intended: Option<Instant>) {
        self.answers.set(self.answers.get() + 1);
        if let (Some(intended), Some(_)) = (intended, self.window.get()) {
            let ns = Instant::read().since(intended).as_nanos();
            let ns = u64::try_from(ns).unwrap_or(u64::MAX);
            self.latencies.borrow_mut().record(ns);
        }
    }

    /// A handshake has ended well.
    pub fn handshake(&self, was_resumed: bool) {
        if self.window.get().is_some() {
            let (all, resumed) = self.handshakes.get();
            self.handshakes
                .set((all + 1, resumed + u64::from(was_resumed)));
        }
    }

    /// Handshakes within the window, and how many of them were resumed.
    pub fn handshakes(&self) -> (u64, u64) {
        self.handshakes.get()
    }

    /// Something was not as it must be.
    pub fn fault(&self, what: &str) {
        self.faults.set(self.faults.get() + 1);
        self.first_fault
            .borrow_mut()
            .get_or_insert_with(|| what.to_owned());
    }

    /// Opens the window: from now on, answers count.
    pub fn begin(&self) {
        self.window.set(Some(self.answers.get()));
    }

    /// Closes the window: the answers within it, and their latencies.
    pub fn end(&self) -> (u64, Histogram) {
        let first = self.window.take().unwrap_or_default();
        let latencies = self.latencies.borrow().clone();
        (self.answers.get() - first, latencies)
    }

    /// Clients end after the exchange in which they are.
    pub fn stop(&self) {
        self.stopping.set(true);
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Waits until all clients have ended; `verdict` tells if some have not.
    pub async fn wait_for_clients(&self, limit: Duration) {
        let deadline = Instant::read() + limit;
        while self.running.get() > 0 && Instant::read() < deadline {
            net::sleep_until(Instant::read() + LOOK).await;
        }
    }

    /// An error if anything was wrong; call it when all clients have ended.
    pub fn verdict(&self) -> Result<()> {
        self.expect_no_fault()?;
        ensure!(
            self.running.get() == 0,
            "{} exchanges had no end",
            self.running.get()
        );
        ensure!(
            self.requests.get() == self.answers.get(),
            "the origin saw {} requests where {} were answered",
            self.requests.get(),
            self.answers.get()
        );
        Ok(())
    }

    /// An error if anything was wrong so far.
    pub fn expect_no_fault(&self) -> Result<()> {
        match &*self.first_fault.borrow() {
            Some(fault) => bail!("{} faults, the first: {fault}", self.faults.get()),
            None => Ok(()),
        }
    }
}
