//! Connections and descriptors are limited; at the limit others wait, and go on when there is room again.

use super::client::get;
use super::*;

#[test]
fn beyond_the_most_connections_clients_wait_until_one_has_gone() {
    let origin = Origin::echoing();
    let more = "[tunables]\n\"net.connections_max\" = 2\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut clients: Vec<Client> = (0..5)
        .map(|_| {
            let mut client = Client::connect(&sluice);
            client.send(get("/"));
            client
        })
        .collect();
    let mut served = 0;
    while !clients.is_empty() {
        let (mut answered, waiting): (Vec<Client>, Vec<Client>) =
            clients.into_iter().partition(|client| {
                client
                    .stream
                    .set_read_timeout(Some(Duration::from_millis(100)))
                    .unwrap();
                client.stream.peek(&mut [0]).is_ok()
            });
        assert!(answered.len() <= 2 && sluice.open() <= 2);
        for client in &mut answered {
            client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(client.response().status, 200);
            served += 1;
        }
        clients = waiting;
    }
    assert_eq!(served, 5);
}

/// The limit is the process's, so the test runs in a process of its own: this one, with one more variable.
#[test]
fn without_descriptors_accepting_rests_and_goes_on_later() {
    const INSIDE: &str = "SLUICE_TEST_WITHOUT_DESCRIPTORS";
    if std::env::var_os(INSIDE).is_some() {
        return without_descriptors();
    }
    let name = "worker::tests::limit::without_descriptors_accepting_rests_and_goes_on_later";
    in_own_process(name, INSIDE);
}

/// Runs the test of this name in another process, which is told by a variable that it is that one.
pub fn in_own_process(name: &str, variable: &str) {
    let this = std::env::current_exe().unwrap();
    let child = std::process::Command::new(this)
        .args(["--exact", name, "--nocapture"])
        .env(variable, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}"
    );
}

fn without_descriptors() {
    use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
    // An accept that is under way keeps the limit that it began with, so it is set before.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 200, hard).unwrap();
    let origin = Origin::echoing();
    // What overload would leave off before is not what this is about.
    let more = "[tunables]\n\"upstream.idle_connections_max\" = 0\n\"worker.overload_rest_percent\" = 1000\n\
                \"worker.overload_close_percent\" = 1000\n\"worker.overload_refuse_percent\" = 1000\n";
    let sluice = Sluice::start(&[origin.address], more);
    let mut client = Client::connect(&sluice);
    assert_eq!(client.get("/before").text(), "/before");
    // What that has taken is given back before the rest is taken.
    origin.wait_until_gone(1);
    std::thread::sleep(Duration::from_millis(100));
    // The clients' own descriptors are there before; what lacks is one for the other side.
    let sockets: Vec<socket2::Socket> = (0..3)
        .map(|_| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap())
        .collect();
    let fill: Vec<std::fs::File> = (0..200)
        .map_while(|_| std::fs::File::open("/dev/null").ok())
        .collect();
    assert!(fill.len() < 200);
    let mut waiting: Vec<Client> = sockets
        .into_iter()
        .map(|socket| {
            socket.connect(&sluice.address.into()).unwrap();
            let mut client = Client::of(socket.into());
            client.send(get("/waiting"));
            client
        })
        .collect();
    // A busy loop would take all of the time.
    let spent = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let (user, system) = (usage.user_time(), usage.system_time());
        (user.tv_sec() + system.tv_sec()) * 1_000_000 + user.tv_usec() + system.tv_usec()
    };
    let before_us = spent();
    std::thread::sleep(Duration::from_millis(600));
    assert!(spent() - before_us < 200_000, "accepting does not rest");
    let response = client.get("/meanwhile");
    assert_eq!(
        (response.status, response.value("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(sluice.rejected("no_descriptor"), 1.0);
    assert_eq!(sluice.reports.take().len(), 0, "no endpoint is blamed");
    assert_eq!(sluice.open(), 1);
    drop(fill);
    for client in &mut waiting {
        assert_eq!(client.response().text(), "/waiting");
    }
}
