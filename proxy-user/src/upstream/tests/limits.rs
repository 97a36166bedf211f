//! Limits of calls, those who wait, and endpoints that stand in.

use super::*;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};

/// Counts how often it is woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

fn has_turn(place: &Place<'_>) -> bool {
    let turn = pin!(place.turn());
    turn.poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
}

/// An upstream whose endpoints may have so many calls, and all together.
fn limited(each: &[Option<u32>], in_all: Option<u32>) -> Upstream {
    let endpoints: Vec<(u16, u32)> = (1..).zip(each.iter().map(|_| 1)).collect();
    let mut config = upstream(Balance::RoundRobin, &endpoints);
    for (endpoint, max) in config.endpoints.iter_mut().zip(each) {
        endpoint.calls_max = *max;
    }
    config.calls_max = in_all;
    made(&config, 4)
}

fn enter(upstream: &Upstream) -> Option<(usize, Active<'_>)> {
    match upstream.enter(&ask(0, None, 0, NOW_NS)) {
        Entry::Begun(index, active) => Some((index, active)),
        Entry::Full | Entry::Nobody => None,
    }
}

#[test]
fn a_full_endpoint_is_passed_over_and_a_full_upstream_takes_nobody() {
    let upstream = limited(&[Some(1), Some(2)], None);
    let mut calls: Vec<_> = (0..3).map(|_| enter(&upstream).expect("room")).collect();
    let mut indices: Vec<_> = calls.iter().map(|(index, _)| *index).collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 1]);
    assert_eq!(upstream.choose(&ask(0, None, 0, NOW_NS)), Choice::Full);
    let (left, _) = calls.remove(0);
    assert_eq!(enter(&upstream).map(|(index, _)| index), Some(left));

    let upstream = limited(&[None, None], Some(3));
    let calls: Vec<_> = (0..3).map(|_| enter(&upstream).expect("room")).collect();
    assert!(matches!(
        upstream.enter(&ask(0, None, 0, NOW_NS)),
        Entry::Full
    ));
    drop(calls);
    assert!(enter(&upstream).is_some());
    kill(&upstream, 0);
    kill(&upstream, 1);
    assert!(
        matches!(upstream.enter(&ask(0, None, 0, NOW_NS)), Entry::Nobody),
        "there is nothing to wait for"
    );
}

#[test]
fn a_limit_holds_over_all_workers() {
    let upstream = limited(&[Some(3), Some(4)], Some(5));
    let (total, most) = (AtomicU32::new(0), AtomicU32::new(0));
    let at_each = [AtomicU32::new(0), AtomicU32::new(0)];
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (upstream, total, most, at_each) = (&upstream, &total, &most, &at_each);
            scope.spawn(move || {
                for random in 0..20_000 {
                    let Entry::Begun(index, active) =
                        upstream.enter(&ask(worker, None, random, NOW_NS))
                    else {
                        continue;
                    };
                    let now = total.fetch_add(1, SeqCst) + 1;
                    most.fetch_max(now, SeqCst);
                    let there = at_each[index].fetch_add(1, SeqCst) + 1;
                    assert!(now <= 5 && there <= [3, 4][index], "{now} {there}");
                    std::thread::yield_now();
                    at_each[index].fetch_sub(1, SeqCst);
                    total.fetch_sub(1, SeqCst);
                    drop(active);
                }
            });
        }
    });
    assert!(most.load(SeqCst) > 1, "they did run together");
    assert_eq!(upstream.active(), 0);
    assert_eq!(
        (0..5)
            .map_while(|_| enter(&upstream))
            .collect::<Vec<_>>()
            .len(),
        5,
        "all room is there again"
    );
}

#[test]
fn who_waits_is_served_in_the_order_of_coming_and_nobody_overtakes() {
    let upstream = limited(&[Some(1)], None);
    let queue = upstream.queue();
    let (_, running) = enter(&upstream).expect("room");
    let first = queue.join(3).expect("a place");
    assert!(has_turn(&first), "it may look whether there is room by now");
    assert!(enter(&upstream).is_none());
    first.wait_on(false);
    let second = queue.join(3).expect("a place");
    assert!(has_turn(&second), "nobody else looks");
    second.wait_on(false);
    let third = queue.join(3).expect("a place");
    third.wait_on(false);
    assert!(queue.join(3).is_none(), "three wait already");
    assert!(
        !queue.is_empty(),
        "newcomers see that they are not the first"
    );
    drop(running);
    assert_eq!(
        [&first, &second, &third].map(has_turn),
        [true, false, false]
    );
    let (_, running) = enter(&upstream).expect("the room that was left");
    first.served(1500);
    // The one behind may look whether there is more; there is not.
    assert_eq!([&second, &third].map(has_turn), [true, false]);
    assert!(enter(&upstream).is_none());
    second.wait_on(false);
    second.give_up();
    drop(running);
    assert!(has_turn(&third));
    drop(third);
    assert!(queue.is_empty());
    assert_eq!(
        queue.facts(),
        QueueFacts {
            pending: 0,
            queued: 3,
            full: 1,
            late: 1,
            waited_us: 1500
        }
    );
}

#[test]
fn a_turn_is_never_lost() {
    let upstream = limited(&[Some(1)], None);
    let queue = upstream.queue();
    let [first, second, third] = [(); 3].map(|()| queue.join(9).expect("a place"));
    second.wait_on(false);
    third.wait_on(false);
    // Whoever goes away with a turn leaves it to the next.
    assert!(has_turn(&first));
    drop(first);
    assert_eq!([&second, &third].map(has_turn), [true, false]);
    // Whoever cannot use it passes it on.
    second.wait_on(true);
    assert_eq!([&second, &third].map(has_turn), [false, true]);
    third.wait_on(true);
    assert_eq!([&second, &third].map(has_turn), [false, false], "to nobody");
    // Room that is left while all look is looked for once more.
    queue.call_next();
    queue.call_next();
    queue.call_next();
    second.wait_on(false);
    assert!(has_turn(&second), "the third call was for it");
    second.wait_on(false);
    assert!(!has_turn(&second));
    // Room that nobody left.
    third.wait_on(false);
    queue.nudge();
    queue.nudge();
    assert_eq!([&second, &third].map(has_turn), [true, false]);
}

#[test]
fn a_turn_wakes_whoever_waits_for_it_in_another_thread() {
    let upstream = limited(&[Some(1)], None);
    let (_, running) = enter(&upstream).expect("room");
    let place = upstream.queue().join(1).expect("a place");
    place.wait_on(false);
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    {
        let mut turn = pin!(place.turn());
        let mut context = Context::from_waker(&waker);
        assert!(turn.as_mut().poll(&mut context).is_pending());
        std::thread::scope(|scope| {
            scope.spawn(move || drop(running));
        });
        assert_eq!(woken.0.load(SeqCst), 1);
        assert!(turn.poll(&mut context).is_ready());
    }
    assert!(enter(&upstream).is_some());
}

#[test]
fn a_reload_counts_on_and_keeps_those_who_wait() {
    let mut config = upstream(Balance::RoundRobin, &[(1, 1)]);
    config.calls_max = Some(2);
    let before = made(&config, 1);
    let running = [enter(&before).expect("room"), enter(&before).expect("room")];
    let place = before.queue().join(1).expect("a place");
    place.wait_on(false);
    let after = Upstream::new(&config, 1, SEED, Some(&before));
    assert!(enter(&after).is_none(), "both are still under way");
    assert!(!after.queue().is_empty());
    drop(running);
    assert!(has_turn(&place));
    assert!(enter(&after).is_some());
}

#[test]
fn endpoints_that_stand_in_are_asked_only_while_no_other_can_be() {
    for balance in every_balance() {
        let mut config = upstream(balance.clone(), &[(1, 1), (2, 1), (3, 1), (4, 3)]);
        config.endpoints[2].is_backup = true;
        config.endpoints[3].is_backup = true;
        let upstream = made(&config, 1);
        let counts = count(&upstream, 400);
        assert!(counts[0] > 0 && counts[1] > 0, "{balance:?}: {counts:?}");
        assert_eq!(counts[2..], [0, 0], "{balance:?}");
        kill(&upstream, 0);
        assert_eq!(count(&upstream, 100), [0, 100, 0, 0], "{balance:?}");
        // One of every day that just failed is worse than one that stands in.
        for random in 0..20 {
            let chosen = pick(&upstream, ask(0, Some(1), random << 58, NOW_NS));
            assert!(matches!(chosen, Some(2 | 3)), "{balance:?}: {chosen:?}");
        }
        kill(&upstream, 1);
        let counts = count(&upstream, 400);
        assert_eq!(counts[..2], [0, 0], "{balance:?}");
        assert!(
            counts[2] > 0 && counts[3] > counts[2],
            "{balance:?}: {counts:?}"
        );
        upstream.endpoints[0].health().record(true, 1, 1);
        assert_eq!(count(&upstream, 100), [100, 0, 0, 0], "{balance:?}");
    }
}

#[test]
fn a_full_endpoint_of_every_day_is_waited_for_although_others_stand_in() {
    let mut config = upstream(Balance::RoundRobin, &[(1, 1), (2, 1)]);
    config.endpoints[0].calls_max = Some(1);
    config.endpoints[1].is_backup = true;
    let upstream = made(&config, 1);
    let running = enter(&upstream).expect("room");
    assert_eq!(upstream.choose(&ask(0, None, 0, NOW_NS)), Choice::Full);
    drop(running);
}

#[test]
fn endpoints_that_stand_in_help_where_too_few_of_every_day_are_healthy() {
    for balance in every_balance() {
        let mut config = upstream(balance.clone(), &[(1, 1), (2, 1), (3, 1), (4, 1)]);
        config.endpoints[3].is_backup = true;
        let upstream = made(&config, 1);
        let kill_and_settle = |index| {
            kill(&upstream, index);
            assert!(!upstream.settle(), "health goes on to be heeded");
        };
        kill_and_settle(0);
        assert!(!upstream.is_helped(), "two of three are enough");
        let counts = count(&upstream, 100);
        assert_eq!((counts[0], counts[3]), (0, 0), "{balance:?}");
        kill_and_settle(1);
        assert!(upstream.is_helped());
        let counts = count(&upstream, 400);
        assert_eq!(counts[..2], [0, 0], "{balance:?}");
        assert!(
            counts[2] > 100 && counts[3] > 100,
            "{balance:?}: {counts:?}"
        );
        // With nobody left to help, health is ignored, and with nobody left at all, the one that stands in has all.
        kill(&upstream, 3);
        assert!(upstream.settle() && upstream.panics());
        let counts = count(&upstream, 300);
        assert!(counts[..3].iter().all(|count| *count > 0), "{balance:?}");
        assert_eq!(counts[3], 0, "it would be no better");
        kill(&upstream, 2);
        upstream.endpoints[3].health().record(true, 1, 1);
        assert!(upstream.settle() && !upstream.panics());
        assert_eq!(count(&upstream, 50), [0, 0, 0, 50], "{balance:?}");
    }
}
