//! What is believed of endpoints, as Prometheus reads it.

use std::fmt::Error;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::metrics::MetricType;

use super::super::{Endpoint, Registry, locked};
use super::{Outside, Page, counted};

impl Page<'_> {
    pub(super) fn health(&mut self, registry: &Registry) -> Result<(), Error> {
        let endpoints = locked(&registry.endpoints);
        type Part<T> = fn(&T) -> u64;
        let gauges: [(&str, &str, Part<Endpoint>); 2] = [
            (
                "upstream_healthy",
                "1 while an endpoint is believed healthy: by its probe, and by the calls to it.",
                |e| u64::from(e.healthy.load(Relaxed)),
            ),
            (
                "upstream_ejected",
                "1 while an endpoint is left out because calls to it failed.",
                |e| u64::from(e.ejected.load(Relaxed)),
            ),
        ];
        let counters: [(&str, &str, Part<Endpoint>); 2] = [
            (
                "upstream_ejections",
                "Times an endpoint was left out because calls to it failed.",
                |e| e.ejections.load(Relaxed),
            ),
            (
                "upstream_ejections_spared",
                "Times that it was not, because too few others would have been left.",
                |e| e.ejections_spared.load(Relaxed),
            ),
        ];
        for (name, help, part) in gauges {
            let mut family = self.family(name, help, MetricType::Gauge)?;
            for ([upstream, endpoint], counts) in &*endpoints {
                let labels = [("upstream", upstream), ("endpoint", endpoint)];
                family.encode_family(&labels)?.encode_gauge(&part(counts))?;
            }
        }
        for (name, help, part) in counters {
            let mut family = self.family(name, help, MetricType::Counter)?;
            for ([upstream, endpoint], counts) in &*endpoints {
                let labels = [("upstream", upstream), ("endpoint", endpoint)];
                counted(&mut family, &labels, part(counts))?;
            }
        }
        let upstreams = locked(&registry.upstreams);
        let help = "1 while health is ignored because too few endpoints have it.";
        let mut family = self.family("upstream_panic", help, MetricType::Gauge)?;
        for ([upstream], counts) in &*upstreams {
            let panics = u64::from(counts.panics());
            family
                .encode_family(&[("upstream", upstream)])?
                .encode_gauge(&panics)?;
        }
        let help = "Times that this began.";
        let mut family = self.family("upstream_panics", help, MetricType::Counter)?;
        for ([upstream], counts) in &*upstreams {
            let panicked = counts.panicked.load(Relaxed);
            counted(&mut family, &[("upstream", upstream)], panicked)?;
        }
        Ok(())
    }

    pub(super) fn names(&mut self, registry: &Registry, outside: &Outside) -> Result<(), Error> {
        let control = &registry.control;
        let asked = control.lookups.load(Relaxed);
        self.counter("upstream_dns_lookups", "Names looked up.", asked)?;
        let failed = control.lookups_failed.load(Relaxed);
        let help = "Names looked up without a good answer; what was known stayed.";
        self.counter("upstream_dns_lookups_failed", help, failed)?;
        let help = "Addresses that a name of endpoints has, by the last good answer.";
        let mut family = self.family("upstream_dns_addresses", help, MetricType::Gauge)?;
        for (name, addresses, _) in &outside.names {
            family
                .encode_family(&[("name", name)])?
                .encode_gauge(addresses)?;
        }
        let help = "1 while the last answer was a good one.";
        let mut family = self.family("upstream_dns_known", help, MetricType::Gauge)?;
        for (name, _, is_known) in &outside.names {
            family
                .encode_family(&[("name", name)])?
                .encode_gauge(&u64::from(*is_known))?;
        }
        Ok(())
    }
}
