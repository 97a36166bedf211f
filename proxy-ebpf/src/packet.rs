//! A packet read from its bytes, and its addresses written anew: the same code in the kernel, in tests and in fuzzing.
//!
//! Positions are raw pointers, never slices: the verifier follows `start + constant > end` and little else.
//! Nothing is written before everything that can fail has been checked.

mod encapsulate;
mod mss;
mod parse;
mod rewrite;
mod too_big;

use core::marker::PhantomData;

use crate::abi::{Address, FlowKey, protocol};
use crate::verdict::Verdict;

pub use encapsulate::{GUE_PORT, Outer, encapsulate, outer_bytes};
pub use mss::{clamp_mss, headers_bytes};
pub use rewrite::{Rewrite, rewrite, rewrite_rare, send_on};
pub use too_big::{QUOTE_BYTES, too_big, too_big_bytes};

/// Bytes of an Ethernet header without VLAN tags.
pub const ETHERNET_BYTES: usize = 14;

/// No header begins behind this: four extension headers of 2 KiB, and what an error quotes.
const OFFSET_MASK: usize = 0x3fff;

/// Ethernet types (IEEE 802 numbers, IANA) that are read.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: [u8; 2] = [0x08, 0x00];
    /// IPv6.
    pub const IPV6: [u8; 2] = [0x86, 0xdd];
    /// A VLAN tag (IEEE 802.1Q).
    pub const VLAN: [u8; 2] = [0x81, 0x00];
    /// The outer one of two tags (IEEE 802.1ad).
    pub const SERVICE_VLAN: [u8; 2] = [0x88, 0xa8];
}

/// Bits of byte 13 of a TCP header (RFC 9293 section 3.1).
pub mod tcp_flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// The bytes of a frame that can be reached directly: all of it, or the first buffer of a long one.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    start: *mut u8,
    end: *mut u8,
    bytes: PhantomData<&'a mut [u8]>,
}

impl<'a> Frame<'a> {
    /// A frame in memory.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let bytes = bytes.as_mut_ptr_range();
        Self {
            start: bytes.start,
            end: bytes.end,
            bytes: PhantomData,
        }
    }

    /// A frame between two pointers.
    ///
    /// # Safety
    ///
    /// The bytes from `start` to `end` must be readable and writable during `'a`.
    #[inline(always)]
    pub const unsafe fn from_pointers(start: *mut u8, end: *mut u8) -> Self {
        Self {
            start,
            end,
            bytes: PhantomData,
        }
    }

    /// `N` bytes from `offset` on, or `Malformed` where they do not all exist.
    #[inline(always)]
    fn header<const N: usize>(&self, offset: usize) -> Result<Header<'a, N>, Verdict> {
        // The verifier wants a bound for what it knows nothing of; the parser's offsets are all below it.
        let first = self.start.wrapping_add(offset & OFFSET_MASK);
        if first.wrapping_add(N) as usize > self.end as usize {
            return Err(Verdict::Malformed);
        }
        Ok(Header {
            first,
            bytes: PhantomData,
        })
    }

    /// Whether a VLAN tag stands before what it carries.
    #[inline(always)]
    pub fn is_tagged(&self) -> bool {
        self.header::<ETHERNET_BYTES>(0).is_ok_and(|ethernet| {
            matches!(
                ethernet.pair::<12>(),
                ethertype::VLAN | ethertype::SERVICE_VLAN
            )
        })
    }

    /// Destination and source MAC.
    #[inline(always)]
    pub fn macs(&self) -> Result<([u8; 6], [u8; 6]), Verdict> {
        let ethernet = self.header::<12>(0)?;
        Ok((ethernet.mac::<0>(), ethernet.mac::<6>()))
    }
}

/// `N` bytes that are known to exist. Words are as they stand in the packet, in network order.
#[derive(Clone, Copy)]
struct Header<'a, const N: usize> {
    first: *mut u8,
    bytes: PhantomData<&'a mut [u8]>,
}

impl<const N: usize> Header<'_, N> {
    /// The word of type `T` at the offset `AT`.
    #[inline(always)]
    fn load<T: bytemuck::Pod, const AT: usize>(&self) -> T {
        const { assert!(AT + size_of::<T>() <= N) };
        let word = self.first.wrapping_add(AT).cast::<T>();
        // SAFETY: `Frame::header` saw that the bytes exist, and any bytes are a word. On the bpf target the word is
        // read at once though its address is no multiple of its size, as C programs do: the kernel allows it wherever
        // the processor does, and a read byte by byte would cost more than all that follows.
        unsafe {
            #[cfg(target_arch = "bpf")]
            return word.read();
            #[cfg(not(target_arch = "bpf"))]
            return word.read_unaligned();
        }
    }

    /// Writes the word at the offset `AT`.
    #[inline(always)]
    fn store<T: bytemuck::Pod, const AT: usize>(&self, value: T) {
        const { assert!(AT + size_of::<T>() <= N) };
        let word = self.first.wrapping_add(AT).cast::<T>();
        // SAFETY: as in `load`; a frame is ours alone to write.
        unsafe {
            #[cfg(target_arch = "bpf")]
            word.write(value);
            #[cfg(not(target_arch = "bpf"))]
            word.write_unaligned(value);
        }
    }

    /// The 32-bit word of this index.
    #[inline(always)]
    fn word(&self, index: usize) -> u32 {
        let words = Header::<4> {
            first: self.first.wrapping_add(index % (N / 4) * 4),
            bytes: PhantomData,
        };
        words.load::<u32, 0>()
    }

    #[inline(always)]
    fn byte<const AT: usize>(&self) -> u8 {
        self.load::<u8, AT>()
    }

    /// A number of two bytes, in host order.
    #[inline(always)]
    fn number<const AT: usize>(&self) -> u16 {
        u16::from_be(self.load::<u16, AT>())
    }

    #[inline(always)]
    fn pair<const AT: usize>(&self) -> [u8; 2] {
        self.load::<u16, AT>().to_ne_bytes()
    }

    #[inline(always)]
    fn store_pair<const AT: usize>(&self, pair: [u8; 2]) {
        self.store::<u16, AT>(u16::from_ne_bytes(pair));
    }

    #[inline(always)]
    fn mac<const AT: usize>(&self) -> [u8; 6] {
        bytemuck::must_cast(self.load::<[u16; 3], AT>())
    }

    #[inline(always)]
    fn store_mac<const AT: usize>(&self, mac: [u8; 6]) {
        self.store::<[u16; 3], AT>(bytemuck::must_cast(mac));
    }
}

/// Which IP header a packet has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// What a packet carries, and so where its ports come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A whole TCP or UDP packet.
    Whole,
    /// The first of several fragments: the ports are known, the rest of its datagram is elsewhere.
    First,
    /// A later fragment. What stands where ports would be is data of whoever sent it, and is never read: the ports
    /// are 0 until the first fragment lends its own.
    Later,
    /// An ICMP error. Addresses and ports are those of a packet that would answer the quoted one: who is told
    /// of an error is whoever would get that answer.
    Error,
    /// Nothing that we read says which ports: more extension headers than `EXTENSIONS_MAX`, or another kind.
    Opaque,
}

/// A packet of TCP or UDP, a part of one, or an ICMP error about one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub family: Family,
    pub part: Part,
    pub source: Address,
    pub destination: Address,
    /// Network order, as all ports here.
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// One of `abi::protocol`.
    pub protocol: u8,
    /// Bits of `tcp_flag`; 0 for all but whole packets and first fragments of TCP.
    pub tcp_flags: u8,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// The source in the IP header: that of an error is often a router between.
    pub sender: Address,
    /// Of a fragment: what all fragments of its datagram have in common, as it stands in the header.
    pub fragment_id: u32,
    /// Where the TCP, UDP or ICMP header begins.
    pub transport_offset: usize,
    /// Of an error: where the IP header that it quotes begins, and the TCP or UDP header behind that.
    pub quote_offset: usize,
    pub quoted_offset: usize,
    /// What the frame must hold at least, by the length in its IP header.
    pub frame_bytes_min: u32,
}

impl Packet {
    /// Reads the headers of a frame, unless its destination port (network order) is not wanted:
    /// most packets of a machine are not ours, and need not be read to the end. Without `RARE` only a whole packet is
    /// read so far; what else a frame holds is told by its part, and its ports are 0.
    ///
    /// # Errors
    ///
    /// `NotOurs`: neither TCP nor UDP over IPv4 or IPv6 nor an ICMP error about such, or a port that is not wanted.
    /// `Malformed`: cut short, lengths that contradict each other, or a later fragment that reaches into the
    /// TCP or UDP header (RFC 3128: it could replace the ports that were looked at).
    #[inline(always)]
    pub fn parse<const RARE: bool>(
        frame: &Frame,
        wanted: impl Fn([u8; 2]) -> bool,
    ) -> Result<Self, Verdict> {
        parse::parse::<RARE>(frame, wanted)
    }

    /// The key of its flow, seen as a packet from client to listener.
    #[inline(always)]
    pub const fn flow_key(&self) -> FlowKey {
        FlowKey::new(
            &self.source,
            &self.destination,
            self.source_port,
            self.destination_port,
            self.protocol,
        )
    }

    /// Whether it may start a flow: any UDP packet with ports of its own, or a TCP packet that is a SYN and nothing else.
    #[inline(always)]
    pub const fn opens_flow(&self) -> bool {
        const DECISIVE: u8 = tcp_flag::FIN | tcp_flag::SYN | tcp_flag::RST | tcp_flag::ACK;
        if self.protocol == protocol::UDP {
            return matches!(self.part, Part::Whole | Part::First);
        }
        self.tcp_flags & DECISIVE == tcp_flag::SYN
    }

    /// Whether it is a TCP packet that opens a connection or answers one that does: it announces a segment size.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.tcp_flags & tcp_flag::SYN != 0
    }

    /// Whether a UDP packet opens a QUIC connection: an Initial of version 1 or 2 (RFC 9000 section 17.2.2, RFC 9369
    /// section 3.2). Read from its long header alone: the form and type bits, and the version.
    #[inline(always)]
    pub fn is_quic_initial(&self, frame: &Frame) -> bool {
        const END: usize = 13;
        let Ok(datagram) = frame.header::<END>(self.transport_offset) else {
            return false;
        };
        let (first, version) = (
            datagram.load::<u8, 8>(),
            u32::from_be(datagram.load::<u32, 9>()),
        );
        self.protocol == protocol::UDP
            && self.opens_flow()
            && self.transport_offset + END <= self.frame_bytes_min as usize
            && matches!((version, first & 0xf0), (1, 0xc0) | (0x6b33_43cf, 0xd0))
    }

    /// Whether this is an error that says that what it quotes did not get there (RFC 792, RFC 4443 section 3.1). That it
    /// was too long says nothing of the kind.
    #[inline(always)]
    pub fn is_unreachable(&self, frame: &Frame) -> bool {
        const UNREACHABLE: u8 = 3;
        const TOO_LONG: u8 = 4;
        const UNREACHABLE_V6: u8 = 1;
        let Ok(icmp) = frame.header::<2>(self.transport_offset) else {
            return false;
        };
        let (kind, code) = (icmp.byte::<0>(), icmp.byte::<1>());
        matches!(self.part, Part::Error)
            && match self.family {
                Family::V4 => kind == UNREACHABLE && code != TOO_LONG,
                Family::V6 => kind == UNREACHABLE_V6,
            }
    }
}

#[cfg(test)]
mod tests;
