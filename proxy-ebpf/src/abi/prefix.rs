//! Listeners of prefixes, which stand for more addresses and ports than would each get an entry.

use bytemuck::{Pod, Zeroable};

use super::{Address, Listener};

/// Key of `PREFIXES`, as an LPM trie has it: how many leading bits of what follows the first word count. Protocol 0: the
/// addresses as such, as in `ListenerKey4`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PrefixKey {
    /// 32 for protocol and family, and those of the address, of which an IPv4 one is mapped.
    pub bits: u32,
    pub protocol: u8,
    /// 4 or 6: an IPv6 prefix that holds mapped addresses has nothing of IPv4.
    pub family: u8,
    pub zero: [u8; 2],
    pub address: Address,
}
const _: () = assert!(size_of::<PrefixKey>() == 24);

impl PrefixKey {
    /// Bits before the address.
    pub const BITS_BEFORE: u32 = 32;
    /// Bits of a whole key.
    pub const BITS: u32 = Self::BITS_BEFORE + 128;

    /// The key of a prefix; the bits behind it are zero.
    pub const fn new(address: Address, address_bits: u32, protocol: u8) -> Self {
        let (family, before) = if address.is_v4() { (4, 96) } else { (6, 0) };
        Self {
            bits: Self::BITS_BEFORE + before + address_bits,
            protocol,
            family,
            zero: [0; 2],
            address,
        }
    }

    /// The prefix that a key names: its address, how many bits of it count, and the protocol.
    pub const fn prefix(&self) -> (Address, u32, u8) {
        let before = if self.family == 4 { 96 } else { 0 };
        let bits = self.bits.saturating_sub(Self::BITS_BEFORE + before);
        (self.address, bits, self.protocol)
    }

    /// The key of one address, in words that are each written at once, as in `ListenerKey4::new`.
    #[inline(always)]
    pub const fn whole([high, low]: [u64; 2], v4: bool, protocol: u8) -> Self {
        let family: u64 = if v4 { 4 } else { 6 };
        let word = Self::BITS as u64 | (protocol as u64) << 32 | family << 40;
        bytemuck::must_cast([word.to_le(), high, low])
    }
}

/// Ports that belong to the same listener, both in host order.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
    pub zero: u32,
    pub listener: Listener,
}
const _: () = assert!(size_of::<PortRange>() == 24);

/// Everything that holds for the addresses of a prefix, but for longer ones in it: what shorter ones say of them stands
/// here, too, so that one look-up tells all.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Prefix {
    /// How many of `ranges` there are.
    pub count: u32,
    pub zero: u32,
    /// In order, and apart; those that are not in use stand at the last port.
    pub ranges: [PortRange; Prefix::RANGES],
}
const _: () = assert!(size_of::<Prefix>() == 392);

impl Prefix {
    /// Ranges of ports that one prefix can have.
    pub const RANGES: usize = 16;

    /// Without any range.
    pub const EMPTY: Self = Self {
        count: 0,
        zero: 0,
        ranges: [PortRange {
            first: u16::MAX,
            last: u16::MAX,
            zero: 0,
            listener: Listener {
                id: 0,
                mode: 0,
                target: 0,
                options: 0,
            },
        }; Self::RANGES],
    };

    /// The listener of a port. A search by halves without a branch: the verifier would follow each one of sixteen, and
    /// all that comes after it as often.
    #[inline(always)]
    pub fn find(&self, port: u16) -> Option<&Listener> {
        let mut index = 0;
        for half in [8, 4, 2, 1] {
            let last = self.ranges[(index + half - 1) % Self::RANGES].last;
            let is_behind = (last as u32).wrapping_sub(port as u32) >> 31;
            index += half * is_behind as usize;
        }
        let range = &self.ranges[index % Self::RANGES];
        if index as u32 >= self.count || port < range.first || port > range.last {
            return None;
        }
        Some(&range.listener)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(id: u32) -> Listener {
        Listener {
            id,
            ..Listener::zeroed()
        }
    }

    #[test]
    fn a_port_belongs_to_the_range_that_holds_it() {
        let mut prefix = Prefix::EMPTY;
        assert_eq!(prefix.find(0), None);
        prefix.count = 3;
        for (index, (first, last)) in [(80, 80), (443, 8000), (8001, 65_535)]
            .into_iter()
            .enumerate()
        {
            let range = &mut prefix.ranges[index];
            (range.first, range.last, range.listener) = (first, last, listener(index as u32 + 1));
        }
        let found = |port| prefix.find(port).map(|listener| listener.id);
        assert_eq!(
            [0, 79, 80, 81, 442].map(found),
            [None, None, Some(1), None, None]
        );
        assert_eq!(
            [443, 8000, 8001, 65_535].map(found),
            [Some(2), Some(2), Some(3), Some(3)]
        );
        // All sixteen, each of two ports, with one between that nobody has.
        prefix.count = 16;
        for (index, range) in (0..).zip(&mut prefix.ranges) {
            (range.first, range.last) = (index * 3, index * 3 + 1);
            range.listener = listener(u32::from(index));
        }
        for port in 0..50 {
            let wanted = (port % 3 < 2 && port < 48).then_some(u32::from(port / 3));
            assert_eq!(
                prefix.find(port).map(|listener| listener.id),
                wanted,
                "{port}"
            );
        }
    }

    #[test]
    fn a_key_is_written_in_words_as_it_is_field_by_field() {
        for address in [Address::v4([10, 1, 2, 3]), Address([0x20; 16])] {
            let v4 = address.is_v4();
            let bits = if v4 { 32 } else { 128 };
            let key = PrefixKey::new(address, bits, 17);
            assert_eq!(key, PrefixKey::whole(bytemuck::must_cast(address), v4, 17));
            assert_eq!(key.prefix(), (address, bits, 17));
        }
    }
}
