//! Sockets and buffers: one thread, one uring (or epoll), one executor. Nothing here leaves its thread.
//!
//! A worker calls [`run`]; inside it, tasks accept, connect, receive and send. Each turn of the loop costs one system call, however
//! many connections have something to say: it hands in what the tasks asked for, waits for the first completion or the next deadline,
//! takes all completions there are, and polls the tasks they belong to.
//!
//! Bytes are received into buffers that belong to the worker and not to a connection, so an idle connection holds none ([`Chunk`]).
//! The memory of an operation lives until the kernel's last word on it, whatever becomes of the future that began it.
//!
//! Where io_uring is refused, epoll stands in its place ([`Backend`]): a system call for each receive and send, and nothing else differs.
//!
//! Why not tokio-uring: a read that is dropped there swallows what arrives later, it knows neither multishot operations nor buffer rings,
//! and its submissions wait while a task is busy. It serves control and files, where none of this matters.

mod chunk;
mod clock;
mod combine;
mod connect;
mod doorbell;
mod driver;
mod epoll;
mod listener;
mod operation;
mod pool;
mod probe;
mod runtime;
mod socket;
mod splice;
mod stream;
mod task;
mod timer;
mod uring;
mod wheel;

#[cfg(test)]
mod tests;

use std::any::Any;

#[cfg(test)]
pub use self::combine::join;
pub use self::{
    chunk::{Chunk, Payload},
    clock::Instant,
    combine::{Either, at_once, boxed, caught, select},
    connect::connect,
    doorbell::{Doorbell, DoorbellReceiver, doorbell},
    listener::Listener,
    probe::{Choice, ProbeError, choose},
    runtime::{keep_lean, now, run, spawn, trim, turns, yield_now},
    splice::Splice,
    stream::Stream,
    timer::{Elapsed, sleep_until, timeout},
};

/// What the kernel is asked through. Both do the same; which one it is nobody above [`Settings`] can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Uring,
    /// Where io_uring is refused ([`choose`]): about as fast for a few connections, and dearer for many.
    Epoll,
}

impl Backend {
    /// As it is called in tunables, metrics and documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Epoll => "epoll",
        }
    }
}

/// What a worker's loop is made with.
#[derive(Clone, Debug)]
pub struct Settings {
    pub backend: Backend,
    /// Entries of the uring's submission queue, a power of two; more may be asked for in one turn, at the price of another system call.
    pub entries: u32,
    /// Receive buffers of the worker, a power of two up to 32768.
    pub buffers: u16,
    /// Bytes of one receive buffer. Its pages take memory only once used.
    pub buffer_bytes: u32,
    /// With so many received buffers unread, a connection stops receiving; what is on its way still comes, up to 32 buffers.
    pub inbox_high_buffers: usize,
    /// With no more than so many unread, it receives again.
    pub inbox_low_buffers: usize,
    /// Tasks polled before the kernel is asked for news.
    pub polls_per_turn: usize,
    /// Told what a task panicked with, which ends the task and nothing else.
    pub task_panicked: fn(&(dyn Any + Send)),
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            #[cfg(not(test))]
            backend: Backend::Uring,
            #[cfg(test)]
            backend: tests::backend(),
            entries: 4096,
            buffers: 1024,
            buffer_bytes: 16 << 10,
            inbox_high_buffers: 8,
            inbox_low_buffers: 2,
            polls_per_turn: 512,
            task_panicked: |_| {},
        }
    }
}
