//! `rate_limit`: so many requests per key and time, spent from a shared cell.

use super::{Cells, Facts, Offence, Refusal, Step};
use crate::config::{self, BanRule, RateKey};
use crate::message::{Reply, RequestHead};
use std::net::IpAddr;

#[derive(Debug)]
pub(super) struct RateLimit {
    key: RateKey,
    interval_ns: u64,
    burst: u32,
    ban: Option<BanRule>,
    rule: u32,
    /// Hash of seed and name: a policy keeps its cells over reloads, wherever it stands in the file.
    cell: u64,
    /// `RateLimit-Policy`: as many at once, and how long until all are back.
    told: String,
    quoted_name: String,
}

impl RateLimit {
    pub fn new(name: &str, rule: u32, limit: &config::RateLimit, seed: u64) -> Self {
        let quoted_name = format!("\"{}\"", name.replace(['"', '\\'], "_"));
        let window_s = u64::from(limit.burst)
            .saturating_mul(limit.interval_ns)
            .div_ceil(NS_PER_S)
            .max(1);
        Self {
            key: limit.key.clone(),
            interval_ns: limit.interval_ns,
            burst: limit.burst,
            ban: limit.ban,
            rule,
            cell: hash(seed, name.as_bytes()),
            told: format!("{quoted_name};q={};w={window_s}", limit.burst),
            quoted_name,
        }
    }

    pub fn request(&self, head: &RequestHead, facts: &Facts<'_>, cells: &impl Cells) -> Step {
        match cells.spend(
            self.key_hash(head, facts),
            self.interval_ns,
            self.burst,
            facts.now_ns,
        ) {
            Ok(()) => Step::Continue,
            Err(retry_after_ns) => self.refuse(retry_after_ns),
        }
    }

    /// The cell of this request. Kinds of key are told apart, so that no header value can be somebody's address.
    fn key_hash(&self, head: &RequestHead, facts: &Facts<'_>) -> u64 {
        let named = match &self.key {
            RateKey::All => return hash(self.cell, b"all"),
            RateKey::Consumer => facts.consumer.map(str::as_bytes),
            RateKey::Header(name) => head.fields().value(name),
            RateKey::Address => None,
        };
        match named {
            Some(name) => hash(self.cell ^ 1, name),
            None => hash(self.cell, &address_key(facts.peer)),
        }
    }

    /// RFC 6585 section 4, RFC 9110 section 10.2.3, draft-ietf-httpapi-ratelimit-headers-10.
    fn refuse(&self, retry_after_ns: u64) -> Step {
        let retry_after_s = retry_after_ns.div_ceil(NS_PER_S).max(1);
        let reply = Reply::new(429, "rate_limited")
            .field("retry-after", retry_after_s.to_string())
            .field("ratelimit-policy", self.told.clone())
            .field(
                "ratelimit",
                format!("{};r=0;t={retry_after_s}", self.quoted_name),
            );
        let offence = self.ban.map(|ban| Offence {
            rule: self.rule,
            ban,
        });
        Step::Refuse(Refusal { reply, offence })
    }
}

const NS_PER_S: u64 = 1_000_000_000;

/// One key per IPv4 address, one per IPv6 network of 64 bits, within which a host has addresses without number.
fn address_key(peer: IpAddr) -> [u8; 16] {
    let mut octets = match peer.to_canonical() {
        IpAddr::V4(v4) => return v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    octets[8..].fill(0);
    octets
}

/// A hash spread over all 64 bits, keyed by its seed: one wide multiplication per eight bytes.
fn hash(seed: u64, bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    };
    let mut state = fold(seed ^ ODD, bytes.len() as u64 ^ 0xd1b5_4a32_d192_ed03);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        state = fold(state ^ u64::from_le_bytes(word), ODD ^ seed.rotate_left(32))
            ^ state.rotate_left(23);
    }
    fold(state ^ seed, ODD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Limits;
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::time::Duration;

    /// Counts down per cell and tells every hash it was asked for.
    #[derive(Default)]
    struct Counted(RefCell<HashMap<u64, u32>>);

    impl Cells for Counted {
        fn spend(
            &self,
            key_hash: u64,
            interval_ns: u64,
            burst: u32,
            now_ns: u64,
        ) -> Result<(), u64> {
            assert_eq!((interval_ns, burst, now_ns), (100_000_000, 2, 7));
            let mut spent = self.0.borrow_mut();
            let spent = spent.entry(key_hash).or_default();
            *spent += 1;
            if *spent > burst {
                Err(2_000_000_001)
            } else {
                Ok(())
            }
        }
    }

    const BAN: BanRule = BanRule {
        after: 50,
        duration: Duration::from_secs(60),
    };

    fn limit(key: RateKey) -> RateLimit {
        let config = config::RateLimit {
            key,
            interval_ns: 100_000_000,
            burst: 2,
            ban: Some(BAN),
        };
        RateLimit::new("fair-use", 3, &config, 42)
    }

    fn spend(
        limit: &RateLimit,
        cells: &Counted,
        peer: &str,
        consumer: Option<&str>,
        tenant: &str,
    ) -> Step {
        let mut head = RequestHead::default();
        let bytes = format!("GET / HTTP/1.1\r\nHost: a\r\nX-Tenant: {tenant}\r\n\r\n");
        assert!(head.parse(bytes.as_bytes(), &Limits::default()).is_ok());
        let peer = peer.parse().expect("an address");
        limit.request(
            &head,
            &Facts {
                peer,
                now_ns: 7,
                consumer,
            },
            cells,
        )
    }

    #[test]
    fn a_refusal_says_when_to_come_again_and_is_an_offence() {
        let (limit, cells) = (limit(RateKey::Address), Counted::default());
        assert_eq!(spend(&limit, &cells, "192.0.2.1", None, ""), Step::Continue);
        assert_eq!(spend(&limit, &cells, "192.0.2.1", None, ""), Step::Continue);
        let Step::Refuse(refusal) = spend(&limit, &cells, "192.0.2.1", None, "") else {
            panic!("not refused")
        };
        assert_eq!(refusal.offence, Some(Offence { rule: 3, ban: BAN }));
        assert_eq!(refusal.reply.status, 429);
        let told = [
            ("retry-after", "3"),
            ("ratelimit-policy", "\"fair-use\";q=2;w=1"),
            ("ratelimit", "\"fair-use\";r=0;t=3"),
        ];
        assert_eq!(
            refusal.reply.fields,
            told.map(|(name, value)| (name, value.to_owned()))
        );
    }

    #[test]
    fn each_kind_of_key_has_its_cells() {
        // For each kind: which of these requests share a cell with the first.
        let asked = [
            ("192.0.2.1", Some("alice"), "t1"),
            ("192.0.2.2", Some("alice"), "t1"),
            ("192.0.2.1", Some("bob"), "t1"),
            ("192.0.2.1", Some("alice"), "t2"),
        ];
        for (key, shared) in [
            (RateKey::Address, [true, false, true, true]),
            (RateKey::Consumer, [true, true, false, true]),
            (
                RateKey::Header("x-tenant".into()),
                [true, true, true, false],
            ),
            (RateKey::All, [true, true, true, true]),
        ] {
            let limit = limit(key);
            let hashes = asked.map(|(peer, consumer, tenant)| {
                let cells = Counted::default();
                assert_eq!(
                    spend(&limit, &cells, peer, consumer, tenant),
                    Step::Continue
                );
                let hashes: Vec<u64> = cells.0.borrow().keys().copied().collect();
                hashes[0]
            });
            assert_eq!(hashes.map(|hash| hash == hashes[0]), shared, "{limit:?}");
        }
    }

    #[test]
    fn an_address_is_one_of_ipv4_or_a_network_of_ipv6() {
        let key = |address: &str| address_key(address.parse().expect("an address"));
        assert_eq!(key("192.0.2.1"), key("::ffff:192.0.2.1"));
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
        assert_eq!(key("2001:db8:1:2:3::4"), key("2001:db8:1:2:ffff::"));
        assert_ne!(key("2001:db8:1:2::"), key("2001:db8:1:3::"));
    }

    #[test]
    fn a_hash_depends_on_every_byte_and_on_its_seed() {
        let mut seen = std::collections::HashSet::new();
        for len in 0..40 {
            for flip in 0..=len {
                let mut bytes = vec![0u8; len];
                if let Some(byte) = bytes.get_mut(flip) {
                    *byte = 1;
                }
                for seed in [0, 1, 42, u64::MAX] {
                    assert!(seen.insert(hash(seed, &bytes)), "{len} {flip} {seed}");
                }
            }
        }
        // Each bit of the hash is about as often set as not.
        for bit in 0..64 {
            let set = seen.iter().filter(|hash| *hash >> bit & 1 == 1).count();
            assert!(
                (seen.len() * 4 / 10..seen.len() * 6 / 10).contains(&set),
                "bit {bit}: {set} of {}",
                seen.len()
            );
        }
    }
}
