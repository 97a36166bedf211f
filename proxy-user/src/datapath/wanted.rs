//! From the configuration to what the kernel half shall do.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proxy_ebpf::abi::{mode, option, protocol};

use super::plan::{
    Wanted, WantedEndpoint, WantedListener, WantedNat, WantedPrefix, WantedUpstream,
};
use crate::config::{
    AllDown, Config, Fragments, ListenAddress, ListenerMode, Nearness, PolicyKind, Protocol,
    UdpFlows, Via, prefixes,
};
use crate::offload::now_ns;
use crate::tunable::Tunables;
use crate::upstream::{Endpoint, Upstream};

/// Which endpoints stand in a ring: those of one upstream, of one family or of both, and what when all are down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RingOf {
    /// Index in `Config::upstreams`.
    pub upstream: usize,
    v4: Option<bool>,
    all_down: AllDown,
}

/// What `config` asks of the kernel half with these `upstreams`, and which ring of it is of whom. An endpoint that is
/// not reached is as good as a dead one. `addresses` are those of the interfaces that XDP is attached to, which a listener on
/// all addresses stands for.
pub fn wanted(
    config: &Config,
    upstreams: &[Arc<Upstream>],
    tunables: &Tunables,
    addresses: &[IpAddr],
    is_reached: impl Fn(IpAddr) -> bool,
) -> (Wanted, Vec<RingOf>) {
    let mut wanted = Wanted {
        nat: nat(config, tunables),
        tunnel: tunnel(config),
        rules: rules(config),
        ..Wanted::default()
    };
    let mut listeners = Vec::new();
    // Only upstreams that a listener forwards to have a ring: one for each family by NAT, one for both otherwise.
    let (mut rings, mut known) = (Vec::new(), HashMap::new());
    let all = config.listeners.iter().flat_map(|one| &one.addresses);
    let of_prefixes = prefixes(all);
    for listener in &config.listeners {
        let upstream = match &listener.mode {
            ListenerMode::Serve { .. } => None,
            ListenerMode::Forward {
                upstream,
                via,
                all_down,
                ..
            } => Some((*upstream, *via, *all_down)),
        };
        for address in &listener.addresses {
            let protocol = match address.protocol {
                Protocol::Tcp => protocol::TCP,
                Protocol::Udp => protocol::UDP,
            };
            let mut way_of = |ip: IpAddr| {
                let (index, via, all_down) = upstream?;
                let of = RingOf {
                    upstream: index,
                    v4: (!via.crosses_families()).then_some(ip.is_ipv4()),
                    all_down,
                };
                let ring = *known.entry(of).or_insert_with(|| {
                    let upstream = upstreams.get(index).map(Arc::as_ref);
                    wanted.upstreams.push(of.ring(upstream, &is_reached));
                    rings.push(of);
                    wanted.upstreams.len() - 1
                });
                Some((ring, mode_of(via)))
            };
            if of_prefixes.contains(address) {
                wanted.prefixes.push(WantedPrefix {
                    name: listener.name.clone(),
                    address: *address,
                    protocol,
                    upstream: way_of(address.socket.ip()),
                    options: options(&listener.mode),
                });
                continue;
            }
            let own = expand(address, addresses);
            let all = own
                .iter()
                .flat_map(|ip| address.ports().map(move |port| (*ip, port)));
            for (ip, port) in all {
                let one = WantedListener {
                    name: listener.name.clone(),
                    address: SocketAddr::new(ip, port),
                    protocol,
                    upstream: way_of(ip),
                    options: options(&listener.mode),
                };
                listeners.push((Nearness::of(address), one));
            }
        }
    }
    listeners.retain(|(nearness, one)| !is_prefix_nearer(&wanted.prefixes, *nearness, one));
    wanted.listeners = nearest(listeners);
    (wanted, rings)
}

impl RingOf {
    /// The endpoints as they are now. A ring that goes on when all are down has a name of its own, beside that of a listener
    /// which would refuse.
    pub fn ring(
        self,
        upstream: Option<&Upstream>,
        is_reached: impl Fn(IpAddr) -> bool,
    ) -> WantedUpstream {
        let is_of_family = |endpoint: &&Endpoint| {
            let is_v4 = endpoint.address.is_ipv4();
            self.v4.is_none_or(|v4| is_v4 == v4)
        };
        let now_ns = now_ns();
        let of_ring = upstream.iter().flat_map(|upstream| &upstream.endpoints);
        let of_ring = of_ring.filter(is_of_family);
        let is_backup: Vec<bool> = of_ring.map(|endpoint| endpoint.is_backup).collect();
        let endpoints = upstream.iter().flat_map(|upstream| {
            let endpoints = upstream.endpoints.iter();
            let of_family = endpoints.filter(is_of_family);
            of_family.map(|endpoint| WantedEndpoint {
                address: endpoint.address,
                weight: upstream.weight_in_ring(endpoint, now_ns),
                healthy: upstream.believes_in(endpoint) && is_reached(endpoint.address.ip()),
            })
        });
        let mut ring = WantedUpstream {
            // A name of the configuration's has no space in it.
            name: format!(
                "{} {}",
                upstream.map_or("", |upstream| &upstream.name),
                match self.v4 {
                    Some(true) => "IPv4",
                    Some(false) => "IPv6",
                    None => "all",
                }
            ),
            endpoints: endpoints.collect(),
        };
        if self.all_down == AllDown::LastKnown {
            keep_when_all_are_down(&mut ring);
        }
        if upstream.is_none_or(|upstream| !upstream.is_helped()) {
            relieve(&mut ring, &is_backup);
        }
        ring
    }
}

/// Whether one of the prefixes has an address and port of another listener's, and is nearer: the kernel half asks for
/// single addresses first.
fn is_prefix_nearer(prefixes: &[WantedPrefix], nearness: Nearness, one: &WantedListener) -> bool {
    prefixes.iter().any(|prefix| {
        prefix.protocol == one.protocol
            && Nearness::of(&prefix.address) > nearness
            && prefix.address.has_ip(one.address.ip())
            && prefix.address.has_port(one.address.port())
    })
}

/// Where several stand for the same address and port, the nearest is meant; one of all ports has what no other has that is
/// at least as near.
fn nearest(listeners: Vec<(Nearness, WantedListener)>) -> Vec<WantedListener> {
    let mut best: HashMap<(SocketAddr, u8), Nearness> = HashMap::new();
    for (nearness, listener) in &listeners {
        let place = best.entry((listener.address, listener.protocol));
        let known = place.or_insert(*nearness);
        *known = (*known).max(*nearness);
    }
    let is_meant = |nearness: &Nearness, listener: &WantedListener| {
        let mut all_ports = listener.address;
        all_ports.set_port(0);
        let all_ports = best.get(&(all_ports, listener.protocol));
        best.get(&(listener.address, listener.protocol)) == Some(nearness)
            && all_ports.is_none_or(|all_ports| nearness.is_as_near(*all_ports))
    };
    let mut kept = Vec::new();
    for (nearness, listener) in listeners {
        if is_meant(&nearness, &listener) {
            kept.push(listener);
        }
    }
    kept
}

const fn mode_of(via: Via) -> u32 {
    match via {
        Via::Nat => mode::NAT,
        Via::Direct => mode::DIRECT,
        Via::Ipip => mode::IPIP,
        Via::Gue => mode::GUE,
    }
}

const fn options(listener: &ListenerMode) -> u32 {
    let ListenerMode::Forward { fragments, udp, .. } = listener else {
        return 0;
    };
    let fragments = match fragments {
        Fragments::Follow => 0,
        Fragments::Pass => option::FRAGMENTS_PASS,
        Fragments::Drop => option::FRAGMENTS_DROP,
    };
    match udp {
        UdpFlows::Stay => fragments,
        UdpFlows::Move => fragments | option::UDP_MOVE,
    }
}

/// When nobody is said to be healthy, nobody is left out.
fn keep_when_all_are_down(ring: &mut WantedUpstream) {
    ring.name.push_str(" kept");
    if ring.endpoints.iter().all(|endpoint| !endpoint.healthy) {
        for endpoint in &mut ring.endpoints {
            endpoint.healthy = true;
        }
    }
}

/// The unspecified address stands for every address of its family.
fn expand(address: &ListenAddress, addresses: &[IpAddr]) -> Vec<IpAddr> {
    if !address.socket.ip().is_unspecified() {
        return address.ips().collect();
    }
    addresses
        .iter()
        .copied()
        .filter(|own| own.is_ipv4() == address.socket.is_ipv4())
        .collect()
}

fn nat(config: &Config, tunables: &Tunables) -> Option<WantedNat> {
    let ns = |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let tcp_idle_ns = ns(tunables.flow.tcp_idle_timeout);
    config.datapath.nat.as_ref().map(|nat| WantedNat {
        sources: nat.source.clone(),
        port_first: nat.ports.0,
        port_last: nat.ports.1,
        tcp_idle_ns,
        tcp_brief_ns: ns(tunables.flow.tcp_brief_timeout).min(tcp_idle_ns),
        udp_idle_ns: ns(tunables.flow.udp_idle_timeout),
    })
}

fn tunnel(config: &Config) -> Vec<IpAddr> {
    let tunnel = config.datapath.tunnel.as_ref();
    tunnel.map_or_else(Vec::new, |tunnel| tunnel.source.clone())
}

fn rules(config: &Config) -> Vec<String> {
    let bans =
        |kind: &PolicyKind| matches!(kind, PolicyKind::RateLimit(limit) if limit.ban.is_some());
    config
        .policies
        .iter()
        .filter(|policy| bans(&policy.kind))
        .map(|policy| policy.name.clone())
        .collect()
}

/// Endpoints that stand in have no slots as long as one of every day has.
fn relieve(ring: &mut WantedUpstream, is_backup: &[bool]) {
    let mut pairs = ring.endpoints.iter().zip(is_backup);
    if pairs.any(|(endpoint, is_backup)| endpoint.healthy && endpoint.weight > 0 && !is_backup) {
        let backups = ring.endpoints.iter_mut().zip(is_backup);
        backups
            .filter(|(_, is_backup)| **is_backup)
            .for_each(|(endpoint, _)| endpoint.healthy = false);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Bundle, load};
    use crate::upstream;

    fn wanted_from(text: String, is_healthy: impl Fn(SocketAddr) -> bool) -> Wanted {
        let files = Bundle::of_files([("/c/s.toml", text)]);
        let loaded = load(&files, Path::new("/c/s.toml"))
            .unwrap_or_else(|diagnostics| panic!("{diagnostics:?}"));
        let upstreams = upstream::build(&loaded.config, 1, 7, None);
        for endpoint in upstreams.iter().flat_map(|upstream| &upstream.endpoints) {
            endpoint.health().record(is_healthy(endpoint.address), 1, 1);
        }
        wanted(&loaded.config, &upstreams, &loaded.tunables, &[], |_| true).0
    }

    fn wanted_of(forward: &str, is_healthy: impl Fn(SocketAddr) -> bool) -> Wanted {
        let text = format!(
            "[datapath]\ninterfaces = [\"eth0\"]\n\
             [[listener]]\nname = \"one\"\naddress = \"203.0.113.1:53/udp\"\n\
             forward = {{ upstream = \"u\", via = \"direct\"{forward} }}\n\
             [[listener]]\nname = \"two\"\naddress = \"203.0.113.2:53/udp\"\n\
             forward = {{ upstream = \"u\", via = \"direct\" }}\n\
             [[upstream]]\nname = \"u\"\nendpoints = [\"10.0.0.1:53\", \"10.0.0.2:53\"]\n"
        );
        wanted_from(text, is_healthy)
    }

    fn healthy(wanted: &Wanted) -> Vec<Vec<bool>> {
        let of_ring =
            |ring: &WantedUpstream| ring.endpoints.iter().map(|one| one.healthy).collect();
        wanted.upstreams.iter().map(of_ring).collect()
    }

    #[test]
    fn when_all_are_down_a_listener_may_go_on_as_if_none_were() {
        let first = |at: SocketAddr| at.ip() == IpAddr::from([10, 0, 0, 1]);
        let none = |_| false;
        assert_eq!(healthy(&wanted_of("", none)), [[false, false]]);
        let kept = ", all_down = \"last_known\"";
        // The other listener of the upstream refuses, and so has a ring of its own.
        assert_eq!(
            healthy(&wanted_of(kept, none)),
            [[true, true], [false, false]]
        );
        assert_eq!(
            healthy(&wanted_of(kept, first)),
            [[true, false], [true, false]]
        );
        let wanted = wanted_of(kept, none);
        assert_ne!(wanted.upstreams[0].name, wanted.upstreams[1].name);
    }

    #[test]
    fn endpoints_that_stand_in_have_slots_only_while_no_other_has() {
        let healthy = |all_down: &str, is_healthy: &dyn Fn(u16) -> bool| {
            let text = format!(
                "[datapath]\ninterfaces = [\"eth0\"]\n\
                 [[listener]]\nname = \"one\"\naddress = \"203.0.113.1:*/udp\"\n\
                 forward = {{ upstream = \"u\", via = \"direct\"{all_down} }}\n\
                 [[upstream]]\nname = \"u\"\nendpoints = [\"10.0.0.1:1\", \"10.0.0.1:2\", \
                 {{ address = \"10.0.0.1:3\", backup = true }}]\n"
            );
            healthy(&wanted_from(text, |at| is_healthy(at.port())))
        };
        assert_eq!(healthy("", &|_| true), [[true, true, false]]);
        assert_eq!(healthy("", &|port| port > 1), [[false, true, false]]);
        assert_eq!(healthy("", &|port| port > 2), [[false, false, true]]);
        let kept = ", all_down = \"last_known\"";
        assert_eq!(healthy(kept, &|_| false), [[true, true, false]]);
    }

    #[test]
    fn udp_flows_move_at_once_only_where_the_listener_says_so() {
        let options = |forward| {
            let wanted = wanted_of(forward, |_| true);
            wanted
                .listeners
                .iter()
                .map(|one| one.options)
                .collect::<Vec<_>>()
        };
        assert_eq!(options(""), [0, 0]);
        assert_eq!(options(", udp = \"stay\""), [0, 0]);
        let moves = option::UDP_MOVE;
        assert_eq!(options(", udp = \"move\""), [moves, 0]);
        let both = moves | option::FRAGMENTS_DROP;
        assert_eq!(options(", udp = \"move\", fragments = \"drop\""), [both, 0]);
    }

    /// Of listeners by their names and addresses, all of which forward alike.
    fn wanted_by<const N: usize>(listeners: [(&str, &str); N]) -> Wanted {
        let listeners = listeners.map(|(name, address)| {
            format!(
                "[[listener]]\nname = \"{name}\"\naddress = \"{address}\"\n\
                 forward = {{ upstream = \"u\", via = \"direct\" }}\n"
            )
        });
        let text = format!(
            "[datapath]\ninterfaces = [\"eth0\"]\n{}\
             [[upstream]]\nname = \"u\"\nendpoints = [\"10.0.0.1:80\"]\n",
            listeners.concat()
        );
        wanted_from(text, |_| true)
    }

    /// Which single addresses listeners have, in order.
    fn places(wanted: &Wanted) -> Vec<(String, &str)> {
        let listeners = wanted.listeners.iter();
        let mut places: Vec<_> = listeners
            .map(|one| (one.address.to_string(), one.name.as_str()))
            .collect();
        places.sort();
        places
    }

    #[test]
    fn of_several_that_stand_for_the_same_the_nearest_is_meant() {
        let wanted = wanted_by([
            ("prefix", "203.0.113.0/30:80"),
            ("range", "203.0.113.1:80-81"),
            ("one", "203.0.113.1:80"),
            ("all", "203.0.113.2:*"),
        ]);
        let expected = [
            ("203.0.113.0:80", "prefix"),
            ("203.0.113.1:80", "one"),
            ("203.0.113.1:81", "range"),
            ("203.0.113.2:0", "all"),
            ("203.0.113.3:80", "prefix"),
        ];
        assert_eq!(
            places(&wanted),
            expected.map(|(at, name)| (at.to_owned(), name))
        );
    }

    #[test]
    fn a_prefix_leaves_single_addresses_what_they_are_nearer_to_and_no_more() {
        let wanted = wanted_by([
            ("wide", "203.0.112.0/20:80-81"),
            ("near", "203.0.113.1:1-8000"),
            ("exact", "203.0.113.1:80"),
            // Less near than `near` where both have a port.
            ("small", "203.0.113.0/31:80"),
            ("open", "203.0.114.1:*"),
        ]);
        let expected = [("203.0.113.0:80", "small"), ("203.0.113.1:80", "exact")];
        assert_eq!(
            places(&wanted),
            expected.map(|(at, name)| (at.to_owned(), name))
        );
        let prefixes: Vec<_> = wanted
            .prefixes
            .iter()
            .map(|one| one.name.as_str())
            .collect();
        assert_eq!(prefixes, ["wide", "near", "open"]);
        assert!(
            wanted
                .prefixes
                .iter()
                .all(|one| one.upstream == Some((0, mode::DIRECT)))
        );
    }
}
