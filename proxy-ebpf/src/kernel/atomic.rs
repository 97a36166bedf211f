//! Read-modify-write on memory that other CPUs, and user space through a mapping, change at the same time.
//!
//! Everything here is AcqRel. A Relaxed fetch-add whose result is used compiles, without a word, to one
//! that returns the operand (LLVM 22, bpf target); a fixture test keeps watch on it.

use core::intrinsics::{
    AtomicOrdering::AcqRel, AtomicOrdering::Acquire, atomic_cxchg, atomic_xadd, atomic_xchg,
};

/// Adds and returns the value before.
///
/// # Safety
///
/// `value` must be valid for reads and writes and aligned to 8.
#[inline(always)]
pub unsafe fn fetch_add(value: *mut u64, addend: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u64, u64, { AcqRel }>(value, addend) }
}

/// Replaces `old` by `new`; false when the value was another, which then stays.
///
/// # Safety
///
/// As for `fetch_add`.
#[inline(always)]
pub unsafe fn replace(value: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's promise.
    let (before, _) = unsafe { atomic_cxchg::<u64, { AcqRel }, { Acquire }>(value, old, new) };
    before == old
}

/// Writes a value that nobody sees before what was written earlier, nor after what is written later.
///
/// # Safety
///
/// As for `fetch_add`.
#[inline(always)]
pub unsafe fn publish(value: *mut u64, new: u64) {
    // SAFETY: the caller's promise.
    unsafe { atomic_xchg::<u64, { AcqRel }>(value, new) };
}
