//! What a listener that forwards needs: a kernel half, sources of the right family, ports that fit and are free.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use proxy_ebpf::abi;

use super::check::Whole;
use super::datapath::DatapathDraft;
use super::listener::ListenerDraft;
use super::prefix::{prefixes, shares};
use super::problem::Spot;
use super::{
    Config, DatapathMode, Endpoint, EndpointName, ListenAddress, ListenerMode, Nat, Protocol,
    Upstream, Via,
};

const TUNNEL_EXAMPLE: &str = "tunnel = { source = [\"10.0.0.1\"] }";
const NAT_EXAMPLE: &str = "nat = { source = [\"10.0.0.1\"], ports = \"20000-59999\" }";

impl<'s> Whole<'s> {
    /// Everything about `forward` listeners and NAT that more than one section decides.
    pub fn check_forwarding(&self) {
        let Some(draft) = &self.datapath else { return };
        let forwarding: Vec<_> = self
            .good_listeners()
            .filter_map(|draft| match draft.listener.mode {
                ListenerMode::Forward { via, .. } => Some((draft, via)),
                ListenerMode::Serve { .. } => None,
            })
            .collect();
        if let Some((first, via)) = forwarding.first() {
            self.check_kernel_half(first, *via);
        }
        let nat = forwarding.iter().find(|(_, via)| *via == Via::Nat);
        if let Some((first, _)) = nat.filter(|_| draft.datapath.nat.is_none()) {
            let label = format!("write {NAT_EXAMPLE}");
            refuse_without(draft, "nat", "a listener forwards via nat", &label, first);
        }
        let wrapped = forwarding.iter().find(|(_, via)| via.wraps());
        if let Some((first, via)) = wrapped.filter(|_| draft.datapath.tunnel.is_none()) {
            let needed = format!("a listener forwards via {}", via.word());
            let label = format!("write {TUNNEL_EXAMPLE}");
            refuse_without(draft, "tunnel", &needed, &label, first);
        }
        for (listener, via) in &forwarding {
            match via {
                Via::Nat => self.check_families(listener),
                Via::Direct | Via::Ipip | Via::Gue => self.check_kept_ports(listener, *via),
            }
            if via.wraps() {
                self.check_tunnel(listener);
            }
        }
        if let (Some(nat), Some(spot)) = (&draft.datapath.nat, draft.nat) {
            self.check_nat(nat, spot);
        }
        self.check_entries();
    }

    /// All addresses of a family together have no more entries than the kernel half has room for: one for each of their ports,
    /// and, as sources of NAT, one for what has no ports.
    fn check_entries(&self) {
        let max = u128::from(self.tunables.datapath.listeners_max);
        let all = self.good_listeners();
        let prefixes = prefixes(all.flat_map(|draft| &draft.listener.addresses));
        let nat = self
            .datapath
            .iter()
            .filter_map(|draft| draft.datapath.nat.as_ref());
        let sources = nat.flat_map(|nat| nat.source.iter().copied());
        let (v4, v6) = sources.partition(IpAddr::is_ipv4);
        let mut of_families: [(u128, HashSet<IpAddr>); 2] = [(0, v4), (0, v6)];
        let mut places = HashSet::new();
        for draft in self.good_listeners() {
            for (address, spot) in draft.listener.addresses.iter().zip(&draft.addresses) {
                if prefixes.contains(address) {
                    self.check_prefix(address, *spot, &prefixes, &mut places);
                    continue;
                }
                let (ports, ips) = &mut of_families[usize::from(address.socket.is_ipv6())];
                if *ports + ips.len() as u128 > max {
                    continue;
                }
                *ports += address.entries();
                ips.extend(address.ips());
                let entries = *ports + ips.len() as u128;
                if entries > max {
                    let message = format!(
                        "with {address} listeners have {entries} entries of this family, and `datapath.listeners_max` is {max}"
                    );
                    let help = "raise it in [tunables], or name fewer; an address has one for each of its ports, and one for what has no ports".to_owned();
                    spot.refuse::<()>(message, "one too many", Some(help));
                }
            }
        }
    }

    /// A prefix has ports in no more ranges than its entry holds, those of shorter ones included; and there is room for
    /// its entries: one for its protocol, and one for what has no ports.
    fn check_prefix(
        &self,
        address: &ListenAddress,
        spot: Spot<'s>,
        prefixes: &HashSet<ListenAddress>,
        places: &mut HashSet<(IpAddr, u8, Option<Protocol>)>,
    ) {
        let max = self.tunables.datapath.prefixes_max as usize;
        let was_full = places.len() > max;
        let (ip, bits) = (address.socket.ip(), address.prefix_bits);
        places.insert((ip, bits, None));
        // Of several with the same prefix one tells of all.
        if places.insert((ip, bits, Some(address.protocol))) {
            check_ranges(address, spot, prefixes);
        }
        if places.len() > max && !was_full {
            let message = format!(
                "with {address} listeners have {} entries of prefixes, and `datapath.prefixes_max` is {max}",
                places.len()
            );
            let help = "raise it in [tunables], or name fewer; a prefix has one for each protocol, and one for what has no ports".to_owned();
            spot.refuse::<()>(message, "one too many", Some(help));
        }
    }

    /// There is a kernel half that is on, and somewhere to attach it.
    fn check_kernel_half(&self, first: &ListenerDraft<'s>, via: Via) {
        let Some(draft) = &self.datapath else { return };
        let (datapath, forwards) = (&draft.datapath, "it forwards");
        let Some(section) = draft.section else {
            let more = match via {
                Via::Nat => format!(" and {NAT_EXAMPLE}"),
                Via::Direct => String::new(),
                Via::Ipip | Via::Gue => format!(" and {TUNNEL_EXAMPLE}"),
            };
            let help = format!("write [datapath] with interfaces = [\"eth0\"]{more}");
            let message = "this listener forwards in the kernel, and there is no [datapath]";
            return first
                .section
                .refuse::<()>(message, "", Some(help))
                .unwrap_or_default();
        };
        match draft.mode {
            Some(mode) if datapath.mode == DatapathMode::Off => {
                let message = "the kernel half is off, and a listener forwards in the kernel";
                mode.refuse_with::<()>(message, "off", first.section, forwards);
            }
            _ if datapath.interfaces.is_empty() => {
                let message =
                    "[datapath] names no interfaces, and a listener forwards in the kernel";
                section.refuse_with::<()>(
                    message,
                    "write interfaces = [\"eth0\"]",
                    first.section,
                    forwards,
                );
            }
            _ => {}
        }
    }

    /// A packet that goes on as it is arrives at the port that it came to.
    fn check_kept_ports(&self, draft: &ListenerDraft<'s>, via: Via) {
        let Some((upstream, upstream_spot)) = self.upstream_of(draft) else {
            return;
        };
        for (address, spot) in draft.listener.addresses.iter().zip(&draft.addresses) {
            let endpoints = upstream.endpoints.iter();
            let endpoints = endpoints.map(|one| (one.address.port(), one.address.to_string()));
            let hosts = upstream.names.iter().filter_map(|name| match name {
                EndpointName::Host { host, port, .. } => Some((*port, format!("{host}:{port}"))),
                EndpointName::Service { .. } => None,
            });
            let mut all = endpoints.chain(hosts);
            if let Some((_, endpoint)) = all.find(|(port, _)| !address.has_port(*port)) {
                let message = format!(
                    "the packet to {address} keeps its port via {}, and an endpoint of `{}` is {endpoint}",
                    via.word(),
                    upstream.name,
                );
                spot.refuse_with::<()>(
                    message,
                    "",
                    *upstream_spot,
                    "its endpoints have this port too, or it is reached via nat",
                );
            }
        }
    }

    /// A packet inside another leaves from an address of its endpoint's family.
    fn check_tunnel(&self, draft: &ListenerDraft<'s>) {
        let (Some(datapath), Some((upstream, upstream_spot))) =
            (&self.datapath, self.upstream_of(draft))
        else {
            return;
        };
        let (Some(tunnel), Some(spot)) = (&datapath.datapath.tunnel, datapath.tunnel) else {
            return;
        };
        for (is_v4, family) in [(true, "IPv4"), (false, "IPv6")] {
            let mut endpoints = upstream.endpoints.iter();
            if endpoints.any(|endpoint| endpoint.address.is_ipv4() == is_v4)
                && !tunnel.source.iter().any(|source| source.is_ipv4() == is_v4)
            {
                let message = format!(
                    "`tunnel` has no {family} source, and `{}` forwards to an {family} endpoint",
                    draft.listener.name
                );
                spot.refuse_with::<()>(message, "", *upstream_spot, "forwarded to");
            }
        }
    }

    fn upstream_of(&self, draft: &ListenerDraft<'s>) -> Option<&(Upstream, Spot<'s>)> {
        match draft.listener.mode {
            ListenerMode::Forward { upstream, .. } => self.upstreams.get(upstream)?.as_ref(),
            ListenerMode::Serve { .. } => None,
        }
    }

    /// NAT keeps the family: listener, endpoints and sources are of the same.
    fn check_families(&self, draft: &ListenerDraft<'s>) {
        let Some((upstream, upstream_spot)) = self.upstream_of(draft) else {
            return;
        };
        let Some(datapath) = &self.datapath else {
            return;
        };
        for (is_v4, family) in [(true, "IPv4"), (false, "IPv6")] {
            let mut addresses = draft.listener.addresses.iter().zip(&draft.addresses);
            let Some((_, spot)) = addresses.find(|(address, _)| address.socket.is_ipv4() == is_v4)
            else {
                continue;
            };
            if !has_endpoint(upstream, is_v4) {
                let message = format!(
                    "an {family} address forwards to `{}`, which has no {family} endpoint",
                    upstream.name
                );
                spot.refuse_with::<()>(
                    message,
                    "NAT keeps the family",
                    *upstream_spot,
                    "all its endpoints are of the other",
                );
                continue;
            }
            if let (Some(nat), Some(nat_spot)) = (&datapath.datapath.nat, datapath.nat)
                && !nat.source.iter().any(|source| source.is_ipv4() == is_v4)
            {
                let message = format!(
                    "`nat` has no {family} source, and `{}` forwards {family}",
                    draft.listener.name
                );
                nat_spot.refuse_with::<()>(message, "", *spot, "forwarded from here");
            }
        }
    }

    /// NAT ports that are a listener's too, or more than the tables hold.
    fn check_nat(&self, nat: &Nat, spot: Spot<'s>) {
        let (first, last) = nat.ports;
        for draft in self.good_listeners() {
            for (address, place) in draft.listener.addresses.iter().zip(&draft.addresses) {
                let ip = address.socket.ip();
                let same = |source: &IpAddr| {
                    address.has_ip(*source)
                        || (ip.is_unspecified() && ip.is_ipv4() == source.is_ipv4())
                };
                let shared = |port: &u16| address.has_port(*port);
                // The sources first: there may be thousands of addresses, and NAT has tens of thousands of ports.
                if nat.source.iter().any(same)
                    && let Some(port) = (first..=last).find(shared)
                {
                    let message = format!(
                        "port {port} is one of those that NAT gives to flows of the same address"
                    );
                    place.refuse_with::<()>(message, "", spot, &format!("{first} to {last}"));
                }
            }
        }
        let flows = (u64::from(last - first) + 1) * nat.source.len() as u64 * 2;
        let max = u64::from(self.tunables.datapath.nat_flows_max);
        if flows > max {
            let message =
                format!("`nat` has ports for {flows} flows, and `datapath.nat_flows_max` is {max}");
            let help = format!(
                "raise \"datapath.nat_flows_max\" to {flows} in [tunables], or name fewer ports or sources"
            );
            spot.refuse::<()>(message, "ports x sources x 2 (TCP and UDP)", Some(help));
        }
    }
}

impl Config {
    /// Why an upstream, by its index, cannot have these endpoints, one of them `added` to what was checked before: what
    /// `check_forwarding` would say of a file with them.
    pub fn refuse_endpoints(
        &self,
        upstream: usize,
        endpoints: &[Endpoint],
        added: Option<SocketAddr>,
    ) -> Option<String> {
        let has = |is_v4| {
            endpoints
                .iter()
                .any(|endpoint| endpoint.address.is_ipv4() == is_v4)
        };
        let families = [(true, "IPv4", has(true)), (false, "IPv6", has(false))];
        // The DNS may have the other family tomorrow.
        let upstreams = self.upstreams.get(upstream);
        let has_names = upstreams.is_some_and(|upstream| !upstream.names.is_empty());
        for listener in &self.listeners {
            let via = match listener.mode {
                ListenerMode::Forward {
                    upstream: of, via, ..
                } if of == upstream => via,
                _ => continue,
            };
            for (is_v4, family, has) in families {
                let mut addresses = listener.addresses.iter();
                let lacks = via == Via::Nat
                    && !has
                    && !has_names
                    && addresses.any(|address| address.socket.is_ipv4() == is_v4);
                if lacks {
                    return Some(format!(
                        "`{}` forwards {family} via nat, which keeps the family, and this would leave no {family} endpoint",
                        listener.name
                    ));
                }
                let tunnel = self.datapath.tunnel.iter();
                let mut sources = tunnel.flat_map(|tunnel| &tunnel.source);
                if via.wraps() && has && !sources.any(|source| source.is_ipv4() == is_v4) {
                    return Some(format!(
                        "`{}` forwards via {}, and `tunnel` has no {family} source for this endpoint",
                        listener.name,
                        via.word()
                    ));
                }
            }
            let mut addresses = listener.addresses.iter();
            if via != Via::Nat
                && let Some(added) = added
                && let Some(other) = addresses.find(|address| !address.has_port(added.port()))
            {
                return Some(format!(
                    "the packet to {other} keeps its port via {}, and {added} has another",
                    via.word()
                ));
            }
        }
        None
    }
}

/// A prefix has no more ranges of ports than its entry holds, with those of the prefixes around it.
fn check_ranges(address: &ListenAddress, spot: Spot<'_>, prefixes: &HashSet<ListenAddress>) {
    let holds =
        |other: &&ListenAddress| other.protocol == address.protocol && other.covers(address);
    let holding: Vec<ListenAddress> = prefixes.iter().filter(holds).copied().collect();
    let ranges = shares(&holding).len();
    if ranges > abi::Prefix::RANGES {
        let message = format!(
            "the addresses of {address} have ports in {ranges} ranges, those of other prefixes included, and {} are possible",
            abi::Prefix::RANGES
        );
        let help = "let neighbouring ports be one range, or all of them `*`".to_owned();
        spot.refuse::<()>(message, "", Some(help));
    }
}

/// A key of `[datapath]` is missing.
fn refuse_without(
    draft: &DatapathDraft<'_>,
    key: &str,
    needed: &str,
    label: &str,
    first: &ListenerDraft<'_>,
) {
    // Without a section that itself is what is told.
    if let Some(section) = draft.section {
        let message = format!("[datapath] has no `{key}`, and {needed}");
        section.refuse_with::<()>(message, label, first.section, "it forwards");
    }
}

/// A name may have addresses of either family: which, is known when it is looked up.
fn has_endpoint(upstream: &Upstream, is_v4: bool) -> bool {
    let mut endpoints = upstream.endpoints.iter();
    !upstream.names.is_empty() || endpoints.any(|endpoint| endpoint.address.is_ipv4() == is_v4)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Bundle, load};

    #[test]
    fn endpoints_at_run_time_are_refused_where_a_file_would_be() {
        let text = "[datapath]\ninterfaces = [\"eth0\"]\n\
            nat = { source = [\"10.0.0.1\"], ports = \"20000-29999\" }\n\
            tunnel = { source = [\"10.0.0.1\"] }\n\
            [[listener]]\nname = \"n\"\naddress = \"192.0.2.1:80\"\nforward = { upstream = \"n\", via = \"nat\" }\n\
            [[listener]]\nname = \"i\"\naddress = \"192.0.2.2:80\"\nforward = { upstream = \"i\", via = \"ipip\" }\n\
            [[upstream]]\nname = \"n\"\nendpoints = [\"10.0.0.2:8080\"]\n\
            [[upstream]]\nname = \"i\"\nendpoints = [\"10.0.0.2:80\"]\n";
        let files = Bundle::of_files([("/c/s.toml", text)]);
        let config = match load(&files, Path::new("/c/s.toml")) {
            Ok(loaded) => loaded.config,
            Err(faults) => panic!("{faults:?}"),
        };
        let refused = |upstream, added: &str| {
            let added: SocketAddr = added.parse().expect("an address");
            let endpoints = [Endpoint::new(added, 1)];
            let said = config.refuse_endpoints(upstream, &endpoints, Some(added));
            said.unwrap_or_default()
        };
        assert_eq!(refused(0, "10.0.0.3:9000"), "");
        assert!(refused(0, "[2001:db8::3]:9000").contains("no IPv4 endpoint"));
        assert_eq!(refused(1, "10.0.0.3:80"), "");
        assert!(refused(1, "10.0.0.3:81").contains("keeps its port via ipip"));
        assert!(refused(1, "[2001:db8::3]:80").contains("`tunnel` has no IPv6 source"));
    }
}
