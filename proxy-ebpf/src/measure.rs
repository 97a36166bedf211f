//! What measurements and tests share with the programs `fresh` and `unwrap` of the floor object.

use bytemuck::{Pod, Zeroable};

/// Bytes of a packet that `fresh` restores in each round: at least what the measured program may change.
pub const FRESH_BYTES: usize = 78;

/// The value of the map `template`: what each round starts from.
#[repr(C, align(8))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Fresh {
    /// The first bytes of the packet.
    pub template: [u8; FRESH_BYTES],
    pub zero: [u8; 2],
    /// Rounds so far.
    pub round: u64,
    /// One less than the number of flows, a power of two.
    pub mask: u64,
    /// Where the word stands (32 bits, network order, a multiple of 2 from the start) that the flow's number is added to.
    pub counted_at: u64,
    /// How long the packet is, where the measured program puts something in front of it, which is taken off again; else 0:
    /// to ask for the length costs some nanoseconds.
    pub bytes: u64,
}
const _: () = assert!(size_of::<Fresh>() == 112);

/// What the program `unwrap` of the floor object counts in its map `unwrapped`, by these indices.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing around it.
    Plain,
    /// A packet in IP.
    Ipip,
    /// A packet in UDP in IP.
    Gue,
    /// An outer header that is not right: its checksum, or a length.
    Wrong,
}

impl Seen {
    /// How many there are.
    pub const COUNT: u32 = 4;
}
