//! Asking the DNS for one name, round by round: when it says so by its TTL, and more patiently while it does not answer.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{RData, RecordType};
use hickory_resolver::{ResolverBuilder, TokioResolver};
use tokio::sync::{mpsc, watch};
use tokio::time::error::Elapsed;
use tokio::time::{sleep, timeout};

use super::{Answer, Question, Target};
use crate::config;
use crate::tunable::Tunables;

/// Pauses are up to so much longer at random, so that a fleet does not ask in step; never shorter, for what was heard last is
/// remembered by the resolver until then.
const JITTER: f64 = 0.1;

/// Longest pause while there is no answer.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// When one family of a host is asked again of which nothing could be learned.
const PART_RETRY: Duration = Duration::from_secs(10);

/// How much longer than one look-up a round may take: records of a service, then the addresses of its targets.
const LOOKUPS: u32 = 4;

/// How the DNS is asked.
#[derive(Clone)]
pub struct Manners {
    resolver: Result<TokioResolver, String>,
    timeout: Duration,
    ttl_min: Duration,
    ttl_max: Duration,
    addresses_max: usize,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            resolver: Err("there is no configuration yet".to_owned()),
            timeout: Duration::ZERO,
            ttl_min: Duration::ZERO,
            ttl_max: Duration::ZERO,
            addresses_max: 0,
        }
    }
}

impl Manners {
    pub fn new(resolver: &config::Resolver, tunables: &Tunables) -> Self {
        let limits = &tunables.upstream;
        Self {
            resolver: build(resolver, tunables),
            timeout: limits.dns_timeout,
            ttl_min: limits.dns_ttl_min,
            ttl_max: limits.dns_ttl_max.max(limits.dns_ttl_min),
            addresses_max: limits.dns_addresses_max as usize,
        }
    }
}

fn build(resolver: &config::Resolver, tunables: &Tunables) -> Result<TokioResolver, String> {
    let mut builder = if resolver.servers.is_empty() {
        TokioResolver::builder_tokio()
            .map_err(|error| format!("/etc/resolv.conf is of no use: {error}"))?
    } else {
        let servers = resolver.servers.iter().map(|server| {
            let mut connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
            connections
                .iter_mut()
                .for_each(|connection| connection.port = server.port());
            NameServerConfig::new(server.ip(), true, connections.into())
        });
        let config = ResolverConfig::from_name_servers(servers.collect());
        let provider = TokioRuntimeProvider::default();
        let builder: ResolverBuilder<_> = TokioResolver::builder_with_config(config, provider);
        builder
    };
    let limits = &tunables.upstream;
    let options = builder.options_mut();
    // Two tries of one server fit into the time for all.
    options.timeout = limits.dns_timeout / 3;
    options.attempts = 2;
    // What is asked again shall be asked, and not be taken from a memory that keeps it longer than we do.
    options.positive_max_ttl = Some(limits.dns_ttl_max);
    options.negative_max_ttl = Some(limits.dns_ttl_min);
    builder.build().map_err(|error| error.to_string())
}

/// Asks for one name as long as it runs.
pub struct Asker {
    question: Question,
    manners: watch::Receiver<Manners>,
    answers: mpsc::Sender<Answer>,
    /// The last addresses of each host and family: one may be known while the other is not.
    last: HashMap<(String, RecordType), Vec<IpAddr>>,
}

/// What there is, and until when.
struct Found<T> {
    all: Vec<T>,
    until: Instant,
}

impl Asker {
    pub fn new(
        question: Question,
        manners: watch::Receiver<Manners>,
        answers: mpsc::Sender<Answer>,
    ) -> Self {
        Self {
            question,
            manners,
            answers,
            last: HashMap::new(),
        }
    }

    /// Ends with its receiver.
    pub async fn run(mut self) {
        let (hashes, mut failures) = (RandomState::new(), 0_u32);
        for round in 0_u64.. {
            let manners = self.manners.borrow_and_update().clone();
            let asked = timeout(manners.timeout * LOOKUPS, self.ask(&manners)).await;
            let found = asked.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            let (targets, rest) = match found {
                Ok(found) => {
                    failures = 0;
                    let ttl = found.until.saturating_duration_since(Instant::now());
                    (Ok(found.all), ttl.clamp(manners.ttl_min, manners.ttl_max))
                }
                Err(failure) => {
                    let rest = manners.ttl_min * 2_u32.saturating_pow(failures.min(16));
                    failures += 1;
                    (Err(failure), rest.min(RETRY_MAX.max(manners.ttl_min)))
                }
            };
            let question = self.question.clone();
            if self
                .answers
                .send(Answer { question, targets })
                .await
                .is_err()
            {
                return;
            }
            let chance = hashes.hash_one(round) as f64 / u64::MAX as f64;
            let rest = rest.mul_f64(1.0 + JITTER * chance);
            tokio::select! {
                () = sleep(rest) => {}
                // Other servers, or other limits: they may know better.
                changed = self.manners.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn ask(&mut self, manners: &Manners) -> Result<Found<Target>, String> {
        let resolver = manners.resolver.clone()?;
        let mut found = match self.question.clone() {
            Question::Host(host) => {
                let found = self.addresses(&resolver, &host, manners).await?;
                let target = |ip| Target {
                    ip,
                    port: 0,
                    weight: 1,
                    priority: 0,
                };
                Found {
                    all: found.all.into_iter().map(target).collect(),
                    until: found.until,
                }
            }
            Question::Service(name) => self.service(&resolver, &name, manners).await?,
        };
        found.all.retain(|target| is_somebody(target.ip));
        found.all.sort_unstable();
        found.all.dedup_by_key(|target| (target.ip, target.port));
        if found.all.is_empty() {
            return Err("nobody is at its addresses".to_owned());
        }
        if found.all.len() > manners.addresses_max {
            log::warn!(
                "the name has {} addresses, of which the first {} are taken: name={}",
                found.all.len(),
                manners.addresses_max,
                self.question.name()
            );
            found.all.truncate(manners.addresses_max);
        }
        Ok(found)
    }

    /// The addresses of a host. A family of which nothing can be learned is as it was; that there are none is an answer, as
    /// long as there are some of the other.
    async fn addresses(
        &mut self,
        resolver: &TokioResolver,
        host: &str,
        manners: &Manners,
    ) -> Result<Found<IpAddr>, String> {
        let (v4, v6) = tokio::join!(
            timeout(manners.timeout, resolver.ipv4_lookup(host)),
            timeout(manners.timeout, resolver.ipv6_lookup(host)),
        );
        let mut found = Found {
            all: Vec::new(),
            until: Instant::now() + Duration::from_secs(u32::MAX.into()),
        };
        let mut failures = Vec::new();
        for (family, answer) in [(RecordType::A, v4), (RecordType::AAAA, v6)] {
            let key = (host.to_owned(), family);
            match records(answer) {
                Ok(Some(lookup)) => {
                    let of_family: Vec<IpAddr> =
                        lookup.answers().iter().filter_map(ip_of).collect();
                    found.until = found.until.min(lookup.valid_until());
                    found.all.extend(&of_family);
                    self.last.insert(key, of_family);
                }
                Ok(None) => drop(self.last.remove(&key)),
                Err(error) => {
                    found.all.extend(self.last.get(&key).into_iter().flatten());
                    found.until = found.until.min(Instant::now() + PART_RETRY);
                    failures.push(error);
                }
            }
        }
        match failures.pop() {
            // Nothing was learned at all, or nothing but that there are none of the other.
            Some(error) if !failures.is_empty() || found.all.is_empty() => Err(error),
            None if found.all.is_empty() => Err("it has no addresses".to_owned()),
            _ => Ok(found),
        }
    }

    async fn service(
        &mut self,
        resolver: &TokioResolver,
        name: &str,
        manners: &Manners,
    ) -> Result<Found<Target>, String> {
        let answer = timeout(manners.timeout, resolver.srv_lookup(name)).await;
        let lookup = records(answer)?.ok_or_else(|| "it has no SRV records".to_owned())?;
        let mut found = Found {
            all: Vec::new(),
            until: lookup.valid_until(),
        };
        let mut records: Vec<_> = lookup
            .answers()
            .iter()
            .filter_map(|record| match &record.data {
                // A target of `.` says that there is no such service here.
                RData::SRV(srv) if !srv.target.is_root() => Some(srv),
                _ => None,
            })
            .collect();
        records.sort_by_key(|srv| (srv.priority, srv.target.clone(), srv.port));
        let mut failure = "the service is said not to be there".to_owned();
        let mut hosts = BTreeSet::new();
        for srv in records.into_iter().take(manners.addresses_max) {
            let host = srv.target.to_ascii();
            match self.addresses(resolver, &host, manners).await {
                Ok(addresses) => {
                    found.until = found.until.min(addresses.until);
                    let weight = u32::from(srv.weight) / addresses.all.len().max(1) as u32;
                    let target = |ip| Target {
                        ip,
                        port: srv.port,
                        weight,
                        priority: srv.priority,
                    };
                    found.all.extend(addresses.all.into_iter().map(target));
                }
                Err(error) => failure = format!("{host}: {error}"),
            }
            hosts.insert(host);
        }
        self.last.retain(|(host, _), _| hosts.contains(host));
        match found.all.is_empty() {
            false => Ok(found),
            true => Err(failure),
        }
    }
}

/// The records of an answer, or none because it says that there are none; or why nothing is known.
fn records(answer: Result<Result<Lookup, NetError>, Elapsed>) -> Result<Option<Lookup>, String> {
    match answer.map_err(|_| "no answer in time".to_owned())? {
        Ok(lookup) => Ok(Some(lookup)),
        Err(NetError::Dns(DnsError::NoRecordsFound(none)))
            if matches!(
                none.response_code,
                ResponseCode::NoError | ResponseCode::NXDomain
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.to_string()),
    }
}

fn ip_of(record: &hickory_resolver::proto::rr::Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    }
}

/// One host could answer there: the DNS of others says what it likes.
fn is_somebody(ip: IpAddr) -> bool {
    let is_broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    let is_mapped = matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    !(ip.is_unspecified() || ip.is_multicast() || is_broadcast || is_mapped)
}
