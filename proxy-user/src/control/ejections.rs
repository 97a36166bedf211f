//! Endpoints that are left out because calls to them failed: by which rule, for how long, and how often in a row.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::config::Eject;

/// The name of an upstream and the address of one of its endpoints.
pub type Key<'k> = (&'k str, SocketAddr);

/// What is known of each endpoint; a few hundred bytes for each whose upstream has a rule.
#[derive(Debug, Default)]
pub struct Ejections(HashMap<String, HashMap<SocketAddr, Record>>);

#[derive(Debug, Default)]
struct Record {
    /// Calls of the workers.
    calls: Window,
    /// Flows that the kernel half forwards.
    flows: Window,
    /// The last time it was left out.
    last: Option<Ejection>,
    is_out: bool,
    /// When it was told that it would have been left out.
    spared: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Ejection {
    until: Instant,
    duration: Duration,
}

/// Calls or flows, and those of them that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub ended: u64,
    pub failed: u64,
}

/// Counts since the beginning, as they were at several times, the oldest first.
#[derive(Debug, Default)]
struct Window(VecDeque<(Instant, Counts)>);

impl Window {
    /// Takes the counts of now in, and forgets those from before `length`, but for the last of them.
    fn add(&mut self, counts: Counts, length: Duration, now: Instant) {
        let is_old = |at: Instant| now.saturating_duration_since(at) >= length;
        while self.0.get(1).is_some_and(|(at, _)| is_old(*at)) {
            self.0.pop_front();
        }
        self.0.push_back((now, counts));
    }

    /// What was counted within it.
    fn counts(&self) -> Counts {
        match (self.0.front(), self.0.back()) {
            (Some((_, first)), Some((_, last))) => Counts {
                ended: last.ended.saturating_sub(first.ended),
                failed: last.failed.saturating_sub(first.failed),
            },
            _ => Counts::default(),
        }
    }
}

impl Counts {
    /// So many failed that the rule is broken.
    fn breaks(self, rule: &Eject) -> bool {
        self.ended >= u64::from(rule.calls_min)
            && self.failed * 100 >= self.ended * u64::from(rule.failed_percent)
    }
}

impl Ejections {
    /// Notes the calls to an endpoint, whose counts only ever grow; to be called about once a second.
    pub fn count_calls(&mut self, key: Key<'_>, rule: &Eject, calls: Counts, now: Instant) {
        let record = self.record(key);
        record.calls.add(calls, rule.window, now);
    }

    /// The same for flows that were opened to it, and those of them that it refused or left without an answer. What they
    /// are within the window.
    pub fn count_flows(
        &mut self,
        key: Key<'_>,
        rule: &Eject,
        flows: Counts,
        now: Instant,
    ) -> Counts {
        let record = self.record(key);
        record.flows.add(flows, rule.window, now);
        record.flows.counts()
    }

    /// Why an endpoint with so many failures in a row is to be left out, if it is.
    pub fn reason(&self, key: Key<'_>, rule: &Eject, failures: u32) -> Option<String> {
        if failures >= rule.failures {
            return Some(format!("{failures} failures in a row"));
        }
        let calls = self.find(key)?.calls.counts();
        calls
            .breaks(rule)
            .then(|| format!("{} of {} calls failed", calls.failed, calls.ended))
    }

    /// Why an endpoint is to be left out for what became of flows to it, if it is. Where flows to the `others` fail as well
    /// it is not the endpoint: whoever sends what nobody answers could take out half of them.
    pub fn flows_reason(flows: Counts, others: Counts, rule: &Eject) -> Option<String> {
        let others_work = others.ended > others.failed
            && others.failed * 100 < others.ended * u64::from(rule.failed_percent);
        (others_work && flows.breaks(rule)).then(|| {
            format!(
                "{} of {} flows refused or not answered",
                flows.failed, flows.ended
            )
        })
    }

    /// Leaves an endpoint out, and says for how long: twice as long as the last time, if that was not over for as long as
    /// it lasted; half of it is forgotten for each such time that it was in since.
    pub fn eject(&mut self, key: Key<'_>, rule: &Eject, now: Instant) -> Duration {
        let record = self.record(key);
        let doubled = record.last.map(|last| {
            let in_since = now.saturating_duration_since(last.until);
            let forgotten = in_since.as_nanos() / last.duration.as_nanos().max(1);
            let halved = last.duration / 2_u32.saturating_pow(forgotten.min(31) as u32);
            halved * 2
        });
        let duration = doubled.unwrap_or_default();
        let duration = duration.clamp(rule.duration, rule.duration_max);
        *record = Record {
            calls: Window::default(),
            flows: Window::default(),
            last: Some(Ejection {
                until: now + duration,
                duration,
            }),
            is_out: true,
            spared: None,
        };
        duration
    }

    /// An endpoint cannot be spared: what was counted against it is forgotten, so that it is judged anew. Whether that is
    /// to be told: once within a window.
    pub fn spare(&mut self, key: Key<'_>, rule: &Eject, now: Instant) -> bool {
        let record = self.record(key);
        record.calls = Window::default();
        record.flows = Window::default();
        let was_told = |told: Instant| now.saturating_duration_since(told) < rule.window;
        if record.spared.is_some_and(was_told) {
            return false;
        }
        record.spared = Some(now);
        true
    }

    /// An endpoint comes back before its time is over, with nothing counted against it; whether it was out.
    pub fn end(&mut self, key: Key<'_>) -> bool {
        let record = self.record(key);
        record.calls = Window::default();
        record.flows = Window::default();
        std::mem::take(&mut record.is_out)
    }

    /// Endpoints whose time is over; they are told once.
    pub fn over(&mut self, now: Instant) -> Vec<(String, SocketAddr)> {
        let mut over = Vec::new();
        for (upstream, records) in &mut self.0 {
            for (address, record) in records {
                if record.is_out && record.last.is_none_or(|last| last.until <= now) {
                    record.is_out = false;
                    over.push((upstream.clone(), *address));
                }
            }
        }
        over
    }

    /// How long an endpoint is still out.
    pub fn left(&self, key: Key<'_>, now: Instant) -> Option<Duration> {
        let record = self.find(key).filter(|record| record.is_out)?;
        let until = record.last?.until;
        Some(until.saturating_duration_since(now))
    }

    /// Forgets all endpoints of an upstream but these.
    pub fn keep(&mut self, upstream: &str, addresses: &HashSet<SocketAddr>) {
        if let Some(records) = self.0.get_mut(upstream) {
            records.retain(|address, _| addresses.contains(address));
        }
    }

    /// Forgets all other upstreams.
    pub fn keep_upstreams(&mut self, is_known: impl Fn(&str) -> bool) {
        self.0.retain(|upstream, _| is_known(upstream));
    }

    fn find(&self, (upstream, address): Key<'_>) -> Option<&Record> {
        self.0.get(upstream)?.get(&address)
    }

    fn record(&mut self, (upstream, address): Key<'_>) -> &mut Record {
        let records = self.0.entry(upstream.to_owned()).or_default();
        records.entry(address).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn key() -> Key<'static> {
        ("app", SocketAddr::from(([192, 0, 2, 1], 80)))
    }

    fn rule() -> Eject {
        Eject {
            duration: 10 * S,
            duration_max: 60 * S,
            ..Eject::default()
        }
    }

    #[test]
    fn failures_in_a_row_are_a_reason_from_the_number_that_the_rule_says() {
        let ejections = Ejections::default();
        assert_eq!(ejections.reason(key(), &rule(), 4), None);
        assert!(ejections.reason(key(), &rule(), 5).is_some());
    }

    #[test]
    fn a_share_of_failures_is_a_reason_when_there_were_enough_calls_within_the_window() {
        let (mut ejections, start) = (Ejections::default(), Instant::now());
        let mut count = |second: u32, ended, failed| {
            let counts = Counts { ended, failed };
            ejections.count_calls(key(), &rule(), counts, start + second * S);
            ejections.reason(key(), &rule(), 0)
        };
        assert_eq!(count(0, 1000, 1000), None, "what was before does not count");
        assert_eq!(count(1, 1019, 1019), None, "too few");
        assert_eq!(count(2, 1040, 1019), None, "19 of 40 is less than half");
        assert!(count(3, 1040, 1020).is_some());
        assert_eq!(count(14, 1060, 1029), None, "what is old does not count");
    }

    #[test]
    fn flows_speak_against_an_endpoint_only_where_the_others_do_better() {
        let reason = |flows: (u64, u64), others: (u64, u64)| {
            let counts = |(ended, failed)| Counts { ended, failed };
            Ejections::flows_reason(counts(flows), counts(others), &rule()).is_some()
        };
        assert!(reason((20, 20), (40, 0)));
        assert!(reason((20, 10), (40, 19)));
        assert!(!reason((19, 19), (40, 0)), "too few");
        assert!(!reason((20, 9), (40, 0)), "less than half");
        assert!(!reason((20, 20), (40, 20)), "the others fail as well");
        assert!(!reason((20, 20), (0, 0)), "nothing is known of others");
        assert!(!reason((9999, 9999), (9999, 9999)), "nobody ever answers");
    }

    #[test]
    fn each_ejection_that_follows_soon_lasts_twice_as_long_up_to_a_bound() {
        let (mut ejections, mut now) = (Ejections::default(), Instant::now());
        let mut lengths = Vec::new();
        for _ in 0..5 {
            let length = ejections.eject(key(), &rule(), now);
            now += length + S;
            lengths.push(length.as_secs());
        }
        assert_eq!(lengths, [10, 20, 40, 60, 60]);
        assert_eq!(ejections.eject(key(), &rule(), now + 60 * S), 60 * S);
        now += 120 * S + 180 * S;
        assert_eq!(
            ejections.eject(key(), &rule(), now),
            15 * S,
            "three times 60 s without a failure: a quarter of it twice over"
        );
        now += 3600 * S;
        assert_eq!(ejections.eject(key(), &rule(), now), 10 * S);
    }

    #[test]
    fn that_an_endpoint_cannot_be_spared_is_told_once_in_a_window() {
        let (mut ejections, now) = (Ejections::default(), Instant::now());
        let told = [0, 1, 9, 10, 11].map(|s| ejections.spare(key(), &rule(), now + s * S));
        assert_eq!(told, [true, false, false, true, false]);
    }

    #[test]
    fn an_ejection_is_over_once() {
        let (mut ejections, now) = (Ejections::default(), Instant::now());
        ejections.eject(key(), &rule(), now);
        assert_eq!(ejections.left(key(), now + 4 * S), Some(6 * S));
        assert_eq!(ejections.over(now + 9 * S), []);
        let over = ejections.over(now + 10 * S);
        assert_eq!(over, [("app".to_owned(), key().1)]);
        assert_eq!(ejections.over(now + 10 * S), []);
        assert_eq!(ejections.left(key(), now + 11 * S), None);
        ejections.eject(key(), &rule(), now + 12 * S);
        assert!(ejections.end(key()) && !ejections.end(key()));
        assert_eq!(ejections.over(now + 99 * S), []);
        ejections.keep("app", &HashSet::new());
        assert_eq!(ejections.eject(key(), &rule(), now + 12 * S), 10 * S);
    }
}
