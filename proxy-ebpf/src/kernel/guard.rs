//! Who is refused: banned sources, and nobody else.

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use proxy_ebpf::abi::{Address, guard_bit};
use proxy_ebpf::verdict::Verdict;

use crate::atomic::fetch_add;
use crate::maps::{BANS, GUARD, RULE_DROPS, count};

/// Refuses a source while its ban lasts. The ban ends by the clock, whether or not a daemon lives to remove it.
///
/// Without any ban this costs one look-up in an array; with some, one more bit; the table is read
/// only for sources that share their bit with a banned one, and the clock only for those in the table.
#[inline(always)]
pub fn refuse_banned(source: &Address) -> Result<(), Verdict> {
    let Some(guard) = GUARD.get(0) else {
        return Ok(());
    };
    if guard.bans == 0 {
        return Ok(());
    }
    let key = source.ban_key();
    let bit = guard_bit(&key);
    // The mask is for the verifier; a bit is never above 65 535.
    if guard.filter[(bit / 64) as usize & 1023] & (1 << (bit % 64)) == 0 {
        return Ok(());
    }
    let Some(ban) = BANS.get_ptr_mut(&key) else {
        return Ok(());
    };
    // SAFETY: the pointer is the kernel's, to a value of this type that outlives the program's run; the count is
    // atomic, the other fields change only as a whole ban is replaced.
    unsafe {
        if bpf_ktime_get_coarse_ns() >= (*ban).until_ns {
            return Ok(());
        }
        fetch_add(&raw mut (*ban).dropped, 1);
        count(&RULE_DROPS, (*ban).rule);
    }
    Err(Verdict::Banned)
}
