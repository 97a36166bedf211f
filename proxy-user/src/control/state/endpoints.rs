//! Endpoints changed while the daemon runs: the kernel half first, then the workers, then the probes.

use std::sync::Arc;
use std::time::Instant;

use super::Control;
use super::apply::SEEK_LIMIT;
use crate::config::Endpoint;
use crate::control::endpoints::{
    Changes, EndpointAct, EndpointChange, EndpointRequest, OfUpstream,
};
use crate::offload::now_ns;
use crate::snapshot::Snapshot;
use crate::tunable::unit;
use crate::worker;

impl Control {
    /// Does what a command asks; `arrived` is when it came. All of it, or nothing.
    ///
    /// # Errors
    /// A sentence that says why not, and what to do instead.
    pub(super) fn change_endpoint(
        &mut self,
        request: &EndpointRequest,
        arrived: Instant,
    ) -> Result<EndpointChange, String> {
        let address = request.socket()?;
        let Some(snapshot) = self.snapshot.clone() else {
            return Err("the daemon has no configuration yet".to_owned());
        };
        let index = find(&snapshot, &request.upstream)?;
        let config = &self.listed(&snapshot.config, index);
        let endpoints_max = snapshot.tunables.upstream.endpoints_max as usize;
        let of = self.changes.of(&config.name);
        let next = of.after(config, address, request.act, endpoints_max)?;
        self.changes.check_room(&config.name, &next)?;
        let endpoints = next.endpoints(&config.endpoints);
        let added = matches!(request.act, EndpointAct::Add { .. }).then_some(address);
        if let Some(why) = snapshot.config.refuse_endpoints(index, &endpoints, added) {
            return Err(why);
        }
        let weight = endpoints
            .iter()
            .find(|endpoint| endpoint.address == address);
        let weight = weight.map(|endpoint| endpoint.weight);
        self.set_endpoints(index, endpoints)?;
        let took = arrived.elapsed();
        self.changes.set(&config.name, next);
        self.set_probes();
        self.remember();
        log::info!(
            "endpoint changed until the next reload: upstream={} endpoint={address} weight={} took={took:?}",
            config.name,
            weight.map_or("none".to_owned(), |weight| weight.to_string()),
        );
        Ok(EndpointChange {
            upstream: config.name.clone(),
            address,
            weight,
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            generation: snapshot.generation,
        })
    }

    /// Gives an upstream, by its index, other endpoints: in the kernel half, which may refuse, then to the workers. The
    /// probes are yet to be set.
    pub(super) fn set_endpoints(
        &mut self,
        upstream: usize,
        endpoints: Vec<Endpoint>,
    ) -> Result<(), String> {
        let Some(snapshot) = self.snapshot.clone() else {
            return Ok(());
        };
        let next = Arc::new(snapshot.with_endpoints(upstream, endpoints, &self.registry));
        if let (Some(before), Some(after)) = (
            snapshot.upstreams.get(upstream),
            next.upstreams.get(upstream),
        ) {
            after.welcome(before, now_ns());
        }
        if let Some(datapath) = &mut self.datapath {
            let sought = datapath.seek(&next, Some(upstream));
            let sought = sought.map_err(|error| format!("{error:#}"))?;
            let changed = datapath.change(&next, upstream);
            changed.map_err(|error| format!("{error:#}"))?;
            self.choose_where_moved(&sought.moved);
            if !sought.is_settled {
                self.sought.insert(upstream, Instant::now() + SEEK_LIMIT);
            }
        }
        for worker in &self.workers {
            worker.tell(worker::Command::Apply {
                snapshot: Arc::clone(&next),
                listeners: Vec::new(),
                close: Vec::new(),
            });
        }
        if let Some(after) = next.upstreams.get(upstream) {
            self.adopt(after);
        }
        self.snapshot = Some(next);
        Ok(())
    }

    /// The endpoints as the daemon before changed them under the same files; what does not fit these is forgotten.
    pub(super) fn restore_endpoints(&self, snapshot: Snapshot) -> (Snapshot, Changes) {
        let (mut restored, mut changes) = (snapshot, Changes::default());
        for (index, config) in restored.config.clone().upstreams.iter().enumerate() {
            let of = self.start.memory.endpoints.of(&config.name);
            if of == OfUpstream::default() {
                continue;
            }
            let endpoints = of.endpoints(&config.endpoints);
            match restored.config.refuse_endpoints(index, &endpoints, None) {
                None => {
                    restored = restored.with_endpoints(index, endpoints, &self.registry);
                    changes.set(&config.name, of);
                }
                Some(why) => log::warn!("endpoints changed at run time are as in the file: {why}"),
            }
        }
        (restored, changes)
    }
}

fn find(snapshot: &Snapshot, name: &str) -> Result<usize, String> {
    let upstreams = &snapshot.config.upstreams;
    let index = upstreams.iter().position(|upstream| upstream.name == name);
    index.ok_or_else(|| {
        let names = upstreams.iter().map(|upstream| upstream.name.as_str());
        let meant = unit::nearest(name, names).map(|meant| format!("; did you mean `{meant}`?"));
        let name = unit::shown(name);
        format!("there is no upstream `{name}`{}", meant.unwrap_or_default())
    })
}
