//! The receive buffers of one worker: a ring that the kernel takes from, and a stack of those it need not see yet.
//!
//! The ring is the uring's; on epoll all buffers are on the stack, and are taken from there.
//!
//! The kernel takes provided buffers in the order in which they were given. If all of them lay in its ring, every
//! receive would touch the buffer that has been cold for longest. So only as many as recent turns needed are in the
//! ring, and the others wait on a stack, the warmest on top; when the kernel runs dry the ring may hold more.

use std::{
    cell::{Cell, RefCell},
    io,
    ptr::NonNull,
    rc::Rc,
    sync::atomic::{AtomicU16, Ordering},
};

use io_uring::types::BufRingEntry;
use memmap2::{MmapMut, UncheckedAdvice};

use super::chunk::Chunk;

/// How many buffers the kernel's ring holds at first; doubled whenever it runs dry while others wait on the stack.
const RING_FIRST: u16 = 32;

/// Pages are not larger on any machine that Sluice runs on by default; smaller ones divide it.
const PAGE_BYTES_MAX: usize = 4096;

/// Equal buffers, one range of memory, each either the kernel's, on the stack, or shared by [`Chunk`]s.
pub(super) struct Pool {
    /// Keeps the buffers mapped; read and written through `base` only.
    memory: MmapMut,
    base: NonNull<u8>,
    buffer_bytes: u32,
    buffers: u16,
    /// How many chunks share each buffer.
    shares: Box<[Cell<u32>]>,
    stack: RefCell<Vec<u16>>,
    ring: RefCell<Ring>,
}

/// The memory of the provided-buffer ring (io_uring_register_buf_ring(3)).
struct Ring {
    memory: MmapMut,
    mask: u16,
    /// What the kernel may see after the next commit.
    tail: u16,
    /// Buffers that the kernel holds, committed or about to be, or a receive that has not completed.
    held: u16,
    /// How many it shall hold.
    target: u16,
    /// It found none since the last commit.
    dry: bool,
}

impl Pool {
    /// A pool whose buffers the uring takes from a ring. Maps memory for `buffers` (a power of two up to 32768) buffers; pages are used when first written to.
    pub(super) fn with_ring(buffers: u16, buffer_bytes: u32) -> io::Result<Self> {
        Self::new(buffers, buffer_bytes, RING_FIRST)
    }

    /// A pool whose buffers are taken one by one ([`Self::take`]); the same sizes.
    pub(super) fn without_ring(buffers: u16, buffer_bytes: u32) -> io::Result<Self> {
        Self::new(buffers, buffer_bytes, 0)
    }

    fn new(buffers: u16, buffer_bytes: u32, ring_target: u16) -> io::Result<Self> {
        if !buffers.is_power_of_two() || buffers > 1 << 15 || buffer_bytes == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the number of receive buffers must be a power of two up to 32768, and their size not zero",
            ));
        }
        let mut memory = MmapMut::map_anon(usize::from(buffers) * buffer_bytes as usize)?;
        let base = NonNull::from(&mut memory[..]).cast::<u8>();
        let ring = MmapMut::map_anon(usize::from(buffers) * size_of::<BufRingEntry>())?;
        Ok(Self {
            memory,
            base,
            buffer_bytes,
            buffers,
            shares: vec![Cell::new(0); usize::from(buffers)].into(),
            stack: RefCell::new((0..buffers).rev().collect()),
            ring: RefCell::new(Ring {
                memory: ring,
                mask: buffers - 1,
                tail: 0,
                held: 0,
                target: ring_target.min(buffers),
                dry: false,
            }),
        })
    }

    /// Address and length of the ring, for its registration.
    pub(super) fn ring_address(&self) -> (u64, u16) {
        (self.ring.borrow().memory.as_ptr() as u64, self.buffers)
    }

    /// Fills the kernel's ring up from the stack and shows it the new entries; once per turn.
    pub(super) fn commit(&self) {
        let mut stack = self.stack.borrow_mut();
        let mut ring = self.ring.borrow_mut();
        if std::mem::take(&mut ring.dry) {
            ring.target = ring.target.saturating_mul(2).min(self.buffers);
        }
        if ring.held >= ring.target {
            return;
        }
        let before = ring.tail;
        while ring.held < ring.target
            && let Some(buffer) = stack.pop()
        {
            let address = self.address(buffer).as_ptr() as u64;
            ring.push(address, self.buffer_bytes, buffer);
        }
        if ring.tail != before {
            ring.publish();
        }
    }

    /// The kernel found its ring empty: from the next commit on it holds twice as many.
    pub(super) fn ran_dry(&self) {
        self.ring.borrow_mut().dry = true;
    }

    /// Takes the buffer that was used last, to be filled by a receive: its name, and where it begins.
    pub(super) fn take(&self) -> Option<(u16, NonNull<u8>)> {
        let buffer = self.stack.borrow_mut().pop()?;
        self.ring.borrow_mut().held += 1;
        Some((buffer, self.address(buffer)))
    }

    /// A buffer that was taken for nothing.
    pub(super) fn give_back(&self, buffer: u16) {
        self.ring.borrow_mut().held -= 1;
        self.stack.borrow_mut().push(buffer);
    }

    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes as usize
    }

    /// How many receives could be served now: what the kernel holds and what the stack can still give it.
    pub(super) fn available(&self) -> usize {
        usize::from(self.ring.borrow().held) + self.stack.borrow().len()
    }

    /// Takes over a buffer that a completion named; its first `len` bytes were filled by the kernel.
    ///
    /// With less than a quarter left, the bytes are copied out and the buffer is free again at once: connections that nobody
    /// reads, or whose bytes cannot be sent on, hold memory of their own then, and not what all the others receive with.
    pub(super) fn received(self: &Rc<Self>, buffer: u16, len: usize) -> Chunk {
        {
            let mut ring = self.ring.borrow_mut();
            ring.held = ring.held.saturating_sub(1);
        }
        self.shares[usize::from(buffer)].set(1);
        let len = len.min(self.buffer_bytes as usize);
        let chunk = Chunk::pooled(self.clone(), buffer, self.address(buffer), len);
        if self.available() < usize::from(self.buffers / 4) {
            return Chunk::from(chunk.to_vec());
        }
        chunk
    }

    /// One more chunk shares the buffer.
    pub(super) fn share(&self, buffer: u16) {
        let shares = &self.shares[usize::from(buffer)];
        shares.set(shares.get() + 1);
    }

    /// One chunk less shares the buffer; after the last one it goes on top of the stack.
    pub(super) fn release(&self, buffer: u16) {
        let shares = &self.shares[usize::from(buffer)];
        shares.set(shares.get() - 1);
        if shares.get() == 0 {
            self.stack.borrow_mut().push(buffer);
        }
    }

    /// Gives the pages of the buffers that nobody holds back to the system; the next who needs one gets them anew, zeroed.
    /// What the kernel's ring holds comes back by and by, as it is received into.
    pub(super) fn trim(&self) {
        let mut ring = self.ring.borrow_mut();
        // Without a ring there is nothing to fill, and it stays so.
        ring.target = ring.target.min(RING_FIRST);
        drop(ring);
        let mut free = self.stack.borrow().clone();
        free.sort_unstable();
        let buffer_bytes = self.buffer_bytes as usize;
        for run in free.chunk_by(|before, after| before + 1 == *after) {
            let (offset, len) = (usize::from(run[0]) * buffer_bytes, run.len() * buffer_bytes);
            // SAFETY: these buffers are on the stack, so neither the kernel nor a chunk knows of them, and none of their bytes
            // is ever read before the kernel has written it. A page that holds a part of another buffer is not: sizes are
            // checked to be whole pages.
            let advised = buffer_bytes.is_multiple_of(PAGE_BYTES_MAX).then(|| unsafe {
                self.memory
                    .unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len)
            });
            if !matches!(advised, Some(Ok(()))) {
                return;
            }
        }
    }

    fn address(&self, buffer: u16) -> NonNull<u8> {
        debug_assert!(
            buffer < self.buffers,
            "the kernel names only buffers it was given"
        );
        let offset = usize::from(buffer % self.buffers) * self.buffer_bytes as usize;
        // SAFETY: `buffer` is below `buffers`, and the mapping holds `buffers * buffer_bytes` bytes from `base`.
        unsafe { self.base.add(offset) }
    }
}

impl Ring {
    fn push(&mut self, address: u64, len: u32, buffer: u16) {
        let index = usize::from(self.tail & self.mask);
        // SAFETY: the mapping is page-aligned and holds `mask + 1` entries; the kernel reads an entry only between its tail and ours,
        // and this one is not published yet. Entry 0 overlays the tail in its reserved field, which the setters leave alone.
        let entry = unsafe { &mut *self.memory.as_mut_ptr().cast::<BufRingEntry>().add(index) };
        entry.set_addr(address);
        entry.set_len(len);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        self.held += 1;
    }

    fn publish(&mut self) {
        let base = self.memory.as_ptr().cast::<BufRingEntry>();
        // SAFETY: the tail lies inside the mapping and is 2-aligned; the kernel only reads it, with acquire, so a release store pairs with it.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(base).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_chunk_is_gone() -> io::Result<()> {
        let pool = Rc::new(Pool::with_ring(4, 4096)?);
        pool.commit();
        assert_eq!(pool.available(), 4);
        let mut whole = pool.received(3, 100);
        let front = whole.split_to(40);
        assert_eq!((front.len(), whole.len()), (40, 60));
        assert_eq!(pool.available(), 3);
        drop(whole);
        assert_eq!(pool.available(), 3, "the front half still holds the buffer");
        drop(front);
        assert_eq!(pool.available(), 4);
        Ok(())
    }

    #[test]
    fn the_last_quarter_is_not_held_by_anybody() -> io::Result<()> {
        let pool = Rc::new(Pool::with_ring(8, 4096)?);
        pool.commit();
        let held: Vec<Chunk> = (0..8).map(|buffer| pool.received(buffer, 10)).collect();
        assert_eq!(pool.available(), 2);
        drop(held);
        assert_eq!(pool.available(), 8);
        Ok(())
    }

    #[test]
    fn the_kernel_is_given_few_buffers_until_it_runs_dry() -> io::Result<()> {
        let pool = Pool::with_ring(256, 4096)?;
        pool.commit();
        assert_eq!(pool.ring.borrow().held, RING_FIRST);
        pool.ran_dry();
        pool.ran_dry();
        pool.commit();
        assert_eq!(
            pool.ring.borrow().held,
            2 * RING_FIRST,
            "dry many times in one turn counts as once"
        );
        assert_eq!(pool.available(), 256);
        Ok(())
    }

    #[test]
    fn without_a_ring_the_warmest_buffer_is_taken_until_there_is_none() -> io::Result<()> {
        let pool = Rc::new(Pool::without_ring(4, 4096)?);
        pool.commit();
        let taken: Vec<u16> = std::iter::from_fn(|| pool.take())
            .map(|(buffer, _)| buffer)
            .collect();
        assert_eq!(taken, [0, 1, 2, 3]);
        assert_eq!(pool.available(), 4, "they may yet be given back");
        pool.give_back(1);
        drop(pool.received(3, 10));
        let again = pool.take().map(|(buffer, _)| buffer);
        assert_eq!(again, Some(3), "the one that was used last");
        Ok(())
    }

    #[test]
    fn trimming_takes_the_pages_of_free_buffers_and_leaves_those_in_use() -> io::Result<()> {
        let pool = Rc::new(Pool::with_ring(64, 16 << 10)?);
        pool.commit();
        for buffer in 0..64 {
            // SAFETY: the buffer lies in the mapping, and nobody else knows of it in this test.
            unsafe { pool.address(buffer).as_ptr().write_bytes(7, 16 << 10) };
        }
        let held = pool.received(31, 10);
        pool.trim();
        assert_eq!(*held, [7; 10]);
        let free = *pool.stack.borrow().first().expect("a free one");
        // SAFETY: as above.
        assert_eq!(unsafe { pool.address(free).as_ptr().read() }, 0);
        Ok(())
    }

    #[test]
    fn a_size_that_the_kernel_cannot_index_is_refused() {
        assert!(Pool::with_ring(3, 4096).is_err());
        assert!(Pool::with_ring(4, 0).is_err());
    }
}
