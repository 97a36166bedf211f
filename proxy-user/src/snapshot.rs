//! One immutable generation of everything configured, made ready for the way of a request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::{self, Config, Diagnostic, ListenerMode, ListenerTls, Loaded};
use crate::message::{self, EncodedSlash, UnderscoreFields};
use crate::metric::{self, Registry};
use crate::policy::Policies;
use crate::route::Routes;
use crate::tls::{Acceptor, Certificate, Tickets};
use crate::tunable::{self, Tunables};
use crate::upstream::{self, Endpoint, Upstream};

/// The application protocols spoken inside TLS, the preferred one first.
const ALPN: &[&[u8]] = &[b"http/1.1"];

/// One generation. Workers share it and change nothing in it but counters and beliefs.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub generation: u64,
    pub config: Arc<Config>,
    pub tunables: Arc<Tunables>,
    /// By index in `config.upstreams`: with the endpoints that they have now, which may be others than those in `config`.
    pub upstreams: Arc<[Arc<Upstream>]>,
    /// By index in `config.listeners`.
    pub listeners: Arc<Vec<Listener>>,
    /// By index in `upstreams`, then of the endpoint.
    pub endpoint_metrics: Arc<[EndpointMetrics]>,
    pub routes: Arc<Routes>,
    pub policies: Arc<Policies>,
    /// Of requests.
    pub request_limits: message::Limits,
    /// Of responses.
    pub response_limits: message::Limits,
    tickets: Tickets,
    workers: usize,
    seed: u64,
}

/// The counters of an upstream's endpoints, in their order.
type EndpointMetrics = Arc<[Arc<metric::Endpoint>]>;

/// What one listener needs at run time.
#[derive(Clone, Debug)]
pub struct Listener {
    /// None: it serves in the clear.
    pub acceptor: Option<Acceptor>,
    pub metrics: Arc<metric::Listener>,
    /// By index in `config.routes`.
    pub routes: Vec<Arc<metric::Route>>,
    /// Of requests for which there is no route.
    pub unrouted: Arc<metric::Route>,
}

impl Snapshot {
    /// Makes a generation of what was loaded; what the one before learned and must not forget (health, counters, ticket
    /// keys) goes on. `seed` keys the hashes of rate cells, see [`Policies::new`],
    /// and sticky cookies.
    ///
    /// # Errors
    /// A certificate that is none, or that its key does not match; all of them at once.
    pub fn build(
        generation: u64,
        loaded: Loaded,
        tunables: Arc<Tunables>,
        previous: Option<&Self>,
        workers: usize,
        registry: &Registry,
        seed: u64,
    ) -> Result<Self, Vec<Diagnostic>> {
        let config = loaded.config;
        let tickets = match previous {
            Some(previous) => previous.tickets.clone(),
            None => Tickets::new().map_err(|error| {
                vec![Diagnostic::error(format!(
                    "no key for TLS tickets: {error}"
                ))]
            })?,
        };
        let listeners = listeners(&config, &tickets, &tunables, registry)?;
        let upstreams = upstream::build(
            &config,
            workers,
            seed,
            previous.map(|previous| &previous.upstreams[..]),
        );
        let endpoint_metrics = upstreams
            .iter()
            .map(|upstream| endpoint_metrics(upstream, registry, None));
        Ok(Self {
            generation,
            endpoint_metrics: endpoint_metrics.collect(),
            upstreams,
            listeners: Arc::new(listeners),
            routes: Arc::new(Routes::new(&config)),
            policies: Arc::new(Policies::new(&config, seed)),
            request_limits: request_limits(&tunables),
            response_limits: response_limits(&tunables),
            tunables,
            config: Arc::new(config),
            tickets,
            workers,
            seed,
        })
    }

    /// The same with other endpoints of one upstream, and nothing made anew but that upstream. What was learned of an address
    /// goes on. An index that no upstream has changes nothing.
    #[must_use]
    pub fn with_endpoints(
        &self,
        upstream: usize,
        endpoints: Vec<config::Endpoint>,
        registry: &Registry,
    ) -> Self {
        let (Some(before), Some(config)) = (
            self.upstreams.get(upstream),
            self.config.upstreams.get(upstream),
        ) else {
            return self.clone();
        };
        let config = config::Upstream {
            endpoints,
            ..config.clone()
        };
        let after = Upstream::new(&config, self.workers, self.seed, Some(before));
        let counted = (before.as_ref(), &self.endpoint_metrics[upstream]);
        let metrics = endpoint_metrics(&after, registry, Some(counted));
        Self {
            upstreams: replaced(&self.upstreams, upstream, Arc::new(after)),
            endpoint_metrics: replaced(&self.endpoint_metrics, upstream, metrics),
            ..self.clone()
        }
    }

    /// The same with other tunables.
    #[must_use]
    pub fn with_tunables(&self, tunables: Arc<Tunables>) -> Self {
        let tickets_sent = tunables.tls.session_tickets as usize;
        let listeners = self.listeners.iter().map(|listener| Listener {
            acceptor: listener
                .acceptor
                .clone()
                .map(|acceptor| acceptor.tickets_sent(tickets_sent)),
            ..listener.clone()
        });
        Self {
            listeners: Arc::new(listeners.collect()),
            request_limits: request_limits(&tunables),
            response_limits: response_limits(&tunables),
            tunables,
            ..self.clone()
        }
    }
}

fn replaced<T: Clone>(all: &[T], index: usize, one: T) -> Arc<[T]> {
    let mut all = all.to_vec();
    all[index] = one;
    all.into()
}

/// Those of addresses that `before` had, too, need not be looked up by name.
fn endpoint_metrics(
    upstream: &Upstream,
    registry: &Registry,
    before: Option<(&Upstream, &EndpointMetrics)>,
) -> EndpointMetrics {
    let before = before.iter().flat_map(|(upstream, metrics)| {
        let addresses = upstream.endpoints.iter().map(|endpoint| endpoint.address);
        addresses.zip(metrics.iter())
    });
    let known: HashMap<SocketAddr, &Arc<metric::Endpoint>> = before.collect();
    let of = |endpoint: &Endpoint| match known.get(&endpoint.address) {
        Some(metrics) => Arc::clone(metrics),
        None => registry.endpoint(&upstream.name, &endpoint.address.to_string()),
    };
    upstream.endpoints.iter().map(of).collect()
}

fn listeners(
    config: &Config,
    tickets: &Tickets,
    tunables: &Tunables,
    registry: &Registry,
) -> Result<Vec<Listener>, Vec<Diagnostic>> {
    let (mut listeners, mut faults) = (Vec::new(), Vec::new());
    for listener in &config.listeners {
        let tls = match &listener.mode {
            ListenerMode::Serve { tls } => tls.as_ref(),
            ListenerMode::Forward { .. } => None,
        };
        let acceptor = tls.map(|tls| acceptor(tls, tickets, tunables));
        let acceptor = acceptor.transpose().unwrap_or_else(|mut found| {
            found
                .iter_mut()
                .for_each(|fault| *fault = fault.clone().at(&listener.at));
            faults.append(&mut found);
            None
        });
        let routes = match &listener.mode {
            ListenerMode::Serve { .. } => &config.routes[..],
            // It answers no request, and there may be thousands of it.
            ListenerMode::Forward { .. } => &[],
        };
        listeners.push(Listener {
            acceptor,
            metrics: registry.listener(&listener.name),
            routes: routes
                .iter()
                .map(|route| registry.route(&listener.name, &route.name))
                .collect(),
            unrouted: registry.route(&listener.name, ""),
        });
    }
    if faults.is_empty() {
        Ok(listeners)
    } else {
        Err(faults)
    }
}

fn acceptor(
    tls: &ListenerTls,
    tickets: &Tickets,
    tunables: &Tunables,
) -> Result<Acceptor, Vec<Diagnostic>> {
    let (mut certificates, mut faults) = (Vec::new(), Vec::new());
    for pem in &tls.certificates {
        match Certificate::parse(&pem.chain, &pem.key) {
            Ok(certificate) => certificates.push(certificate),
            Err(error) => faults.push(Diagnostic::error(format!(
                "{}: {error}",
                pem.path.display()
            ))),
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    Acceptor::new(&certificates, tickets, ALPN)
        .map(|acceptor| acceptor.tickets_sent(tunables.tls.session_tickets as usize))
        .map_err(|error| vec![Diagnostic::error(format!("TLS: {error}"))])
}

fn request_limits(tunables: &Tunables) -> message::Limits {
    let http = &tunables.http;
    message::Limits {
        head_bytes_max: http.head_bytes_max,
        field_bytes_max: http.field_bytes_max,
        fields_max: http.fields_max as usize,
        target_bytes_max: http.target_bytes_max,
        chunk_extension_bytes_max: http.chunk_extension_bytes_max,
        underscore_fields: match http.underscore_fields {
            tunable::UnderscoreFields::Drop => UnderscoreFields::Drop,
            tunable::UnderscoreFields::Keep => UnderscoreFields::Keep,
            tunable::UnderscoreFields::Refuse => UnderscoreFields::Refuse,
        },
        encoded_slash: match http.encoded_slash {
            tunable::EncodedSlash::Refuse => EncodedSlash::Refuse,
            tunable::EncodedSlash::Keep => EncodedSlash::Keep,
            tunable::EncodedSlash::Decode => EncodedSlash::Decode,
        },
        ..message::Limits::default()
    }
}

/// An origin is not held to the limits of clients, but to some.
fn response_limits(tunables: &Tunables) -> message::Limits {
    message::Limits {
        head_bytes_max: tunables.upstream.head_bytes_max,
        field_bytes_max: tunables.upstream.head_bytes_max,
        fields_max: message::FIELDS_MAX,
        ..message::Limits::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Bundle};
    use crate::tunable::Origin;
    use std::path::Path;

    const TEXT: &str = "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:80\"\n\
        [[upstream]]\nname = \"app\"\nendpoints = [\"127.0.0.1:81\"]\n\
        [[upstream]]\nname = \"other\"\nendpoints = [\"127.0.0.1:81\"]\n\
        [[route]]\nmatch = { path = \"/*\" }\nupstream = \"app\"\n\
        [[route]]\nmatch = { path = \"/other\" }\nupstream = \"other\"\n";

    fn build(previous: Option<&Snapshot>, registry: &Registry) -> Snapshot {
        let files = Bundle::of_files([("/etc/sluice/sluice.toml", TEXT)]);
        let loaded = config::load(&files, Path::new("/etc/sluice/sluice.toml")).unwrap();
        let tunables = Arc::new(loaded.tunables.clone());
        let generation = previous.map_or(1, |previous| previous.generation + 1);
        Snapshot::build(generation, loaded, tunables, previous, 1, registry, 7).unwrap()
    }

    #[test]
    fn other_tunables_change_the_limits_and_nothing_else() {
        let registry = Registry::new(1);
        let before = build(None, &registry);
        let mut tunables = (*before.tunables).clone();
        for (key, value) in [
            ("http.head_bytes_max", "2KiB"),
            ("http.underscore_fields", "refuse"),
            ("http.encoded_slash", "keep"),
            ("upstream.head_bytes_max", "3KiB"),
        ] {
            tunables.assign(key, value, Origin::Runtime).unwrap();
        }
        let after = before.with_tunables(Arc::new(tunables));
        let limits = &after.request_limits;
        assert_eq!(limits.head_bytes_max, 2 << 10);
        assert_eq!(limits.underscore_fields, UnderscoreFields::Refuse);
        assert_eq!(limits.encoded_slash, EncodedSlash::Keep);
        assert_eq!(after.response_limits.head_bytes_max, 3 << 10);
        assert_eq!(after.response_limits.field_bytes_max, 3 << 10);
        assert_eq!(before.request_limits.head_bytes_max, 32 << 10);
        assert_eq!(after.generation, before.generation);
        assert!(Arc::ptr_eq(&after.routes, &before.routes));
        assert!(Arc::ptr_eq(&after.upstreams, &before.upstreams));
        assert!(Arc::ptr_eq(&after.policies, &before.policies));
        let metrics = |snapshot: &Snapshot| Arc::clone(&snapshot.listeners[0].metrics);
        assert!(Arc::ptr_eq(&metrics(&after), &metrics(&before)));
    }

    #[test]
    fn other_endpoints_of_one_upstream_make_that_one_anew_and_nothing_else() {
        let registry = Registry::new(1);
        let before = build(None, &registry);
        before.upstreams[0].endpoints[0].hold(1000);
        let mut endpoints = before.config.upstreams[0].endpoints.clone();
        let mut other = endpoints[0];
        other.address.set_port(82);
        endpoints.push(other);
        let after = before.with_endpoints(0, endpoints, &registry);
        assert_eq!(after.generation, before.generation);
        assert_eq!(after.upstreams[0].endpoints.len(), 2);
        assert!(after.upstreams[0].endpoints[0].is_held(999));
        assert!(!after.upstreams[0].endpoints[1].is_held(999));
        assert!(Arc::ptr_eq(
            &after.endpoint_metrics[0][0],
            &before.endpoint_metrics[0][0]
        ));
        let of_other = registry.endpoint("app", "127.0.0.1:82");
        assert!(Arc::ptr_eq(&after.endpoint_metrics[0][1], &of_other));
        assert!(Arc::ptr_eq(&after.routes, &before.routes));
        assert!(Arc::ptr_eq(&after.config, &before.config));
        assert!(Arc::ptr_eq(&after.listeners, &before.listeners));
        assert!(Arc::ptr_eq(&after.upstreams[1], &before.upstreams[1]));
        assert!(Arc::ptr_eq(
            &before.with_endpoints(9, Vec::new(), &registry).upstreams,
            &before.upstreams
        ));
    }

    #[test]
    fn a_new_generation_counts_on_and_forgets_no_hold() {
        let registry = Registry::new(1);
        let before = build(None, &registry);
        before.upstreams[0].endpoints[0].hold(1000);
        let after = build(Some(&before), &registry);
        assert_eq!(after.generation, 2);
        assert!(after.upstreams[0].endpoints[0].is_held(999));
        assert!(Arc::ptr_eq(
            &after.endpoint_metrics[0][0],
            &before.endpoint_metrics[0][0]
        ));
        assert!(Arc::ptr_eq(
            &after.listeners[0].routes[0],
            &before.listeners[0].routes[0]
        ));
    }
}
