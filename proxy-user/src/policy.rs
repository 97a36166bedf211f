//! What is checked or changed on the way of a request: plain data and pure steps, one file per policy.

mod api_key;
mod headers;
mod rate_limit;

use crate::config::{BanRule, Config, PolicyKind};
use crate::message::{Reply, RequestHead, ResponseHead};
use crate::offload;
use std::net::IpAddr;

use api_key::ApiKey;
use headers::Headers;
use rate_limit::RateLimit;

/// All policies, by their index in `Config::policies`.
#[derive(Debug)]
pub struct Policies {
    policies: Vec<Policy>,
}

#[derive(Debug)]
enum Policy {
    Headers(Headers),
    ApiKey(ApiKey),
    RateLimit(RateLimit),
}

/// Where rates are spent from: cells that other workers and the kernel half share, or memory of our own.
pub trait Cells {
    /// Spends one from the cell of this hash, where one comes back every `interval_ns` and `burst` may go at once.
    /// Refused: nanoseconds until one is there again.
    fn spend(&self, key_hash: u64, interval_ns: u64, burst: u32, now_ns: u64) -> Result<(), u64>;
}

impl Cells for offload::Cells {
    fn spend(&self, key_hash: u64, interval_ns: u64, burst: u32, now_ns: u64) -> Result<(), u64> {
        let rate = offload::Rate { interval_ns, burst };
        Self::spend(self, key_hash, now_ns, rate).map_err(|refused| refused.retry_after_ns)
    }
}

/// What the policies of one exchange know and find out.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'p> {
    /// The client's address.
    pub peer: IpAddr,
    /// CLOCK_MONOTONIC_COARSE.
    pub now_ns: u64,
    /// Who calls, once an `api_key` policy has said so.
    pub consumer: Option<&'p str>,
}

/// What a policy makes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Continue,
    Refuse(Refusal),
}

/// An answer in the origin's place, and what else follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reply: Reply,
    /// To be reported: enough of them and the source is banned.
    pub offence: Option<Offence>,
}

/// One breach of a rule that bans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offence {
    /// Index into `Config::policies`.
    pub rule: u32,
    pub ban: BanRule,
}

impl Policies {
    /// `seed` keys the hashes of rate cells, so that nobody outside can choose whose cell he shares; it must live as long
    /// as the cells do.
    pub fn new(config: &Config, seed: u64) -> Self {
        let policies = config.policies.iter().enumerate();
        let policies = policies.map(|(index, policy)| match &policy.kind {
            PolicyKind::Headers { request, response } => {
                Policy::Headers(Headers::new(request, response))
            }
            PolicyKind::ApiKey(api_key) => Policy::ApiKey(ApiKey::new(api_key)),
            PolicyKind::RateLimit(limit) => {
                Policy::RateLimit(RateLimit::new(&policy.name, index as u32, limit, seed))
            }
        });
        Self {
            policies: policies.collect(),
        }
    }

    /// Runs one policy on a request.
    pub fn request<'p>(
        &'p self,
        policy: usize,
        head: &mut RequestHead,
        facts: &mut Facts<'p>,
        cells: &impl Cells,
    ) -> Step {
        match self.policies.get(policy) {
            Some(Policy::Headers(headers)) => headers.request(head),
            Some(Policy::ApiKey(api_key)) => api_key.request(head, facts),
            Some(Policy::RateLimit(limit)) => limit.request(head, facts, cells),
            None => Step::Continue,
        }
    }

    /// Runs one policy on the response to a request that it let go on.
    pub fn response(&self, policy: usize, head: &mut ResponseHead) {
        if let Some(Policy::Headers(headers)) = self.policies.get(policy) {
            headers.response(head);
        }
    }
}
