//! Routes against a model that tries them all.

use super::*;
use crate::config::{Action, Datapath, DatapathMode, ErrorPages, Listener, ListenerMode, Origin};

fn config(listeners: usize, routes: Vec<Route>) -> Config {
    let listener = |index| Listener {
        name: format!("listener-{index}"),
        addresses: Vec::new(),
        mode: ListenerMode::Serve { tls: None },
        trusted: None,
        via: None,
        is_logged: true,
        at: Origin::Default,
    };
    Config {
        access_log: None,
        datapath: Datapath {
            interfaces: Vec::new(),
            mode: DatapathMode::Off,
            nat: None,
            tunnel: None,
            hash_key: None,
            at: Origin::Default,
        },
        listeners: (0..listeners).map(listener).collect(),
        routes,
        policies: Vec::new(),
        upstreams: Vec::new(),
        resolver: crate::config::Resolver::default(),
        tunables: Vec::new(),
    }
}

/// A route as an operator would write it: host (empty = any) and path.
fn route(listener: Option<usize>, host: &str, path: &str) -> Route {
    let host = match host.strip_prefix("*.") {
        Some(name) => HostMatch::Wildcard(name.into()),
        None if host.is_empty() => HostMatch::Any,
        None => HostMatch::Exact(host.into()),
    };
    let captures: Vec<String> = path
        .split('/')
        .filter_map(name_of)
        .map(str::to_owned)
        .collect();
    let path = match path.strip_suffix('*') {
        Some(prefix) => PathMatch::Prefix(prefix.into()),
        None if captures.is_empty() => PathMatch::Exact(path.into()),
        None => {
            let literal = |segment: &str| name_of(segment).is_none().then(|| segment.to_owned());
            PathMatch::Template {
                segments: path[1..].split('/').map(literal).collect(),
                captures,
            }
        }
    };
    Route {
        trailers: Vec::new(),
        errors: ErrorPages::default(),
        is_logged: None,
        name: String::new(),
        listener,
        host,
        path,
        policies: Vec::new(),
        action: Action::Respond {
            status: 200,
            headers: Vec::new(),
            body: [].into(),
        },
        timeout: Default::default(),
        retry: Default::default(),
        hedge: None,
        at: Origin::Default,
    }
}

fn name_of(segment: &str) -> Option<&str> {
    segment.strip_prefix('{')?.strip_suffix('}')
}

/// What each of the four words of a match means, tried one by one on every route.
fn find_by_trying(config: &Config, listener: usize, host: &str, path: &str) -> Option<usize> {
    let matches = |route: &Route| {
        let host_matches = match &route.host {
            HostMatch::Any => true,
            HostMatch::Exact(exact) => exact == host,
            HostMatch::Wildcard(name) => host
                .strip_suffix(name.as_str())
                .is_some_and(|labels| labels.len() > 1 && labels.ends_with('.')),
        };
        let path_matches = match &route.path {
            PathMatch::Exact(exact) => exact == path,
            PathMatch::Prefix(prefix) => prefix == "/" || path.starts_with(prefix.as_str()),
            PathMatch::Template { segments, .. } => {
                let found: Vec<&str> = path.split('/').skip(1).collect();
                let fits = |(wanted, found): (&Option<String>, &&str)| match wanted {
                    Some(literal) => literal == found,
                    None => !found.is_empty(),
                };
                found.len() == segments.len() && segments.iter().zip(&found).all(fits)
            }
        };
        route.listener.is_none_or(|only| only == listener) && host_matches && path_matches
    };
    let candidates = config
        .routes
        .iter()
        .enumerate()
        .filter(|(_, route)| matches(route));
    candidates
        .max_by_key(|(index, route)| Precedence::of(route, *index))
        .map(|(index, _)| index)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ mixed >> 27) % bound as u64) as usize
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }

    fn path(&mut self, words: &[&str], ends: &[&str]) -> String {
        let mut path = String::new();
        for _ in 0..self.below(4) {
            path.push('/');
            path.push_str(self.pick(words));
        }
        path.push_str(self.pick(ends));
        if path.is_empty() { "/".into() } else { path }
    }
}

#[test]
fn the_tree_finds_what_trying_all_routes_finds() {
    let hosts = [
        "",
        "",
        "a.test",
        "b.test",
        "x.a.test",
        "*.test",
        "*.a.test",
        "*.x.a.test",
    ];
    let asked_hosts = [
        "",
        "test",
        "a.test",
        "b.test",
        "c.test",
        "x.a.test",
        "y.a.test",
        "z.x.a.test",
        "w.z.x.a.test",
        "xa.test",
        "other",
    ];
    let mut random = Random(7);
    let mut found = 0;
    for _ in 0..300 {
        let count = 1 + random.below(40);
        let routes = (0..count).map(|_| {
            let listener = [None, None, Some(0), Some(1)][random.below(4)];
            let path = random.path(&["a", "b", "c", "{x}", "{y}"], &["", "/", "/*", "/*"]);
            // A capture in a prefix is no path that the configuration knows.
            let path = if path.ends_with('*') {
                path.replace("{x}", "a").replace("{y}", "b")
            } else {
                path
            };
            route(listener, random.pick(&hosts), &path)
        });
        let config = config(3, routes.collect());
        let routes = Routes::new(&config);
        for _ in 0..200 {
            let (listener, host) = (random.below(3), random.pick(&asked_hosts));
            let path = random.path(&["a", "b", "c", "d"], &["", "/", "/a", "/d/"]);
            let expected = find_by_trying(&config, listener, host, &path);
            let answer = routes.find(listener, host, &path).map(|found| found.index);
            assert_eq!(
                answer, expected,
                "{listener} {host} {path} among {:#?}",
                config.routes
            );
            found += usize::from(answer.is_some());
        }
    }
    assert!(
        found > 10_000,
        "the random routes are worth nothing if none matches: {found}"
    );
}

#[test]
fn the_better_match_wins_wherever_it_is_written() {
    let config = config(
        1,
        vec![
            route(None, "", "/*"),
            route(None, "*.test", "/a/*"),
            route(None, "*.a.test", "/*"),
            route(None, "x.a.test", "/a/{id}/b"),
            route(None, "x.a.test", "/a/1/b"),
            route(None, "x.a.test", "/a/1/*"),
            route(None, "x.a.test", "/a/{other}/b"),
        ],
    );
    let routes = Routes::new(&config);
    let find = |host, path| routes.find(0, host, path).map(|found| found.index);
    assert_eq!(find("x.a.test", "/a/1/b"), Some(4), "exact before template");
    assert_eq!(
        find("x.a.test", "/a/2/b"),
        Some(3),
        "the earlier of two equal templates"
    );
    assert_eq!(
        find("x.a.test", "/a/1/c"),
        Some(5),
        "a prefix where no template fits"
    );
    assert_eq!(
        find("x.a.test", "/c"),
        Some(2),
        "the longer wildcard where the host has no path"
    );
    assert_eq!(find("b.test", "/a/1"), Some(1));
    assert_eq!(
        find("b.test", "/a"),
        Some(0),
        "what stands below a prefix does not include itself"
    );
    assert_eq!(
        find("test", "/a/1"),
        Some(0),
        "a wildcard stands for one label at least"
    );
    assert_eq!(
        find("", "*"),
        Some(0),
        "a question for the whole server is below every path"
    );
    assert_eq!(
        routes.find(1, "", "/").map(|found| found.index),
        None,
        "no such listener"
    );
}

#[test]
fn captures_have_names_and_values() {
    let config = config(1, vec![route(None, "", "/a/{id}/b/{rest}")]);
    let routes = Routes::new(&config);
    let found = routes.find(0, "", "/a/1%2C/b/x").expect("a match");
    assert_eq!(
        found.captures.collect::<Vec<_>>(),
        [("id", "1%2C"), ("rest", "x")]
    );
    assert!(
        routes.find(0, "", "/a//b/x").is_none(),
        "nothing is no value"
    );
    assert!(routes.find(0, "", "/a/1/b/x/").is_none());
}

#[test]
fn a_path_of_slashes_costs_no_more_than_what_is_configured() {
    let config = config(
        1,
        vec![
            route(None, "", "/a/{x}/c"),
            route(None, "*.a.test", "/a/b/*"),
            route(None, "", "/*"),
        ],
    );
    let routes = Routes::new(&config);
    let (path, host) = ("/a".repeat(100_000), "a.".repeat(100_000));
    assert_eq!(
        routes.find(0, &host, &path).map(|found| found.index),
        Some(2)
    );
}
