//! Which of two matching routes is the better one.

use crate::config::{HostMatch, PathMatch, Route};
use std::cmp::Reverse;

/// Of routes that match the same request the greatest answers it: exact host before longer wildcard before any; then
/// exact path before template before longer prefix; then the one written earlier.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Precedence {
    host: HostRank,
    path: PathRank,
    index: Reverse<usize>,
}

/// From the widest to the most exact.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum HostRank {
    Any,
    /// Length of the name behind `*.`; of two that match one host the longer has more labels.
    Wildcard(usize),
    Exact,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PathRank {
    /// Its length.
    Prefix(usize),
    /// Which segments are literal: the first difference from the left decides.
    Template(Vec<bool>),
    Exact,
}

impl Precedence {
    /// Of the route at this index.
    pub fn of(route: &Route, index: usize) -> Self {
        let host = match &route.host {
            HostMatch::Any => HostRank::Any,
            HostMatch::Wildcard(name) => HostRank::Wildcard(name.len()),
            HostMatch::Exact(_) => HostRank::Exact,
        };
        let path = match &route.path {
            PathMatch::Prefix(prefix) => PathRank::Prefix(prefix.len()),
            PathMatch::Template { segments, .. } => {
                PathRank::Template(segments.iter().map(Option::is_some).collect())
            }
            PathMatch::Exact(_) => PathRank::Exact,
        };
        Self {
            host,
            path,
            index: Reverse(index),
        }
    }
}
