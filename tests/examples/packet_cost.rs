//! Nanoseconds per packet of the loaded XDP program, beside programs that do nothing, in one run. Needs root.
//!
//! `cargo run --release -p tests --example packet_cost`
//!
//! Each round of BPF_PROG_TEST_RUN starts from a fresh packet: the program `fresh` restores it, makes it one of
//! the next flow and tail-calls what is measured. The figures are raw, wrapper included; compare them with the
//! floor rows. Each row is measured five times, the rows in turn.

#[expect(
    clippy::unwrap_used,
    dead_code,
    reason = "the fixture tests use more of it"
)]
#[path = "../tests/packet/loaded.rs"]
mod loaded;

use std::net::{IpAddr, Ipv4Addr};

use aya::maps::{Array, ProgramArray};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use bytemuck::Zeroable;
use proxy_ebpf::abi::{Tunnel, mode, name};
use proxy_ebpf::measure::{FRESH_BYTES, Fresh};
use proxy_ebpf::object;
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, Frame, SYN, TCP, UDP};

use loaded::{INGRESS, Loaded, Value, now_ns};

const REPEAT: u32 = 2_000_000;
const RUNS: usize = 5;
/// All but eight of them get a port of one of eight sources.
const FLOWS: u64 = 512 * 1024;
const RETURN_FLOWS: u64 = 16 * 1024;

/// The first port of the few sources.
const PORT_FIRST: u16 = 20_000;

/// Where the words begin that the number of the flow is added to: the source address, the ports.
const SOURCE4: u64 = 26;
const SOURCE6: u64 = 34;
const PORTS4: u64 = 34;

const LISTENER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(11, 0, 0, 0));
const ENDPOINT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 1, 1));

/// One line of the table.
struct Row {
    label: &'static str,
    frame: Frame,
    flows: u64,
    counted_at: u64,
    subject: Subject,
    ns: Vec<u64>,
}

/// What a row measures.
#[derive(Clone, Copy)]
enum Subject {
    /// A program of the floor object.
    Floor(&'static str),
    /// Ours, with maps for many flows over IPv4.
    Many(Verdict),
    /// Ours, with one IPv4 source, whose ports are given out in order, and one of IPv6.
    Few(Verdict),
}

fn main() {
    let sizes = |flows| {
        [
            (name::NAT_FLOWS, 16 * 65_535),
            (name::FLOWS, flows),
            (name::RINGS, 16),
        ]
    };
    let (Some(mut many), Some(mut few)) = (
        loaded::load_sized(&sizes(1 << 20)),
        loaded::load_sized(&sizes(1 << 16)),
    ) else {
        return;
    };
    fill_many(&mut many);
    fill_few(&mut few);
    let mut floor = EbpfLoader::new()
        .load(object::FLOOR)
        .expect("the floor loads");
    for name in ["fresh", "pass", "tx", "drop"] {
        xdp(&mut floor, name)
            .load()
            .expect("the verifier accepts it");
    }
    let info = few.ingress().info().expect("what the kernel knows of it");
    println!(
        "ingress: {} instructions verified, {} bytes of machine code",
        info.verified_instruction_count().unwrap_or(0),
        info.size_jitted()
    );
    let mut rows = rows();
    let opening = [
        row("", tcp(80, SYN), FLOWS, Subject::Many(Verdict::Forward)),
        row("", udp(), RETURN_FLOWS, Subject::Few(Verdict::Forward)),
    ];
    for mut row in opening {
        let repeat = row.flows as u32;
        run(&mut floor, &mut many, &mut few, &mut row, repeat);
        println!("opened {} flows, {} ns each", row.flows, row.ns[0]);
    }
    for _ in 0..RUNS {
        for row in &mut rows {
            run(&mut floor, &mut many, &mut few, row, REPEAT);
        }
    }
    println!("{:<44} {:>6} {:>6}", "raw ns per packet", "min", "median");
    for row in &mut rows {
        row.ns.sort_unstable();
        println!("{:<44} {:>6} {:>6}", row.label, row.ns[0], row.ns[RUNS / 2]);
    }
}

fn rows() -> Vec<Row> {
    use Subject::{Few, Floor, Many};
    let (serve, forward) = (Many(Verdict::Serve), Many(Verdict::Forward));
    let (not_ours, back) = (Few(Verdict::NotOurs), Few(Verdict::Return));
    let elsewhere = |port| Frame::tcp((CLIENT, 40_000), (IpAddr::from([192, 0, 2, 9]), port), ACK);
    let banned = Frame::tcp(
        (IpAddr::from([203, 0, 113, 7]), 40_000),
        (LISTENER, 443),
        SYN,
    );
    let tcp6 = Frame::tcp((v6(0x2001, 9), 40_000), (v6(0x2001, 1), 80), SYN);
    let reply = Frame::udp((ENDPOINT, 8080), (IpAddr::from([10, 0, 0, 1]), PORT_FIRST));
    vec![
        row("floor: pass", tcp(80, ACK), 1, Floor("pass")),
        row("floor: tx", tcp(80, ACK), 1, Floor("tx")),
        row("floor: drop", tcp(80, ACK), 1, Floor("drop")),
        row("not ours: another port", tcp(22, ACK), 1, not_ours),
        row(
            "not ours: our port, another address",
            elsewhere(80),
            1,
            not_ours,
        ),
        row(
            "not ours: a NAT port, another address",
            elsewhere(PORT_FIRST),
            1,
            not_ours,
        ),
        row("serve, while 100 bans stand", tcp(443, ACK), 1, serve),
        row(
            "serve, the same, 512 Ki sources",
            tcp(443, ACK),
            FLOWS,
            serve,
        ),
        row("banned", banned, 1, Many(Verdict::Banned)),
        row("forward TCP over IPv4, 1 flow", tcp(80, ACK), 1, forward),
        row(
            "forward TCP over IPv4, 512 Ki flows",
            tcp(80, ACK),
            FLOWS,
            forward,
        ),
        row(
            "forward UDP over IPv4, 1 flow",
            udp(),
            1,
            Few(Verdict::Forward),
        ),
        row(
            "forward TCP over IPv6, 1 flow",
            tcp6,
            1,
            Few(Verdict::Forward),
        ),
        row("direct TCP over IPv4, 1 flow", tcp(81, ACK), 1, forward),
        row("ipip TCP over IPv4, 1 flow", tcp(82, ACK), 1, forward),
        row(
            "ipip TCP over IPv4, 4096 flows",
            tcp(82, ACK),
            4096,
            forward,
        ),
        row(
            "ipip TCP over IPv4, 512 Ki flows",
            tcp(82, ACK),
            FLOWS,
            forward,
        ),
        row(
            "ipip TCP over IPv4, a new flow, clean slot",
            tcp(82, SYN),
            1,
            forward,
        ),
        row("gue TCP over IPv4, 1 flow", tcp(83, ACK), 1, forward),
        row(
            "gue TCP over IPv4, 512 Ki flows",
            tcp(83, ACK),
            FLOWS,
            forward,
        ),
        row(
            "forward TCP over IPv4, 4096 flows",
            tcp(80, ACK),
            4096,
            forward,
        ),
        row("return UDP over IPv4, 1 flow", reply.clone(), 1, back),
        row(
            "return UDP over IPv4, 16 Ki flows",
            reply,
            RETURN_FLOWS,
            back,
        ),
    ]
}

fn tcp(port: u16, flags: u8) -> Frame {
    Frame::tcp((CLIENT, 40_000), (LISTENER, port), flags)
}

fn udp() -> Frame {
    Frame::udp((CLIENT, 40_000), (LISTENER, 80))
}

fn v6(first: u16, last: u16) -> IpAddr {
    IpAddr::from([first, 0, 0, 0, 0, 0, 0, last])
}

fn row(label: &'static str, frame: Frame, flows: u64, subject: Subject) -> Row {
    let counted_at = match subject {
        Subject::Few(Verdict::Return) => PORTS4,
        _ if frame.source.is_ipv6() => SOURCE6,
        _ => SOURCE4,
    };
    // At least as long as what `fresh` restores.
    let frame = frame.with(|frame| frame.payload = vec![0x61; 60]);
    Row {
        label,
        frame,
        flows,
        counted_at,
        subject,
        ns: vec![],
    }
}

fn fill_many(loaded: &mut Loaded) {
    let sources: Vec<IpAddr> = (1..=8).map(|last| IpAddr::from([10, 0, 0, last])).collect();
    loaded.nat(&sources, 1, 65_535);
    let endpoints = [1, 2, 3].map(|id| (id, (IpAddr::from([10, 0, 1, id as u8]), 8080)));
    for (id, at) in endpoints {
        loaded.endpoint(id, at, INGRESS);
    }
    loaded.upstream(1, &endpoints);
    loaded.listener((LISTENER, 80), TCP, mode::NAT, 1);
    for (port, via) in [(81, mode::DIRECT), (82, mode::IPIP), (83, mode::GUE)] {
        loaded.listener((LISTENER, port), TCP, via, 1);
    }
    let mut tunnel = Tunnel::zeroed();
    tunnel.source4 = loaded::address(IpAddr::from([172, 16, 0, 1]));
    tunnel.gue_port = [0x17, 0xc0];
    loaded.tunnel(tunnel);
    loaded.listener((LISTENER, 443), TCP, mode::SERVE, 0);
    for last in 0..100 {
        let source = IpAddr::from([203, 0, 113, last]);
        loaded.ban(source, now_ns() + (1 << 50), 1);
    }
}

fn fill_few(loaded: &mut Loaded) {
    let sources = [IpAddr::from([10, 0, 0, 1]), v6(0xfd00, 1)];
    loaded.nat(&sources, PORT_FIRST, 32_768);
    for (id, address, listener, protocol) in [
        (1, ENDPOINT, LISTENER, UDP),
        (2, v6(0xfd00, 11), v6(0x2001, 1), TCP),
    ] {
        loaded.endpoint(id, (address, 8080), INGRESS);
        loaded.upstream(u32::from(id), &[(id, (address, 8080))]);
        loaded.listener((listener, 80), protocol, mode::NAT, u32::from(id));
    }
}

/// Runs a row's program so often, and checks that ours gave every packet the verdict that the row is about.
fn run(floor: &mut Ebpf, many: &mut Loaded, few: &mut Loaded, row: &mut Row, repeat: u32) {
    let frame = row.frame.bytes();
    let mut template = [0; FRESH_BYTES];
    template.copy_from_slice(&frame[..FRESH_BYTES]);
    let fresh = Fresh {
        template,
        zero: [0; 2],
        round: 0,
        mask: row.flows - 1,
        counted_at: row.counted_at,
        bytes: frame.len() as u64,
    };
    let map = floor.map_mut("template").expect("the map of `fresh`");
    let mut map: Array<_, Value<Fresh>> = Array::try_from(map).expect("an array");
    map.set(0, Value(fresh), 0).expect("a state for `fresh`");
    let measured = match row.subject {
        Subject::Floor(name) => xdp(floor, name).fd(),
        Subject::Many(_) => many.ingress().fd(),
        Subject::Few(_) => few.ingress().fd(),
    };
    let measured = measured.expect("a loaded program");
    let measured = measured.try_clone().expect("one more descriptor");
    let map = floor.map_mut("measured").expect("the map of programs");
    let mut map = ProgramArray::try_from(map).expect("a program array");
    map.set(0, &measured, 0).expect("a program to call");

    let before = verdicts(many, few, row.subject);
    let options = TestRunOptions {
        data_in: Some(&frame),
        repeat,
        ..TestRunOptions::default()
    };
    let result = xdp(floor, "fresh").test_run(options).expect("the test run");
    row.ns.push(result.duration.as_nanos() as u64);
    if let Subject::Floor(_) = row.subject {
        return;
    }
    let missed = u64::from(repeat) - (verdicts(many, few, row.subject) - before);
    // There are eight flows more than ports.
    assert!(
        missed <= u64::from(repeat) / 50_000,
        "{}: {missed}",
        row.label
    );
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let program = ebpf.program_mut(name).expect("a program of that name");
    program.try_into().expect("an XDP program")
}

/// How often the verdict of a row was given.
fn verdicts(many: &mut Loaded, few: &mut Loaded, subject: Subject) -> u64 {
    match subject {
        Subject::Floor(_) => 0,
        Subject::Many(verdict) => many.verdicts()[verdict as usize],
        Subject::Few(verdict) => few.verdicts()[verdict as usize],
    }
}
