//! The tasks of one worker and their wakers, which are numbers and not pointers.
//!
//! A waker names runtime, slot and generation in one word. Waking on the worker's own thread sets a flag and queues
//! the slot; cloning and dropping do nothing. A waker may outlive its task and its runtime, and be woken from any thread:
//! what it names is looked up, and at worst a task is polled once for nothing.

use std::{
    any::Any,
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    future::Future,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, RawWaker, RawWakerVTable, Waker},
};

use super::{doorbell::Doorbell, runtime};

/// A future that was spawned.
pub(super) type Work = Pin<Box<dyn Future<Output = ()>>>;

/// The slot of the future that [`runtime::run`] was called with; it lies on that function's stack.
pub(super) const MAIN: u32 = 0;

const SLOT_BITS: u32 = 24;
const GENERATION_BITS: u32 = 24;
const SLOTS_MAX: usize = 1 << SLOT_BITS;
const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

/// What a waker carries: 16 bits of runtime, 24 of generation, 24 of slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) runtime: u16,
    generation: u32,
    slot: u32,
}

/// All tasks that have not ended.
pub(super) struct Tasks {
    runtime: u16,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    ready: RefCell<VecDeque<u32>>,
}

struct Slot {
    generation: u32,
    queued: bool,
    /// None while the task runs, in a free slot, and for the main future.
    work: Option<Work>,
}

/// What polling a task came to.
pub(super) enum Polled {
    Done,
    Pending,
    Panicked(Box<dyn Any + Send>),
}

impl Tasks {
    pub(super) fn new(runtime: u16) -> Self {
        let main = Slot {
            generation: 0,
            queued: true,
            work: None,
        };
        Self {
            runtime,
            slots: RefCell::new(vec![main]),
            free: RefCell::default(),
            ready: RefCell::new(VecDeque::from([MAIN])),
        }
    }

    /// Queues a new task; false, and the work is dropped, where there are 16 million already.
    pub(super) fn spawn(&self, work: Work) -> bool {
        let mut slots = self.slots.borrow_mut();
        let slot = match self.free.borrow_mut().pop() {
            Some(slot) => slot,
            None if slots.len() == SLOTS_MAX => return false,
            None => {
                slots.push(Slot {
                    generation: 0,
                    queued: false,
                    work: None,
                });
                (slots.len() - 1) as u32
            }
        };
        let entry = &mut slots[slot as usize];
        entry.work = Some(work);
        entry.queued = true;
        self.ready.borrow_mut().push_back(slot);
        true
    }

    /// Queues the task with this name, unless it is queued already or gone.
    pub(super) fn wake(&self, name: Name) {
        let mut slots = self.slots.borrow_mut();
        if let Some(slot) = slots.get_mut(name.slot as usize)
            && slot.generation == name.generation
            && !slot.queued
        {
            slot.queued = true;
            self.ready.borrow_mut().push_back(name.slot);
        }
    }

    /// The next slot to be polled, and the waker for it.
    pub(super) fn next(&self) -> Option<(u32, Waker)> {
        let slot = self.ready.borrow_mut().pop_front()?;
        let entry = &mut self.slots.borrow_mut()[slot as usize];
        // Woken while it runs, it shall run again.
        entry.queued = false;
        let name = Name {
            runtime: self.runtime,
            generation: entry.generation,
            slot,
        };
        Some((slot, name.waker()))
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    /// Polls a spawned task; one that has ended or panicked is dropped and its slot freed.
    pub(super) fn poll(&self, slot: u32, waker: &Waker) -> Polled {
        let Some(mut work) = self.slots.borrow_mut()[slot as usize].work.take() else {
            return Polled::Done;
        };
        let polled = catch_unwind(AssertUnwindSafe(|| {
            work.as_mut().poll(&mut Context::from_waker(waker))
        }));
        if let Ok(Poll::Pending) = polled {
            self.slots.borrow_mut()[slot as usize].work = Some(work);
            return Polled::Pending;
        }
        self.release(slot);
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(work)));
        match polled.and(dropped) {
            Ok(()) => Polled::Done,
            Err(panic) => Polled::Panicked(panic),
        }
    }

    /// Drops every task, and those that are spawned meanwhile; gives back the last panic of a drop.
    pub(super) fn clear(&self) -> Option<Box<dyn Any + Send>> {
        let mut panic = None;
        loop {
            let work: Vec<Work> = self
                .slots
                .borrow_mut()
                .iter_mut()
                .filter_map(|slot| slot.work.take())
                .collect();
            if work.is_empty() {
                return panic;
            }
            for task in work {
                if let Err(caught) = catch_unwind(AssertUnwindSafe(|| drop(task))) {
                    panic = Some(caught);
                }
            }
        }
    }

    fn release(&self, slot: u32) {
        let entry = &mut self.slots.borrow_mut()[slot as usize];
        entry.generation = entry.generation.wrapping_add(1) & GENERATION_MASK;
        // Woken while it ran for the last time, the slot is still in the queue; whoever takes it next is polled once more, for nothing.
        self.free.borrow_mut().push(slot);
    }
}

impl Name {
    fn pack(self) -> usize {
        (usize::from(self.runtime) << (SLOT_BITS + GENERATION_BITS))
            | ((self.generation as usize) << SLOT_BITS)
            | self.slot as usize
    }

    fn unpack(word: usize) -> Self {
        Self {
            runtime: (word >> (SLOT_BITS + GENERATION_BITS)) as u16,
            generation: (word >> SLOT_BITS) as u32 & GENERATION_MASK,
            slot: word as u32 & (SLOTS_MAX - 1) as u32,
        }
    }

    fn waker(self) -> Waker {
        // SAFETY: the data is a number; the functions of the table only read it as such, on any thread, and own nothing.
        unsafe { Waker::from_raw(raw(std::ptr::without_provenance(self.pack()))) }
    }
}

static TABLE: RawWakerVTable = RawWakerVTable::new(raw, wake, wake, |_| {});

fn raw(word: *const ()) -> RawWaker {
    RawWaker::new(word, &TABLE)
}

fn wake(word: *const ()) {
    let name = Name::unpack(word.addr());
    if !runtime::wake_here(name) {
        wake_elsewhere(name);
    }
}

/// Where other threads leave their wakes for a runtime; closed when dropped.
pub(super) struct Letterbox {
    number: u16,
    slot: Arc<LetterSlot>,
}

struct LetterSlot {
    names: Mutex<Vec<Name>>,
    doorbell: Doorbell,
}

static LETTERBOXES: Mutex<BTreeMap<u16, Arc<LetterSlot>>> = Mutex::new(BTreeMap::new());

impl Letterbox {
    /// Opens a letterbox under a number that no other live runtime has.
    pub(super) fn open() -> io::Result<Self> {
        let slot = Arc::new(LetterSlot {
            names: Mutex::default(),
            doorbell: Doorbell::new()?,
        });
        let mut all = lock(&LETTERBOXES);
        let number = (0..=u16::MAX)
            .find(|number| !all.contains_key(number))
            .ok_or_else(|| io::Error::other("65536 workers run already"))?;
        all.insert(number, slot.clone());
        Ok(Self { number, slot })
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    pub(super) fn doorbell(&self) -> &Doorbell {
        &self.slot.doorbell
    }

    /// Takes what has been left.
    pub(super) fn empty(&self) -> impl Iterator<Item = Name> + use<> {
        std::mem::take(&mut *lock(&self.slot.names)).into_iter()
    }
}

impl Drop for Letterbox {
    fn drop(&mut self) {
        lock(&LETTERBOXES).remove(&self.number);
    }
}

fn wake_elsewhere(name: Name) {
    let slot = lock(&LETTERBOXES).get(&name.runtime).cloned();
    if let Some(slot) = slot {
        lock(&slot.names).push(name);
        slot.doorbell.ring();
    }
}

/// Nothing that runs under these locks can leave a half-made change behind, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_packing() {
        let name = Name {
            runtime: 0xfedc,
            generation: 0xab_cdef,
            slot: 0x12_3456,
        };
        assert_eq!(Name::unpack(name.pack()), name);
    }

    #[test]
    fn a_waker_of_a_runtime_that_is_gone_does_nothing() {
        let name = Name {
            runtime: u16::MAX,
            generation: 1,
            slot: 1,
        };
        let waker = name.waker();
        let clone = waker.clone();
        assert!(waker.will_wake(&clone));
        waker.wake();
        clone.wake_by_ref();
    }
}
