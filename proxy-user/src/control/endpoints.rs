//! Endpoints as commands have changed them: what is kept beside the file until it is read again.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::config::{self, ENDPOINT_WEIGHT_MAX, Endpoint, parse_endpoint_address};

/// Most changes that are kept, of all upstreams together: the next daemon must be told of all of them.
const CHANGES_MAX: usize = 65_536;

/// What a command asks of one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRequest {
    pub upstream: String,
    /// As the file would have it.
    pub address: String,
    #[serde(flatten)]
    pub act: EndpointAct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "snake_case")]
pub enum EndpointAct {
    /// One more; it gets its share of new flows and requests.
    Add {
        #[serde(default = "one")]
        weight: u32,
    },
    /// As if the file had been read again without it.
    Del,
    /// Nothing new; what has begun ends as it will.
    Drain,
    Weight {
        weight: u32,
    },
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointChange {
    pub upstream: String,
    pub address: SocketAddr,
    /// Absent: it is no endpoint any more.
    pub weight: Option<u32>,
    /// From the arrival of the request in the daemon to the last slot of a ring that was written, and workers told.
    pub took_us: u64,
    /// The generation that the change ends with: the next one is as its files say.
    pub generation: u64,
}

/// One change to what the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It has this weight, whether the file names it or not.
    Weight(u32),
    Removed,
}

/// The changes to the endpoints of one upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OfUpstream(BTreeMap<SocketAddr, Change>);

/// All changes, by the name of the upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Changes(BTreeMap<String, OfUpstream>);

const fn one() -> u32 {
    1
}

impl EndpointRequest {
    /// The address that it names.
    ///
    /// # Errors
    /// A sentence that says why it is none.
    pub fn socket(&self) -> Result<SocketAddr, String> {
        parse_endpoint_address(&self.address)
    }
}

impl Changes {
    /// Those of one upstream.
    pub fn of(&self, upstream: &str) -> OfUpstream {
        self.0.get(upstream).cloned().unwrap_or_default()
    }

    /// Whether there is room for these changes of one upstream.
    ///
    /// # Errors
    /// There are too many of all.
    pub fn check_room(&self, upstream: &str, next: &OfUpstream) -> Result<(), String> {
        let others = self.0.iter().filter(|(name, _)| *name != upstream);
        let count = others.map(|(_, of)| of.0.len()).sum::<usize>() + next.0.len();
        if count > CHANGES_MAX {
            return Err(format!(
                "{CHANGES_MAX} endpoints are changed at run time already: write them into the file and reload"
            ));
        }
        Ok(())
    }

    /// These are the changes of one upstream now.
    pub fn set(&mut self, upstream: &str, next: OfUpstream) {
        match next.0.is_empty() {
            true => drop(self.0.remove(upstream)),
            false => drop(self.0.insert(upstream.to_owned(), next)),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.values().map(|of| of.0.len()).sum()
    }
}

impl OfUpstream {
    /// The endpoints, sorted, where the file says `file`.
    pub fn endpoints(&self, file: &[Endpoint]) -> Vec<Endpoint> {
        let mut endpoints: BTreeMap<SocketAddr, Endpoint> = file
            .iter()
            .map(|endpoint| (endpoint.address, *endpoint))
            .collect();
        for (address, change) in &self.0 {
            match change {
                Change::Removed => drop(endpoints.remove(address)),
                Change::Weight(weight) => {
                    let fresh = Endpoint::new(*address, *weight);
                    endpoints.entry(*address).or_insert(fresh).weight = *weight;
                }
            }
        }
        endpoints.into_values().collect()
    }

    /// What was changed of an address.
    pub fn change(&self, address: SocketAddr) -> Option<Change> {
        self.0.get(&address).copied()
    }

    /// Addresses that the file names and that are no endpoints now.
    pub fn removed(&self) -> impl Iterator<Item = SocketAddr> {
        let removed = self.0.iter().filter(|(_, one)| **one == Change::Removed);
        removed.map(|(address, _)| *address)
    }

    /// The changes after one more act. `endpoints_max` is how many may be added to.
    ///
    /// # Errors
    /// A sentence that says why not, and what to do instead.
    pub fn after(
        &self,
        upstream: &config::Upstream,
        address: SocketAddr,
        act: EndpointAct,
        endpoints_max: usize,
    ) -> Result<Self, String> {
        let name = &upstream.name;
        let now = self.endpoints(&upstream.endpoints);
        let present = now.iter().find(|endpoint| endpoint.address == address);
        let weight = match act {
            EndpointAct::Add { weight } | EndpointAct::Weight { weight } => weight,
            EndpointAct::Del | EndpointAct::Drain => 0,
        };
        if weight > ENDPOINT_WEIGHT_MAX {
            return Err(format!("a weight is 0 to {ENDPOINT_WEIGHT_MAX}"));
        }
        match (act, present) {
            (EndpointAct::Add { .. }, Some(known)) => {
                return Err(format!(
                    "{address} is an endpoint of `{name}` already, with weight {}: to change that, `sluice endpoint weight`",
                    known.weight
                ));
            }
            (EndpointAct::Add { .. }, None) if now.len() >= endpoints_max => {
                return Err(format!(
                    "`{name}` has {} endpoints, and upstream.endpoints_max is {endpoints_max}: raise it with `sluice sysctl -w`",
                    now.len()
                ));
            }
            (EndpointAct::Add { .. }, None) => {}
            (_, None) => {
                return Err(format!(
                    "{address} is no endpoint of `{name}`: `sluice endpoint list {name}` shows those there are"
                ));
            }
            (EndpointAct::Del, Some(_)) if now.len() == 1 => {
                return Err(format!(
                    "{address} is the last endpoint of `{name}`: add another first, or let it get nothing new with `sluice endpoint drain`"
                ));
            }
            (_, Some(_)) => {}
        }
        let change = match act {
            EndpointAct::Del => Change::Removed,
            _ => Change::Weight(weight),
        };
        let in_file = upstream.endpoints.iter();
        let in_file = in_file.filter(|endpoint| endpoint.address == address);
        let is_as_in_file = match in_file.map(|endpoint| endpoint.weight).next() {
            Some(of_file) => change == Change::Weight(of_file),
            None => change == Change::Removed,
        };
        let mut next = self.clone();
        match is_as_in_file {
            true => next.0.remove(&address),
            false => next.0.insert(address, change),
        };
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(ports: &[u16]) -> config::Upstream {
        let endpoint = |port: &u16| Endpoint::new(at(*port), 1);
        config::Upstream::new("app", ports.iter().map(endpoint).collect())
    }

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    /// Port and weight of each endpoint after these acts.
    fn after(acts: &[(u16, EndpointAct)]) -> Result<(Vec<(u16, u32)>, OfUpstream), String> {
        let file = upstream(&[1, 2]);
        let mut of = OfUpstream::default();
        for (port, act) in acts {
            of = of.after(&file, at(*port), *act, 4)?;
        }
        let endpoints = of.endpoints(&file.endpoints).into_iter();
        let endpoints = endpoints.map(|endpoint| (endpoint.address.port(), endpoint.weight));
        Ok((endpoints.collect(), of))
    }

    const ADD: EndpointAct = EndpointAct::Add { weight: 3 };

    #[test]
    fn acts_follow_each_other_and_what_is_as_in_the_file_is_no_change() {
        let (endpoints, of) =
            after(&[(3, ADD), (1, EndpointAct::Del), (2, EndpointAct::Drain)]).unwrap();
        assert_eq!(endpoints, [(2, 0), (3, 3)]);
        assert_eq!(of.removed().collect::<Vec<_>>(), [at(1)]);
        assert_eq!(of.change(at(2)), Some(Change::Weight(0)));
        let back = [
            (1, EndpointAct::Del),
            (3, ADD),
            (1, EndpointAct::Add { weight: 1 }),
            (3, EndpointAct::Del),
            (2, EndpointAct::Weight { weight: 9 }),
            (2, EndpointAct::Weight { weight: 1 }),
        ];
        let (endpoints, of) = after(&back).unwrap();
        assert_eq!(endpoints, [(1, 1), (2, 1)]);
        assert_eq!(of, OfUpstream::default());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_remedy() {
        let (del, heavy) = (EndpointAct::Del, EndpointAct::Weight { weight: 1001 });
        for (acts, word) in [
            (&[(1, ADD)][..], "already, with weight 1"),
            (&[(3, del)], "no endpoint of `app`"),
            (&[(3, EndpointAct::Drain)], "sluice endpoint list app"),
            (&[(1, del), (2, del)], "the last endpoint"),
            (&[(1, heavy)], "0 to 1000"),
            (&[(3, ADD), (4, ADD), (5, ADD)], "endpoints_max is 4"),
        ] {
            let refused = after(acts).expect_err(word);
            assert!(refused.contains(word), "{refused}");
        }
    }

    #[test]
    fn changes_and_requests_are_the_same_after_a_way_through_json() {
        let (_, of) = after(&[(3, ADD), (1, EndpointAct::Del)]).unwrap();
        let mut changes = Changes::default();
        changes.set("app", of);
        let text = serde_json::to_string(&changes).unwrap();
        assert_eq!(serde_json::from_str::<Changes>(&text).unwrap(), changes);
        let request = r#"{"upstream":"app","address":"[::1]:80","act":"add"}"#;
        let request: EndpointRequest = serde_json::from_str(request).unwrap();
        assert_eq!(request.act, EndpointAct::Add { weight: 1 });
        assert_eq!(request.socket(), Ok("[::1]:80".parse().unwrap()));
    }
}
