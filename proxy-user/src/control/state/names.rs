//! Endpoints that are names: asked for with each generation, and changed when the DNS says something else.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::mpsc;

use super::Control;
use crate::config::{self, Config, Endpoint};
use crate::control::endpoints::Changes;
use crate::control::names::{Answer, Names, Question};
use crate::snapshot::Snapshot;
use crate::tunable::Tunables;

impl Control {
    /// Where the answers of the DNS shall go.
    pub fn start_names(&mut self, answers: mpsc::Sender<Answer>) {
        self.names = Some(Names::new(answers, &self.start.memory.resolved));
    }

    /// Asks for the names of a configuration that comes into force, and for those of the one that is.
    pub(super) fn ask_names(&mut self, config: &Config, tunables: &Tunables) {
        let running = self.snapshot.as_ref().map(|snapshot| &*snapshot.config);
        let wanted = [Some(config), running].into_iter().flatten();
        let wanted: BTreeSet<Question> = wanted.flat_map(questions).collect();
        if let Some(names) = &mut self.names {
            names.set(wanted, &config.resolver, tunables);
        }
    }

    /// Names that only the generation before asked for are asked for no more.
    pub(super) fn forget_names(&mut self) {
        if let Some(snapshot) = self.snapshot.clone() {
            let wanted: BTreeSet<Question> = questions(&snapshot.config).collect();
            if let Some(names) = &mut self.names {
                names.keep(&wanted);
            }
        }
    }

    /// Whether there was an answer to all that a configuration asks for.
    pub(super) fn knows_names(&self, config: &Config) -> bool {
        let questions: Vec<Question> = questions(config).collect();
        let names = self.names.as_ref();
        names.is_none_or(|names| names.all_answered(&questions))
    }

    /// An upstream as its file has it, with the endpoints that its names have now.
    pub(super) fn listed(&self, config: &Config, upstream: usize) -> config::Upstream {
        let mut listed = config.upstreams[upstream].clone();
        if let Some(names) = self.names.as_ref().filter(|_| !listed.names.is_empty()) {
            let is_usable = |address| {
                let endpoints = [Endpoint::new(address, 1)];
                let refused = config.refuse_endpoints(upstream, &endpoints, Some(address));
                refused.is_none()
            };
            listed.endpoints = names.endpoints(&listed, is_usable);
        }
        listed
    }

    /// A snapshot that comes into force, with the endpoints that its names have by now.
    pub(super) fn name_endpoints(&self, snapshot: Snapshot, changes: &Changes) -> Snapshot {
        let config = snapshot.config.clone();
        let mut named = snapshot;
        for (index, upstream) in config.upstreams.iter().enumerate() {
            if upstream.names.is_empty() {
                continue;
            }
            let listed = self.listed(&config, index);
            let endpoints = changes.of(&upstream.name).endpoints(&listed.endpoints);
            if endpoints.is_empty() {
                log::error!(
                    "an upstream has no endpoints until the DNS knows them: upstream={}",
                    upstream.name
                );
            }
            named = named.with_endpoints(index, endpoints, &self.registry);
        }
        named
    }

    /// A generation has come into force: what the DNS said while it waited for neighbours is followed.
    pub(super) fn follow_all_names(&mut self) {
        let Some(snapshot) = self.snapshot.clone() else {
            return;
        };
        for (index, upstream) in snapshot.config.upstreams.iter().enumerate() {
            if !upstream.names.is_empty()
                && let Err(error) = self.follow_names(&snapshot, index)
            {
                log::error!(
                    "endpoints are not as the DNS says: upstream={}: {error}",
                    upstream.name
                );
            }
        }
    }

    /// Gives an upstream, by its index, the endpoints that its names have now.
    fn follow_names(&mut self, snapshot: &Snapshot, index: usize) -> Result<(), String> {
        let name = &snapshot.config.upstreams[index].name;
        let listed = self.listed(&snapshot.config, index);
        let endpoints = self.changes.of(name).endpoints(&listed.endpoints);
        let before = snapshot.upstreams[index].endpoints.iter();
        let before = before.map(|one| (one.address, one.weight, one.is_backup));
        let after = endpoints
            .iter()
            .map(|one| (one.address, one.weight, one.is_backup));
        if before.eq(after) {
            return Ok(());
        }
        let count = endpoints.len();
        self.set_endpoints(index, endpoints)?;
        log::info!("endpoints changed by the DNS: upstream={name} endpoints={count}");
        Ok(())
    }

    /// The DNS answered, or did not.
    pub fn named(&mut self, answer: Answer) {
        let control = &self.registry.control;
        control.lookups.fetch_add(1, Relaxed);
        let failed = u64::from(answer.targets.is_err());
        control.lookups_failed.fetch_add(failed, Relaxed);
        let Some(names) = &mut self.names else {
            return;
        };
        let question = answer.question.clone();
        let before = names.last(&question);
        if !names.learn(answer) {
            return;
        }
        // Before there is a snapshot what was learned waits for it.
        let Some(snapshot) = self.snapshot.clone() else {
            return;
        };
        for (index, upstream) in snapshot.config.upstreams.iter().enumerate() {
            let mut asked = upstream.names.iter().map(Question::from);
            if asked.any(|asked| asked == question)
                && let Err(error) = self.follow_names(&snapshot, index)
                && let Some(names) = &mut self.names
            {
                names.reject(&question, &before, error);
                break;
            }
        }
        self.set_probes();
        self.remember();
    }
}

fn questions(config: &Config) -> impl Iterator<Item = Question> {
    let names = config.upstreams.iter().flat_map(|upstream| &upstream.names);
    names.map(Question::from)
}
