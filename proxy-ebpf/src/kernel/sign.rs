//! Passive signs of endpoints: what becomes of the flows that NAT opens to them. A flow has two at most, so that packets between pay nothing.

use crate::maps::ENDPOINT_SIGNS;

/// What is counted of a flow, in `Signs`.
#[derive(Clone, Copy)]
pub enum Sign {
    Opened,
    Answered,
    Refused,
}

/// Counts a sign of an endpoint. A function of its own, with nothing but numbers: the way of a packet does not grow by it.
#[inline(never)]
pub fn count(endpoint: u32, sign: Sign) {
    let Some(signs) = ENDPOINT_SIGNS.get_ptr_mut(endpoint) else {
        return;
    };
    // SAFETY: the value belongs to this CPU, and XDP is not interrupted by itself.
    unsafe {
        match sign {
            Sign::Opened => (*signs).opened += 1,
            Sign::Answered => (*signs).answered += 1,
            Sign::Refused => (*signs).refused += 1,
        }
    }
}
