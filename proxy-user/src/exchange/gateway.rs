//! What the exchanges of one worker share.

use std::cell::{Cell, Ref, RefCell};
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use crate::access_log;
use crate::call::Caller;
use crate::metric;
use crate::net;
use crate::offload::Cells;
use crate::overload::Overload;
use crate::report::{Report, Sender};
use crate::snapshot::Snapshot;

/// Identities that are remembered as told, and for how long: control wants to hear of each within ten minutes.
const IDENTITIES_MAX: usize = 4096;
const IDENTITIES_S: u64 = 60;

/// What the exchanges of one worker share.
pub struct Gateway {
    worker: usize,
    /// The present generation: a shallow copy of our own, so that exchanges share it without an atomic count that all
    /// workers would fight over.
    snapshot: RefCell<Rc<Snapshot>>,
    caller: Caller,
    cells: Arc<Cells>,
    metrics: Arc<metric::Worker>,
    overload: Overload,
    reports: Sender,
    access_log: access_log::Log,
    date: RefCell<Date>,
    identities: RefCell<Identities>,
    hashes: RandomState,
    /// Requests that were given an id.
    ids: Cell<u64>,
}

/// The present second, as `Date` has it.
#[derive(Default)]
struct Date {
    second: u64,
    text: String,
}

/// Whom control has heard of lately.
#[derive(Default)]
struct Identities {
    told: HashSet<u64>,
    since_s: u64,
}

impl Gateway {
    pub fn new(
        worker: usize,
        snapshot: &Snapshot,
        cells: Arc<Cells>,
        metrics: Arc<metric::Worker>,
        reports: Sender,
        access_log: access_log::Log,
    ) -> Self {
        let hashes = RandomState::new();
        Self {
            worker,
            snapshot: RefCell::new(Rc::new(snapshot.clone())),
            caller: Caller::new(worker, reports.clone(), hashes.hash_one(worker)),
            cells,
            overload: Overload::new(Arc::clone(&metrics)),
            metrics,
            reports,
            access_log,
            date: RefCell::default(),
            identities: RefCell::default(),
            hashes,
            ids: Cell::new(0),
        }
    }

    /// The generation that exchanges begin with from now on.
    pub fn replace(&self, snapshot: &Snapshot) {
        *self.snapshot.borrow_mut() = Rc::new(snapshot.clone());
    }

    pub fn snapshot(&self) -> Rc<Snapshot> {
        Rc::clone(&self.snapshot.borrow())
    }

    /// Index of the worker.
    pub fn worker(&self) -> usize {
        self.worker
    }

    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    pub fn metrics(&self) -> &metric::Worker {
        &self.metrics
    }

    /// Where exchanges have their lines.
    pub fn access_log(&self) -> &access_log::Log {
        &self.access_log
    }

    /// What is left off for now.
    pub fn overload(&self) -> &Overload {
        &self.overload
    }

    pub(super) fn cells(&self) -> &Cells {
        &self.cells
    }

    pub(super) fn report(&self, report: Report) {
        self.reports.send(report);
    }

    /// Tells control that a consumer succeeded from this address, once in a while.
    pub(super) fn identify(&self, source: IpAddr, consumer: &str) {
        let now_s = net::now().as_ns() / 1_000_000_000;
        let mut identities = self.identities.borrow_mut();
        if now_s - identities.since_s > IDENTITIES_S || identities.told.len() >= IDENTITIES_MAX {
            *identities = Identities {
                told: HashSet::new(),
                since_s: now_s,
            };
        }
        if identities
            .told
            .insert(self.hashes.hash_one((source, consumer)))
        {
            let consumer = self.hashes.hash_one(consumer);
            self.reports.send(Report::Identity { source, consumer });
        }
    }

    /// An id that no other request has, and of which nobody can tell the next.
    pub(super) fn new_id(&self) -> u128 {
        let number = self.ids.get();
        self.ids.set(number + 1);
        let half = |half: u8| u128::from(self.hashes.hash_one((number, half)));
        half(0) << 64 | half(1)
    }

    /// Now, as an IMF-fixdate (RFC 9110 section 5.6.7); made once a second.
    pub(super) fn date(&self) -> Ref<'_, str> {
        let second = net::now().as_ns() / 1_000_000_000;
        if self.date.borrow().second != second {
            let text = httpdate::fmt_http_date(SystemTime::now());
            *self.date.borrow_mut() = Date { second, text };
        }
        Ref::map(self.date.borrow(), |date| &*date.text)
    }
}
