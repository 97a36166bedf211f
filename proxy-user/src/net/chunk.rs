//! Bytes that arrived, and bytes to send: ranges of a receive buffer, of a vector, or of something shared.

use std::{
    cell::UnsafeCell,
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    rc::Rc,
    sync::Arc,
};

use super::pool::Pool;

/// A range of bytes that this chunk alone may read and change.
///
/// Chunks split from one another share the memory below them, never a byte of it; the memory is given back (to the worker's
/// receive buffers, or to the allocator) with the last of them. A chunk stays on its thread.
pub struct Chunk {
    start: NonNull<u8>,
    len: usize,
    memory: Memory,
}

enum Memory {
    Pooled { pool: Rc<Pool>, buffer: u16 },
    Vec(Rc<UnsafeCell<Vec<u8>>>),
}

impl Chunk {
    pub(super) fn pooled(pool: Rc<Pool>, buffer: u16, start: NonNull<u8>, len: usize) -> Self {
        Self {
            start,
            len,
            memory: Memory::Pooled { pool, buffer },
        }
    }

    /// Gives up the first `n` bytes.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn advance(&mut self, n: usize) {
        assert!(n <= self.len, "advance beyond the end of a chunk");
        // SAFETY: `n` is within the range that this chunk owns, so the result points into it or one past its end.
        self.start = unsafe { self.start.add(n) };
        self.len -= n;
    }

    /// Takes the first `n` bytes out as a chunk of their own; nothing is copied.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_to(&mut self, n: usize) -> Self {
        assert!(n <= self.len, "split beyond the end of a chunk");
        let front = Self {
            start: self.start,
            len: n,
            memory: self.memory.share(),
        };
        self.advance(n);
        front
    }

    /// Gives up all but the first `n` bytes.
    pub fn truncate(&mut self, n: usize) {
        self.len = self.len.min(n);
    }
}

impl Memory {
    fn share(&self) -> Self {
        match self {
            Self::Pooled { pool, buffer } => {
                pool.share(*buffer);
                Self::Pooled {
                    pool: pool.clone(),
                    buffer: *buffer,
                }
            }
            Self::Vec(bytes) => Self::Vec(bytes.clone()),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Pooled { pool, buffer } = self {
            pool.release(*buffer);
        }
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `memory` keeps the range allocated, it is initialised (mapped zeroed or a vector's contents), and no other chunk
        // and not the kernel writes to it: a buffer is the kernel's only until its completion and after its last chunk.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Chunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; chunks of the same memory have disjoint ranges, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        let bytes = Rc::new(UnsafeCell::new(bytes));
        // SAFETY: the vector was moved to its place just now and nobody else has it; from here on it is reached through `start` alone, until it is dropped.
        let start = unsafe { (*bytes.get()).as_mut_ptr() };
        Self {
            start: NonNull::new(start).unwrap_or(NonNull::dangling()),
            len,
            memory: Memory::Vec(bytes),
        }
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({} bytes)", self.len)
    }
}

/// Bytes to be sent. They live until the kernel has done with them, whatever becomes of the future that sends them.
#[derive(Debug)]
pub enum Payload {
    Vec(Vec<u8>),
    Chunk(Chunk),
    Static(&'static [u8]),
    /// One body for many, as a cache gives it.
    Shared(Arc<[u8]>),
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Vec(bytes) => bytes,
            Self::Chunk(chunk) => chunk,
            Self::Static(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Vec(bytes)
    }
}

impl From<Chunk> for Payload {
    fn from(chunk: Chunk) -> Self {
        Self::Chunk(chunk)
    }
}

impl From<&'static [u8]> for Payload {
    fn from(bytes: &'static [u8]) -> Self {
        Self::Static(bytes)
    }
}

impl<const N: usize> From<&'static [u8; N]> for Payload {
    fn from(bytes: &'static [u8; N]) -> Self {
        Self::Static(bytes)
    }
}

impl From<Arc<[u8]>> for Payload {
    fn from(bytes: Arc<[u8]>) -> Self {
        Self::Shared(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_chunk_can_be_changed_apart_and_outlive_one_another() {
        let mut rest = Chunk::from(b"headbody".to_vec());
        let mut head = rest.split_to(4);
        head.make_ascii_uppercase();
        rest.advance(1);
        rest.truncate(2);
        assert_eq!((&head[..], &rest[..]), (&b"HEAD"[..], &b"od"[..]));
        drop(head);
        rest[0] = b'0';
        assert_eq!(&rest[..], b"0d");
    }

    #[test]
    #[should_panic(expected = "beyond the end")]
    fn splitting_beyond_the_end_is_a_bug_of_the_caller() {
        Chunk::from(vec![1, 2]).split_to(3);
    }

    #[test]
    fn an_empty_vector_makes_an_empty_chunk() {
        let mut chunk = Chunk::from(Vec::new());
        assert!(chunk.split_to(0).is_empty());
        assert!(chunk.is_empty());
    }
}
