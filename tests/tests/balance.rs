//! Limits that hold over all workers, and cookies that outlive the daemon, through whole proxies.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::field::WEB_V4;
use rig::http::{KeepAlive, Response};
use rig::world::{World, socket};
use rig::{harness, namespace::Namespace, tests, wait};

const PORT: u16 = 8080;
/// Where the origins of this test listen.
const ORIGIN_PORT: u16 = 9000;
/// How long they take.
const TOOK: Duration = Duration::from_millis(10);

const CONFIGURATION: &str = r#"
[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[route]]
match    = { path = "/limited" }
upstream = "limited"

[[route]]
match    = { path = "/sticky" }
upstream = "sticky"

[[upstream]]
name               = "limited"
balance            = "least_request"
calls_max          = 5
endpoint_calls_max = 3
queue              = { pending_max = 64, wait = "10s" }
endpoints          = ["10.77.1.2:9000", "10.77.2.2:9000"]

[[upstream]]
name      = "sticky"
sticky    = { cookie = "node", ttl = "1h" }
endpoints = ["10.77.1.2:8080", "10.77.2.2:8080", "10.77.3.2:8080"]
"#;

fn main() -> ExitCode {
    harness::main(
        || World::build(CONFIGURATION),
        World::last_words,
        tests![
            a_limit_holds_over_all_workers_and_everybody_gets_a_turn,
            a_cookie_is_known_to_the_next_daemon_and_after_a_reload,
        ],
    )
}

/// Calls that an origin has now, and the most that it had.
#[derive(Default)]
struct Calls {
    now: AtomicU64,
    most: AtomicU64,
    served: AtomicU64,
}

/// Answers each request after a while, and counts those that it has at a time, in all of `counted`.
fn start_origin(namespace: &Namespace, counted: [Arc<Calls>; 2]) -> Result<()> {
    let listener = namespace
        .inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, ORIGIN_PORT)))
        .context("listen")?;
    namespace.thread("slow-origin", move || {
        for stream in listener.incoming().flatten() {
            let counted = counted.clone();
            // What cannot be served is closed, which the client sees as a failure.
            let _ = thread::Builder::new()
                .stack_size(128 * 1024)
                .spawn(move || serve(stream, &counted));
        }
    })?;
    Ok(())
}

fn serve(mut stream: TcpStream, counted: &[Arc<Calls>; 2]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        read.extend_from_slice(&buffer[..length]);
        if !read.ends_with(b"\r\n\r\n") {
            continue;
        }
        read.clear();
        for calls in counted {
            let now = calls.now.fetch_add(1, SeqCst) + 1;
            calls.most.fetch_max(now, SeqCst);
        }
        thread::sleep(TOOK);
        for calls in counted {
            calls.now.fetch_sub(1, SeqCst);
            calls.served.fetch_add(1, SeqCst);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
    }
}

fn a_limit_holds_over_all_workers_and_everybody_gets_a_turn(world: &mut World) -> Result<()> {
    let (all, each) = (
        Arc::<Calls>::default(),
        [(); 2].map(|()| Arc::<Calls>::default()),
    );
    for (origin, calls) in world.field.origins.iter().zip(&each) {
        start_origin(origin, [Arc::clone(&all), Arc::clone(calls)])?;
    }
    let (to, clients, time) = (socket(WEB_V4, PORT)?, 24, Duration::from_secs(3));
    let waits = |_| {
        world.field.client.thread("client", move || -> Result<u64> {
            let (mut client, started) = (KeepAlive::connect(None, to)?, Instant::now());
            let mut served = 0;
            while started.elapsed() < time {
                let response = client.get("web.test", "/limited", "")?;
                ensure!(response.status == 200, "{response:?}");
                served += 1;
            }
            Ok(served)
        })
    };
    let running: Vec<_> = (0..clients).map(waits).collect::<Result<_>>()?;
    wait::until_true("some to wait", Duration::from_secs(5), || {
        let metrics = world.sluice.metrics();
        metrics
            .is_ok_and(|all| all.labelled("sluice_upstream_pending", "upstream", "limited") > 8.0)
    })?;
    let status = world.sluice.command(&["status"])?;
    ensure!(
        status.contains("upstream limited: at most 5 calls") && status.contains(" of 3 calls"),
        "{status}"
    );
    let mut served = Vec::new();
    for client in running {
        served.push(client.join().ok().context("a client panicked")??);
    }
    let most = [&all, &each[0], &each[1]].map(|calls| calls.most.load(SeqCst));
    ensure!(most == [5, 3, 3], "at most {most:?} at a time");
    let (least, greatest) = (served.iter().min(), served.iter().max());
    let (least, greatest) = (*least.context("one")?, *greatest.context("one")?);
    // First come, first served over all workers: whoever is served comes again behind all others.
    ensure!(least * 3 >= greatest, "unfair: {served:?}");
    // Room is never left unused while somebody waits: what five at a time can do, and a threefold margin.
    let possible = time.as_secs_f64() / TOOK.as_secs_f64() * 5.0;
    let done = all.served.load(SeqCst) as f64;
    ensure!(done > possible / 3.0, "{done} of {possible}");
    let metrics = world.sluice.metrics()?;
    let of = |name| metrics.labelled(name, "upstream", "limited");
    ensure!(of("sluice_upstream_pending") == 0.0, "somebody waits still");
    ensure!(of("sluice_upstream_queued_total") > 100.0, "nobody waited");
    ensure!(of("sluice_upstream_queue_wait_seconds_total") > 1.0);
    Ok(())
}

fn a_cookie_is_known_to_the_next_daemon_and_after_a_reload(world: &mut World) -> Result<()> {
    let to = socket(WEB_V4, PORT)?;
    let ask = |world: &World, cookie: &str| -> Result<Response> {
        world.field.client.inside(|| {
            let field = format!("Cookie: {cookie}\r\n");
            KeepAlive::connect(None, to)?.get("web.test", "/sticky", &field)
        })
    };
    let first = ask(world, "a=b")?;
    let set = first.field("set-cookie").context("no cookie")?.to_owned();
    let cookie = set.split(';').next().context("no pair")?.to_owned();
    ensure!(!set.contains("10.77"), "{set}");
    let comes_back = |world: &World, when: &str| -> Result<()> {
        for _ in 0..6 {
            let again = ask(world, &cookie)?;
            ensure!(
                again.origin() == first.origin() && again.field("set-cookie").is_none(),
                "{when}: {again:?}"
            );
        }
        Ok(())
    };
    comes_back(world, "at once")?;
    world.write(&CONFIGURATION.replace("ttl = \"1h\"", "ttl = \"2h\""))?;
    world.sluice.reload()?;
    comes_back(world, "after a reload")?;
    let old = world.sluice.kill_daemon()?;
    world.sluice.wait_for_other_daemon(old)?;
    comes_back(world, "under the next daemon")
}
