//! What the kernel half has counted.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Result;
use proxy_ebpf::abi::Signs;
use proxy_ebpf::verdict::Verdict;

use super::entry::{signs, sum, traffic};
use super::{OPERATOR, Writer};

/// The flows are counted one by one, so not at every question.
const FLOWS_COUNTED_EVERY: Duration = Duration::from_secs(5);

/// Everything counted, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub verdicts: Vec<(&'static str, u64)>,
    /// By listener name: packets, bytes.
    pub listeners: Vec<(String, u64, u64)>,
    /// By endpoint: packets, bytes.
    pub endpoints: BTreeMap<SocketAddr, (u64, u64)>,
    pub flows: u64,
    /// Slots of rings that keep their earlier owner, after a change of endpoints, for flows that began with it.
    pub slots_shared: u64,
    pub rule_drops: Vec<(String, u64)>,
    pub bans: u64,
}

impl Writer {
    /// Everything counted.
    ///
    /// # Errors
    /// The system refuses to read.
    pub fn counts(&mut self) -> Result<Counts> {
        let mut counts = Counts {
            bans: self.guard.words()[0].load(Relaxed),
            slots_shared: self.count_shared(),
            ..Counts::default()
        };
        for verdict in Verdict::ALL {
            counts
                .verdicts
                .push((verdict.name(), sum(&self.verdicts, verdict as u32)?));
        }
        let listening = self.state.listener_ids();
        for (name, id) in self
            .state
            .names
            .listeners
            .iter()
            .filter(|(_, id)| listening.contains(id))
        {
            let traffic = traffic(&self.listener_traffic, *id)?;
            counts
                .listeners
                .push((name.clone(), traffic.packets, traffic.bytes));
        }
        for (id, at) in self.state.endpoints.iter() {
            let traffic = traffic(&self.endpoint_traffic, u32::from(id))?;
            counts
                .endpoints
                .insert(at, (traffic.packets, traffic.bytes));
        }
        counts
            .rule_drops
            .push((OPERATOR.to_owned(), sum(&self.rule_drops, 0)?));
        for (name, id) in &self.state.names.rules {
            counts
                .rule_drops
                .push((name.clone(), sum(&self.rule_drops, *id)?));
        }
        counts.flows = self.count_flows();
        Ok(counts)
    }

    /// What became of the flows that NAT opened to each endpoint, since it has its id: they only grow, so that whoever
    /// asks now and then learns by the difference how an endpoint takes what it is sent.
    ///
    /// # Errors
    /// The system refuses to read.
    pub fn endpoint_signs(&self) -> Result<BTreeMap<SocketAddr, Signs>> {
        let mut all = BTreeMap::new();
        for (id, at) in self.state.endpoints.iter() {
            all.insert(at, signs(&self.endpoint_signs, u32::from(id))?);
        }
        Ok(all)
    }

    fn count_flows(&mut self) -> u64 {
        let now = Instant::now();
        match self.flows_counted {
            Some((at, count)) if now.duration_since(at) < FLOWS_COUNTED_EVERY => count,
            _ => {
                // The walk begins anew where the key that it stands on was deleted: under churn only a bound ends it.
                let bound = self.nat_flows.len() as usize;
                let count = self.flows.keys().filter_map(Result::ok).take(bound).count() as u64;
                self.flows_counted = Some((now, count));
                count
            }
        }
    }
}
