//! Who is asked, in what order, and what goes on over a reload.

mod health;
mod limits;
mod shares;
mod sticky;

use super::*;
use crate::config::{Attribute, Datapath, DatapathMode, Origin, Probe, ProbeKind};
use std::time::Duration;

const NOW_NS: u64 = 1_000;
const SEED: u64 = 7;

/// An upstream with endpoints of these ports and weights.
fn upstream(balance: Balance, endpoints: &[(u16, u32)]) -> config::Upstream {
    let endpoint = |(port, weight): &(u16, u32)| {
        config::Endpoint::new(([192, 0, 2, 1], *port).into(), *weight)
    };
    let probe = Probe {
        kind: ProbeKind::Tcp,
        interval: Duration::from_secs(1),
        timeout: Duration::from_secs(1),
        rise: 1,
        fall: 1,
    };
    config::Upstream {
        balance,
        probe: Some(probe),
        ..config::Upstream::new("app", endpoints.iter().map(endpoint).collect())
    }
}

/// Every way of balancing.
fn every_balance() -> Vec<Balance> {
    let by_address = |load_percent_max| {
        Balance::Maglev(Hashing {
            key: Attribute::Address,
            load_percent_max,
        })
    };
    vec![
        Balance::RoundRobin,
        Balance::Random,
        Balance::LeastRequest { candidates: 2 },
        Balance::LeastRequest {
            candidates: u32::MAX,
        },
        Balance::Ewma,
        by_address(None),
        by_address(Some(125)),
    ]
}

fn made(config: &config::Upstream, workers: usize) -> Upstream {
    Upstream::new(config, workers, SEED, None)
}

/// Whom it chooses, if anybody.
fn pick(upstream: &Upstream, ask: Ask) -> Option<usize> {
    match upstream.choose(&ask) {
        Choice::Endpoint(index) => Some(index),
        Choice::Full | Choice::Nobody => None,
    }
}

fn kill(upstream: &Upstream, endpoint: usize) {
    upstream.endpoints[endpoint].health().record(false, 1, 1);
}

fn ask(worker: usize, avoid: Option<usize>, random: u64, now_ns: u64) -> Ask {
    Ask {
        worker,
        avoid,
        random,
        now_ns,
        wish: Wish {
            key: random,
            endpoint: None,
        },
    }
}

/// How often each endpoint is chosen in so many calls of one worker.
fn count(upstream: &Upstream, calls: u64) -> Vec<usize> {
    let mut counts = vec![0; upstream.endpoints.len()];
    for call in 0..calls {
        let random = call.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        counts[pick(upstream, ask(0, None, random, NOW_NS)).expect("an endpoint")] += 1;
    }
    counts
}

#[test]
fn round_robin_gives_each_its_turn_by_weight() {
    let equal = made(&upstream(Balance::RoundRobin, &[(1, 1), (2, 1), (3, 1)]), 1);
    let turns: Vec<_> = (0..6)
        .map(|_| pick(&equal, ask(0, None, 0, NOW_NS)))
        .collect();
    assert_eq!(turns, [0, 1, 2, 0, 1, 2].map(Some));
    let weighted = made(&upstream(Balance::RoundRobin, &[(1, 1), (2, 2), (3, 0)]), 1);
    assert_eq!(count(&weighted, 300), [100, 200, 0]);
}

#[test]
fn the_share_of_a_dead_endpoint_falls_to_all_others() {
    let upstream = made(
        &upstream(Balance::RoundRobin, &[(1, 1), (2, 1), (3, 1), (4, 1)]),
        1,
    );
    kill(&upstream, 1);
    assert_eq!(count(&upstream, 300), [100, 0, 100, 100]);
}

#[test]
fn random_follows_the_weights_and_leaves_out_the_dead() {
    let upstream = made(&upstream(Balance::Random, &[(1, 1), (2, 3), (3, 4)]), 1);
    let counts = count(&upstream, 8000);
    let is_near = |count: usize, share: usize| count.abs_diff(share) < share / 5;
    assert!(
        is_near(counts[0], 1000) && is_near(counts[1], 3000) && is_near(counts[2], 4000),
        "{counts:?}"
    );
    kill(&upstream, 2);
    let counts = count(&upstream, 8000);
    assert!(
        is_near(counts[0], 2000) && is_near(counts[1], 6000) && counts[2] == 0,
        "{counts:?}"
    );
}

#[test]
fn nobody_is_chosen_where_all_are_dead_or_leaving() {
    for balance in every_balance() {
        let dead = made(&upstream(balance.clone(), &[(1, 1), (2, 1), (3, 0)]), 1);
        kill(&dead, 0);
        kill(&dead, 1);
        assert_eq!(pick(&dead, ask(0, None, 5, NOW_NS)), None);
        assert_eq!(
            pick(&dead, ask(0, Some(2), 5, NOW_NS)),
            None,
            "an endpoint of weight 0 takes nothing new even if it was asked before"
        );
        assert_eq!(
            pick(
                &made(&upstream(balance.clone(), &[]), 1),
                ask(0, None, 5, NOW_NS)
            ),
            None
        );
    }
}

#[test]
fn the_endpoint_that_failed_is_asked_again_only_if_there_is_no_other() {
    for balance in every_balance() {
        let upstream = made(&upstream(balance.clone(), &[(1, 1), (2, 1)]), 1);
        for random in 0..50 {
            assert_eq!(
                pick(&upstream, ask(0, Some(0), random << 58, NOW_NS)),
                Some(1)
            );
        }
        kill(&upstream, 1);
        assert_eq!(pick(&upstream, ask(0, Some(0), 0, NOW_NS)), Some(0));
        kill(&upstream, 0);
        assert_eq!(pick(&upstream, ask(0, Some(0), 0, NOW_NS)), None);
    }
}

#[test]
fn workers_begin_at_different_endpoints() {
    let upstream = made(
        &upstream(Balance::RoundRobin, &[(1, 1), (2, 1), (3, 1), (4, 1)]),
        2,
    );
    assert_eq!(
        (
            pick(&upstream, ask(0, None, 0, NOW_NS)),
            pick(&upstream, ask(1, None, 0, NOW_NS))
        ),
        (Some(0), Some(2))
    );
    assert!(
        pick(&upstream, ask(9, None, 0, NOW_NS)).is_some(),
        "a worker that nobody announced still gets an answer"
    );
}

#[test]
fn what_is_known_of_an_address_goes_on_over_a_reload() {
    let before = [Arc::new(made(
        &upstream(Balance::RoundRobin, &[(1, 1), (2, 1)]),
        1,
    ))];
    kill(&before[0], 1);
    drop(before[0].endpoints[1].begin(0, 0));
    let running = before[0].endpoints[1].begin(0, 0).expect("no limit");
    let config = Config {
        access_log: None,
        datapath: Datapath {
            interfaces: Vec::new(),
            mode: DatapathMode::Off,
            nat: None,
            tunnel: None,
            hash_key: None,
            at: Origin::Default,
        },
        listeners: Vec::new(),
        routes: Vec::new(),
        policies: Vec::new(),
        upstreams: vec![upstream(Balance::Random, &[(2, 5), (3, 1)])],
        resolver: config::Resolver::default(),
        tunables: Vec::new(),
    };
    let after = build(&config, 1, SEED, Some(&before));
    let [kept, fresh] = &after[0].endpoints[..] else {
        panic!("two endpoints")
    };
    assert!(!kept.health().is_healthy() && fresh.health().is_healthy());
    assert_eq!(
        (kept.calls(), kept.active(), kept.failed(), fresh.calls()),
        (2, 1, 0, 0)
    );
    running.fail(0);
    assert_eq!(
        (kept.calls(), kept.active(), kept.failed()),
        (2, 0, 1),
        "a call of the old generation ends in the new one"
    );
    let unprobed = vec![config::Upstream {
        probe: None,
        ..config.upstreams[0].clone()
    }];
    let after = build(
        &Config {
            upstreams: unprobed,
            ..config
        },
        1,
        SEED,
        Some(&after),
    );
    assert!(
        after[0].endpoints[0].health().is_healthy(),
        "nobody would find out that it lives"
    );
}

#[test]
fn weights_choose_among_upstreams() {
    let choices = [(7, 95), (3, 5), (9, 0)];
    let count = |wanted| {
        (0..100)
            .filter(|random| choose_weighted(&choices, *random) == Some(wanted))
            .count()
    };
    assert_eq!((count(7), count(3), count(9)), (95, 5, 0));
    assert_eq!(choose_weighted(&[(4, 1)], 12), Some(4));
    assert_eq!(choose_weighted(&[(4, 0)], 12), None);
    assert_eq!(choose_weighted(&[], 12), None);
}

#[test]
fn an_endpoint_on_hold_is_left_out_while_there_is_another() {
    for balance in every_balance() {
        let upstream = made(&upstream(balance.clone(), &[(1, 1), (2, 1)]), 1);
        upstream.endpoints[0].hold(NOW_NS + 1);
        for random in 0..20 {
            assert_eq!(pick(&upstream, ask(0, None, random << 59, NOW_NS)), Some(1));
        }
        assert_eq!(
            pick(&upstream, ask(0, Some(1), 0, NOW_NS)),
            Some(0),
            "the one that just failed is no better"
        );
        kill(&upstream, 1);
        assert_eq!(
            pick(&upstream, ask(0, None, 0, NOW_NS)),
            Some(0),
            "there is no other"
        );
        let turns: Vec<_> = (0..2)
            .map(|_| pick(&upstream, ask(0, None, 0, NOW_NS + 1)))
            .collect();
        assert_eq!(turns, [Some(0), Some(0)], "the hold is over");
    }
}
