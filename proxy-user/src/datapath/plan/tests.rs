//! Plans replayed write by write on a model of the maps: no packet may ever meet a pointer to nothing.

use std::collections::HashMap;

use super::*;

mod prefix;

/// The maps as the writes leave them.
struct Model {
    endpoints: BTreeSet<u16>,
    pages: HashMap<u32, Vec<u16>>,
    upstreams: HashMap<u32, abi::Upstream>,
    listeners: BTreeMap<Key, abi::Listener>,
    ports: BTreeSet<u16>,
    prefixes: BTreeMap<abi::PrefixKey, abi::Prefix>,
    prefix_ports: Vec<(u16, u16)>,
    nat_ports: u32,
    tunnel: Option<abi::Tunnel>,
}

impl Model {
    fn new() -> Self {
        Self {
            endpoints: BTreeSet::new(),
            pages: HashMap::new(),
            upstreams: HashMap::new(),
            listeners: BTreeMap::new(),
            ports: BTreeSet::new(),
            prefixes: BTreeMap::new(),
            prefix_ports: vec![],
            nat_ports: 0,
            tunnel: None,
        }
    }

    fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            match write.clone() {
                Write::Endpoint(id, _) => drop(self.endpoints.insert(id)),
                Write::Ring { page, slots, .. } => drop(self.pages.insert(page, slots)),
                Write::Upstream(id, entry) => drop(self.upstreams.insert(id, entry)),
                Write::Nat(nat) => self.nat_ports = nat.ports,
                Write::Tunnel(tunnel) => self.tunnel = Some(tunnel),
                Write::AddPorts(ports) => {
                    self.ports.extend(ports.listener);
                    self.prefix_ports.extend(ports.prefix);
                }
                Write::SetPorts(ports) => {
                    self.ports = ports.listener;
                    self.prefix_ports = ports.prefix;
                }
                Write::ResetListener(id) => {
                    assert!(self.listeners.values().all(|listener| listener.id != id))
                }
                Write::Listener(key, entry) => drop(self.listeners.insert(key, entry)),
                Write::RemoveListener(key) => drop(self.listeners.remove(&key)),
                Write::Prefix(key, prefix) => drop(self.prefixes.insert(key, *prefix)),
                Write::RemovePrefix(key) => drop(self.prefixes.remove(&key)),
            }
            self.check(write);
        }
    }

    /// Whatever a packet can follow leads somewhere.
    fn check(&self, write: &Write) {
        for (key, listener) in &self.listeners {
            assert!(
                key.port == 0 || self.ports.contains(&key.port),
                "{key:?} without its port after {write:?}"
            );
            self.check_listener(listener, (&key, write));
        }
        for (key, prefix) in &self.prefixes {
            for range in &prefix.ranges[..prefix.count as usize] {
                let is_asked = |port: u16| {
                    let mut ranges = self.prefix_ports.iter();
                    ranges.any(|(first, last)| (*first..=*last).contains(&port))
                };
                assert!(
                    key.protocol == 0 || is_asked(range.first) && is_asked(range.last),
                    "{key:?} without its ports after {write:?}"
                );
                self.check_listener(&range.listener, (&key, write));
            }
        }
    }

    fn check_listener(
        &self,
        listener: &abi::Listener,
        (key, write): (&dyn std::fmt::Debug, &Write),
    ) {
        if matches!(listener.mode, mode::ADDRESS | mode::NAT_RETURN) {
            return;
        }
        assert!(
            self.tunnel.is_some() || !matches!(listener.mode, mode::IPIP | mode::GUE),
            "{key:?} without a source after {write:?}"
        );
        let upstream = self.upstreams.get(&listener.target).copied();
        let upstream =
            upstream.unwrap_or_else(|| panic!("{key:?} without upstream after {write:?}"));
        let slots = self
            .pages
            .get(&upstream.page)
            .unwrap_or_else(|| panic!("no ring after {write:?}"));
        assert_eq!(
            slots.len() as u32,
            upstream.slots,
            "a ring of another size after {write:?}"
        );
        for id in slots.iter().filter(|id| **id != 0) {
            assert!(
                self.endpoints.contains(id),
                "endpoint {id} is not there after {write:?}"
            );
        }
    }
}

fn empty() -> State {
    let capacity = Capacity {
        listeners: 16,
        prefixes: 8,
        upstreams: 8,
        endpoints: 1024,
        ring_pages: 8,
        nat_flows: 400_000,
    };
    State {
        capacity,
        names: Names::default(),
        listeners: BTreeMap::new(),
        prefixes: BTreeMap::new(),
        upstreams: BTreeMap::new(),
        endpoints: Endpoints::default(),
        nat: bytemuck::Zeroable::zeroed(),
        tunnel: bytemuck::Zeroable::zeroed(),
    }
}

fn endpoint(last: u8) -> WantedEndpoint {
    WantedEndpoint {
        address: SocketAddr::from(([10, 0, 0, last], 80)),
        weight: 1,
        healthy: true,
    }
}

fn upstream(name: &str, endpoints: impl IntoIterator<Item = u8>) -> WantedUpstream {
    WantedUpstream {
        name: name.to_owned(),
        endpoints: endpoints.into_iter().map(endpoint).collect(),
    }
}

fn forward(name: &str, port: u16, upstream: usize) -> WantedListener {
    let address = SocketAddr::from(([192, 0, 2, 1], port));
    WantedListener {
        name: name.to_owned(),
        address,
        protocol: abi::protocol::TCP,
        upstream: Some((upstream, mode::NAT)),
        options: 0,
    }
}

fn nat() -> Option<WantedNat> {
    Some(WantedNat {
        sources: vec![
            IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
            IpAddr::from([192, 0, 2, 1]),
        ],
        port_first: 20_000,
        port_last: 59_999,
        tcp_idle_ns: 1,
        tcp_brief_ns: 1,
        udp_idle_ns: 1,
    })
}

fn planned(state: &State, wanted: &Wanted) -> (Vec<Write>, State) {
    plan(state, wanted, None).unwrap_or_else(|full| panic!("{full}"))
}

#[test]
fn no_packet_ever_meets_a_pointer_to_nothing() {
    let one = Wanted {
        listeners: vec![forward("a", 80, 0)],
        upstreams: vec![upstream("x", [1, 2, 3])],
        nat: nat(),
        tunnel: vec![],
        rules: vec![],
        ..Wanted::default()
    };
    let two = Wanted {
        listeners: vec![forward("b", 81, 0), forward("a", 80, 1)],
        upstreams: vec![upstream("y", [3, 4]), upstream("x", [2, 5])],
        nat: nat(),
        tunnel: vec![],
        rules: vec!["fair-use".to_owned()],
        ..Wanted::default()
    };
    // More than 40 endpoints need a larger ring.
    let three = Wanted {
        upstreams: vec![upstream("x", 1..60)],
        ..one.clone()
    };
    let nothing = Wanted::default();
    let mut model = Model::new();
    let mut state = empty();
    for wanted in [&one, &two, &three, &one, &nothing, &two] {
        let (writes, next) = planned(&state, wanted);
        model.apply(&writes);
        assert_eq!(model.listeners, next.listeners);
        let live: BTreeMap<_, _> = model
            .upstreams
            .iter()
            .filter(|(_, entry)| entry.slots > 0)
            .collect();
        assert_eq!(live, next.upstreams.iter().collect());
        state = next;
    }
}

#[test]
fn the_same_again_writes_no_pointer() {
    let wanted = Wanted {
        listeners: vec![forward("a", 80, 0)],
        upstreams: vec![upstream("x", [1, 2])],
        nat: nat(),
        tunnel: vec![],
        rules: vec![],
        ..Wanted::default()
    };
    let (_, state) = planned(&empty(), &wanted);
    let (writes, again) = planned(&state, &wanted);
    assert_eq!(state, again);
    let harmless = |write: &Write| {
        matches!(
            write,
            Write::Ring { .. } | Write::AddPorts { .. } | Write::SetPorts { .. }
        )
    };
    assert!(writes.iter().all(harmless), "{writes:?}");
}

#[test]
fn ids_stay_with_their_names_and_endpoints_over_changes_and_absence() {
    let wanted = |names: &[&str], endpoints: &[u8]| Wanted {
        listeners: names
            .iter()
            .enumerate()
            .map(|(n, name)| forward(name, 80 + n as u16, 0))
            .collect(),
        upstreams: vec![upstream("x", endpoints.iter().copied())],
        ..Wanted::default()
    };
    let (_, first) = planned(&empty(), &wanted(&["a", "b"], &[1, 2]));
    let (_, second) = planned(&first, &wanted(&["b"], &[2]));
    let (_, third) = planned(&second, &wanted(&["c", "a", "b"], &[3, 1, 2]));
    assert_eq!(third.names.listeners["a"], first.names.listeners["a"]);
    assert_eq!(third.names.listeners["b"], first.names.listeners["b"]);
    assert_ne!(third.names.listeners["c"], first.names.listeners["a"]);
    for (id, address) in first.endpoints.iter() {
        assert_eq!(third.endpoints.find(address), Some(id));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_name() {
    let mut wanted = Wanted {
        nat: nat(),
        ..Wanted::default()
    };
    let mut small = empty();
    small.capacity.nat_flows = 1000;
    assert_eq!(
        plan(&small, &wanted, None)
            .map_err(|full| (full.what, full.needed))
            .err(),
        Some(("nat_flows", Some(160_000)))
    );

    wanted.nat = None;
    wanted.listeners = (0..17).map(|n| forward("a", 1000 + n, 0)).collect();
    wanted.upstreams = vec![upstream("x", [1])];
    assert_eq!(
        plan(&empty(), &wanted, None)
            .map_err(|full| full.what)
            .err(),
        Some("listeners")
    );

    wanted.listeners = (0..9)
        .map(|n| forward(&format!("l{n}"), 1000 + n as u16, n))
        .collect();
    wanted.upstreams = (0..9).map(|n| upstream(&format!("u{n}"), [1])).collect();
    assert_eq!(
        plan(&empty(), &wanted, None)
            .map_err(|full| full.what)
            .err(),
        Some("upstreams")
    );

    let mut few = empty();
    few.capacity.endpoints = 3;
    wanted.listeners = vec![forward("a", 80, 0)];
    wanted.upstreams = vec![upstream("x", [1, 2, 3])];
    assert_eq!(
        plan(&few, &wanted, None).map_err(|full| full.what).err(),
        Some("endpoints")
    );

    few = empty();
    few.capacity.ring_pages = 0;
    assert_eq!(
        plan(&few, &wanted, None).map_err(|full| full.what).err(),
        Some("ring_pages")
    );
}

#[test]
fn an_unhealthy_endpoint_leaves_the_ring_and_all_unhealthy_ones_stay() {
    let slots = |healthy: [bool; 2]| {
        let mut one = upstream("x", [1, 2]);
        for (endpoint, healthy) in one.endpoints.iter_mut().zip(healthy) {
            endpoint.healthy = healthy;
        }
        let wanted = Wanted {
            listeners: vec![forward("a", 80, 0)],
            upstreams: vec![one],
            ..Wanted::default()
        };
        let (writes, _) = planned(&empty(), &wanted);
        writes.into_iter().find_map(|write| match write {
            Write::Ring { slots, .. } => Some(slots.into_iter().collect::<BTreeSet<u16>>()),
            _ => None,
        })
    };
    assert_eq!(slots([true, true]), Some(BTreeSet::from([1, 2])));
    assert_eq!(slots([false, true]), Some(BTreeSet::from([2])));
    assert_eq!(slots([false, false]), Some(BTreeSet::from([1, 2])));
}

#[test]
fn nat_sources_stand_with_ipv4_first_and_keep_the_cursors() {
    let mut state = empty();
    state.nat.cursors = [7, 8, 9, 10];
    let (writes, next) = planned(
        &state,
        &Wanted {
            nat: nat(),
            ..Wanted::default()
        },
    );
    assert_eq!(next.nat.cursors, [7, 8, 9, 10]);
    assert_eq!(
        (next.nat.sources_count, next.nat.sources_v4, next.nat.ports),
        (2, 1, 40_000)
    );
    assert!(next.nat.sources[0].is_v4());
    let gate = writes
        .iter()
        .position(|write| matches!(write, Write::Nat(_)));
    let way_back = writes
        .iter()
        .position(|write| matches!(write, Write::Listener(..)));
    assert!(gate < way_back);
}

#[test]
fn flows_survive_a_source_that_is_added_and_nothing_else() {
    let of = |nat: Option<WantedNat>| {
        planned(
            &empty(),
            &Wanted {
                nat,
                ..Wanted::default()
            },
        )
        .1
        .nat
    };
    let before = of(nat());
    let more = nat().map(|mut nat| {
        nat.sources
            .push(IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 2]));
        nat.tcp_idle_ns = 5;
        nat
    });
    let other_ports = nat().map(|nat| WantedNat {
        port_first: 30_000,
        ..nat
    });
    // A second IPv4 source takes the index of the IPv6 one.
    let moved = nat().map(|mut nat| {
        nat.sources.push(IpAddr::from([192, 0, 2, 2]));
        nat
    });
    assert!(keeps_flows(&before, &of(more)));
    assert!(!keeps_flows(&before, &of(other_ports)));
    assert!(!keeps_flows(&before, &of(moved)));
    assert!(!keeps_flows(&before, &of(None)));
    assert!(keeps_flows(&of(None), &before));
}

#[test]
fn remembered_ids_that_the_maps_do_not_have_are_given_anew() {
    let wanted = Wanted {
        listeners: vec![forward("a", 80, 0), forward("b", 81, 1)],
        upstreams: vec![upstream("x", [1]), upstream("y", [2])],
        nat: nat(),
        rules: vec!["r".to_owned(), "s".to_owned()],
        tunnel: vec![],
        ..Wanted::default()
    };
    let forged = |pairs: [(&str, u32); 2]| {
        let owned = pairs.map(|(name, id)| (name.to_owned(), id));
        owned.into_iter().collect::<BTreeMap<_, _>>()
    };
    let names = Names {
        listeners: forged([("a", u32::MAX), ("b", 16)]),
        upstreams: forged([("x", 3), ("y", 3)]),
        rules: forged([("r", 0), ("s", abi::size::RULES)]),
    };
    let state = State {
        names: names.within(&empty().capacity),
        ..empty()
    };
    let (_, next) = planned(&state, &wanted);
    for (ids, end) in [
        (&next.names.listeners, 16),
        (&next.names.upstreams, 8),
        (&next.names.rules, abi::size::RULES),
    ] {
        let distinct: BTreeSet<u32> = ids.values().copied().collect();
        assert_eq!(distinct.len(), 2, "{ids:?}");
        assert!(distinct.iter().all(|id| (1..end).contains(id)), "{ids:?}");
    }
}

#[test]
fn a_tunnel_has_sources_before_a_packet_needs_one_and_keeps_them() {
    let mut wanted = Wanted {
        listeners: vec![forward("a", 80, 0)],
        upstreams: vec![upstream("x", [1, 2])],
        tunnel: vec![IpAddr::from([10, 0, 0, 9])],
        ..Wanted::default()
    };
    wanted.listeners[0].upstream = Some((0, mode::IPIP));
    let mut model = Model::new();
    let (writes, state) = planned(&empty(), &wanted);
    model.apply(&writes);
    assert_eq!(state.tunnel.source4, address(wanted.tunnel[0]));
    assert_eq!(state.tunnel.source6, abi::Address([0; 16]));
    assert_eq!(state.tunnel.gue_port, port(6080));
    let (writes, without) = planned(&state, &Wanted::default());
    model.apply(&writes);
    assert_eq!(without.tunnel, state.tunnel);
}

#[test]
fn an_address_drops_what_has_no_ports_only_where_all_its_listeners_would() {
    let options = |first, second| {
        let mut wanted = Wanted {
            listeners: vec![forward("a", 80, 0), forward("b", 81, 0)],
            upstreams: vec![upstream("x", [1])],
            ..Wanted::default()
        };
        wanted.listeners[0].options = first;
        wanted.listeners[1].options = second;
        let (_, state) = planned(&empty(), &wanted);
        let address = state.listeners.iter().find(|(key, _)| key.port == 0);
        address.map(|(_, entry)| entry.options)
    };
    let (pass, drop) = (option::FRAGMENTS_PASS, option::FRAGMENTS_DROP);
    assert_eq!(options(drop, drop), Some(drop));
    assert_eq!(options(drop, pass), Some(0));
    assert_eq!(options(0, drop), Some(0));
}

#[test]
fn an_id_that_is_spare_goes_to_another_address_when_no_fresh_one_is_left() {
    let mut few = empty();
    few.capacity.endpoints = 4;
    let wanted = |endpoints: &[u8]| Wanted {
        listeners: vec![forward("a", 80, 0)],
        upstreams: vec![upstream("x", endpoints.iter().copied())],
        ..Wanted::default()
    };
    let (_, mut state) = planned(&few, &wanted(&[1, 2]));
    let id = |state: &State, last| state.endpoints.find(endpoint(last).address);
    let (one, two) = (id(&state, 1), id(&state, 2));
    let (_, next) = planned(&state, &wanted(&[2]));
    state = next;
    state.endpoints.spare(one.unwrap_or(0));
    let (_, next) = planned(&state, &wanted(&[2, 3]));
    state = next;
    assert_eq!(
        (id(&state, 1), id(&state, 2), id(&state, 3)),
        (one, two, Some(3))
    );
    // Wanted again, it is not spare any more.
    let (_, kept) = planned(&state, &wanted(&[1, 2, 3]));
    assert!(plan(&kept, &wanted(&[1, 2, 3, 4]), None).is_err());
    let (writes, state) = planned(&state, &wanted(&[2, 3, 4]));
    assert_eq!((id(&state, 1), id(&state, 4)), (None, one));
    assert!(writes.contains(&Write::Endpoint(1, endpoint(4).address)));
    let rings = change(&state, [upstream("x", [2, 3, 5])].iter());
    assert_eq!(
        rings.map(|_| ()).map_err(|full| full.what),
        Err("endpoints")
    );
}
