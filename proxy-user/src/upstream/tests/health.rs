//! Who is left out for what is believed of it, when beliefs are ignored, and how work comes back.

use super::*;

const S: u64 = 1_000_000_000;

/// Endpoints at the ports 1, 2 and so on, each of this weight.
fn with_health(weights: &[u32], health: config::Health) -> Upstream {
    let endpoints: Vec<(u16, u32)> = (1..).zip(weights.iter().copied()).collect();
    let config = config::Upstream {
        health,
        ..upstream(Balance::RoundRobin, &endpoints)
    };
    made(&config, 1)
}

fn equal(count: usize) -> Upstream {
    with_health(&vec![1; count], config::Health::default())
}

#[test]
fn an_ejected_endpoint_gets_nothing_until_it_is_back_with_nothing_held_against_it() {
    let upstream = equal(3);
    let endpoint = &upstream.endpoints[1];
    endpoint.blame();
    endpoint.blame();
    assert_eq!(endpoint.failures(), 2);
    endpoint.praise();
    assert_eq!(endpoint.failures(), 0, "only failures in a row count");
    endpoint.blame();
    endpoint.eject(true);
    assert!(!endpoint.is_healthy() && endpoint.health().is_healthy());
    assert_eq!(count(&upstream, 300), [150, 0, 150]);
    endpoint.eject(false);
    assert_eq!((endpoint.failures(), endpoint.is_healthy()), (0, true));
    assert_eq!(count(&upstream, 300), [100, 100, 100]);
}

#[test]
fn ejection_leaves_as_many_as_its_bound_says_and_never_none() {
    for (count, percent, spared) in [
        (1, 100, 0),
        (2, 50, 1),
        (2, 100, 1),
        (3, 50, 1),
        (4, 50, 2),
        (10, 10, 1),
        (9, 10, 0),
    ] {
        let upstream = equal(count);
        let mut ejected = 0;
        for endpoint in &upstream.endpoints {
            if upstream.can_spare(endpoint, percent) {
                endpoint.eject(true);
                ejected += 1;
            }
        }
        assert_eq!(ejected, spared, "{percent}% of {count}");
    }
    let upstream = equal(2);
    kill(&upstream, 0);
    assert!(
        !upstream.can_spare(&upstream.endpoints[1], 100),
        "the only one that answers its probe"
    );
}

#[test]
fn health_is_ignored_while_too_few_have_it_and_heeded_again_when_enough_do() {
    let upstream = equal(4);
    let kill_and_settle = |endpoint| {
        kill(&upstream, endpoint);
        upstream.settle()
    };
    assert!(!kill_and_settle(0) && !kill_and_settle(1), "half is enough");
    assert_eq!(count(&upstream, 100), [0, 0, 50, 50]);
    assert!(kill_and_settle(2) && upstream.panics());
    assert!(!upstream.settle(), "it is told once");
    assert_eq!(count(&upstream, 100), [25; 4]);
    upstream.endpoints[0].health().record(true, 1, 1);
    assert!(upstream.settle() && !upstream.panics());
    assert_eq!(count(&upstream, 100), [50, 0, 0, 50]);
}

#[test]
fn where_none_is_healthy_nobody_is_asked_however_high_the_threshold() {
    let upstream = equal(2);
    kill(&upstream, 0);
    kill(&upstream, 1);
    upstream.settle();
    assert!(!upstream.panics());
    assert_eq!(pick(&upstream, ask(0, None, 0, NOW_NS)), None);
}

#[test]
fn a_threshold_of_zero_always_heeds_health() {
    let health = config::Health {
        panic_percent: 0,
        ..config::Health::default()
    };
    let upstream = with_health(&[1, 1, 1, 1], health);
    (0..3).for_each(|endpoint| kill(&upstream, endpoint));
    upstream.settle();
    assert_eq!(count(&upstream, 10), [0, 0, 0, 10]);
}

fn starting_slowly() -> Upstream {
    let health = config::Health {
        slow_start: Duration::from_secs(10),
        ..config::Health::default()
    };
    with_health(&[1, 1], health)
}

#[test]
fn the_share_of_one_that_came_back_grows_from_a_tenth_to_the_whole() {
    let upstream = starting_slowly();
    let endpoint = &upstream.endpoints[1];
    assert_eq!(upstream.share(endpoint, 5), SHARE_WHOLE, "it never went");
    endpoint.welcome(100 * S);
    let shares = [0, 1, 5, 9, 10, 11].map(|s| upstream.share(endpoint, (100 + s) * S));
    assert_eq!(shares, [100, 190, 550, 910, 1000, 1000]);
    assert_eq!(
        upstream.share(endpoint, 99 * S),
        100,
        "another thread's clock is a moment behind"
    );
    assert_eq!(equal(1).share(endpoint, 100 * S), SHARE_WHOLE);
}

#[test]
fn one_that_starts_slowly_takes_its_share_of_turns_and_all_if_it_is_alone() {
    let upstream = starting_slowly();
    upstream.endpoints[1].welcome(100 * S);
    for (age_s, share) in [(0, 0.1), (5, 0.55), (10, 1.0)] {
        let mut taken = 0;
        for call in 0..2000_u64 {
            let random = call.wrapping_mul(0xd134_2543_de82_ef95).rotate_left(17);
            let chosen = pick(&upstream, ask(0, None, random, (100 + age_s) * S));
            taken += usize::from(chosen == Some(1));
        }
        // Of two turns it lets so many go by, and the other takes them.
        let expected = 2000.0 * share / (1.0 + share);
        assert!(
            (taken as f64 - expected).abs() < 120.0,
            "{taken} of 2000 at {age_s} s, and not {expected}"
        );
    }
    kill(&upstream, 0);
    assert_eq!(
        pick(&upstream, ask(0, None, 7, 100 * S)),
        Some(1),
        "there is no other"
    );
}

#[test]
fn those_that_come_with_a_reload_begin_slowly_and_those_of_the_start_do_not() {
    let config = |endpoints| config::Upstream {
        health: config::Health {
            slow_start: Duration::from_secs(10),
            ..config::Health::default()
        },
        ..upstream(Balance::Random, endpoints)
    };
    let before = made(&config(&[(1, 1)]), 1);
    let after = Upstream::new(&config(&[(1, 1), (2, 1)]), 1, SEED, Some(&before));
    after.welcome(&before, 100 * S);
    let share = |index: usize| after.share(&after.endpoints[index], 100 * S);
    assert_eq!((share(0), share(1)), (SHARE_WHOLE, SHARE_WHOLE / 10));
}
