//! When a source is banned: offences of each address in a window, and never an address that hides many users.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use crate::config::BanRule;

/// Sources that are watched at a time. What comes after waits until others are forgotten.
const SOURCES_MAX: usize = 65_536;

/// Identities that are kept apart for one source. `guard.ban_identities` beyond it counts as this many.
const IDENTITIES: usize = 8;

/// How long an identity is remembered.
const IDENTITY_AGE: Duration = Duration::from_secs(600);

/// What an offence leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Not yet enough, or already judged in this window.
    Wait,
    /// Ban the source.
    Ban,
    /// It would be banned, but many users stand behind it.
    Spare,
}

/// Offences and identities by source.
#[derive(Debug, Default)]
pub struct Offences {
    /// By source and rule: the present window.
    windows: HashMap<(IpAddr, u32), Window>,
    /// By source: consumers, each with the time at which it was seen last.
    identities: HashMap<IpAddr, [Option<(u64, Instant)>; IDENTITIES]>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Window {
    end: Instant,
    count: u32,
    judged: bool,
}

impl Offences {
    /// Counts one offence of `source` against the rule of this id. A window begins with its first offence. An address
    /// where so many `identities` were seen within ten minutes is never banned.
    pub fn offence(
        &mut self,
        source: IpAddr,
        rule: u32,
        ban: BanRule,
        identities: usize,
        now: Instant,
    ) -> Judgement {
        self.sweep(now);
        let source = ban_key(source);
        let watched = self.windows.len();
        let window = match self.windows.entry((source, rule)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if watched >= SOURCES_MAX => return Judgement::Wait,
            Entry::Vacant(entry) => entry.insert(Window {
                end: now + ban.duration,
                count: 0,
                judged: false,
            }),
        };
        if now >= window.end {
            *window = Window {
                end: now + ban.duration,
                count: 0,
                judged: false,
            };
        }
        window.count += 1;
        if window.judged || window.count < ban.after {
            return Judgement::Wait;
        }
        window.judged = true;
        if self.hides_many(source, identities, now) {
            Judgement::Spare
        } else {
            Judgement::Ban
        }
    }

    /// Notes that a request of `source` was let through as `consumer`.
    pub fn identity(&mut self, source: IpAddr, consumer: u64, now: Instant) {
        self.sweep(now);
        let source = ban_key(source);
        if self.identities.len() >= SOURCES_MAX && !self.identities.contains_key(&source) {
            return;
        }
        let seen = self.identities.entry(source).or_default();
        let same = seen
            .iter()
            .position(|one| one.is_some_and(|(known, _)| known == consumer));
        // The same one again, or the place of the one that was seen longest ago (`None` is the longest).
        let place = same.or_else(|| (0..IDENTITIES).min_by_key(|n| seen[*n].map(|(_, at)| at)));
        if let Some(place) = place {
            seen[place] = Some((consumer, now));
        }
    }

    fn hides_many(&self, source: IpAddr, identities: usize, now: Instant) -> bool {
        let recent = |(_, at): &&(u64, Instant)| now.duration_since(*at) < IDENTITY_AGE;
        let seen = self
            .identities
            .get(&source)
            .map_or(0, |seen| seen.iter().flatten().filter(recent).count());
        seen >= identities.clamp(1, IDENTITIES)
    }

    /// Forgets what has passed, at most once a second.
    fn sweep(&mut self, now: Instant) {
        if self
            .swept
            .is_some_and(|at| now.duration_since(at) < Duration::from_secs(1))
        {
            return;
        }
        self.swept = Some(now);
        self.windows.retain(|_, window| window.end > now);
        self.identities.retain(|_, seen| {
            seen.iter()
                .flatten()
                .any(|(_, at)| now.duration_since(*at) < IDENTITY_AGE)
        });
    }
}

/// What a ban names: an IPv4 address itself (also in its mapped form), of an IPv6 address its /64.
pub fn ban_key(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: BanRule = BanRule {
        after: 3,
        duration: Duration::from_secs(60),
    };

    fn source(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn the_offence_that_reaches_the_limit_bans_once() {
        let mut offences = Offences::default();
        let now = Instant::now();
        let judged: Vec<_> = (0..5)
            .map(|_| offences.offence(source(1), 1, RULE, 3, now))
            .collect();
        use Judgement::{Ban, Wait};
        assert_eq!(judged, [Wait, Wait, Ban, Wait, Wait]);
        assert_eq!(offences.offence(source(2), 1, RULE, 3, now), Wait);
    }

    #[test]
    fn a_slow_offender_is_never_banned() {
        let mut offences = Offences::default();
        let start = Instant::now();
        for n in 0..50 {
            let now = start + Duration::from_secs(31) * n;
            assert_eq!(
                offences.offence(source(1), 1, RULE, 3, now),
                Judgement::Wait
            );
        }
    }

    #[test]
    fn who_goes_on_after_a_ban_has_ended_is_banned_again() {
        let mut offences = Offences::default();
        let now = Instant::now();
        let bans = |offences: &mut Offences, now| {
            (0..3)
                .filter(|_| offences.offence(source(1), 1, RULE, 3, now) == Judgement::Ban)
                .count()
        };
        assert_eq!(bans(&mut offences, now), 1);
        assert_eq!(bans(&mut offences, now + Duration::from_secs(61)), 1);
    }

    #[test]
    fn an_address_with_three_users_is_spared_and_with_two_it_is_not() {
        let now = Instant::now();
        for (users, expected) in [
            (2, Judgement::Ban),
            (3, Judgement::Spare),
            (9, Judgement::Spare),
        ] {
            let mut offences = Offences::default();
            for consumer in 0..users {
                offences.identity(source(1), consumer, now);
                offences.identity(source(1), consumer, now);
            }
            let last = (0..3)
                .map(|_| offences.offence(source(1), 1, RULE, 3, now))
                .last();
            assert_eq!(last, Some(expected), "{users} users");
        }
    }

    #[test]
    fn users_of_eleven_minutes_ago_do_not_spare_an_address() {
        let mut offences = Offences::default();
        let start = Instant::now();
        for consumer in 0..3 {
            offences.identity(source(1), consumer, start);
        }
        let now = start + Duration::from_secs(660);
        offences.identity(source(1), 0, now);
        let last = (0..3)
            .map(|_| offences.offence(source(1), 1, RULE, 3, now))
            .last();
        assert_eq!(last, Some(Judgement::Ban));
    }

    #[test]
    fn an_ipv6_network_of_64_bits_is_one_source() {
        let mut offences = Offences::default();
        let now = Instant::now();
        let judged: Vec<_> = ["2001:db8::1", "2001:db8::2", "2001:db8::ffff:1"]
            .iter()
            .filter_map(|text| text.parse().ok())
            .map(|address| offences.offence(address, 1, RULE, 3, now))
            .collect();
        assert_eq!(judged.last(), Some(&Judgement::Ban));
        let mapped: Option<IpAddr> = "::ffff:192.0.2.1".parse().ok();
        assert_eq!(mapped.map(ban_key), Some(source(1)));
    }

    #[test]
    fn a_flood_of_sources_does_not_grow_the_table_without_end() {
        let mut offences = Offences::default();
        let now = Instant::now();
        for n in 0..(SOURCES_MAX as u32 + 100) {
            offences.offence(IpAddr::from(n.to_be_bytes()), 1, RULE, 3, now);
            offences.identity(IpAddr::from(n.to_be_bytes()), 1, now);
        }
        assert_eq!(
            (offences.windows.len(), offences.identities.len()),
            (SOURCES_MAX, SOURCES_MAX)
        );
    }
}
