//! The operations in flight: who is told of a completion, and what keeps their memory alive until the last one.

use std::rc::Rc;

use super::{connect::Connecting, doorbell::Bell, listener::Accepting, socket::Socket};

/// An operation, with a share of everything the kernel reads or writes for it.
#[derive(Clone)]
pub(super) enum Operation {
    Accept(Rc<Accepting>),
    Connect(Rc<Connecting>),
    Recv(Rc<Socket>),
    Send(Rc<Socket>),
    Readable(Rc<Socket>),
    Writable(Rc<Socket>),
    Ring(Rc<Bell>),
}

/// A slab of operations; the token of one is its slot and the slot's generation, so that a late completion finds nobody.
#[derive(Default)]
pub(super) struct Operations {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

struct Slot {
    generation: u32,
    operation: Option<Operation>,
}

impl Operations {
    /// Notes an operation and returns its token.
    pub(super) fn insert(&mut self, operation: Operation) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                operation: None,
            });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.operation = Some(operation);
        (u64::from(slot.generation) << 32) | u64::from(index)
    }

    /// The operation of a completion; with the last completion (`more` is false) its token dies.
    pub(super) fn complete(&mut self, token: u64, more: bool) -> Option<Operation> {
        let index = token as u32;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != (token >> 32) as u32 {
            return None;
        }
        if more {
            return slot.operation.clone();
        }
        let operation = slot.operation.take()?;
        // All ones is the uring's token for nobody; the generation skips it.
        slot.generation = (slot.generation + 1) % u32::MAX;
        self.free.push(index);
        Some(operation)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}
