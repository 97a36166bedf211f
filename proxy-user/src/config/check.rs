//! What only the whole shows: addresses in use twice, shadowed routes, rules out of order, objects nobody uses.

use std::collections::{HashMap, HashSet};

use proxy_ebpf::abi::size;

use super::datapath::DatapathDraft;
use super::listener::ListenerDraft;
use super::problem::{Problems, Spot};
use super::route::RouteDraft;
use super::table::Value;
use super::{
    AccessLog, Action, Attribute, Balance, Diagnostic, Hashing, ListenerMode, LogField, PathMatch,
    Policy, PolicyKind, RateKey, Resolver, Route, Upstream,
};
use crate::tunable::Tunables;

/// Everything that was read. A part that was bad is `None`, so that the others can be checked all the same.
pub(super) struct Whole<'s> {
    pub datapath: Option<DatapathDraft<'s>>,
    /// `None`: there is no `[log]`; `Some(None)`: a bad one.
    pub access_log: Option<Option<AccessLog>>,
    pub listeners: Vec<Option<ListenerDraft<'s>>>,
    pub routes: Vec<Option<RouteDraft<'s>>>,
    pub policies: Vec<Option<(Policy, Spot<'s>)>>,
    pub upstreams: Vec<Option<(Upstream, Spot<'s>)>>,
    pub resolver: Option<Resolver>,
    /// By upstream: what says something to L7 only.
    pub l7_values: Vec<Vec<Value<'s>>>,
    pub tunables: Tunables,
}

impl<'s> Whole<'s> {
    /// Every check that needs more than one object.
    pub fn check(&self, problems: &Problems) {
        if self.listeners.is_empty() {
            let help = "write [[listener]] with name = \"web\" and address = \"0.0.0.0:8080\"";
            problems.push_general(
                Diagnostic::error("there is no listener: nothing would be accepted").help(help),
            );
        }
        self.check_addresses();
        self.check_forwarding();
        self.check_names();
        self.check_twins();
        self.check_serving();
        self.check_policy_order();
        self.check_bans();
        self.check_logged_keys();
        self.warn_of_stages(problems);
        if !problems.has_errors() {
            self.warn_of_unused();
            self.warn_of_deaf_upstreams();
            self.warn_of_captures();
        }
    }

    /// Every good listener.
    pub fn good_listeners(&self) -> impl Iterator<Item = &ListenerDraft<'s>> {
        self.listeners.iter().flatten()
    }

    fn good_routes(&self) -> impl Iterator<Item = &RouteDraft<'s>> {
        self.routes.iter().flatten()
    }

    /// No address twice.
    fn check_addresses(&self) {
        let mut first: HashMap<_, Spot<'_>> = HashMap::new();
        for draft in self.good_listeners() {
            for (address, spot) in draft.listener.addresses.iter().zip(&draft.addresses) {
                if let Some(other) = first.get(address) {
                    let message = format!("the address {address} is listened on twice");
                    spot.refuse_with::<()>(
                        message,
                        "listened on again",
                        *other,
                        "listened on first",
                    );
                } else {
                    first.insert(*address, *spot);
                }
            }
        }
    }

    /// No name that was given to two routes.
    fn check_names(&self) {
        let mut first: HashMap<&str, Spot<'_>> = HashMap::new();
        for draft in self.good_routes() {
            let Some(spot) = draft.name else { continue };
            let name = draft.route.name.as_str();
            if let Some(other) = first.get(name) {
                spot.refuse_with::<()>(
                    format!("the route `{name}` is defined twice"),
                    "defined again",
                    *other,
                    "defined first",
                );
            } else {
                first.insert(name, spot);
            }
        }
    }

    /// No two routes that match the same, and none that can never be reached.
    fn check_twins(&self) {
        let mut first: HashMap<_, &RouteDraft<'_>> = HashMap::new();
        for draft in self.good_routes() {
            let route = &draft.route;
            let key = (route.listener, &route.host, PathKey::of(&route.path));
            if let Some(other) = first.get(&key) {
                let message = format!(
                    "the route `{}` is never reached: `{}` matches the same",
                    route.name, other.route.name
                );
                draft.matching.refuse_with::<()>(
                    message,
                    "the same host and path",
                    other.matching,
                    "this one answers",
                );
            } else {
                first.insert(key, draft);
            }
        }
        let serving: Vec<usize> = (0..self.listeners.len())
            .filter(|index| self.serves(*index))
            .collect();
        if self.listeners.iter().any(Option::is_none) || serving.is_empty() {
            return;
        }
        for draft in self
            .good_routes()
            .filter(|draft| draft.route.listener.is_none())
        {
            let route = &draft.route;
            let twin =
                |index: &usize| first.get(&(Some(*index), &route.host, PathKey::of(&route.path)));
            let twins: Vec<_> = serving.iter().filter_map(twin).collect();
            if let (Some(other), true) = (twins.first(), twins.len() == serving.len()) {
                let message = format!(
                    "the route `{}` is never reached: each listener has one of its own that matches the same",
                    route.name
                );
                draft.matching.refuse_with::<()>(
                    message,
                    "the same host and path",
                    other.matching,
                    "this one answers",
                );
            }
        }
    }

    /// Routes need a listener that serves.
    fn check_serving(&self) {
        let forwards = |draft: &Option<ListenerDraft<'_>>| {
            draft
                .as_ref()
                .is_some_and(|draft| matches!(draft.listener.mode, ListenerMode::Forward { .. }))
        };
        if let (false, true, Some(draft)) = (
            self.listeners.is_empty(),
            self.listeners.iter().all(forwards),
            self.good_routes().next(),
        ) {
            let help = "add a [[listener]] without `forward`".to_owned();
            draft.matching.refuse::<()>(
                "there are routes, and every listener forwards in the kernel",
                "",
                Some(help),
            );
        }
    }

    fn serves(&self, index: usize) -> bool {
        let draft = self.listeners.get(index).and_then(Option::as_ref);
        draft.is_some_and(|draft| matches!(draft.listener.mode, ListenerMode::Serve { .. }))
    }

    /// A limit by consumer stands after what finds the consumer.
    fn check_policy_order(&self) {
        for draft in self.good_routes() {
            let policies = draft.route.policies.iter().zip(&draft.policies);
            let policies: Vec<_> = policies
                .filter_map(|(index, spot)| Some((&self.policies.get(*index)?.as_ref()?.0, *spot)))
                .collect();
            if policies.len() < draft.policies.len() {
                continue;
            }
            let Some(limit) = policies
                .iter()
                .position(|(policy, _)| counts_by_consumer(policy))
            else {
                continue;
            };
            let key = policies
                .iter()
                .position(|(policy, _)| matches!(policy.kind, PolicyKind::ApiKey(_)));
            let (policy, spot) = policies[limit];
            match key {
                Some(key) if key < limit => {}
                Some(key) => {
                    let message = format!(
                        "`{}` counts by consumer, and the key is looked at only after it",
                        policy.name
                    );
                    spot.refuse_with::<()>(
                        message,
                        "no consumer is known here",
                        policies[key].1,
                        "put this one first",
                    );
                }
                None => {
                    let message = format!(
                        "`{}` counts by consumer, and no api_key policy before it finds one",
                        policy.name
                    );
                    let help =
                        "put an api_key policy before it, or write key = \"address\"".to_owned();
                    spot.warn(message, "counts by address", Some(help));
                }
            }
        }
    }

    /// The kernel half counts drops by rule, and one rule is the operator's own.
    fn check_bans(&self) {
        let max = size::RULES as usize - 1;
        let bans = |policy: &Policy| matches!(&policy.kind, PolicyKind::RateLimit(limit) if limit.ban.is_some());
        let beyond = self
            .policies
            .iter()
            .flatten()
            .filter(|(policy, _)| bans(policy))
            .nth(max);
        if let Some((_, spot)) = beyond {
            spot.refuse::<()>(format!("more than {max} policies ban"), "", None);
        }
    }

    /// A field that holds keys is not logged.
    fn check_logged_keys(&self) {
        let Some(Some(log)) = &self.access_log else {
            return;
        };
        for (policy, spot) in self.policies.iter().flatten() {
            let PolicyKind::ApiKey(keys) = &policy.kind else {
                continue;
            };
            if log.fields.contains(&LogField::Request(keys.header.clone())) {
                let message = format!(
                    "the access log names request.{}, which holds the keys of this policy",
                    keys.header
                );
                let help = "log `consumer` instead: whose key it is".to_owned();
                spot.refuse::<()>(message, "", Some(help));
            }
        }
    }

    /// Stages of overload that begin before one that they include.
    fn warn_of_stages(&self, problems: &Problems) {
        let limits = &self.tunables.worker;
        let stages = [
            ("lean", limits.overload_lean_percent),
            ("close", limits.overload_close_percent),
            ("refuse", limits.overload_refuse_percent),
            ("rest", limits.overload_rest_percent),
        ];
        for [(earlier, from), (later, below)] in stages.array_windows() {
            if below < from {
                let message = format!(
                    "the stage {earlier} of overload begins with {later}, at {below} %: `worker.overload_{earlier}_percent` is {from}, and each stage includes those before it"
                );
                problems.push_general(Diagnostic::warning(message));
            }
        }
    }

    /// What says how L7 chooses, where only the kernel half does.
    fn warn_of_deaf_upstreams(&self) {
        let routed: HashSet<usize> = self.shares().map(|(_, upstream)| upstream).collect();
        let forwarded = self.good_listeners().filter_map(|draft| {
            let ListenerMode::Forward { upstream, .. } = draft.listener.mode else {
                return None;
            };
            Some(upstream)
        });
        let forwarded: HashSet<usize> = forwarded.collect();
        let upstreams = self.upstreams.iter().flatten().zip(&self.l7_values);
        for (index, ((upstream, _), values)) in upstreams.enumerate() {
            if routed.contains(&index) || !forwarded.contains(&index) {
                continue;
            }
            for value in values {
                let message = format!(
                    "`{}` means nothing to `{}`: only listeners that forward use it, and these choose by a Maglev ring over addresses and ports",
                    value.name, upstream.name
                );
                value.spot.warn(message, "", None);
            }
        }
    }

    /// What is hashed that no route captures.
    fn warn_of_captures(&self) {
        let upstreams = self.upstreams.iter().flatten().zip(&self.l7_values);
        for (index, ((upstream, _), values)) in upstreams.enumerate() {
            let Balance::Maglev(Hashing {
                key: Attribute::Capture(name),
                ..
            }) = &upstream.balance
            else {
                continue;
            };
            let captures = |route: &Route| match &route.path {
                PathMatch::Template { captures, .. } => captures.contains(name),
                PathMatch::Exact(_) | PathMatch::Prefix(_) => false,
            };
            let mut routes = self.shares().filter(|(_, upstream)| *upstream == index);
            let spot = values.iter().find(|value| value.name == "hash");
            if let (false, Some(value)) = (routes.any(|(route, _)| captures(route)), spot) {
                let message = format!(
                    "no route to `{}` captures `{name}`: its requests are balanced by the client's address",
                    upstream.name
                );
                let help =
                    format!("write path = \"/shop/{{{name}}}\" in a route, or hash something else");
                value.spot.warn(message, "", Some(help));
            }
        }
    }

    /// Each route with each upstream that it leads to.
    fn shares(&self) -> impl Iterator<Item = (&Route, usize)> {
        self.good_routes().flat_map(|draft| {
            let shares = match &draft.route.action {
                Action::Upstream(shares) => &shares[..],
                Action::Respond { .. } | Action::Redirect { .. } => &[],
            };
            shares.iter().map(|(upstream, _)| (&draft.route, *upstream))
        })
    }

    /// What nothing refers to, and what would only answer 404.
    fn warn_of_unused(&self) {
        let (mut upstreams, mut policies, mut listeners) =
            (HashSet::new(), HashSet::new(), HashSet::new());
        let mut all_listeners = false;
        for route in self.good_routes().map(|draft| &draft.route) {
            policies.extend(route.policies.iter().copied());
            listeners.extend(route.listener);
            all_listeners |= route.listener.is_none();
            if let Action::Upstream(shares) = &route.action {
                upstreams.extend(shares.iter().map(|(upstream, _)| *upstream));
            }
        }
        for draft in self.good_listeners() {
            if let ListenerMode::Forward { upstream, .. } = draft.listener.mode {
                upstreams.insert(upstream);
            }
        }
        for (index, (upstream, spot)) in self.upstreams.iter().flatten().enumerate() {
            if !upstreams.contains(&index) {
                spot.warn(
                    format!("nothing uses the upstream `{}`", upstream.name),
                    "",
                    None,
                );
            }
        }
        for (index, (policy, spot)) in self.policies.iter().flatten().enumerate() {
            if !policies.contains(&index) {
                spot.warn(
                    format!("no route uses the policy `{}`", policy.name),
                    "",
                    None,
                );
            }
        }
        for (index, draft) in self.good_listeners().enumerate() {
            if self.serves(index) && !all_listeners && !listeners.contains(&index) {
                let name = &draft.listener.name;
                let message = format!(
                    "the listener `{name}` has no route: every request is answered with 404"
                );
                draft.section.warn(message, "", None);
            }
        }
    }
}

fn counts_by_consumer(policy: &Policy) -> bool {
    matches!(&policy.kind, PolicyKind::RateLimit(limit) if limit.key == RateKey::Consumer)
}

/// A path without the names of its captures: `/a/{id}` and `/a/{name}` match the same.
#[derive(PartialEq, Eq, Hash)]
enum PathKey<'p> {
    Exact(&'p str),
    Prefix(&'p str),
    Template(&'p [Option<String>]),
}

impl<'p> PathKey<'p> {
    fn of(path: &'p PathMatch) -> Self {
        match path {
            PathMatch::Exact(path) => Self::Exact(path),
            PathMatch::Prefix(path) => Self::Prefix(path),
            PathMatch::Template { segments, .. } => Self::Template(segments),
        }
    }
}
