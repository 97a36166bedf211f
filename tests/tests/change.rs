//! Endpoints that come and go, die and live again under open flows, via `direct` and via `nat`: none is reset, and each stays where it is.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rig::client::connect;
use rig::field::{CLIENT_V4, Field, L4_V4, ORIGINS};
use rig::namespace::Namespace;
use rig::sluice::Sluice;
use rig::world::socket;
use rig::{harness, sandbox, tests, wait};

/// The port of the listener via `direct`, which is that of the echoes too, and that of the listener via `nat`.
const DIRECT_PORT: u16 = 7100;
const NAT_PORT: u16 = 7101;

/// Flows of each way. Both ends of each are descriptors of this process, which may have 20 000 on a plain machine.
const FLOWS: usize = 4500;

/// Longer than a round over all flows takes on two busy cores.
const IDLE: Duration = Duration::from_secs(6);

struct Stage {
    field: Field,
    sluice: Sluice,
    path: PathBuf,
    /// Whether each echo takes new connections.
    listens: Vec<Arc<AtomicBool>>,
}

/// A connection to an echo, and who answers it.
struct Flow {
    stream: TcpStream,
    endpoint: String,
    rounds: u64,
}

fn main() -> ExitCode {
    harness::main(
        build,
        |stage| stage.sluice.last_words(),
        tests![
            endpoints_come_and_go_under_nine_thousand_flows_and_none_is_reset,
            an_endpoint_that_its_probe_finds_dead_takes_no_flow_of_others_along,
        ],
    )
}

fn build() -> Result<Stage> {
    let field = Field::build()?;
    lay_ways_back(&field)?;
    let listens = field.origins.iter().map(start_echo);
    let listens = listens.collect::<Result<_>>()?;
    let path = sandbox::folder("change")?.join("sluice.toml");
    fs::write(&path, configuration(&[(1, 1), (2, 1)], "")).context("write the configuration")?;
    let sluice = Sluice::start(&field.edge, &path)?;
    Ok(Stage {
        field,
        sluice,
        path,
        listens,
    })
}

/// Both listeners over these origins, each with its weight; `more` is further keys of their upstream.
fn configuration(origins: &[(usize, u32)], more: &str) -> String {
    let endpoints = origins.iter().map(|(number, weight)| {
        format!("{{ address = \"10.77.{number}.2:{DIRECT_PORT}\", weight = {weight} }}")
    });
    let endpoints = endpoints.collect::<Vec<_>>().join(", ");
    format!(
        r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "native"
nat        = {{ source = ["10.77.9.1"], ports = "20000-39999" }}

[[listener]]
name    = "direct"
address = "{L4_V4}:{DIRECT_PORT}/tcp"
forward = {{ upstream = "echo", via = "direct" }}

[[listener]]
name    = "nat"
address = "{L4_V4}:{NAT_PORT}/tcp"
forward = {{ upstream = "echo", via = "nat" }}

[[upstream]]
name      = "echo"
endpoints = [{endpoints}]
{more}

[tunables]
"flow.tcp_idle_timeout" = "{}s"
"#,
        IDLE.as_secs()
    )
}

/// Gives every origin the listener's address, and a way to the client that does not lead over the edge.
fn lay_ways_back(field: &Field) -> Result<()> {
    let client = &field.client;
    for (number, origin) in (1..).zip(&field.origins) {
        // Packets come in by another interface than answers leave by: that is the point here.
        for namespace in [client, origin] {
            for interface in ["all", "default", "eth0"] {
                namespace.set(&format!("ipv4/conf/{interface}/rp_filter"), "0")?;
            }
        }
        client.ip(&format!(
            "link add back{number} type veth peer name back netns {}
             link set back{number} addrgenmode none up
             address add 10.78.{number}.1/24 dev back{number}",
            origin.name()
        ))?;
        origin.ip(&format!(
            "link set back addrgenmode none up
             address add 10.78.{number}.2/24 dev back
             address add {L4_V4} dev lo
             route add {CLIENT_V4}/32 via 10.78.{number}.1 dev back"
        ))?;
    }
    Ok(())
}

/// An echo for thousands of connections in one thread: says who it is, then sends back what comes.
/// While the answer is false it listens no more, and what is open goes on.
fn start_echo(origin: &Namespace) -> Result<Arc<AtomicBool>> {
    let listener = origin.inside(listen)?;
    let label = format!("{}\n", origin.label());
    let listens = Arc::new(AtomicBool::new(true));
    let told = Arc::clone(&listens);
    origin.thread("echo", move || echo(listener, &label, &told))?;
    Ok(listens)
}

fn listen() -> Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, DIRECT_PORT))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn echo(listener: TcpListener, label: &str, listens: &AtomicBool) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let mut listener = Some(listener);
    let mut streams = HashMap::new();
    let mut events = [EpollEvent::empty(); 256];
    let mut buffer = [0; 4096];
    loop {
        if !listens.load(Relaxed) {
            listener = None;
        } else if listener.is_none() {
            let again = listen()?;
            epoll.add(&again, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            listener = Some(again);
        }
        let count = epoll.wait(&mut events, EpollTimeout::from(10u8))?;
        for event in &events[..count] {
            if event.data() == 0 {
                while let Some(Ok((mut stream, _))) = listener.as_ref().map(TcpListener::accept) {
                    stream.set_nodelay(true)?;
                    stream.write_all(label.as_bytes())?;
                    let number = stream.as_raw_fd() as u64;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
                    streams.insert(number, stream);
                }
                continue;
            }
            let open = streams.get_mut(&event.data()).is_some_and(|stream| {
                let read = stream.read(&mut buffer);
                read.is_ok_and(|length| length > 0 && stream.write_all(&buffer[..length]).is_ok())
            });
            if !open {
                streams.remove(&event.data());
            }
        }
    }
}

fn open(to: SocketAddr) -> Result<Flow> {
    let mut stream = connect(None, to)?;
    let mut name = [0; 8];
    stream
        .read_exact(&mut name)
        .context("read the endpoint's name")?;
    Ok(Flow {
        stream,
        endpoint: String::from_utf8_lossy(&name).trim_end().to_owned(),
        rounds: 0,
    })
}

impl Flow {
    /// 64 bytes that no other flow and no other round has.
    fn message(&self, number: usize) -> Vec<u8> {
        let words = [number as u64, self.rounds];
        words.map(u64::to_be_bytes).concat().repeat(4)
    }
}

/// Every flow sends once and hears exactly that.
fn round(flows: &mut [Flow]) -> Result<()> {
    for (number, flow) in flows.iter_mut().enumerate() {
        let message = flow.message(number);
        let sent = flow.stream.write_all(&message);
        sent.with_context(|| format!("flow {number} to {} broke", flow.endpoint))?;
    }
    for (number, flow) in flows.iter_mut().enumerate() {
        let mut back = [0; 64];
        let heard = flow.stream.read_exact(&mut back);
        heard.with_context(|| format!("flow {number} to {} broke", flow.endpoint))?;
        ensure!(back[..] == flow.message(number), "its echo differs");
        flow.rounds += 1;
    }
    Ok(())
}

fn open_some(stage: &Stage, count: usize) -> Result<Vec<Flow>> {
    stage.field.client.inside(|| {
        let mut flows = Vec::new();
        for port in [DIRECT_PORT, NAT_PORT] {
            let to = socket(L4_V4, port)?;
            for _ in 0..count {
                flows.push(open(to)?);
            }
        }
        Ok(flows)
    })
}

/// How many of `count` new flows each endpoint gets.
fn new_flows(stage: &Stage, port: u16, count: usize) -> Result<BTreeMap<String, u64>> {
    let to = socket(L4_V4, port)?;
    stage.field.client.inside(|| {
        let mut shares = BTreeMap::new();
        for _ in 0..count {
            *shares.entry(open(to)?.endpoint).or_default() += 1;
        }
        Ok(shares)
    })
}

fn slots_shared(stage: &Stage) -> f64 {
    let metrics = stage.sluice.metrics().unwrap_or_default();
    metrics.value("sluice_datapath_slots_shared")
}

fn endpoints_come_and_go_under_nine_thousand_flows_and_none_is_reset(
    stage: &mut Stage,
) -> Result<()> {
    let begun = Instant::now();
    let mut flows = open_some(stage, FLOWS)?;
    round(&mut flows)?;
    // Added, removed, added again, and drained by weight: each time those that are new go where they should at once.
    let all: &[_] = &[(1, 1), (2, 1), (3, 1)];
    for origins in [all, &all[1..], all, &[(1, 0), (2, 1), (3, 1)]] {
        let weighty = origins.iter().filter(|(_, weight)| *weight > 0);
        let expected: Vec<_> = weighty
            .map(|(origin, _)| format!("origin{origin}"))
            .collect();
        fs::write(&stage.path, configuration(origins, ""))?;
        stage.sluice.reload()?;
        for port in [DIRECT_PORT, NAT_PORT] {
            let shares = new_flows(stage, port, 60)?;
            ensure!(
                shares.keys().eq(&expected),
                "{origins:?}, port {port}: {shares:?}"
            );
        }
        round(&mut flows).with_context(|| format!("after the change to {origins:?}"))?;
    }
    ensure!(slots_shared(stage) > 1000.0, "{}", slots_shared(stage));
    let used = begun.elapsed();
    ensure!(flows.len() == 2 * FLOWS && ORIGINS == 3, "{used:?}");

    // One that never pauses keeps its slot as it is; all others end, and their slots are clean again.
    let at = flows[..FLOWS]
        .iter()
        .position(|flow| flow.endpoint == "origin1")
        .context("no flow went to origin1")?;
    let steady = flows.swap_remove(at);
    drop(flows);
    let ending = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&ending);
    let steady = stage.field.client.thread("steady", move || {
        let mut flow = [steady];
        while !end.load(Relaxed) {
            round(&mut flow)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        anyhow::Ok(flow[0].rounds)
    })?;
    let cleaned = wait::until_true("all slots but one to be clean", IDLE * 4, || {
        slots_shared(stage) == 1.0
    });
    // It goes on for as long again.
    std::thread::sleep(IDLE / 2);
    let left = slots_shared(stage);
    ending.store(true, Relaxed);
    let rounds = steady.join().map_err(|_| anyhow!("the flow panicked"))?;
    let rounds = rounds.context("the flow that never pauses")?;
    cleaned?;
    ensure!(left == 1.0 && rounds > 100, "{left} slots, {rounds} rounds");
    wait::until_true("the last slot to be clean", IDLE * 4, || {
        slots_shared(stage) == 0.0
    })
}

fn an_endpoint_that_its_probe_finds_dead_takes_no_flow_of_others_along(
    stage: &mut Stage,
) -> Result<()> {
    let probe = r#"probe = { tcp = true, interval = "100ms", rise = 2, fall = 2 }"#;
    let all = configuration(&[(1, 1), (2, 1), (3, 1)], probe);
    fs::write(&stage.path, all)?;
    stage.sluice.reload()?;
    let mut flows = open_some(stage, 300)?;
    round(&mut flows)?;

    stage.listens[0].store(false, Relaxed);
    let died = Instant::now();
    wait_for_belief(stage, false)?;
    // Two probes, one of which may have begun before; and a threefold margin.
    let late = died.elapsed();
    ensure!(
        late < Duration::from_millis(900),
        "found dead after {late:?}"
    );
    expect_new(stage, &["origin2", "origin3"])?;
    // By NAT a flow stays where it is as long as its endpoint answers, and this one still does.
    let (direct, nat) = flows.split_at_mut(300);
    round(nat)?;
    let is_other = |flow: &Flow| flow.endpoint != "origin1";
    direct.sort_by_key(|flow| is_other(flow));
    let first = direct.partition_point(|flow| !is_other(flow));
    ensure!((50..200).contains(&first), "{first} of 300 were its own");
    round(&mut direct[first..])?;
    let mut between = open_some(stage, 300)?;
    ensure!(
        between.iter().all(is_other),
        "a new flow went to the dead one"
    );

    stage.listens[0].store(true, Relaxed);
    wait_for_belief(stage, true)?;
    expect_new(stage, &["origin1", "origin2", "origin3"])?;
    round(&mut between).context("flows that began while it was dead")?;
    let (direct, nat) = flows.split_at_mut(300);
    round(nat)?;
    round(&mut direct[first..])
}

fn expect_new(stage: &Stage, endpoints: &[&str]) -> Result<()> {
    for port in [DIRECT_PORT, NAT_PORT] {
        let shares = new_flows(stage, port, 60)?;
        ensure!(shares.keys().eq(endpoints), "port {port}: {shares:?}");
    }
    Ok(())
}

/// Waits until the first endpoint is believed to live, or not to.
fn wait_for_belief(stage: &Stage, is_healthy: bool) -> Result<()> {
    wait::until_true("a belief to change", Duration::from_secs(10), || {
        let status = stage.sluice.status().unwrap_or_default();
        status["upstreams"][0]["endpoints"][0]["healthy"] == is_healthy
    })
}
