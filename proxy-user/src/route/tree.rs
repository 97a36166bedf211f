//! The paths of one host: a table of exact ones, and a tree of segments for templates and prefixes.

use crate::config::PathMatch;
use std::collections::HashMap;

/// Finds a path at a cost of its own length, bounded by the longest that is configured.
#[derive(Debug)]
pub(super) struct Tree {
    exact: HashMap<Box<str>, usize>,
    exact_bytes_max: usize,
    /// The first is the root, for what stands behind the first slash.
    nodes: Vec<Node>,
    has_template: bool,
}

/// What begins with the segments that lead here.
#[derive(Debug, Default)]
struct Node {
    literals: HashMap<Box<str>, usize>,
    capture: Option<usize>,
    /// The template that ends here.
    end: Option<usize>,
    /// The prefix that holds whatever follows.
    below: Option<usize>,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            exact: HashMap::new(),
            exact_bytes_max: 0,
            nodes: vec![Node::default()],
            has_template: false,
        }
    }
}

impl Tree {
    /// Adds a route; where two mean the same paths the first one stays.
    pub fn insert(&mut self, path: &PathMatch, route: usize) {
        match path {
            PathMatch::Exact(path) => {
                self.exact_bytes_max = self.exact_bytes_max.max(path.len());
                self.exact.entry(path.as_str().into()).or_insert(route);
            }
            PathMatch::Prefix(prefix) => {
                let inner = prefix.trim_start_matches('/').trim_end_matches('/');
                let segments = inner.split('/').filter(|segment| !segment.is_empty());
                let node = self.grow(segments.map(Some));
                self.nodes[node].below.get_or_insert(route);
            }
            PathMatch::Template { segments, .. } => {
                self.has_template = true;
                let node = self.grow(segments.iter().map(Option::as_deref));
                self.nodes[node].end.get_or_insert(route);
            }
        }
    }

    /// The node at the end of these segments.
    fn grow<'s>(&mut self, segments: impl Iterator<Item = Option<&'s str>>) -> usize {
        let mut at = 0;
        for segment in segments {
            let fresh = self.nodes.len();
            let node = &mut self.nodes[at];
            at = match segment {
                Some(literal) => *node.literals.entry(literal.into()).or_insert(fresh),
                None => *node.capture.get_or_insert(fresh),
            };
            if at == fresh {
                self.nodes.push(Node::default());
            }
        }
        at
    }

    pub fn find(&self, path: &str) -> Option<usize> {
        if path.len() <= self.exact_bytes_max
            && let Some(route) = self.exact.get(path)
        {
            return Some(*route);
        }
        let inner = path.strip_prefix('/');
        if self.has_template
            && let Some(route) = inner.and_then(|inner| self.find_template(0, Some(inner)))
        {
            return Some(route);
        }
        self.find_prefix(inner.unwrap_or_default())
    }

    /// Literals before captures, from the left. In a tree every node is visited once at most, however a path turns.
    fn find_template(&self, node: usize, rest: Option<&str>) -> Option<usize> {
        let node = &self.nodes[node];
        let Some(rest) = rest else { return node.end };
        let (segment, rest) = match rest.split_once('/') {
            Some((segment, rest)) => (segment, Some(rest)),
            None => (rest, None),
        };
        let literal = node
            .literals
            .get(segment)
            .and_then(|child| self.find_template(*child, rest));
        literal.or_else(|| {
            node.capture
                .filter(|_| !segment.is_empty())
                .and_then(|child| self.find_template(child, rest))
        })
    }

    /// The longest prefix; it ends where the tree does, however long the path is.
    fn find_prefix(&self, inner: &str) -> Option<usize> {
        let mut node = &self.nodes[0];
        let mut best = node.below;
        let mut rest = inner;
        while let Some((segment, behind)) = rest.split_once('/') {
            let Some(child) = node.literals.get(segment) else {
                break;
            };
            node = &self.nodes[*child];
            best = node.below.or(best);
            rest = behind;
        }
        best
    }
}
