//! Finds the route of a request: by host, then by path, the best match first, at a cost that routes do not add to.

mod precedence;
mod tree;

use crate::config::{Config, HostMatch, PathMatch, Route};
use std::collections::HashMap;
use tree::Tree;

pub use precedence::Precedence;

/// All routes, ready to be asked.
#[derive(Debug)]
pub struct Routes {
    /// The table of each listener.
    listeners: Vec<usize>,
    /// The first is for listeners that no route names.
    tables: Vec<Table>,
    /// By route: what its captures are, where it has any.
    templates: Vec<Option<Template>>,
}

/// The routes that one listener knows, by host.
#[derive(Debug, Default)]
struct Table {
    exact: HashMap<Box<str>, Tree>,
    /// `*.example.com` under `example.com`.
    wildcards: HashMap<Box<str>, Tree>,
    /// Length of the longest name in `wildcards`: longer endings of a host are not worth hashing.
    wildcard_bytes_max: usize,
    any: Tree,
}

#[derive(Debug)]
struct Template {
    segments: Vec<Option<String>>,
    names: Vec<String>,
}

/// The route that answers a request.
#[derive(Clone, Debug)]
pub struct Found<'a> {
    /// Index into `Config::routes`.
    pub index: usize,
    /// What a template captured.
    pub captures: Captures<'a>,
}

impl Routes {
    /// Of all matching routes the greatest by [`Precedence`] will be found.
    pub fn new(config: &Config) -> Self {
        let mut best_first: Vec<usize> = (0..config.routes.len()).collect();
        best_first.sort_by_cached_key(|index| {
            std::cmp::Reverse(Precedence::of(&config.routes[*index], *index))
        });
        let table_for = |listener: Option<usize>| {
            let mut table = Table::default();
            for index in &best_first {
                let route = &config.routes[*index];
                if route.listener.is_none() || route.listener == listener {
                    table.insert(route, *index);
                }
            }
            table
        };
        let mut tables = vec![table_for(None)];
        let mut listeners = Vec::with_capacity(config.listeners.len());
        for listener in 0..config.listeners.len() {
            if config
                .routes
                .iter()
                .any(|route| route.listener == Some(listener))
            {
                listeners.push(tables.len());
                tables.push(table_for(Some(listener)));
            } else {
                listeners.push(0);
            }
        }
        let templates = config.routes.iter().map(Template::of).collect();
        Self {
            listeners,
            tables,
            templates,
        }
    }

    /// The route of a request that came to this listener (index into `Config::listeners`), for a host in lower case without
    /// port (empty = none named) and a path as [`crate::message::RequestHead::path`] gives it.
    pub fn find<'a>(&'a self, listener: usize, host: &str, path: &'a str) -> Option<Found<'a>> {
        let table = self.tables.get(*self.listeners.get(listener)?)?;
        let index = table.find(host, path)?;
        let template = self.templates.get(index).and_then(Option::as_ref);
        Some(Found {
            index,
            captures: Captures::new(template, path),
        })
    }
}

impl Table {
    fn insert(&mut self, route: &Route, index: usize) {
        let tree = match &route.host {
            HostMatch::Any => &mut self.any,
            HostMatch::Exact(host) => self.exact.entry(host.as_str().into()).or_default(),
            HostMatch::Wildcard(name) => {
                self.wildcard_bytes_max = self.wildcard_bytes_max.max(name.len());
                self.wildcards.entry(name.as_str().into()).or_default()
            }
        };
        tree.insert(&route.path, index);
    }

    /// The most exact host that has a match for the path: a host without one leaves the request to wider ones.
    fn find(&self, host: &str, path: &str) -> Option<usize> {
        if let Some(index) = self.exact.get(host).and_then(|tree| tree.find(path)) {
            return Some(index);
        }
        let mut rest = if self.wildcards.is_empty() { "" } else { host };
        while let Some((_, ending)) = rest.split_once('.') {
            let tree = if ending.len() <= self.wildcard_bytes_max {
                self.wildcards.get(ending)
            } else {
                None
            };
            if let Some(index) = tree.and_then(|tree| tree.find(path)) {
                return Some(index);
            }
            rest = ending;
        }
        self.any.find(path)
    }
}

impl Template {
    fn of(route: &Route) -> Option<Self> {
        match &route.path {
            PathMatch::Template { segments, captures } => Some(Self {
                segments: segments.clone(),
                names: captures.clone(),
            }),
            PathMatch::Exact(_) | PathMatch::Prefix(_) => None,
        }
    }
}

/// Names and values that a template captured from a path, read when asked for.
#[derive(Clone, Debug)]
pub struct Captures<'a> {
    segments: std::slice::Iter<'a, Option<String>>,
    names: std::slice::Iter<'a, String>,
    path: std::str::Split<'a, char>,
}

impl<'a> Captures<'a> {
    fn new(template: Option<&'a Template>, path: &'a str) -> Self {
        let (segments, names) = template.map_or((&[][..], &[][..]), |template| {
            (&template.segments, &template.names)
        });
        Self {
            segments: segments.iter(),
            names: names.iter(),
            path: path.strip_prefix('/').unwrap_or(path).split('/'),
        }
    }
}

impl<'a> Iterator for Captures<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let segment = self.segments.next()?;
            let value = self.path.next()?;
            if segment.is_none() {
                return Some((self.names.next()?, value));
            }
        }
    }
}

#[cfg(test)]
mod tests;
