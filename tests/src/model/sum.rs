//! Internet checksums added up in full, and what a change of the bytes under one must do to it.

/// The sum of the words modulo 65 535, of which one's complement sums are representatives (RFC 1071). An odd last byte
/// counts as if a zero followed.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)));
    words.sum::<u64>() % 0xffff
}

/// The checksum over bytes in which it is still zero.
pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let sum = parts.iter().map(|part| sum(part)).sum::<u64>() % 0xffff;
    // Of the two zeros the one that RFC 1624 arrives at, too.
    (((0xffff - sum) % 0xffff) as u16).to_be_bytes()
}

/// The checksum, at `at` in both, after `before` became `after`: right where it was right, and as wrong as before where
/// it was wrong, so that whoever receives the packet sees the fault. Bytes that both have behind the end are left out.
pub fn carried(before: &[&[u8]], after: &[&[u8]], old: [u8; 2]) -> [u8; 2] {
    let total = |parts: &[&[u8]]| parts.iter().map(|part| sum(part)).sum::<u64>() % 0xffff;
    let old = u64::from(u16::from_be_bytes(old));
    // Both contain the old checksum, so that it is what `before` lacks.
    let sum = (old + total(before) + 0xffff - total(after)) % 0xffff;
    (sum as u16).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_that_was_right_stays_right_and_a_wrong_one_as_wrong() {
        let mut before = *b"abcdefg_";
        before[6..].fill(0);
        let right = checksum(&[&before]);
        before[6..].copy_from_slice(&right);
        assert_eq!(checksum(&[&before]), [0, 0]);
        for fault in [0u16, 1, 0x8000] {
            let old = (u16::from_be_bytes(right) ^ fault).to_be_bytes();
            before[6..].copy_from_slice(&old);
            let mut after = before;
            after[..2].copy_from_slice(b"xy");
            let new = carried(&[&before], &[&after], old);
            after[6..].copy_from_slice(&new);
            assert_eq!(checksum(&[&after]), checksum(&[&before]));
        }
    }
}
