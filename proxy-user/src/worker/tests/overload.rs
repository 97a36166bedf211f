//! What a worker leaves off when it runs out of something, stage by stage, and that it takes it up again.

use super::client::get;
use super::*;
use crate::exchange::STALLS_AT;

/// Tunables under which these stages are reached when half is used, and others are not but for those before them.
fn stages(reached: &[&str], more: &str) -> String {
    let mut text = "[tunables]\n".to_owned();
    for stage in ["lean", "close", "refuse", "rest"] {
        let percent = if reached.contains(&stage) { 50 } else { 1000 };
        text += &format!("\"worker.overload_{stage}_percent\" = {percent}\n");
    }
    text + more
}

/// As much as this process holds now: it will not be half of it soon, nor ten times of it.
fn memory_max() -> String {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    format!("\"worker.memory_max\" = \"{}B\"\n", pages * 4096)
}

fn wait_for_stage(sluice: &Sluice, signal: &str, stage: u8) {
    wait_until("the stage is reached", || {
        sluice.metric(&format!("sluice_overload_stage{{signal=\"{signal}\"}}")) == f64::from(stage)
    });
}

#[test]
fn short_of_memory_bodies_still_pass_whole_through_small_buffers() {
    let body = patterned(3_000_000);
    let sent = body.clone();
    let origin = Origin::answering(move |_| origin::ok(&sent));
    let more = stages(&["lean"], &memory_max());
    let sluice = Sluice::start(&[origin.address], &more);
    wait_for_stage(&sluice, "memory", 1);
    let mut client = Client::connect(&sluice);
    for _ in 0..2 {
        let response = client.get("/");
        assert!(response.body == body && !response.closes());
    }
}

#[test]
fn short_of_memory_connections_end_with_their_exchange() {
    let origin = Origin::echoing();
    let mut sluice = Sluice::start(&[origin.address], "");
    let mut idle = Client::connect(&sluice);
    assert_eq!(idle.get("/first").text(), "/first");
    for line in stages(&["lean", "close"], &memory_max()).lines().skip(1) {
        let (key, value) = line.split_once(" = ").unwrap();
        sluice.set(key.trim_matches('"'), value.trim_matches('"'));
    }
    idle.expect_end();
    wait_for_stage(&sluice, "memory", 2);
    origin.wait_until_gone(1);
    let mut client = Client::connect(&sluice);
    let response = client.get("/second");
    assert_eq!((response.text(), response.closes()), ("/second", true));
    client.expect_end();
    sluice.set("worker.memory_max", "1000GiB");
    wait_for_stage(&sluice, "memory", 0);
    let mut client = Client::connect(&sluice);
    assert!(!client.get("/third").closes());
}

#[test]
fn short_of_memory_requests_are_refused_until_there_is_enough() {
    let origin = Origin::echoing();
    let more = stages(&["refuse"], &memory_max());
    let mut sluice = Sluice::start(&[origin.address], &more);
    wait_for_stage(&sluice, "memory", 3);
    let response = Client::connect(&sluice).get("/");
    assert_eq!(
        (response.status, response.value("retry-after")),
        (503, Some("1"))
    );
    assert!(response.closes());
    let id = response
        .value("x-request-id")
        .expect("it names its request");
    assert!(response.text().ends_with(&format!("request {id}\n")));
    assert_eq!(sluice.rejected("overload_memory"), 1.0);
    assert_eq!(origin.connections(), 0);
    sluice.set("worker.memory_max", "1000GiB");
    wait_for_stage(&sluice, "memory", 0);
    assert_eq!(Client::connect(&sluice).get("/").status, 200);
    let entered = "sluice_overload_entered_total{signal=\"memory\",stage=\"refuse\"}";
    assert_eq!(sluice.metric(entered), 1.0);
}

#[test]
fn short_of_memory_no_connection_is_accepted_until_there_is_enough() {
    let origin = Origin::echoing();
    let mut sluice = Sluice::start(&[origin.address], &stages(&["rest"], &memory_max()));
    wait_for_stage(&sluice, "memory", 4);
    // What was on its way when it began to rest may still be accepted.
    let _first = Client::connect(&sluice);
    std::thread::sleep(Duration::from_millis(100));
    let before = sluice.accepted();
    let mut clients: Vec<Client> = (0..5).map(|_| Client::connect(&sluice)).collect();
    clients.iter_mut().for_each(|client| client.send(get("/")));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(sluice.accepted(), before, "they wait in the kernel");
    sluice.set("worker.memory_max", "1000GiB");
    for client in &mut clients {
        assert_eq!(client.response().status, 200);
    }
}

#[test]
fn a_loop_that_is_late_again_and_again_refuses_and_keeps_its_connections() {
    let origin = Origin::echoing();
    let more =
        "[tunables]\n\"worker.lag_max\" = \"80ms\"\n\"worker.overload_rest_percent\" = 1000\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut well = Client::connect(&sluice);
    assert_eq!(well.get("/").status, 200);
    // Each takes its worker 100 ms, and the next one is there already.
    let mut busy: Vec<Client> = (0..3).map(|_| Client::connect(&sluice)).collect();
    busy.iter_mut()
        .for_each(|client| client.send(get(STALLS_AT).repeat(30)));
    let refused = (0..90)
        .map(|n| busy[n % 3].response())
        .find(|response| response.status == 503);
    let refused = refused.expect("one that is refused");
    assert_eq!(refused.value("retry-after"), Some("1"));
    assert!(!refused.closes(), "who comes back costs more");
    assert!(sluice.rejected("overload_lag") >= 1.0);
    // One turn that is not late ends it.
    wait_until("requests are served again", || well.get("/").status == 200);
}

/// The limit is the process's, so the test runs in a process of its own.
#[test]
fn short_of_descriptors_a_reserve_is_left() {
    const INSIDE: &str = "SLUICE_TEST_RESERVE";
    if std::env::var_os(INSIDE).is_some() {
        return reserve();
    }
    let name = "worker::tests::overload::short_of_descriptors_a_reserve_is_left";
    limit::in_own_process(name, INSIDE);
}

fn reserve() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use std::os::fd::AsRawFd;
    let open = || std::fs::File::open("/dev/null").ok();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 400, hard).unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let origin = Origin::start(move |peer| {
        while let Some(request) = peer.request() {
            if request.path() == "/begun" && !peer.wait_for(&released) {
                return;
            }
            peer.send(origin::ok(request.path()));
        }
    });
    // Of the 400, 100 are not for clients.
    let more = "[tunables]\n\"worker.descriptors_reserve\" = 100\n";
    let sluice = Sluice::start(&[origin.address], more);
    let (mut idle, mut begun) = (Client::connect(&sluice), Client::connect(&sluice));
    assert_eq!(idle.get("/a").text(), "/a");
    begun.send(get("/begun"));
    wait_until("it has begun", || {
        origin.paths().contains(&"/begun".to_owned())
    });
    // The test's own files stand for clients, each of which would have a descriptor at either end here.
    let fill: Vec<_> = std::iter::repeat_with(open)
        .map_while(|file| file)
        .take_while(|file| file.as_raw_fd() < 300)
        .collect();
    wait_for_stage(&sluice, "descriptors", 4);
    idle.expect_end();
    std::thread::sleep(Duration::from_millis(100));
    let before = sluice.accepted();
    let mut waiting: Vec<Client> = (0..10).map(|_| Client::connect(&sluice)).collect();
    waiting.iter_mut().for_each(|client| client.send(get("/w")));
    let reserve: Vec<_> = (0..60).map_while(|_| open()).collect();
    assert_eq!(reserve.len(), 60, "there are some for whoever needs them");
    assert_eq!(sluice.accepted(), before, "clients wait");
    release.send(()).unwrap();
    assert_eq!(begun.response().text(), "/begun", "what was begun ends");
    drop((fill, reserve));
    for client in &mut waiting {
        assert_eq!(client.response().text(), "/w");
    }
}
