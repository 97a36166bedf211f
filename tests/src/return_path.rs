//! Origins that answer the client by themselves: they have the listener's address and a link of their own to the client, and unwrap what comes wrapped.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use aya::maps::PerCpuArray;
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use proxy_ebpf::measure::Seen;

use crate::field::{CLIENT_V4, CLIENT_V6, Field, L4_V4, L4_V6};
use crate::namespace::Namespace;

/// The origins' way back to the client that does not lead over the edge. It lasts as long as this.
pub struct ReturnPath {
    /// One per origin: its program is attached while it lives.
    unwraps: Vec<Ebpf>,
}

impl ReturnPath {
    /// Gives every origin the listener's addresses, a link to the client, and the program `unwrap` of `floor`
    /// (`proxy_ebpf::object::FLOOR`) in the place of the one that passes everything.
    pub fn lay(field: &mut Field, floor: &[u8]) -> Result<Self> {
        loosen(&field.client)?;
        for (number, origin) in (1..).zip(&field.origins) {
            loosen(origin)?;
            join(&field.client, origin, number)?;
        }
        field.clear_origins();
        let attached = |origin: &Namespace| {
            attach(origin, floor).with_context(|| format!("unwrap packets in {}", origin.label()))
        };
        let unwraps = field.origins.iter().map(attached).collect::<Result<_>>()?;
        Ok(Self { unwraps })
    }

    /// How many packets all origins have seen, by kind.
    pub fn seen(&self) -> Result<BTreeMap<&'static str, u64>> {
        let kinds = [
            ("plain", Seen::Plain),
            ("ipip", Seen::Ipip),
            ("gue", Seen::Gue),
            ("wrong", Seen::Wrong),
        ];
        let mut sums = BTreeMap::new();
        for program in &self.unwraps {
            let map = program.map("unwrapped").context("find the counts")?;
            let counts: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
            for (name, kind) in kinds {
                let by_cpu = counts.get(&(kind as u32), 0)?;
                *sums.entry(name).or_default() += by_cpu.iter().sum::<u64>();
            }
        }
        Ok(sums)
    }
}

/// What the client's and all origins' Linux found wrong with packets: `InCsumErrors` of every protocol, and headers that are
/// not right. Nobody on a veth pair takes a checksum on trust once XDP has sent the packet.
pub fn faults(field: &Field) -> Result<BTreeMap<String, u64>> {
    let mut faults = BTreeMap::new();
    for namespace in std::iter::once(&field.client).chain(&field.origins) {
        let read = |path: &'static str| {
            namespace
                .inside(|| fs::read_to_string(path))
                .with_context(|| format!("read {path}"))
        };
        let v4 = read("/proc/thread-self/net/snmp")?;
        let v6 = read("/proc/thread-self/net/snmp6")?;
        for (name, count) in pairs(&v4).chain(v6.lines().filter_map(|line| {
            let (name, count) = line.split_once(char::is_whitespace)?;
            Some((name.to_owned(), count.trim().parse().ok()?))
        })) {
            if name.ends_with("InCsumErrors") || name.ends_with("InHdrErrors") {
                *faults.entry(name).or_default() += count;
            }
        }
    }
    Ok(faults)
}

/// The numbers of /proc/net/snmp: a line of names, then a line of values, for each protocol.
fn pairs(text: &str) -> impl Iterator<Item = (String, u64)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut pairs = Vec::new();
    for couple in lines.chunks_exact(2) {
        let (mut names, values) = (couple[0].split(' '), couple[1].split(' '));
        let protocol = names.next().unwrap_or_default().trim_end_matches(':');
        for (name, value) in names.zip(values.skip(1)) {
            if let Ok(value) = value.parse() {
                pairs.push((format!("{protocol}{name}"), value));
            }
        }
    }
    pairs.into_iter()
}

/// Packets come in by another interface than answers leave by: that is the point here.
fn loosen(namespace: &Namespace) -> Result<()> {
    for interface in ["all", "default", "eth0"] {
        namespace.set(&format!("ipv4/conf/{interface}/rp_filter"), "0")?;
    }
    Ok(())
}

/// A link from an origin straight to the client.
fn join(client: &Namespace, origin: &Namespace, number: usize) -> Result<()> {
    let back = format!("back{number}");
    // A neighbour is asked for from an address of the link. The service address is none, so it takes a link-local one:
    // without it Linux asks nobody, and says nothing.
    client.ip(&format!(
        "link add {back} type veth peer name back netns {}
         link set {back} addrgenmode none up
         address add 10.78.{number}.1/24 dev {back}
         address add fd78:{number}::1/64 dev {back} nodad
         address add fe80::1/64 dev {back} nodad",
        origin.name()
    ))?;
    origin.ip(&format!(
        "link set back addrgenmode none up
         address add 10.78.{number}.2/24 dev back
         address add fd78:{number}::2/64 dev back nodad
         address add fe80::2/64 dev back nodad
         address add {L4_V4} dev lo
         address add {L4_V6} dev lo nodad
         route add {CLIENT_V4}/32 via 10.78.{number}.1 dev back src {L4_V4}
         route add {CLIENT_V6}/128 via fd78:{number}::1 dev back src {L4_V6}"
    ))
}

fn attach(origin: &Namespace, floor: &[u8]) -> Result<Ebpf> {
    origin.inside(|| {
        let mut object = EbpfLoader::new()
            .load(floor)
            .context("load the floor object")?;
        let program: &mut Xdp = object
            .program_mut("unwrap")
            .context("find the program")?
            .try_into()?;
        program.load()?;
        program.attach("eth0", XdpMode::Driver)?;
        Ok(object)
    })
}
