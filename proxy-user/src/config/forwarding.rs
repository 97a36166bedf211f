//! What a listener that forwards needs: a kernel half, NAT, sources of the right family, ports that are free.

use std::net::IpAddr;

use super::check::Whole;
use super::listener::ListenerDraft;
use super::problem::Spot;
use super::{DatapathMode, ListenerMode, Nat, Upstream};

const NAT_EXAMPLE: &str = "nat = { source = [\"10.0.0.1\"], ports = \"20000-59999\" }";

impl<'s> Whole<'s> {
    /// Everything about `forward` listeners and NAT that more than one section decides.
    pub fn check_forwarding(&self) {
        let Some(draft) = &self.datapath else { return };
        let forwarding: Vec<_> = self
            .good_listeners()
            .filter(|draft| matches!(draft.listener.mode, ListenerMode::Forward { .. }))
            .collect();
        if let Some(first) = forwarding.first() {
            self.check_kernel_half(first);
        }
        for listener in &forwarding {
            self.check_families(listener);
        }
        if let (Some(nat), Some(spot)) = (&draft.datapath.nat, draft.nat) {
            self.check_nat(nat, spot);
        }
    }

    /// There is a kernel half that is on, somewhere to attach it, and NAT.
    fn check_kernel_half(&self, first: &ListenerDraft<'s>) {
        let Some(draft) = &self.datapath else { return };
        let (datapath, forwards) = (&draft.datapath, "it forwards");
        let Some(section) = draft.section else {
            let help = format!("write [datapath] with interfaces = [\"eth0\"] and {NAT_EXAMPLE}");
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
        if datapath.nat.is_none() {
            let label = format!("write {NAT_EXAMPLE}");
            section.refuse_with::<()>(
                "[datapath] has no `nat`, and a listener forwards via nat",
                &label,
                first.section,
                forwards,
            );
        }
    }

    /// NAT keeps the family: listener, endpoints and sources are of the same.
    fn check_families(&self, draft: &ListenerDraft<'s>) {
        let ListenerMode::Forward { upstream } = draft.listener.mode else {
            return;
        };
        let Some(Some((upstream, upstream_spot))) = self.upstreams.get(upstream) else {
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
                let (ip, port) = (address.socket.ip(), address.socket.port());
                let same = |source: &IpAddr| {
                    *source == ip || (ip.is_unspecified() && ip.is_ipv4() == source.is_ipv4())
                };
                if (first..=last).contains(&port) && nat.source.iter().any(same) {
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

fn has_endpoint(upstream: &Upstream, is_v4: bool) -> bool {
    upstream
        .endpoints
        .iter()
        .any(|endpoint| endpoint.address.is_ipv4() == is_v4)
}
