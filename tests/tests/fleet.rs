//! Two edges with the same hash key behind a router that spreads flows over both: they choose alike, and one can go without a reset.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, ensure};
use rig::field::{CLIENT_V4, L4_V4};
use rig::flow::{Flow, round};
use rig::namespace::Namespace;
use rig::pass::Pass;
use rig::process::Process;
use rig::sluice::PATIENCE;
use rig::world::socket;
use rig::{harness, sandbox, sluice, tests, wait};

const PORT: u16 = 7000;
const ENDPOINTS: usize = 5;
const FLOWS: usize = 200;

struct Fleet {
    client: Namespace,
    router: Namespace,
    edges: Vec<Namespace>,
    nodes: Vec<Process>,
    _endpoints: Vec<Namespace>,
    _passes: Vec<Pass>,
}

fn main() -> ExitCode {
    harness::main(
        build,
        |fleet| fleet.nodes.iter().map(|node| node.tail(15)).collect(),
        tests![flows_of_an_edge_that_goes_go_on_at_the_other],
    )
}

/// `client - router - edge1, edge2 - endpoints 1 to 5 - client`: each edge has a link to each endpoint, which answer by
/// links of their own.
fn build() -> Result<Fleet> {
    let client = namespace("client")?;
    let router = namespace("router")?;
    router.set("ipv4/ip_forward", "1")?;
    router.set("ipv4/fib_multipath_hash_policy", "1")?;
    pair(&client, "eth0", &router, "client")?;
    client.ip(&format!(
        "address add {CLIENT_V4}/24 dev eth0\nroute add default via 10.77.0.1"
    ))?;
    router.ip("address add 10.77.0.1/24 dev client")?;
    let endpoints = (1..=ENDPOINTS).map(|number| endpoint(&client, number));
    let endpoints: Vec<_> = endpoints.collect::<Result<_>>()?;
    let (mut edges, mut passes) = (Vec::new(), Vec::new());
    for number in 1..=2 {
        edges.push(edge(&router, number, &endpoints, &mut passes)?);
    }
    router.ip(&format!(
        "route add {L4_V4}/32 nexthop via 10.91.1.2 nexthop via 10.91.2.2"
    ))?;
    let mut fleet = Fleet {
        client,
        router,
        edges,
        nodes: Vec::new(),
        _endpoints: endpoints,
        _passes: passes,
    };
    for (number, edge) in (1..).zip(&fleet.edges) {
        fleet.nodes.push(start(edge, number)?);
    }
    Ok(fleet)
}

fn namespace(label: &str) -> Result<Namespace> {
    let namespace = Namespace::create(label)?;
    // Packets come in by another interface than answers leave by: that is the point here.
    for interface in ["all", "default"] {
        namespace.set(&format!("ipv4/conf/{interface}/rp_filter"), "0")?;
    }
    Ok(namespace)
}

fn pair(near: &Namespace, name: &str, far: &Namespace, far_name: &str) -> Result<()> {
    near.ip(&format!(
        "link add {name} numrxqueues 2 numtxqueues 2 type veth peer name {far_name} numrxqueues 2 numtxqueues 2 netns {}",
        far.name()
    ))?;
    for (end, name) in [(near, name), (far, far_name)] {
        end.ip(&format!("link set {name} addrgenmode none up"))?;
        end.run(&["ethtool", "-K", name, "tx", "off"])?;
    }
    Ok(())
}

fn endpoint(client: &Namespace, number: usize) -> Result<Namespace> {
    let endpoint = namespace(&format!("endpoint{number}"))?;
    let back = format!("back{number}");
    pair(client, &back, &endpoint, "back")?;
    client.ip(&format!("address add 10.78.{number}.1/24 dev {back}"))?;
    endpoint.ip(&format!(
        "address add 10.78.{number}.2/24 dev back
         address add {L4_V4} dev lo
         address add 10.90.{number}.2 dev lo
         route add {CLIENT_V4}/32 via 10.78.{number}.1 dev back"
    ))?;
    let listener = endpoint.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    endpoint.thread("echo", move || {
        for stream in listener.incoming().flatten() {
            let echo = move || echo(stream, number);
            // One that cannot start a thread closes the connection, which the client counts as failed.
            let _ = thread::Builder::new().stack_size(128 * 1024).spawn(echo);
        }
    })?;
    Ok(endpoint)
}

fn echo(mut stream: TcpStream, number: usize) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(format!("{number}\n").as_bytes())?;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

fn edge(
    router: &Namespace,
    number: usize,
    endpoints: &[Namespace],
    passes: &mut Vec<Pass>,
) -> Result<Namespace> {
    let edge = namespace(&format!("edge{number}"))?;
    let up = format!("edge{number}");
    pair(&edge, "uplink", router, &up)?;
    passes.push(Pass::attach(router, &up)?);
    router.ip(&format!("address add 10.91.{number}.1/24 dev {up}"))?;
    edge.ip(&format!(
        "address add 10.91.{number}.2/24 dev uplink
         address add {L4_V4} dev lo
         route add default via 10.91.{number}.1"
    ))?;
    for (index, endpoint) in (1..).zip(endpoints) {
        let (near, far) = (format!("to{index}"), format!("edge{number}"));
        pair(&edge, &near, endpoint, &far)?;
        passes.push(Pass::attach(endpoint, &far)?);
        edge.ip(&format!(
            "address add 10.89.{index}.{number} dev {near}
             route add 10.90.{index}.2/32 dev {near} src 10.89.{index}.{number}"
        ))?;
        endpoint.ip(&format!("route add 10.89.{index}.{number}/32 dev {far}"))?;
    }
    Ok(edge)
}

/// Each edge is an instance of its own, for both stand on one host here; all else is alike, but for the order of endpoints.
fn start(edge: &Namespace, number: usize) -> Result<Process> {
    let mut endpoints: Vec<String> = (1..=ENDPOINTS)
        .map(|index| format!("\"10.90.{index}.2:{PORT}\""))
        .collect();
    endpoints.rotate_left(number);
    let text = format!(
        r#"
[datapath]
interfaces = ["uplink", "to1", "to2", "to3", "to4", "to5"]
mode       = "native"
hash_key   = "all edges of this fleet have it"

[[listener]]
name    = "echo"
address = "{L4_V4}:{PORT}/tcp"
forward = {{ upstream = "echo", via = "direct" }}

[[upstream]]
name      = "echo"
endpoints = [{}]
"#,
        endpoints.join(", ")
    );
    let path = sandbox::folder("fleet")?.join(format!("edge{number}.toml"));
    fs::write(&path, text).context("write the configuration")?;
    let mut command = sluice::command(edge)?;
    let instance = format!("edge{number}");
    command.arg("run").arg("-c").arg(&path);
    command.args(["--instance", &instance]);
    let mut node = Process::start(&instance, command)?;
    wait::until("an edge to be ready", PATIENCE, || {
        match node.expect_running() {
            Ok(()) => node.log().contains("ready: instance").then_some(Ok(())),
            Err(error) => Some(Err(error)),
        }
    })??;
    Ok(node)
}

impl Fleet {
    /// Packets that each edge had from the router.
    fn received(&self) -> Result<Vec<u64>> {
        let path = "/proc/thread-self/net/dev";
        let edges = self.edges.iter().map(|edge| {
            let text = edge.inside(|| fs::read_to_string(path))?;
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix("uplink:"));
            let packets = line.and_then(|line| line.split_ascii_whitespace().nth(1));
            Ok(packets.context("the interface `uplink`")?.parse()?)
        });
        edges.collect()
    }
}

fn flows_of_an_edge_that_goes_go_on_at_the_other(fleet: &mut Fleet) -> Result<()> {
    let to = socket(L4_V4, PORT)?;
    let open = || {
        (0..FLOWS)
            .map(|_| Flow::open(to))
            .collect::<Result<Vec<_>>>()
    };
    let mut flows = fleet.client.inside(open)?;
    let mut names: Vec<&str> = flows.iter().map(|flow| flow.endpoint.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    ensure!(names.len() == ENDPOINTS, "{names:?}");
    let before = fleet.received()?;
    ensure!(before.iter().all(|packets| *packets > 100), "{before:?}");
    round(&mut flows)?;
    fleet.router.ip("link set edge2 down")?;
    let gone = fleet.received()?[1];
    round(&mut flows)?;
    round(&mut flows)?;
    let after = fleet.received()?;
    ensure!(after[1] == gone, "the edge that is gone had packets");
    // Two rounds of all flows, of each at least what it says; acknowledgements may go with it.
    ensure!(
        after[0] >= before[0] + 2 * FLOWS as u64,
        "{before:?}, {after:?}"
    );
    Ok(())
}
