//! Endpoints that are names: what the DNS said of each last, and which endpoints follow from that.

mod lookup;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::config::{self, ENDPOINT_WEIGHT_MAX, Endpoint, EndpointName, Traits};
use crate::tunable::Tunables;
use lookup::{Asker, Manners};

/// What is asked of the DNS.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// The addresses of a host, of both families.
    Host(String),
    /// The targets of SRV records, and their addresses.
    Service(String),
}

/// One of those that a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    pub ip: IpAddr,
    /// Of a service; 0: the name's own.
    pub port: u16,
    /// Of a service, as it stands in the record, shared by the addresses of a target.
    pub weight: u32,
    /// Of a service: lower ones first.
    pub priority: u16,
}

/// What one round of asking came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub question: Question,
    /// All there are, sorted; or why it is not known.
    pub targets: Result<Vec<Target>, String>,
}

/// What is known of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// By the last good answer.
    pub targets: Vec<Target>,
    /// Why the last answer was none.
    pub failure: Option<String>,
}

/// The last good answers, for the next daemon.
pub type Remembered = Vec<(Question, Vec<Target>)>;

/// Names that are asked for, now and again.
pub struct Names {
    known: BTreeMap<Question, Known>,
    running: HashMap<Question, JoinHandle<()>>,
    answers: mpsc::Sender<Answer>,
    manners: watch::Sender<Manners>,
}

impl From<&EndpointName> for Question {
    fn from(name: &EndpointName) -> Self {
        match name {
            EndpointName::Host { host, .. } => Self::Host(host.clone()),
            EndpointName::Service { name, .. } => Self::Service(name.clone()),
        }
    }
}

impl Question {
    pub fn name(&self) -> &str {
        match self {
            Self::Host(name) | Self::Service(name) => name,
        }
    }
}

impl Names {
    /// None yet; what is found out comes to `answers`. What the daemon before knew is believed until the DNS says otherwise.
    pub fn new(answers: mpsc::Sender<Answer>, remembered: &Remembered) -> Self {
        let known = remembered.iter().map(|(question, targets)| {
            let targets = targets.clone();
            let known = Known {
                targets,
                failure: Some("not asked yet".to_owned()),
            };
            (question.clone(), known)
        });
        Self {
            known: known.collect(),
            running: HashMap::new(),
            answers,
            manners: watch::channel(Manners::default()).0,
        }
    }

    /// Asks for exactly these names from now on. One that is asked for already goes on undisturbed.
    pub fn set(
        &mut self,
        wanted: BTreeSet<Question>,
        resolver: &config::Resolver,
        tunables: &Tunables,
    ) {
        if wanted.is_empty() && self.running.is_empty() {
            return;
        }
        self.manners.send_replace(Manners::new(resolver, tunables));
        self.keep(&wanted);
        for question in wanted {
            if !self.running.contains_key(&question) {
                let asker = Asker::new(
                    question.clone(),
                    self.manners.subscribe(),
                    self.answers.clone(),
                );
                let task = tokio::task::spawn_local(asker.run());
                self.running.insert(question, task);
            }
        }
    }

    /// Asks for no others any more.
    pub fn keep(&mut self, wanted: &BTreeSet<Question>) {
        self.running.retain(|question, task| {
            let stays = wanted.contains(question);
            if !stays {
                task.abort();
            }
            stays
        });
        self.known.retain(|question, _| wanted.contains(question));
    }

    /// The tunables have other values.
    pub fn behave(&mut self, resolver: &config::Resolver, tunables: &Tunables) {
        if !self.running.is_empty() {
            self.manners.send_replace(Manners::new(resolver, tunables));
        }
    }

    /// Takes an answer in; whether endpoints may be others now. Without a good answer what was known stays.
    pub fn learn(&mut self, answer: Answer) -> bool {
        let name = answer.question.name().to_owned();
        let known = self.known.entry(answer.question).or_default();
        match answer.targets {
            Ok(targets) if known.targets == targets => {
                if known.failure.take().is_some() {
                    log::info!("the name is known again: name={name}");
                }
                false
            }
            Ok(targets) => {
                known.failure = None;
                known.targets = targets;
                true
            }
            Err(failure) => {
                if known.failure.is_none() {
                    log::warn!(
                        "the DNS does not know the name, so what was known stays: name={name} addresses={} reason={failure:?}",
                        known.targets.len()
                    );
                }
                known.failure = Some(failure);
                false
            }
        }
    }

    /// The targets of a question by its last good answer.
    pub fn last(&self, question: &Question) -> Vec<Target> {
        let known = self.known.get(question);
        known.map(|known| known.targets.clone()).unwrap_or_default()
    }

    /// An answer that was learned cannot be followed: it is `before` again, as if there had been none.
    pub fn reject(&mut self, question: &Question, before: &[Target], error: String) {
        let known = self.known.entry(question.clone()).or_default();
        known.targets = before.to_vec();
        log::error!(
            "endpoints stay as they are, for what the DNS says cannot be done: name={}: {error}",
            question.name()
        );
        known.failure = Some(error);
    }

    /// There was an answer, good or bad, to all that is asked for.
    pub fn all_answered<'q>(&self, questions: impl IntoIterator<Item = &'q Question>) -> bool {
        let is_known = |question| self.known.contains_key(question);
        questions.into_iter().all(is_known)
    }

    /// What is known of a name.
    pub fn known(&self, name: &EndpointName) -> Known {
        self.known.get(&name.into()).cloned().unwrap_or_default()
    }

    /// The names, each with how many addresses it has, and whether the last answer was a good one.
    pub fn facts(&self) -> Vec<(String, u64, bool)> {
        let facts = self.known.iter().map(|(question, known)| {
            let count = known.targets.len() as u64;
            (question.name().to_owned(), count, known.failure.is_none())
        });
        facts.collect()
    }

    /// For the next daemon.
    pub fn remembered(&self) -> Remembered {
        let known = self.known.iter();
        known
            .map(|(question, known)| (question.clone(), known.targets.clone()))
            .collect()
    }

    /// The endpoints of an upstream, sorted: those with addresses, and those that its names have now. `is_usable` says which
    /// of the latter could be asked at all.
    pub fn endpoints(
        &self,
        upstream: &config::Upstream,
        is_usable: impl Fn(SocketAddr) -> bool,
    ) -> Vec<Endpoint> {
        let by_address = upstream.endpoints.iter().filter(|one| !one.is_named);
        let mut endpoints: BTreeMap<SocketAddr, Endpoint> =
            by_address.map(|one| (one.address, *one)).collect();
        for name in &upstream.names {
            let Some(known) = self.known.get(&name.into()) else {
                continue;
            };
            for endpoint in named(name, &known.targets) {
                if is_usable(endpoint.address) {
                    endpoints.entry(endpoint.address).or_insert(endpoint);
                }
            }
        }
        endpoints.into_values().collect()
    }
}

/// The endpoints that a name stands for.
fn named(name: &EndpointName, targets: &[Target]) -> Vec<Endpoint> {
    let first = targets.iter().map(|target| target.priority).min();
    let heaviest = targets.iter().map(|target| target.weight).max();
    let heaviest = u64::from(heaviest.unwrap_or(0).max(ENDPOINT_WEIGHT_MAX));
    let endpoint = |target: &Target| match name {
        EndpointName::Host { port, traits, .. } => traits.at((target.ip, *port).into()),
        // A weight of 0 is a very small one, and who has not the first priority stands in (RFC 2782).
        EndpointName::Service { calls_max, .. } => {
            let weight = u64::from(target.weight) * u64::from(ENDPOINT_WEIGHT_MAX) / heaviest;
            let traits = Traits {
                weight: (weight as u32).max(1),
                is_backup: Some(target.priority) != first,
                calls_max: *calls_max,
            };
            traits.at((target.ip, target.port).into())
        }
    };
    let endpoints = targets.iter().map(endpoint);
    endpoints
        .map(|endpoint| Endpoint {
            is_named: true,
            ..endpoint
        })
        .collect()
}

#[cfg(test)]
mod tests;
