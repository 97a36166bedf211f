//! Stand-in until the integrator's snapshot comes.

use std::sync::Arc;

use crate::config::{Config, Diagnostic, Loaded};
use crate::metric::Registry;
use crate::tunable::Tunables;
use crate::upstream::{self, Upstream};

/// One immutable generation of everything configured.
#[derive(Debug)]
pub struct Snapshot {
    pub generation: u64,
    pub config: Arc<Config>,
    pub tunables: Arc<Tunables>,
    pub upstreams: Arc<Vec<Upstream>>,
}

impl Snapshot {
    /// # Errors
    /// What is wrong.
    pub fn build(
        generation: u64,
        loaded: Loaded,
        tunables: Arc<Tunables>,
        previous: Option<&Self>,
        workers: usize,
        _registry: &Registry,
    ) -> Result<Self, Vec<Diagnostic>> {
        let upstreams = upstream::build(
            &loaded.config,
            workers,
            previous.map(|previous| &previous.upstreams[..]),
        );
        Ok(Self {
            generation,
            config: Arc::new(loaded.config),
            tunables,
            upstreams: Arc::new(upstreams),
        })
    }

    /// The same with other tunables.
    pub fn with_tunables(&self, tunables: Arc<Tunables>) -> Self {
        Self {
            generation: self.generation,
            config: Arc::clone(&self.config),
            tunables,
            upstreams: Arc::clone(&self.upstreams),
        }
    }
}
