//! Another balancer's test vectors, replayed: what it does with 161 packets, and what we do with them.
//!
//! They are no part of the project. `SLUICE_KATRAN_VECTORS` names a file of them (schema katran-fixtures-neutral/1);
//! each is sent with the ring forced to the endpoint that its expected output names. What differs must be a decision: see
//! docs/katran.md. Without a file nothing is compared.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bytemuck::Zeroable;
use proxy_ebpf::abi::{Tunnel, mode};
use proxy_ebpf::verdict::Verdict;
use rig::model::{self, Part};
use rig::packet::{ICMP, ICMPV6, TCP, UDP, checksum};
use serde::Deserialize;

use crate::loaded::{Action, INGRESS, Loaded, Outcome, address, load, skip};

const VECTORS: &str = "SLUICE_KATRAN_VECTORS";

#[derive(Deserialize)]
struct Vectors {
    provision: Provision,
    sets: BTreeMap<String, Set>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Provision {
    base: Vec<Vip>,
    cidr: Vec<Vip>,
    stable_rt: Vec<Vip>,
    flowmig: Vec<Vip>,
    xpop: Vec<Vip>,
}

#[derive(Deserialize)]
struct Set {
    encap: String,
    provision: Vec<String>,
}

#[derive(Clone, Deserialize)]
struct Vip {
    /// An address, or a prefix.
    address: String,
    /// 0 = all.
    port: u16,
    proto: String,
    reals: Vec<String>,
}

#[derive(Deserialize)]
struct Case {
    id: String,
    set: String,
    category: String,
    description: String,
    expected_verdict: String,
    input_hex: String,
    expected_output_hex: String,
}

/// What came out of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Result {
    Same,
    /// The same but for fields of the outer header that are each balancer's own.
    SameInside,
    /// Made the same way, for the endpoint that Katran chose by something that we do not read.
    SameForm(&'static str),
    Decided(&'static str),
    Unexplained,
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

impl Vip {
    fn covers(&self, to: IpAddr, port: u16, protocol: u8) -> bool {
        let (network, bits) = self
            .address
            .split_once('/')
            .unwrap_or((&self.address, "128"));
        let network = address(network.parse().unwrap());
        let bits: u32 = bits.parse().unwrap();
        let mask = if bits == 0 {
            0
        } else {
            u128::MAX << (128 - bits)
        };
        let number = |address: [u8; 16]| u128::from_be_bytes(address) & mask;
        let wanted = if self.proto == "tcp" { TCP } else { UDP };
        number(network.0) == number(address(to).0)
            && (self.port == 0 || self.port == port)
            && wanted == protocol
    }
}

/// The virtual addresses of a set.
fn vips(provision: &Provision, set: &Set) -> Vec<Vip> {
    let mut vips = vec![];
    for name in &set.provision {
        let more: &[Vip] = match name.as_str() {
            "base" | "lpm" => &provision.base,
            "cidr" => &provision.cidr,
            "stable_rt" => &provision.stable_rt,
            "xpop" => &provision.xpop,
            _ if name.contains("flowmig") || name.contains("flow_migration") => &provision.flowmig,
            _ => &[],
        };
        vips.extend_from_slice(more);
    }
    vips
}

/// The outer destination of an encapsulated frame.
fn outer_destination(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x08, 0x00] => {
            let octets: [u8; 4] = frame.get(30..34)?.try_into().unwrap();
            Some(IpAddr::from(octets))
        }
        [0x86, 0xdd] => {
            let octets: [u8; 16] = frame.get(38..54)?.try_into().unwrap();
            Some(IpAddr::from(octets))
        }
        _ => None,
    }
}

/// The listener that stands for a virtual address, exactly where the packet goes: all ports and prefixes have
/// tests of their own.
fn provide(loaded: &mut Loaded, vips: &[Vip], case: &Case, via: u32) {
    let input = unhex(&case.input_hex);
    let Ok(packet) = model::read(&input, |_| true) else {
        return;
    };
    let to = if packet.v6 {
        IpAddr::from(packet.destination.0)
    } else {
        IpAddr::from(packet.destination.as_v4())
    };
    let later = packet.part == Part::Later;
    let covers = |vip: &&Vip| {
        vip.covers(to, packet.destination_port, packet.protocol)
            || (later && vip.covers(to, vip.port, packet.protocol))
    };
    let Some(vip) = vips.iter().find(covers) else {
        return;
    };
    let sent = case.expected_verdict == "XDP_TX";
    let real = outer_destination(&unhex(&case.expected_output_hex)).filter(|_| sent);
    let real = real.or_else(|| vip.reals.first().map(|real| real.parse().unwrap()));
    let members: Vec<_> = real.iter().map(|real| (1, (*real, 80))).collect();
    for member in &members {
        loaded.endpoint_entry(1, member.1, INGRESS, |endpoint| {
            endpoint.mac = [0, 0, 0xde, 0xad, 0xbe, 0xaf];
            endpoint.source_mac.copy_from_slice(&input[..6]);
            endpoint.mtu_bytes = 1500;
        });
    }
    loaded.upstream(1, &members);
    loaded.listener((to, packet.destination_port), packet.protocol, via, 1);
}

/// Zeroes what is each balancer's own in an outer header: source bits from the flow, flags, label, GUE's port, checksums.
fn without_own(frame: &[u8], gue: bool) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let transport = match frame[12..14] {
        [0x08, 0x00] => {
            frame[20..22].fill(0);
            frame[24..26].fill(0);
            frame[26..30].fill(0);
            34
        }
        _ => {
            frame[15] &= 0xf0;
            frame[16..18].fill(0);
            frame[22..38].fill(0);
            54
        }
    };
    if gue && frame.len() >= transport + 8 {
        frame[transport..transport + 2].fill(0);
        frame[transport + 6..transport + 8].fill(0);
    }
    frame
}

fn judge(case: &Case, outcome: &Outcome, gue: bool) -> Result {
    let expected = unhex(&case.expected_output_hex);
    let action = match case.expected_verdict.as_str() {
        "XDP_TX" => Action::Tx,
        "XDP_DROP" => Action::Drop,
        _ => Action::Pass,
    };
    let chosen = match case.category.as_str() {
        "quic_cid" => Some("a connection id names no endpoint of ours"),
        "tcp_server_id_option" => Some("no TCP option names an endpoint of ours"),
        "source_lpm_routing" => Some("the source's prefix chooses no endpoint of ours"),
        "udp_stable_routing" => Some("no header of UDP payload names an endpoint of ours"),
        "dst_port_hash" => Some("a flow's whole key is hashed"),
        _ => None,
    };
    if outcome.action == action {
        if outcome.bytes == expected {
            return Result::Same;
        }
        let tunnelled = outcome.verdict == Verdict::Forward;
        if tunnelled && without_own(&outcome.bytes, gue) == without_own(&expected, gue) {
            return chosen.map_or(Result::SameInside, Result::SameForm);
        }
    }
    decided(case, outcome).map_or(Result::Unexplained, Result::Decided)
}

/// Why we do otherwise.
fn decided(case: &Case, outcome: &Outcome) -> Option<&'static str> {
    let untouched = outcome.bytes == unhex(&case.input_hex);
    let passed = outcome.action == Action::Pass && untouched;
    match (case.category.as_str(), outcome.verdict) {
        ("icmp_echo_reply", Verdict::NotOurs) if passed => Some("Linux answers echo requests"),
        ("drop", Verdict::NoEndpoint) if passed => {
            Some("nothing is dropped that no operator refused: without endpoints to Linux")
        }
        ("drop", Verdict::NotOurs) if passed => {
            Some("behind the fragment header stands neither TCP nor UDP: to Linux")
        }
        ("drop", Verdict::Forward) => Some("options and fragments are forwarded"),
        ("drop", Verdict::Unsupported) if passed => {
            Some("a later fragment without its first one goes to Linux")
        }
        ("drop", Verdict::TooBig) => Some("the sender of what does not fit is told"),
        ("icmp_too_big_generation", Verdict::TooBig) => is_told(case, outcome).then_some(
            "the sender is told the exact size that fits, and more of its packet is quoted",
        ),
        ("decap", Verdict::NotOurs) if passed => Some("nothing is decapsulated: to Linux"),
        ("decap", Verdict::Forward) => Some("the outer packet is one to that listener"),
        _ => None,
    }
}

/// Whether both answers go the same way, say the same, and quote the packet.
fn is_told(case: &Case, outcome: &Outcome) -> bool {
    let (ours, theirs, sent) = (
        &outcome.bytes,
        unhex(&case.expected_output_hex),
        unhex(&case.input_hex),
    );
    let (icmp, addresses) = if ours[12] == 0x86 {
        (54, 22..54)
    } else {
        (34, 26..34)
    };
    let number = if ours[12] == 0x86 { ours[20] } else { ours[23] };
    let right = checksum(&ours[14..34]) == [0, 0] || ours[12] == 0x86;
    right
        && matches!(number, ICMP | ICMPV6)
        && ours[..14] == theirs[..14]
        && ours[addresses.clone()] == theirs[addresses]
        && ours[icmp..icmp + 2] == theirs[icmp..icmp + 2]
        && ours[icmp + 8..] == sent[14..14 + ours.len() - icmp - 8]
}

#[test]
fn every_difference_to_katran_is_a_decision() {
    let Ok(path) = std::env::var(VECTORS) else {
        skip(&format!("{VECTORS} names no file"));
        return;
    };
    let text = std::fs::read_to_string(&path).unwrap();
    let vectors: Vectors = serde_json::from_str(&text).unwrap();
    let mut counts: BTreeMap<Result, usize> = BTreeMap::new();
    for case in &vectors.cases {
        if case.category == "healthcheck_encap" {
            let reason = "probes are not encapsulated by a program of their own";
            *counts.entry(Result::Decided(reason)).or_default() += 1;
            continue;
        }
        let set = &vectors.sets[&case.set];
        let gue = set.encap == "gue";
        let Some(mut loaded) = load() else { return };
        let mut tunnel = Tunnel::zeroed();
        let (v4, v6) = match gue {
            true => ("10.0.13.37", "fc00:2307::1337"),
            false => ("172.16.0.0", "100::"),
        };
        tunnel.source4 = address(v4.parse().unwrap());
        tunnel.source6 = address(v6.parse().unwrap());
        tunnel.entropy4 = 0xffffu32.to_be();
        tunnel.entropy6 = u32::MAX;
        tunnel.gue_port = 9886u16.to_be_bytes();
        loaded.tunnel(tunnel);
        let via = if gue { mode::GUE } else { mode::IPIP };
        provide(&mut loaded, &vips(&vectors.provision, set), case, via);
        let outcome = loaded.send(&unhex(&case.input_hex));
        let result = judge(case, &outcome, gue);
        let (word, reason) = result.words();
        println!("{word:11} {:22} {}: {reason}", case.id, case.description);
        if result == Result::Unexplained {
            println!(
                "  wanted {} {}",
                case.expected_verdict, case.expected_output_hex
            );
            let ours = crate::mirror::hex(&outcome.bytes);
            println!("  made   {} {ours}", outcome.verdict.name());
        }
        *counts.entry(result).or_default() += 1;
    }
    for (result, count) in &counts {
        let (word, reason) = result.words();
        println!("{count:4} {word} {reason}");
    }
    assert_eq!(counts.get(&Result::Unexplained), None);
}

impl Result {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Same => ("same", "to the byte"),
            Self::SameInside => ("same", "but for what is its own in each outer header"),
            Self::SameForm(reason) => ("form", reason),
            Self::Decided(reason) => ("different", reason),
            Self::Unexplained => ("UNEXPLAINED", ""),
        }
    }
}
