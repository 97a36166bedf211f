//! `packet`: nanoseconds per packet of the loaded XDP program, beside programs that do nothing, in one run.
//!
//! Each round of BPF_PROG_TEST_RUN starts from a fresh packet: the program `fresh` restores it, makes it one of the next flow and tail-calls
//! what is measured. The figures are raw, that included; compare them with the floor. Rows are measured five times, in turn. A case is named
//! by what becomes of the packet, protocol and family, and the number of flows.

#[expect(
    clippy::unwrap_used,
    dead_code,
    reason = "the fixture tests use more of it, and may panic"
)]
#[path = "../../../tests/tests/packet/loaded.rs"]
mod loaded;
#[path = "../../../tests/tests/packet/mirror.rs"]
mod mirror;
#[expect(clippy::unwrap_used, reason = "as in the fixture tests")]
#[path = "../../../tests/tests/packet/pool.rs"]
mod pool;

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, ProgramArray};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use bytemuck::Zeroable;
use proxy_ebpf::abi::{Tunnel, mode, name};
use proxy_ebpf::measure::{FRESH_BYTES, Fresh};
use proxy_ebpf::object;
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, Frame, SYN, TCP, UDP};

use self::loaded::{INGRESS, Loaded, Value, now_ns};
use super::Bench;
use crate::metric::Metric;
use crate::report::{self, Report};
use crate::say;

const REPEAT: u32 = 1_000_000;
const RUNS: usize = 5;
/// That stand while packets of others pass, too.
const BANS: u32 = 10_000;
/// Of each family, each once for TCP and once as such.
const PREFIXES: u32 = 1000;
/// The port of all of them.
const PREFIX_PORT: u16 = 84;
/// All but eight of them get a port of one of eight sources.
const FLOWS: u64 = 512 * 1024;
const RETURN_FLOWS: u64 = 16 * 1024;

/// The first port of the few sources.
const PORT_FIRST: u16 = 20_000;

/// Ways of forwarding that keep no flow, and the port of their listeners.
const STATELESS: [(&str, u16); 3] = [("direct", 81), ("ipip", 82), ("gue", 83)];

/// Where the words begin that the number of the flow is added to: the source address, the ports.
const SOURCE4: u64 = 26;
const SOURCE6: u64 = 34;
const PORTS4: u64 = 34;

const LISTENER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(11, 0, 0, 0));
const ENDPOINT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 1, 1));

/// One line of the table.
struct Row {
    case: String,
    frame: Frame,
    /// The program puts something in front of it.
    grows: bool,
    flows: u64,
    counted_at: u64,
    subject: Subject,
    ns: Vec<f64>,
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

/// One packet of a scenario, measured again and again.
pub fn measure(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    if !bench.has("sluice") {
        return Ok(());
    }
    let sizes = |flows| {
        [
            (name::NAT_FLOWS, 16 * 65_535),
            (name::FLOWS, flows),
            (name::RINGS, 16),
            (name::BANS, BANS * 2),
            (name::PREFIXES, PREFIXES * 4),
        ]
    };
    let many = loaded::load_sized(&sizes(1 << 20)).context("load the kernel half: needs root")?;
    let few = loaded::load_sized(&sizes(1 << 16)).context("load the kernel half: needs root")?;
    let mut floor = EbpfLoader::new()
        .load(object::FLOOR)
        .context("load the floor")?;
    for name in ["fresh", "pass", "tx", "drop"] {
        xdp(&mut floor, name)?
            .load()
            .context("the verifier refuses it")?;
    }
    let mut subjects = Subjects { floor, many, few };
    fill_many(&mut subjects.many);
    fill_few(&mut subjects.few);
    let mut rows = rows();
    rows.retain(|row| bench.wants(&row.case));
    let opening = [
        row("", tcp(80, SYN), FLOWS, Subject::Many(Verdict::Forward)),
        row("", udp(80), RETURN_FLOWS, Subject::Few(Verdict::Forward)),
    ];
    for mut row in opening {
        let repeat = row.flows as u32;
        subjects.run(&mut row, repeat)?;
        say::note(&format!(
            "opened {} flows, {} ns each",
            row.flows, row.ns[0]
        ));
    }
    for _ in 0..RUNS {
        for row in &mut rows {
            subjects.run(row, REPEAT)?;
        }
    }
    for row in rows {
        let proxy = match row.subject {
            Subject::Floor(_) => "floor",
            _ => "sluice",
        };
        report.rows.push(report::Row::new(
            proxy,
            &row.case,
            Metric::NsPerPacket,
            row.ns,
        ));
    }
    report.remarks.push(
        "raw figures, the program that makes each packet anew included: compare with the floor"
            .into(),
    );
    report.remarks.push(
        "what is encapsulated, and its floor, has to be cut to its length again each round".into(),
    );
    report.remarks.push(
        "UDP and IPv6 by NAT: up to 4 096 flows, for one source has no ports for 512 Ki".into(),
    );
    Ok(())
}

fn rows() -> Vec<Row> {
    use Subject::{Few, Floor, Many};
    let (serve, forward) = (Many(Verdict::Serve), Many(Verdict::Forward));
    let (not_ours, back) = (Few(Verdict::NotOurs), Few(Verdict::Return));
    let elsewhere = |port| Frame::tcp((CLIENT, 40_000), (IpAddr::from([192, 0, 2, 9]), port), ACK);
    let banned = Frame::tcp((IpAddr::from([203, 0, 7, 7]), 40_000), (LISTENER, 443), SYN);
    let few = Few(Verdict::Forward);
    let reply = Frame::udp((ENDPOINT, 8080), (IpAddr::from([10, 0, 0, 1]), PORT_FIRST));
    let mut rows = vec![
        row("floor/pass", tcp(80, ACK), 1, Floor("pass")),
        row("floor/tx", tcp(80, ACK), 1, Floor("tx")),
        row("floor/drop", tcp(80, ACK), 1, Floor("drop")),
        row("not-ours/1", tcp(22, ACK), 1, not_ours),
        row("not-ours-address/1", elsewhere(80), 1, not_ours),
        row("not-ours-nat-port/1", elsewhere(PORT_FIRST), 1, not_ours),
        row("serve-tcp4/1", tcp(443, ACK), 1, serve),
        row("serve-tcp4/524288", tcp(443, ACK), FLOWS, serve),
        row("banned/10000", banned, 1, Many(Verdict::Banned)),
        row("nat-tcp4/1", tcp(80, ACK), 1, forward),
        row("nat-tcp4/524288", tcp(80, ACK), FLOWS, forward),
        row("nat-tcp4/4096", tcp(80, ACK), 4096, forward),
        grown("floor/tx-cut", tcp(82, ACK), 1, Floor("tx")),
        grown("syn-new/524288", tcp(82, SYN), FLOWS, forward),
        row("nat-udp4/1", udp(80), 1, few),
        row("nat-udp4/4096", udp(80), 4096, few),
        // The first round opens the flow: no IPv6 client did before.
        row("nat-tcp6/1", tcp6(80, SYN), 1, few),
        row("nat-tcp6/4096", tcp6(80, SYN), 4096, few),
        row("nat-udp6/1", udp6(80), 1, few),
        row("nat-udp6/4096", udp6(80), 4096, few),
        row("return-udp4/1", reply.clone(), 1, back),
        row("return-udp4/16384", reply, RETURN_FLOWS, back),
    ];
    for (name, host, verdict) in [
        ("ipip-prefix", 7, Verdict::Forward),
        ("not-ours-prefix", 0, Verdict::NotOurs),
    ] {
        // The last byte of the client's address is the flow's; that of the listener's is any of its prefix.
        let to4 = IpAddr::from((0x1400_0000u32 + (host << 12) + 9).to_be_bytes());
        let to6 = IpAddr::from([0x2001, 0xdb8, host as u16, 0, 0, 0, 0, 9]);
        for (kind, from, to) in [("tcp4", CLIENT, to4), ("tcp6", v6(0x2001, 9), to6)] {
            let frame = Frame::tcp((from, 40_000), (to, PREFIX_PORT), ACK);
            rows.push(Row {
                grows: verdict == Verdict::Forward,
                ..row(&format!("{name}-{kind}/1"), frame, 1, Many(verdict))
            });
        }
    }
    for (via, port) in STATELESS {
        let frames = [
            ("tcp4", tcp(port, ACK)),
            ("udp4", udp(port)),
            ("tcp6", tcp6(port, ACK)),
            ("udp6", udp6(port)),
        ];
        for (kind, frame) in frames {
            for flows in [1, 4096, FLOWS] {
                let case = format!("{via}-{kind}/{flows}");
                rows.push(Row {
                    grows: via != "direct",
                    ..row(&case, frame.clone(), flows, forward)
                });
            }
        }
    }
    rows
}

fn tcp(port: u16, flags: u8) -> Frame {
    Frame::tcp((CLIENT, 40_000), (LISTENER, port), flags)
}

fn udp(port: u16) -> Frame {
    Frame::udp((CLIENT, 40_000), (LISTENER, port))
}

fn tcp6(port: u16, flags: u8) -> Frame {
    Frame::tcp((v6(0x2001, 9), 40_000), (v6(0x2001, 1), port), flags)
}

fn udp6(port: u16) -> Frame {
    Frame::udp((v6(0x2001, 9), 40_000), (v6(0x2001, 1), port))
}

fn v6(first: u16, last: u16) -> IpAddr {
    IpAddr::from([first, 0, 0, 0, 0, 0, 0, last])
}

fn row(case: &str, frame: Frame, flows: u64, subject: Subject) -> Row {
    let counted_at = match subject {
        Subject::Few(Verdict::Return) => PORTS4,
        _ if frame.source.is_ipv6() => SOURCE6,
        _ => SOURCE4,
    };
    // At least as long as what `fresh` restores.
    let frame = frame.with(|frame| frame.payload = vec![0x61; 60]);
    Row {
        case: case.to_owned(),
        frame,
        grows: false,
        flows,
        counted_at,
        subject,
        ns: vec![],
    }
}

/// A row whose packet the program encapsulates.
fn grown(case: &str, frame: Frame, flows: u64, subject: Subject) -> Row {
    Row {
        grows: true,
        ..row(case, frame, flows, subject)
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
    let endpoint6 = (4, (v6(0xfd00, 11), 8080));
    loaded.endpoint(endpoint6.0, endpoint6.1, INGRESS);
    loaded.upstream(2, &[endpoint6]);
    let modes = [mode::DIRECT, mode::IPIP, mode::GUE];
    for ((_, port), via) in STATELESS.into_iter().zip(modes) {
        for protocol in [TCP, UDP] {
            loaded.listener((LISTENER, port), protocol, via, 1);
            loaded.listener((v6(0x2001, 1), port), protocol, via, 2);
        }
    }
    let mut tunnel = Tunnel::zeroed();
    tunnel.source6 = loaded::address(v6(0x100, 1));
    tunnel.source4 = loaded::address(IpAddr::from([172, 16, 0, 1]));
    tunnel.gue_port = [0x17, 0xc0];
    loaded.tunnel(tunnel);
    loaded.listener((LISTENER, 443), TCP, mode::SERVE, 0);
    for number in 1..=PREFIXES {
        let v4 = IpAddr::from((0x1400_0000 + (number << 12)).to_be_bytes());
        let v6 = IpAddr::from([0x2001, 0xdb8, number as u16, 0, 0, 0, 0, 0]);
        for (at, bits, upstream) in [(v4, 20, 1), (v6, 64, 2)] {
            let ways = [((PREFIX_PORT, PREFIX_PORT), mode::IPIP, upstream)];
            loaded.prefix((at, bits), TCP, &ways);
        }
    }
    for number in 0..BANS {
        let source = IpAddr::from((0xcb00_0000 + number).to_be_bytes());
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
    loaded.listener((v6(0x2001, 1), 80), UDP, mode::NAT, 2);
}

/// What rows measure.
struct Subjects {
    floor: Ebpf,
    many: Loaded,
    few: Loaded,
}

impl Drop for Subjects {
    fn drop(&mut self) {
        // Of what ran here their model knows nothing, and is not to be asked.
        self.many.ebpf = None;
        self.few.ebpf = None;
    }
}

impl Subjects {
    /// Runs a row's program so often, and checks that ours gave every packet the verdict that the row is about.
    fn run(&mut self, row: &mut Row, repeat: u32) -> Result<()> {
        let frame = row.frame.bytes();
        let mut template = [0; FRESH_BYTES];
        template.copy_from_slice(&frame[..FRESH_BYTES]);
        let fresh = Fresh {
            template,
            zero: [0; 2],
            round: 0,
            mask: row.flows - 1,
            counted_at: row.counted_at,
            bytes: if row.grows { frame.len() as u64 } else { 0 },
        };
        let map = self
            .floor
            .map_mut("template")
            .context("the map of `fresh`")?;
        let mut map: Array<_, Value<Fresh>> = Array::try_from(map)?;
        map.set(0, Value(fresh), 0)?;
        let measured = match row.subject {
            Subject::Floor(name) => xdp(&mut self.floor, name)?.fd()?.try_clone()?,
            Subject::Many(_) => self.many.ingress().fd()?.try_clone()?,
            Subject::Few(_) => self.few.ingress().fd()?.try_clone()?,
        };
        let map = self
            .floor
            .map_mut("measured")
            .context("the map of programs")?;
        ProgramArray::try_from(map)?.set(0, &measured, 0)?;

        let before = self.verdicts(row.subject);
        let options = TestRunOptions {
            data_in: Some(&frame),
            repeat,
            ..TestRunOptions::default()
        };
        let result = xdp(&mut self.floor, "fresh")?
            .test_run(options)
            .context("the test run")?;
        row.ns.push(result.duration.as_nanos() as f64);
        if let Subject::Floor(_) = row.subject {
            return Ok(());
        }
        let missed = u64::from(repeat) - (self.verdicts(row.subject) - before);
        // There are eight flows more than ports.
        ensure!(
            missed <= u64::from(repeat) / 50_000,
            "{}: {missed} packets had another verdict",
            row.case
        );
        Ok(())
    }

    /// How often the verdict of a row was given.
    fn verdicts(&mut self, subject: Subject) -> u64 {
        match subject {
            Subject::Floor(_) => 0,
            Subject::Many(verdict) => self.many.verdicts()[verdict as usize],
            Subject::Few(verdict) => self.few.verdicts()[verdict as usize],
        }
    }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name).context("a program of that name")?;
    Ok(program.try_into()?)
}
