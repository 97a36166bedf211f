//! The registry as Prometheus reads it: each name, its help and its type, once and here.

mod health;

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode as encode_text;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::{
    DURATION_BOUNDS_US, Endpoint, EndpointShard, Listener, ListenerShard, Registry, Route, Series,
    Worker, locked,
};

/// What the registry cannot count itself: read where it stands, at the time of the question.
#[derive(Debug, Default)]
pub struct Outside {
    /// What workers ask the kernel through.
    pub backend: &'static str,
    /// Packets by verdict; empty while there is no datapath.
    pub verdicts: Vec<(&'static str, u64)>,
    /// Whether the kernel half is attached to each of its interfaces.
    pub attached: Vec<(String, bool)>,
    /// Packets and bytes that the kernel half took in for each listener.
    pub listener_traffic: Vec<(String, u64, u64)>,
    /// Packets and bytes that the kernel half sent to each endpoint (upstream, endpoint).
    pub endpoint_traffic: Vec<([String; 2], u64, u64)>,
    /// Whether the breaker of each upstream that has one is open, and how often it has opened.
    pub breakers: Vec<(String, bool, u64)>,
    /// Flows in the kernel's table.
    pub flow_entries: Option<u64>,
    /// Slots of the kernel's rings that keep an earlier owner.
    pub slots_shared: Option<u64>,
    /// Sources banned now.
    pub bans: Option<u64>,
    /// Calls under way to each endpoint (upstream, endpoint).
    pub calls_active: Vec<([String; 2], u64)>,
    /// Those who wait for room at upstreams with limits.
    pub queues: Vec<Waiting>,
    /// Packets dropped for each rule that can ban.
    pub rule_drops: Vec<(String, u64)>,
    /// Listener, file and end of validity (seconds since 1970) of each certificate.
    pub certificates: Vec<([String; 2], i64)>,
    /// Names of endpoints, how many addresses each has, and whether the last answer was a good one.
    pub names: Vec<(String, u64, bool)>,
    /// Seconds since 1970 at which the daemon started.
    pub start_time_seconds: u64,
}

/// Requests that wait, or waited, for room at an upstream.
#[derive(Debug, Default)]
pub struct Waiting {
    pub upstream: String,
    /// Now.
    pub pending: u64,
    /// Since the upstream came into the configuration: those that had to wait, those that found too many waiting, those
    /// that waited in vain.
    pub queued: u64,
    pub full: u64,
    pub late: u64,
    /// What all waited together, in microseconds.
    pub waited_us: u64,
}

/// Encodes all as OpenMetrics 1.0 text.
pub(super) fn encode(registry: &Arc<Registry>, outside: Outside) -> String {
    let mut all = prometheus_client::registry::Registry::with_prefix("sluice");
    all.register_collector(Box::new(All {
        registry: Arc::clone(registry),
        outside,
    }));
    let mut text = String::new();
    // Writing to a String cannot fail, and nothing else in here does.
    if encode_text(&mut text, &all).is_err() {
        text.push_str("# EOF\n");
    }
    text
}

#[derive(Debug)]
struct All {
    registry: Arc<Registry>,
    outside: Outside,
}

impl Collector for All {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut page = Page { encoder };
        page.control(&self.registry, &self.outside)?;
        page.workers(&self.registry.workers)?;
        page.log(&self.registry)?;
        page.overload(&self.registry)?;
        page.listeners(&self.registry.listeners)?;
        page.routes(&self.registry.routes)?;
        page.endpoints(&self.registry.endpoints)?;
        page.queues(&self.outside)?;
        page.health(&self.registry)?;
        page.names(&self.registry, &self.outside)?;
        page.breakers(&self.outside)?;
        page.datapath(&self.outside)
    }
}

struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    fn control(&mut self, registry: &Registry, outside: &Outside) -> Result<(), Error> {
        let control = &registry.control;
        let mut info = self.encoder.encode_descriptor(
            "build",
            "Version that runs.",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        let mut info = self.encoder.encode_descriptor(
            "net",
            "How workers ask the kernel for connections and bytes.",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&[("backend", outside.backend)])?;
        let started = "Seconds since 1970 at which the daemon started.";
        self.gauge("start_time_seconds", started, outside.start_time_seconds)?;
        self.gauge(
            "config_generation",
            "Number of the configuration in force.",
            control.generation.load(Relaxed),
        )?;
        let success = u64::from(control.last_reload_success.load(Relaxed));
        self.gauge(
            "config_last_reload_success",
            "1 when the last reload was applied, 0 when it was refused.",
            success,
        )?;
        let refused = control.reloads_refused.load(Relaxed);
        self.counter(
            "config_reloads_refused",
            "Reloads that were refused; the old configuration went on.",
            refused,
        )?;
        let restarts = control.daemon_restarts.load(Relaxed);
        self.counter(
            "daemon_restarts",
            "Times the keeper started a daemon again.",
            restarts,
        )?;
        self.counter(
            "guard_bans_issued",
            "Bans issued by policies.",
            control.bans_issued.load(Relaxed),
        )?;
        let spared = control.bans_spared.load(Relaxed);
        self.counter(
            "guard_bans_spared",
            "Bans not issued because many users stand behind the address.",
            spared,
        )?;
        self.counter(
            "upstream_probes",
            "Probes sent.",
            control.probes.load(Relaxed),
        )?;
        self.counter(
            "upstream_probes_failed",
            "Probes without a good answer.",
            control.probes_failed.load(Relaxed),
        )?;
        let mut ends = self.family(
            "tls_certificate_not_after_seconds",
            "Seconds since 1970 at which a certificate ends.",
            MetricType::Gauge,
        )?;
        for ([listener, file], not_after) in &outside.certificates {
            ends.encode_family(&[("listener", listener), ("file", file)])?
                .encode_gauge(not_after)?;
        }
        Ok(())
    }

    fn workers(&mut self, workers: &[Arc<Worker>]) -> Result<(), Error> {
        let sum = |part: fn(&Worker) -> u64| workers.iter().map(|worker| part(worker)).sum::<u64>();
        self.gauge("workers", "Worker threads.", workers.len() as u64)?;
        self.counter(
            "tls_handshakes",
            "TLS handshakes completed.",
            sum(|w| w.handshakes.value()),
        )?;
        let failed = sum(|w| w.handshakes_failed.value());
        self.counter(
            "tls_handshakes_failed",
            "TLS handshakes that failed or ran out of time.",
            failed,
        )?;
        self.counter(
            "worker_panics",
            "Exchanges that ended by a panic.",
            sum(|w| w.panics.value()),
        )?;
        self.counter(
            "reports_dropped",
            "Reports that found the queue full.",
            sum(|w| w.reports_dropped.value()),
        )?;
        let banned = sum(|w| w.connections_banned.value());
        self.counter(
            "guard_connections_closed",
            "Connections closed because of a ban.",
            banned,
        )?;

        let mut reasons = std::collections::BTreeMap::<&str, u64>::new();
        for worker in workers {
            for (reason, count) in &worker.rejected.0 {
                let reason = reason.get().copied().unwrap_or("other");
                *reasons.entry(reason).or_default() += count.value();
            }
        }
        let mut family = self.family(
            "http_rejected",
            "Requests refused, by reason.",
            MetricType::Counter,
        )?;
        for (reason, count) in reasons.iter().filter(|(_, count)| **count > 0) {
            counted(&mut family, &[("reason", *reason)], *count)?;
        }
        Ok(())
    }

    fn log(&mut self, registry: &Registry) -> Result<(), Error> {
        let failed = registry.control.log_failed.load(Relaxed);
        let workers = registry.workers.iter().map(|w| w.log_dropped.value());
        let help = "Lines of the access log that were not written: its file or reader was slow, full or gone.";
        self.counter("log_dropped", help, workers.sum::<u64>() + failed)
    }

    fn overload(&mut self, registry: &Registry) -> Result<(), Error> {
        const SIGNALS: [&str; 3] = ["descriptors", "memory", "lag"];
        const STAGES: [&str; 5] = ["none", "lean", "close", "refuse", "rest"];
        let worst = registry.overload();
        let mut family = self.family(
            "overload_used_percent",
            "How much is used of what there is, in the worst worker.",
            MetricType::Gauge,
        )?;
        for (signal, (used_percent, _)) in SIGNALS.iter().zip(&worst) {
            family
                .encode_family(&[("signal", *signal)])?
                .encode_gauge(used_percent)?;
        }
        let mut family = self.family(
            "overload_stage",
            "What is left off, in the worst worker: 0 nothing, 1 large buffers, 2 keep-alive, 3 requests, 4 connections.",
            MetricType::Gauge,
        )?;
        for (signal, (_, stage)) in SIGNALS.iter().zip(&worst) {
            family
                .encode_family(&[("signal", *signal)])?
                .encode_gauge(stage)?;
        }
        let mut family = self.family(
            "overload_entered",
            "Times that a worker entered a stage.",
            MetricType::Counter,
        )?;
        for (index, signal) in SIGNALS.into_iter().enumerate() {
            for (stage, name) in STAGES.into_iter().enumerate() {
                let workers = registry.workers.iter();
                let count = workers
                    .map(|worker| worker.overload[index].entered[stage].value())
                    .sum();
                counted(&mut family, &[("signal", signal), ("stage", name)], count)?;
            }
        }
        Ok(())
    }

    fn listeners(&mut self, listeners: &Series<[String; 1], Listener>) -> Result<(), Error> {
        let listeners = locked(listeners);
        type Part = fn(&ListenerShard) -> u64;
        let counters: [(&str, &str, Part); 3] = [
            ("listener_connections", "Connections accepted.", |l| {
                l.accepted.value()
            }),
            ("listener_received_bytes", "Bytes read from clients.", |l| {
                l.received_bytes.value()
            }),
            ("listener_sent_bytes", "Bytes written to clients.", |l| {
                l.sent_bytes.value()
            }),
        ];
        for (name, help, part) in counters {
            let mut family = self.family(name, help, MetricType::Counter)?;
            for ([listener], counts) in &*listeners {
                counted(
                    &mut family,
                    &[("listener", listener)],
                    counts.shards.sum(part),
                )?;
            }
        }
        let mut family = self.family(
            "listener_connections_active",
            "Connections open now.",
            MetricType::Gauge,
        )?;
        for ([listener], counts) in &*listeners {
            let active = counts.shards.sum_signed(|l| l.active.value());
            family
                .encode_family(&[("listener", listener)])?
                .encode_gauge(&active)?;
        }
        Ok(())
    }

    fn routes(&mut self, routes: &Series<[String; 2], Route>) -> Result<(), Error> {
        let routes = locked(routes);
        let mut family = self.family("http_requests", "Requests answered.", MetricType::Counter)?;
        for ([listener, route], counts) in &*routes {
            for (status, count) in counts.status_counts() {
                let code = status.to_string();
                counted(
                    &mut family,
                    &[("listener", listener), ("route", route), ("code", &code)],
                    count,
                )?;
            }
        }
        let help = "From the end of a request's head to the end of the response.";
        let mut family =
            self.family("http_request_duration_seconds", help, MetricType::Histogram)?;
        for ([listener, route], counts) in &*routes {
            let buckets: Vec<(f64, u64)> = (0..=DURATION_BOUNDS_US.len())
                .map(|n| {
                    let bound_s = DURATION_BOUNDS_US
                        .get(n)
                        .map_or(f64::INFINITY, |us| *us as f64 / 1e6);
                    (
                        bound_s,
                        counts
                            .shards
                            .sum(|shard| shard.durations.buckets[n].value()),
                    )
                })
                .collect();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let sum_s = counts.shards.sum(|shard| shard.durations.sum_us.value()) as f64 / 1e6;
            let labels = [("listener", listener), ("route", route)];
            family
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(sum_s, count, &buckets, None)?;
        }
        Ok(())
    }

    fn breakers(&mut self, outside: &Outside) -> Result<(), Error> {
        let mut family = self.family(
            "upstream_breaker_open",
            "1 while nobody is asked because too many calls failed.",
            MetricType::Gauge,
        )?;
        for (upstream, is_open, _) in &outside.breakers {
            family
                .encode_family(&[("upstream", upstream)])?
                .encode_gauge(&u64::from(*is_open))?;
        }
        let mut family = self.family(
            "upstream_breaker_opened",
            "Times the breaker has opened.",
            MetricType::Counter,
        )?;
        for (upstream, _, opened) in &outside.breakers {
            counted(&mut family, &[("upstream", upstream)], *opened)?;
        }
        Ok(())
    }

    fn endpoints(&mut self, endpoints: &Series<[String; 2], Endpoint>) -> Result<(), Error> {
        let endpoints = locked(endpoints);
        type Part = fn(&EndpointShard) -> u64;
        let counters: [(&str, &str, Part); 9] = [
            ("upstream_calls", "Calls begun.", |e| e.calls.value()),
            (
                "upstream_failures",
                "Calls without a whole response, or with one that counts as a failure.",
                |e| e.failures.value(),
            ),
            ("upstream_retries", "Calls that were tried again.", |e| {
                e.retries.value()
            }),
            (
                "upstream_retries_denied",
                "Calls not tried again because the retry budget was spent.",
                |e| e.retries_denied.value(),
            ),
            (
                "upstream_hedges",
                "Calls begun because the one before took long.",
                |e| e.hedges.value(),
            ),
            ("upstream_hedges_won", "Hedges that answered first.", |e| {
                e.hedges_won.value()
            }),
            ("upstream_connects", "Connections opened.", |e| {
                e.connects.value()
            }),
            (
                "upstream_received_bytes",
                "Bytes read from endpoints.",
                |e| e.received_bytes.value(),
            ),
            ("upstream_sent_bytes", "Bytes written to endpoints.", |e| {
                e.sent_bytes.value()
            }),
        ];
        for (name, help, part) in counters {
            let mut family = self.family(name, help, MetricType::Counter)?;
            for ([upstream, endpoint], counts) in &*endpoints {
                let labels = [("upstream", upstream), ("endpoint", endpoint)];
                counted(&mut family, &labels, counts.shards.sum(part))?;
            }
        }
        let mut family = self.family(
            "upstream_connections_active",
            "Connections open now.",
            MetricType::Gauge,
        )?;
        for ([upstream, endpoint], counts) in &*endpoints {
            let active = counts.shards.sum_signed(|e| e.active.value());
            family
                .encode_family(&[("upstream", upstream), ("endpoint", endpoint)])?
                .encode_gauge(&active)?;
        }
        Ok(())
    }

    fn queues(&mut self, outside: &Outside) -> Result<(), Error> {
        let mut family = self.family(
            "upstream_calls_active",
            "Calls under way.",
            MetricType::Gauge,
        )?;
        for ([upstream, endpoint], active) in &outside.calls_active {
            family
                .encode_family(&[("upstream", upstream), ("endpoint", endpoint)])?
                .encode_gauge(&(*active as i64))?;
        }
        let help = "Requests that wait for room at an upstream with limits.";
        let mut family = self.family("upstream_pending", help, MetricType::Gauge)?;
        for queue in &outside.queues {
            family
                .encode_family(&[("upstream", &queue.upstream)])?
                .encode_gauge(&(queue.pending as i64))?;
        }
        let help = "Requests that had to wait for room.";
        let mut family = self.family("upstream_queued", help, MetricType::Counter)?;
        for queue in &outside.queues {
            counted(&mut family, &[("upstream", &queue.upstream)], queue.queued)?;
        }
        let help =
            "Requests for which there was no room: too many waited, or they waited too long.";
        let mut family = self.family("upstream_queue_refused", help, MetricType::Counter)?;
        for queue in &outside.queues {
            for (reason, count) in [("full", queue.full), ("timeout", queue.late)] {
                let labels = [("upstream", queue.upstream.as_str()), ("reason", reason)];
                counted(&mut family, &labels, count)?;
            }
        }
        let help = "What requests waited for room and found it, all together.";
        let mut family = self.family("upstream_queue_wait_seconds", help, MetricType::Counter)?;
        for queue in &outside.queues {
            let seconds = queue.waited_us as f64 / 1e6;
            family
                .encode_family(&[("upstream", &queue.upstream)])?
                .encode_counter::<NoLabelSet, _, u64>(&seconds, None)?;
        }
        Ok(())
    }

    fn datapath(&mut self, outside: &Outside) -> Result<(), Error> {
        if let Some(bans) = outside.bans {
            self.gauge("guard_bans", "Sources banned now.", bans)?;
        }
        if let Some(flows) = outside.flow_entries {
            self.gauge("flow_entries", "Flows in the kernel's table.", flows)?;
        }
        if let Some(slots) = outside.slots_shared {
            let help = "Slots of rings that keep an endpoint from before a change, for flows that began with it.";
            self.gauge("datapath_slots_shared", help, slots)?;
        }
        let mut family = self.family(
            "datapath_attached",
            "Whether the kernel half is attached to the interface.",
            MetricType::Gauge,
        )?;
        for (interface, attached) in &outside.attached {
            let labels = [("interface", interface)];
            family
                .encode_family(&labels)?
                .encode_gauge(&i64::from(*attached))?;
        }
        let mut family = self.family(
            "datapath_packets",
            "Packets by verdict.",
            MetricType::Counter,
        )?;
        for (verdict, packets) in &outside.verdicts {
            counted(&mut family, &[("verdict", *verdict)], *packets)?;
        }
        let mut family = self.family(
            "guard_dropped_packets",
            "Packets dropped, by rule.",
            MetricType::Counter,
        )?;
        for (rule, packets) in &outside.rule_drops {
            counted(&mut family, &[("rule", rule)], *packets)?;
        }
        let name = "datapath_listener_packets";
        let mut family = self.family(
            name,
            "Packets the kernel half took in.",
            MetricType::Counter,
        )?;
        for (listener, packets, _) in &outside.listener_traffic {
            counted(&mut family, &[("listener", listener)], *packets)?;
        }
        let name = "datapath_listener_bytes";
        let mut family =
            self.family(name, "Bytes the kernel half took in.", MetricType::Counter)?;
        for (listener, _, bytes) in &outside.listener_traffic {
            counted(&mut family, &[("listener", listener)], *bytes)?;
        }
        let name = "datapath_endpoint_packets";
        let mut family = self.family(
            name,
            "Packets the kernel half sent to endpoints.",
            MetricType::Counter,
        )?;
        for ([upstream, endpoint], packets, _) in &outside.endpoint_traffic {
            counted(
                &mut family,
                &[("upstream", upstream), ("endpoint", endpoint)],
                *packets,
            )?;
        }
        let name = "datapath_endpoint_bytes";
        let mut family = self.family(
            name,
            "Bytes the kernel half sent to endpoints.",
            MetricType::Counter,
        )?;
        for ([upstream, endpoint], _, bytes) in &outside.endpoint_traffic {
            counted(
                &mut family,
                &[("upstream", upstream), ("endpoint", endpoint)],
                *bytes,
            )?;
        }
        Ok(())
    }

    fn family<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
        kind: MetricType,
    ) -> Result<MetricEncoder<'s>, Error> {
        self.encoder.encode_descriptor(name, help, None, kind)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        ConstGauge::new(value).encode(self.family(name, help, MetricType::Gauge)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        self.family(name, help, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }
}

fn counted(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    value: u64,
) -> Result<(), Error> {
    family
        .encode_family(labels)?
        .encode_counter::<NoLabelSet, _, u64>(&value, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_described_once_and_every_sample_belongs_to_one() {
        let registry = Arc::new(Registry::new(2));
        registry.route("web", "a\"b").count(1, 404, 3_000);
        registry.listener("web").of(0).active.add(2);
        registry.endpoint("app", "10.0.0.1:80").of(1).calls.add(7);
        registry.worker(0).reject("no_route");
        let outside = Outside {
            verdicts: vec![("serve", 3)],
            bans: Some(1),
            calls_active: vec![(["app".to_owned(), "10.0.0.1:80".to_owned()], 4)],
            queues: vec![Waiting {
                upstream: "app".to_owned(),
                pending: 2,
                queued: 9,
                full: 1,
                late: 3,
                waited_us: 1_500_000,
            }],
            ..Outside::default()
        };
        let text = registry.text(outside);

        let mut families = std::collections::HashSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = line.split(' ').next().unwrap_or_default();
            assert!(families.insert(name), "{name} twice");
        }
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap_or_default();
            let known = ["", "_total", "_info", "_sum", "_count", "_bucket"]
                .iter()
                .any(|suffix| {
                    name.strip_suffix(suffix)
                        .is_some_and(|family| families.contains(family))
                });
            assert!(known, "{line}");
        }
        for wanted in [
            r#"sluice_http_requests_total{listener="web",route="a\"b",code="404"} 1"#,
            r#"sluice_http_request_duration_seconds_bucket{le="0.005",listener="web",route="a\"b"} 1"#,
            r#"sluice_http_request_duration_seconds_bucket{le="+Inf",listener="web",route="a\"b"} 1"#,
            r#"sluice_http_rejected_total{reason="no_route"} 1"#,
            r#"sluice_upstream_calls_total{upstream="app",endpoint="10.0.0.1:80"} 7"#,
            r#"sluice_listener_connections_active{listener="web"} 2"#,
            r#"sluice_datapath_packets_total{verdict="serve"} 3"#,
            "sluice_guard_bans 1",
            r#"sluice_upstream_calls_active{upstream="app",endpoint="10.0.0.1:80"} 4"#,
            r#"sluice_upstream_pending{upstream="app"} 2"#,
            r#"sluice_upstream_queued_total{upstream="app"} 9"#,
            r#"sluice_upstream_queue_refused_total{upstream="app",reason="full"} 1"#,
            r#"sluice_upstream_queue_refused_total{upstream="app",reason="timeout"} 3"#,
            r#"sluice_upstream_queue_wait_seconds_total{upstream="app"} 1.5"#,
        ] {
            assert!(
                text.lines().any(|line| line == wanted),
                "no {wanted} in\n{text}"
            );
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
