//! How endpoints are reached: sought when they are new, looked at once a second, written where it has changed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use proxy_ebpf::abi;
use proxy_ebpf::packet::{Family, headers_bytes};

use super::Writer;
use crate::config::{Config, ListenerMode, Via};
use crate::datapath::map::Value;
use crate::datapath::neighbour::Reach;
use crate::datapath::{address, port};
use crate::snapshot::Snapshot;
use crate::tunable::{MssClamp, Tunables};
use crate::upstream::Upstream;

/// The upstreams that listeners forward to, by index, and in which ways.
pub(super) fn ways(config: &Config) -> HashSet<(usize, Via)> {
    let forwarded = config.listeners.iter();
    forwarded
        .filter_map(|listener| match listener.mode {
            ListenerMode::Forward { upstream, via, .. } => Some((upstream, via)),
            ListenerMode::Serve { .. } => None,
        })
        .collect()
}

/// A packet that goes to a MAC as it came would come back from a gateway, for it carries our own address. One with
/// another address cannot be given to Linux on this host: its answer would not come by us.
pub(super) fn check_links(writer: &Writer, upstream: &Upstream, via: Via) -> Result<()> {
    let addresses = upstream.endpoints.iter().map(|endpoint| endpoint.address);
    for address in addresses {
        if via == Via::Nat && writer.neighbours.is_local(address.ip()) {
            bail!(
                "the endpoint {address} of `{}` is this host itself, and a listener forwards there via nat: \
                 let the server listen on the listener's address, and reach it via direct",
                upstream.name
            );
        }
        if via == Via::Direct
            && let Some(gateway) = writer.neighbours.gateway(address.ip())
        {
            bail!(
                "the endpoint {address} of `{}` is behind the gateway {gateway}, and a listener forwards there via direct: \
                 such an endpoint is on a link of this host; reach it via ipip, gue or nat",
                upstream.name
            );
        }
    }
    Ok(())
}

/// Which segments SYNs by NAT may announce.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct SegmentLimit {
    clamp: MssClamp,
    max: u16,
}

impl SegmentLimit {
    /// The largest of all, which limits nothing.
    const ANY: u16 = 65_495;

    fn of(tunables: &Tunables) -> Self {
        Self {
            clamp: tunables.datapath.mss_clamp,
            max: u16::try_from(tunables.datapath.mss_max).unwrap_or(Self::ANY),
        }
    }

    /// The largest for flows of an endpoint that is reached in this way; 0 = as they are, which costs them nothing. That is
    /// so, too, where all links of this host take the same.
    fn bytes(self, reach: Reach, is_v4: bool) -> u16 {
        if self.clamp == MssClamp::Off {
            return 0;
        }
        let family = if is_v4 { Family::V4 } else { Family::V6 };
        let differs = reach.plain_mtu_bytes != 0 || reach.back_mtu_bytes != 0;
        let fits = differs.then(|| reach.mtu_bytes.saturating_sub(headers_bytes(family)));
        let asked = (self.max < Self::ANY).then_some(self.max);
        fits.into_iter().chain(asked).min().unwrap_or(0)
    }
}

/// What came of looking for neighbours.
#[derive(Debug)]
pub struct Sought {
    /// Each is reached by now, or known not to be; until then it is to be looked again, every millisecond or two.
    pub is_settled: bool,
    /// Addresses that can now be reached and could not, or the reverse: the rings of their upstreams are to be changed.
    pub moved: HashSet<IpAddr>,
}

impl Writer {
    /// Looks for the neighbours of endpoints that listeners forward to, of all upstreams or of one.
    ///
    /// # Errors
    /// rtnetlink or a map does not answer.
    pub fn seek(&mut self, snapshot: &Snapshot, only: Option<usize>) -> Result<Sought> {
        let ways = match (only, &self.in_force) {
            (Some(only), Some(in_force)) => {
                let ways = in_force.ways.iter().copied();
                ways.filter(|(upstream, _)| *upstream == only).collect()
            }
            _ => ways(&snapshot.config),
        };
        let of = |upstream: usize| {
            let endpoints = snapshot.upstreams.get(upstream);
            let endpoints = endpoints.into_iter().flat_map(|one| &one.endpoints);
            endpoints.map(|endpoint| endpoint.address.ip())
        };
        let near = ways.iter().filter(|(_, via)| *via == Via::Direct);
        let near = near.flat_map(|(upstream, _)| of(*upstream));
        match only {
            None => self.neighbours.keep_near(near.collect()),
            Some(_) => near.for_each(|address| self.neighbours.keep_near_too(address)),
        }
        let upstreams: BTreeSet<usize> = ways.iter().map(|(upstream, _)| *upstream).collect();
        let addresses = upstreams.iter().copied().flat_map(of);
        let is_settled = self
            .neighbours
            .seek(&mut self.network, addresses)
            .context("read the neighbours of this host")?;
        let upstreams = upstreams
            .iter()
            .filter_map(|one| snapshot.upstreams.get(*one));
        let endpoints = upstreams.flat_map(|upstream| &upstream.endpoints);
        let written: Vec<(u16, SocketAddr)> = endpoints
            .filter_map(|endpoint| {
                let id = self.state.endpoints.find(endpoint.address)?;
                Some((id, endpoint.address))
            })
            .collect();
        let moved = self.write_reaches(written)?;
        Ok(Sought { is_settled, moved })
    }

    /// Looks again how each endpoint is reached; to be called about once a second. Answers which addresses can now be
    /// reached and could not, or the reverse: the rings of their upstreams are to be changed.
    ///
    /// # Errors
    /// rtnetlink or a map does not answer.
    pub fn refresh_neighbours(&mut self) -> Result<HashSet<IpAddr>> {
        self.clean_slots();
        self.retire().context("look for ids of endpoints")?;
        let endpoints: Vec<(u16, SocketAddr)> = self.state.endpoints.iter().collect();
        let addresses: HashSet<IpAddr> = endpoints.iter().map(|(_, at)| at.ip()).collect();
        self.neighbours
            .retain(|address| addresses.contains(&address));
        self.neighbours
            .refresh(&mut self.network, addresses.into_iter(), Instant::now())
            .context("read the neighbours of this host")?;
        self.write_reaches(endpoints)
    }

    /// Writes how these endpoints are reached, where that has changed; answers which came or went.
    pub(super) fn write_reaches(
        &mut self,
        endpoints: impl IntoIterator<Item = (u16, SocketAddr)>,
    ) -> Result<HashSet<IpAddr>> {
        let mut moved = HashSet::new();
        for (id, at) in endpoints {
            let reach = self.neighbours.reach(at.ip());
            let before = self.reaches.get(&id).copied().unwrap_or_default();
            if reach != before {
                self.write_endpoint(id, at, reach)?;
                if (reach == Reach::default()) != (before == Reach::default()) {
                    moved.insert(at.ip());
                }
            }
        }
        Ok(moved)
    }

    /// Writes which segments flows of endpoints may announce, where the tunables that say so are others than before.
    pub(super) fn limit_segments(&mut self, tunables: &Tunables) -> Result<()> {
        let limit = Some(SegmentLimit::of(tunables));
        if limit == self.segment_limit {
            return Ok(());
        }
        self.segment_limit = limit;
        let endpoints: Vec<(u16, SocketAddr)> = self.state.endpoints.iter().collect();
        for (id, at) in endpoints {
            let reach = self.reaches.get(&id).copied().unwrap_or_default();
            self.set_endpoint(id, self.entry(at, reach))?;
        }
        Ok(())
    }

    /// The entry of an endpoint that is reached in this way.
    fn entry(&self, at: SocketAddr, reach: Reach) -> abi::Endpoint {
        abi::Endpoint {
            address: address(at.ip()),
            port: port(at.port()),
            mac: reach.mac,
            source_mac: reach.source_mac,
            vlan: [0; 2],
            ifindex: reach.ifindex,
            mtu_bytes: reach.mtu_bytes,
            plain_mtu_bytes: reach.plain_mtu_bytes,
            back_mtu_bytes: reach.back_mtu_bytes,
            mss_bytes: self
                .segment_limit
                .map_or(0, |limit| limit.bytes(reach, at.is_ipv4())),
            zero: [0; 4],
        }
    }

    pub(super) fn write_endpoint(&mut self, id: u16, at: SocketAddr, reach: Reach) -> Result<()> {
        let mut entry = self.entry(at, Reach::default());
        // Away first, so that no packet leaves with half of one neighbour's MAC and half of another's.
        self.set_endpoint(id, entry)?;
        if reach != Reach::default() {
            entry = abi::Endpoint {
                ifindex: 0,
                ..self.entry(at, reach)
            };
            self.set_endpoint(id, entry)?;
            entry.ifindex = reach.ifindex;
            self.set_endpoint(id, entry)?;
        }
        self.reaches.insert(id, reach);
        Ok(())
    }

    fn set_endpoint(&mut self, id: u16, entry: abi::Endpoint) -> Result<()> {
        self.endpoints
            .set(u32::from(id), Value(entry), 0)
            .context("write an endpoint")
    }

    /// Whether the neighbour of each endpoint is resolved.
    pub fn resolved(&self) -> BTreeMap<SocketAddr, bool> {
        let resolved = |id: u16| {
            self.reaches
                .get(&id)
                .is_some_and(|reach| reach.ifindex != 0)
        };
        let endpoints = self.state.endpoints.iter();
        endpoints.map(|(id, at)| (at, resolved(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_limited_by_the_links_and_by_the_operator_and_else_not_at_all() {
        let limit = |clamp, max| SegmentLimit { clamp, max };
        let (auto, off) = (MssClamp::Auto, MssClamp::Off);
        let same = Reach {
            ifindex: 3,
            mtu_bytes: 1500,
            ..Reach::default()
        };
        let smaller = Reach {
            mtu_bytes: 1280,
            plain_mtu_bytes: 1280,
            ..same
        };
        let larger = Reach {
            back_mtu_bytes: 1400,
            ..same
        };
        let any = limit(auto, SegmentLimit::ANY);
        assert_eq!(
            [same, smaller, larger].map(|reach| any.bytes(reach, true)),
            [0, 1240, 1460]
        );
        assert_eq!(
            [same, smaller].map(|reach| any.bytes(reach, false)),
            [0, 1220]
        );
        let asked = limit(auto, 1300);
        assert_eq!(
            [same, smaller].map(|reach| asked.bytes(reach, true)),
            [1300, 1240]
        );
        assert_eq!(limit(off, 1300).bytes(smaller, true), 0);
    }
}
