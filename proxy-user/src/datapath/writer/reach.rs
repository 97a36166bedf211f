//! How endpoints are reached: sought when they are new, looked at once a second, written where it has changed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use proxy_ebpf::abi;

use super::Writer;
use crate::config::{Config, ListenerMode, Via};
use crate::datapath::map::Value;
use crate::datapath::neighbour::Reach;
use crate::datapath::{address, port};
use crate::snapshot::Snapshot;
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
        let mut ways = ways(&snapshot.config);
        ways.retain(|(upstream, _)| only.is_none_or(|only| only == *upstream));
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

    pub(super) fn write_endpoint(&mut self, id: u16, at: SocketAddr, reach: Reach) -> Result<()> {
        let mut entry: abi::Endpoint = bytemuck::Zeroable::zeroed();
        entry.address = address(at.ip());
        entry.port = port(at.port());
        // Away first, so that no packet leaves with half of one neighbour's MAC and half of another's.
        self.set_endpoint(id, entry)?;
        if reach != Reach::default() {
            entry.mac = reach.mac;
            entry.source_mac = reach.source_mac;
            entry.mtu_bytes = reach.mtu_bytes;
            entry.plain_mtu_bytes = reach.plain_mtu_bytes;
            entry.back_mtu_bytes = reach.back_mtu_bytes;
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
