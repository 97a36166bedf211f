//! A packet read from its bytes, and its addresses written anew: the same code in the kernel, in tests and in fuzzing.
//!
//! Positions are raw pointers, never slices: the verifier follows `start + constant > end` and little else.
//! Nothing is written before everything that can fail has been checked.

use core::marker::PhantomData;

use crate::abi::{Address, FlowKey, protocol};
use crate::checksum::Delta;
use crate::verdict::Verdict;

/// Bytes of an Ethernet header without VLAN tags.
pub const ETHERNET_BYTES: usize = 14;

/// Ethernet types (IEEE 802 numbers, IANA) that are read.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: [u8; 2] = [0x08, 0x00];
    /// IPv6.
    pub const IPV6: [u8; 2] = [0x86, 0xdd];
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
        let first = self.start.wrapping_add(offset);
        if first.wrapping_add(N) as usize > self.end as usize {
            return Err(Verdict::Malformed);
        }
        Ok(Header {
            first,
            bytes: PhantomData,
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

/// A TCP or UDP packet, or the first fragment of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub family: Family,
    pub source: Address,
    pub destination: Address,
    /// Network order, as all ports here.
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// One of `abi::protocol`.
    pub protocol: u8,
    /// Bits of `tcp_flag`; 0 for UDP and for fragments.
    pub tcp_flags: u8,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// The first of several fragments: its ports are known, the rest of its datagram is elsewhere.
    pub fragment: bool,
    /// IPv6 extension headers stand before its TCP or UDP header.
    pub extended: bool,
    /// Where the TCP or UDP header begins.
    pub transport_offset: usize,
    /// What the frame must hold at least, by the length in its IP header.
    pub frame_bytes_min: u32,
}

impl Packet {
    /// Reads the headers of a frame, unless its destination port (network order) is not wanted:
    /// most packets of a machine are not ours, and need not be read to the end.
    ///
    /// # Errors
    ///
    /// `NotOurs`: neither TCP nor UDP over IPv4 or IPv6, or a port that is not wanted. `Malformed`: cut short,
    /// or lengths that contradict each other. `Unsupported`: no ports where we read them
    /// (a later fragment, more extension headers than `EXTENSIONS_MAX`, or some of another kind).
    #[inline(always)]
    pub fn parse(frame: &Frame, wanted: impl Fn([u8; 2]) -> bool) -> Result<Self, Verdict> {
        let ethernet = frame.header::<ETHERNET_BYTES>(0)?;
        // One call for both families: of two, LLVM merges the ends and computes a pointer anew behind its bounds check,
        // which the verifier then takes for an unchecked one.
        let (ip, payload_bytes) = match ethernet.pair::<12>() {
            ethertype::IPV4 => parse_ipv4(frame)?,
            ethertype::IPV6 => parse_ipv6(frame)?,
            _ => return Err(Verdict::NotOurs),
        };
        parse_transport(frame, ip, payload_bytes, wanted)
    }

    /// The key of its flow, seen as a packet from client to listener.
    #[inline(always)]
    pub const fn flow_key(&self) -> FlowKey {
        FlowKey {
            client: self.source,
            listener: self.destination,
            client_port: self.source_port,
            listener_port: self.destination_port,
            protocol: self.protocol,
            zero: [0; 3],
        }
    }

    /// Whether it may start a flow: any UDP packet, or a TCP packet that is a SYN and nothing else.
    #[inline(always)]
    pub const fn opens_flow(&self) -> bool {
        const DECISIVE: u8 = tcp_flag::FIN | tcp_flag::SYN | tcp_flag::RST | tcp_flag::ACK;
        self.protocol == protocol::UDP || self.tcp_flags & DECISIVE == tcp_flag::SYN
    }
}

/// IPv4 (RFC 791), options included. The ports are filled in later. Returns the bytes after the header, too.
#[inline(always)]
fn parse_ipv4(frame: &Frame) -> Result<(Packet, u32), Verdict> {
    let ip = frame.header::<20>(ETHERNET_BYTES)?;
    let protocol = known_protocol(ip.byte::<9>())?;
    let version = ip.byte::<0>() >> 4;
    let header_bytes = (ip.byte::<0>() & 0x0f) as u32 * 4;
    let total_bytes = ip.number::<2>() as u32;
    let fragment = ip.number::<6>();
    if version != 4 || header_bytes < 20 || total_bytes < header_bytes {
        return Err(Verdict::Malformed);
    }
    if fragment & 0x1fff != 0 {
        return Err(Verdict::Unsupported);
    }
    let packet = Packet {
        family: Family::V4,
        source: Address::v4_word(ip.load::<u32, 12>()),
        destination: Address::v4_word(ip.load::<u32, 16>()),
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol,
        tcp_flags: 0,
        hop_limit: ip.byte::<8>(),
        fragment: fragment & 0x2000 != 0,
        extended: false,
        transport_offset: ETHERNET_BYTES + header_bytes as usize,
        frame_bytes_min: ETHERNET_BYTES as u32 + total_bytes,
    };
    Ok((packet, total_bytes - header_bytes))
}

/// IPv6 (RFC 8200). Returns the bytes after the IP header and its extensions, too.
#[inline(always)]
fn parse_ipv6(frame: &Frame) -> Result<(Packet, u32), Verdict> {
    let ip = frame.header::<40>(ETHERNET_BYTES)?;
    let payload_bytes = ip.number::<4>() as u32;
    if ip.byte::<0>() >> 4 != 6 {
        return Err(Verdict::Malformed);
    }
    let transport = skip_extensions(frame, ip.byte::<6>())?;
    let extension_bytes = (transport.offset - IPV6_PAYLOAD) as u32;
    if extension_bytes > payload_bytes {
        return Err(Verdict::Malformed);
    }
    let packet = Packet {
        family: Family::V6,
        source: Address(bytemuck::must_cast(ip.load::<[u32; 4], 8>())),
        destination: Address(bytemuck::must_cast(ip.load::<[u32; 4], 24>())),
        source_port: [0; 2],
        destination_port: [0; 2],
        protocol: transport.protocol,
        tcp_flags: 0,
        hop_limit: ip.byte::<7>(),
        fragment: transport.fragment,
        extended: transport.offset != IPV6_PAYLOAD,
        transport_offset: transport.offset,
        frame_bytes_min: IPV6_PAYLOAD as u32 + payload_bytes,
    };
    Ok((packet, payload_bytes - extension_bytes))
}

/// Where the payload of an IPv6 packet begins.
const IPV6_PAYLOAD: usize = ETHERNET_BYTES + 40;

/// Extension headers that are stepped over. They are read only so that nobody gets around a ban
/// by adding one; four is more than any real packet has.
const EXTENSIONS_MAX: usize = 4;

/// What stands behind the extension headers.
struct Transport6 {
    protocol: u8,
    offset: usize,
    fragment: bool,
}

/// Steps over the extension headers of RFC 8200 section 4 that Linux, too, would step over.
#[inline(always)]
fn skip_extensions(frame: &Frame, first: u8) -> Result<Transport6, Verdict> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let mut number = first;
    let mut offset = IPV6_PAYLOAD;
    let mut fragment = false;
    for _ in 0..EXTENSIONS_MAX {
        if !matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            break;
        }
        let header = frame.header::<8>(offset)?;
        if number == FRAGMENT {
            let place = header.number::<2>();
            if place & 0xfff8 != 0 {
                return Err(Verdict::Unsupported);
            }
            fragment |= place & 1 != 0;
            offset += 8;
        } else {
            offset += (header.byte::<1>() as usize + 1) * 8;
        }
        number = header.byte::<0>();
    }
    let protocol = known_protocol(number)?;
    Ok(Transport6 {
        protocol,
        offset,
        fragment,
    })
}

/// The protocols with ports that we read. ICMP is nobody's listener: an error about a flow of
/// ours is not translated yet, and goes to Linux like every other protocol.
#[inline(always)]
const fn known_protocol(number: u8) -> Result<u8, Verdict> {
    match number {
        protocol::TCP | protocol::UDP => Ok(number),
        // Extension headers (IANA): one too many, or authentication or mobility.
        0 | 43 | 44 | 51 | 60 | 135 => Err(Verdict::Unsupported),
        _ => Err(Verdict::NotOurs),
    }
}

/// TCP (RFC 9293) or UDP (RFC 768) after `payload_bytes` were announced for them.
#[inline(always)]
fn parse_transport(
    frame: &Frame,
    ip: Packet,
    payload_bytes: u32,
    wanted: impl Fn([u8; 2]) -> bool,
) -> Result<Packet, Verdict> {
    let mut packet = ip;
    let ports = frame.header::<4>(packet.transport_offset)?;
    if !wanted(ports.pair::<2>()) {
        return Err(Verdict::NotOurs);
    }
    packet.source_port = ports.pair::<0>();
    packet.destination_port = ports.pair::<2>();
    if packet.fragment {
        return Ok(packet);
    }
    if packet.protocol == protocol::TCP {
        let tcp = frame.header::<20>(packet.transport_offset)?;
        let header_bytes = (tcp.byte::<12>() >> 4) as u32 * 4;
        if header_bytes < 20 || header_bytes > payload_bytes {
            return Err(Verdict::Malformed);
        }
        packet.tcp_flags = tcp.byte::<13>();
    } else {
        let udp = frame.header::<8>(packet.transport_offset)?;
        let udp_bytes = udp.number::<4>() as u32;
        if udp_bytes < 8 || udp_bytes > payload_bytes {
            return Err(Verdict::Malformed);
        }
    }
    Ok(packet)
}

/// What a packet becomes on its way on. Both addresses have the packet's own family.
#[derive(Clone, Copy, Debug)]
pub struct Rewrite {
    pub source: Address,
    pub destination: Address,
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
}

/// Writes addresses, ports and MACs, takes one off the hop limit (which must be above 1) and updates the checksums.
///
/// # Errors
///
/// `Malformed` when the frame is shorter than what `packet` was read from; then no byte has changed.
#[inline(always)]
pub fn rewrite(frame: &Frame, packet: &Packet, to: &Rewrite) -> Result<(), Verdict> {
    let checksum_offset = if packet.protocol == protocol::TCP {
        16
    } else {
        6
    };
    let ethernet = frame.header::<12>(0)?;
    let ports = frame.header::<4>(packet.transport_offset)?;
    let checksum = frame.header::<2>(packet.transport_offset + checksum_offset)?;

    let addresses = Delta::NONE
        .address(&packet.source, &to.source)
        .address(&packet.destination, &to.destination);
    match packet.family {
        Family::V4 => write_ipv4(frame.header::<20>(ETHERNET_BYTES)?, addresses, to),
        Family::V6 => write_ipv6(frame.header::<40>(ETHERNET_BYTES)?, to),
    }
    ethernet.store_mac::<0>(to.destination_mac);
    ethernet.store_mac::<6>(to.source_mac);
    ports.store_pair::<0>(to.source_port);
    ports.store_pair::<2>(to.destination_port);

    let delta = addresses
        .word(packet.source_port, to.source_port)
        .word(packet.destination_port, to.destination_port);
    checksum.store_pair::<0>(if packet.protocol == protocol::TCP {
        delta.apply(checksum.pair::<0>())
    } else {
        delta.apply_udp(checksum.pair::<0>())
    });
    Ok(())
}

/// The time to live, the checksum and both addresses of an IPv4 header.
#[inline(always)]
fn write_ipv4(ip: Header<20>, addresses: Delta, to: &Rewrite) {
    let before = ip.pair::<8>();
    let after = [before[0].wrapping_sub(1), before[1]];
    ip.store_pair::<8>(after);
    ip.store_pair::<10>(addresses.word(before, after).apply(ip.pair::<10>()));
    ip.store::<u32, 12>(to.source.as_v4_word());
    ip.store::<u32, 16>(to.destination.as_v4_word());
}

/// The hop limit and both addresses of an IPv6 header, which has no checksum.
#[inline(always)]
fn write_ipv6(ip: Header<40>, to: &Rewrite) {
    ip.store::<u8, 7>(ip.byte::<7>().wrapping_sub(1));
    ip.store::<[u32; 4], 8>(bytemuck::must_cast(to.source.0));
    ip.store::<[u32; 4], 24>(bytemuck::must_cast(to.destination.0));
}

#[cfg(test)]
mod tests;
