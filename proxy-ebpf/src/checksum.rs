//! The Internet checksum, updated for what changed instead of computed anew (RFC 1624).

use crate::abi::Address;

/// What a change of a packet's words does to a checksum over them: the sum of `~m + m'` in
/// equation 3 of RFC 1624. It is added up in the byte order of the machine, as RFC 1071 section 2(B) allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u64);

impl Delta {
    /// Nothing changed.
    pub const NONE: Self = Self(0);

    /// A 16-bit word changed.
    #[inline(always)]
    pub const fn word(self, old: [u8; 2], new: [u8; 2]) -> Self {
        let old = !u16::from_ne_bytes(old);
        Self(self.0 + old as u64 + u16::from_ne_bytes(new) as u64)
    }

    /// An address changed, in the IP header or the pseudo-header. Of two IPv4 addresses the
    /// common prefix cancels out, so one path serves both families.
    #[inline(always)]
    pub fn address(self, old: &Address, new: &Address) -> Self {
        let old: [u32; 4] = bytemuck::must_cast(*old);
        let new: [u32; 4] = bytemuck::must_cast(*new);
        let mut sum = self.0;
        sum += !old[0] as u64 + new[0] as u64;
        sum += !old[1] as u64 + new[1] as u64;
        sum += !old[2] as u64 + new[2] as u64;
        sum += !old[3] as u64 + new[3] as u64;
        Self(sum)
    }

    /// Both changes.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// A 16-bit word of a header that is made anew, for `complete`.
    #[inline(always)]
    pub const fn add(self, word: [u8; 2]) -> Self {
        Self(self.0 + u16::from_ne_bytes(word) as u64)
    }

    /// 32 bits of one.
    #[inline(always)]
    pub const fn add_word(self, word: u32) -> Self {
        Self(self.0 + word as u64)
    }

    /// The four bytes of an IPv4 address.
    #[inline(always)]
    pub const fn add_v4(self, address: &Address) -> Self {
        self.add_word(address.as_v4_word())
    }

    /// All sixteen of an IPv6 address.
    #[inline(always)]
    pub const fn add_whole(self, address: &Address) -> Self {
        let words: [u32; 4] = bytemuck::must_cast(*address);
        self.add_word(words[0])
            .add_word(words[1])
            .add_word(words[2])
            .add_word(words[3])
    }

    /// The checksum of a header that was added up in full (RFC 1071), with zero where the checksum stands.
    #[inline(always)]
    pub const fn complete(self) -> [u8; 2] {
        (!fold(self.0)).to_ne_bytes()
    }

    /// The checksum after the change, as it stands in the header.
    #[inline(always)]
    pub const fn apply(self, checksum: [u8; 2]) -> [u8; 2] {
        let sum = self.0 + (!u16::from_ne_bytes(checksum)) as u64;
        (!fold(sum)).to_ne_bytes()
    }

    /// The same for UDP, where zero says that there is no checksum (RFC 768): then there is none
    /// afterwards, and a sum that comes out as zero is sent as all ones.
    #[inline(always)]
    pub const fn apply_udp(self, checksum: [u8; 2]) -> [u8; 2] {
        if u16::from_ne_bytes(checksum) == 0 {
            return checksum;
        }
        match self.apply(checksum) {
            [0, 0] => [0xff, 0xff],
            sum => sum,
        }
    }
}

/// Adds the carries back in until 16 bits are left: four steps, for the second and fourth can carry once more.
#[inline(always)]
const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*: enough variety for a test, and the same in each run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        fn address(&mut self) -> Address {
            if self.next().is_multiple_of(2) {
                return Address::v4((self.next() as u32).to_ne_bytes());
            }
            Address(bytemuck::must_cast([self.next(), self.next()]))
        }
    }

    /// The checksum over whole bytes, computed in full (RFC 1071).
    fn full(parts: &[&[u8]]) -> [u8; 2] {
        let mut sum = 0u64;
        for word in parts.iter().flat_map(|part| part.chunks_exact(2)) {
            sum += u64::from(u16::from_be_bytes([word[0], word[1]]));
        }
        (!fold(sum)).to_be_bytes()
    }

    #[test]
    fn the_example_of_rfc_1624_section_4_comes_out_right() {
        // The old checksum is 0xDD2F, a word changes from 0x5555 to 0x3285; equation 3 gives 0x0000.
        let delta = Delta::NONE.word([0x55, 0x55], [0x32, 0x85]);
        assert_eq!(delta.apply([0xdd, 0x2f]), [0x00, 0x00]);
    }

    #[test]
    fn an_update_equals_a_full_recompute() {
        let mut random = Random(7);
        for _ in 0..20_000 {
            let (old, new) = (random.address(), random.address());
            let (old_port, new_port) = (
                (random.next() as u16).to_ne_bytes(),
                (random.next() as u16).to_ne_bytes(),
            );
            // The protocol number keeps the sum from being zero, as it does in a real pseudo-header.
            let rest = [0, 6, random.next() as u8, random.next() as u8];
            let before = full(&[&old.0, &old_port, &rest]);
            let delta = Delta::NONE.address(&old, &new).word(old_port, new_port);
            assert_eq!(
                delta.apply(before),
                full(&[&new.0, &new_port, &rest]),
                "{old:?} {new:?}"
            );
        }
    }

    #[test]
    fn all_ones_everywhere_does_not_overflow() {
        let (zero, ones) = (Address([0; 16]), Address([0xff; 16]));
        let delta = Delta::NONE
            .address(&zero, &ones)
            .address(&zero, &ones)
            .word([0, 0], [0xff, 0xff]);
        assert_eq!(delta.apply([0x12, 0x34]), [0x12, 0x34]);
    }

    #[test]
    fn a_udp_packet_without_checksum_stays_without() {
        let delta = Delta::NONE.word([1, 2], [3, 4]);
        assert_eq!(delta.apply_udp([0, 0]), [0, 0]);
    }

    #[test]
    fn a_udp_checksum_that_becomes_zero_is_sent_as_all_ones() {
        let delta = Delta::NONE.word([0x55, 0x55], [0x32, 0x85]);
        assert_eq!(delta.apply_udp([0xdd, 0x2f]), [0xff, 0xff]);
    }
}
