//! Plans of prefixes.

use super::*;

fn prefix(name: &str, address: &str, upstream: usize) -> WantedPrefix {
    let (network, ports) = address.rsplit_once(':').expect("ports");
    let (ip, bits) = network.split_once('/').expect("a prefix");
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let port = first.parse().expect("a port");
    WantedPrefix {
        name: name.to_owned(),
        address: ListenAddress {
            socket: SocketAddr::new(ip.parse().expect("an address"), port),
            prefix_bits: bits.parse().expect("bits"),
            port_last: last.parse().expect("a port"),
            protocol: crate::config::Protocol::Tcp,
        },
        protocol: abi::protocol::TCP,
        upstream: Some((upstream, mode::DIRECT)),
        options: 0,
    }
}

/// Who has a port of the addresses of an entry, by the name of its listener.
fn owner(state: &State, ip: [u8; 4], bits: u32, port: u16) -> Option<&str> {
    let key = abi::PrefixKey::new(abi::Address::v4(ip), bits, abi::protocol::TCP);
    let id = state.prefixes[&key].find(port)?.id;
    let names = state.names.listeners.iter();
    names
        .clone()
        .find(|(_, known)| **known == id)
        .map(|(name, _)| name.as_str())
}

#[test]
fn a_longer_prefix_tells_what_shorter_ones_have_at_its_addresses_too() {
    let wanted = Wanted {
        prefixes: vec![
            prefix("wide", "203.0.112.0/20:1-65535", 0),
            prefix("near", "203.0.113.0/24:8000-8099", 0),
            prefix("far", "198.51.0.0/16:443", 0),
        ],
        upstreams: vec![upstream("x", [1, 2])],
        ..Wanted::default()
    };
    let (writes, state) = planned(&empty(), &wanted);
    let mut model = Model::new();
    model.apply(&writes);
    assert_eq!(model.prefixes, state.prefixes);
    let near = |port| owner(&state, [203, 0, 113, 0], 24, port);
    assert_eq!(
        [7999, 8000, 8099, 8100].map(near),
        [Some("wide"), Some("near"), Some("near"), Some("wide")]
    );
    assert_eq!(owner(&state, [203, 0, 112, 0], 20, 8000), Some("wide"));
    assert_eq!(owner(&state, [198, 51, 0, 0], 16, 443), Some("far"));
    assert_eq!(owner(&state, [198, 51, 0, 0], 16, 444), None);
    // Three prefixes, each once for TCP and once for what has no ports.
    assert_eq!(state.prefixes.len(), 6);
    let (again, _) = planned(&state, &wanted);
    assert!(
        !again
            .iter()
            .any(|write| matches!(write, Write::Prefix(..) | Write::RemovePrefix(_)))
    );

    let less = Wanted {
        prefixes: wanted.prefixes[..1].to_vec(),
        ..wanted
    };
    let (writes, after) = planned(&state, &less);
    model.apply(&writes);
    assert_eq!(model.prefixes, after.prefixes);
    assert_eq!(after.prefixes.len(), 2);
}

#[test]
fn prefixes_that_do_not_fit_are_refused_whole() {
    let mut wanted = Wanted {
        prefixes: (0..5)
            .map(|n| prefix("p", &format!("203.{n}.0.0/16:443"), 0))
            .collect(),
        upstreams: vec![upstream("x", [1])],
        ..Wanted::default()
    };
    let full = plan(&empty(), &wanted, None).expect_err("ten entries, and eight have room");
    assert_eq!(full.what, "prefixes");
    wanted.prefixes.truncate(4);
    let (_, state) = planned(&empty(), &wanted);
    // Others, for which there is room only once these have gone.
    wanted.prefixes = vec![prefix("p", "10.0.0.0/8:443", 0)];
    let full = plan(&state, &wanted, None).expect_err("old and new ones are there together");
    assert_eq!(full.what, "prefixes");
}

#[test]
fn what_has_no_ports_is_dropped_only_where_all_listeners_of_its_address_would() {
    let mut wanted = Wanted {
        listeners: vec![forward("exact", 80, 0)],
        prefixes: vec![prefix("wide", "192.0.0.0/16:443", 0)],
        upstreams: vec![upstream("x", [1])],
        ..Wanted::default()
    };
    let mut dropped = |exact, wide| {
        (wanted.listeners[0].options, wanted.prefixes[0].options) = (exact, wide);
        let (_, state) = planned(&empty(), &wanted);
        let at = Key {
            address: wanted.listeners[0].address.ip(),
            port: 0,
            protocol: 0,
        };
        let key = abi::PrefixKey::new(abi::Address::v4([192, 0, 0, 0]), 16, 0);
        let of_prefix = state.prefixes[&key].find(0).expect("all ports").options;
        (state.listeners[&at].options, of_prefix)
    };
    let drop = option::FRAGMENTS_DROP;
    assert_eq!(dropped(drop, 0), (0, 0));
    assert_eq!(dropped(0, drop), (0, drop));
    assert_eq!(dropped(drop, drop), (drop, drop));
}
