//! The list of all tunables, and the struct of their values. A knob is added here and nowhere else.

use std::time::Duration;

use proxy_ebpf::abi::size;
use serde::{Deserialize, Serialize};

use super::{Class, Kind, Tunable};

const MS: u64 = 1;
const S: u64 = 1000 * MS;
const MINUTE: u64 = 60 * S;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// The Rust type of a kind of value.
macro_rules! value_type {
    (duration $range:tt) => {
        Duration
    };
    (bytes $range:tt) => {
        usize
    };
    (byte_rate $range:tt) => {
        u64
    };
    (count $range:tt) => {
        u32
    };
    (power $range:tt) => {
        u32
    };
    (word [$Words:ident]) => {
        $Words
    };
}

/// A raw number, known to be in range, as a value of its type.
macro_rules! value_of {
    (duration $range:tt, $raw:expr) => {
        Duration::from_millis($raw)
    };
    (bytes $range:tt, $raw:expr) => {
        usize::try_from($raw).unwrap_or(usize::MAX)
    };
    (byte_rate $range:tt, $raw:expr) => {
        $raw
    };
    (count $range:tt, $raw:expr) => {
        u32::try_from($raw).unwrap_or(u32::MAX)
    };
    (power $range:tt, $raw:expr) => {
        u32::try_from($raw).unwrap_or(u32::MAX)
    };
    (word [$Words:ident], $raw:expr) => {
        $Words::from_raw($raw)
    };
}

/// A row of the table.
macro_rules! row {
    (duration $range:tt, $rest:tt) => { row!(@ Kind::Duration, $range, $rest) };
    (bytes $range:tt, $rest:tt) => { row!(@ Kind::Bytes, $range, $rest) };
    (byte_rate $range:tt, $rest:tt) => { row!(@ Kind::ByteRate, $range, $rest) };
    (count $range:tt, $rest:tt) => { row!(@ Kind::Count, $range, $rest) };
    (power $range:tt, $rest:tt) => { row!(@ Kind::Power, $range, $rest) };
    (word [$Words:ident], $rest:tt) => {
        row!(@ Kind::Word($Words::WORDS), [0, 0, $Words::WORDS.len() as u64 - 1], $rest)
    };
    (@ $kind:expr, [$default:expr, $min:expr, $max:expr], [$key:expr, $class:ident, $help:literal]) => {
        Tunable { key: $key, kind: $kind, default: $default, min: $min, max: $max, class: Class::$class, help: $help }
    };
}

/// `knob: kind[default, min, max] Class "help";` by area.
macro_rules! tree {
    ($($area:ident: $Area:ident { $($knob:ident: $kind:ident $range:tt $class:ident $help:literal;)* })*) => {
        /// Every knob, area by area.
        pub static TREE: &[Tunable] = &[
            $($(row!($kind $range, [concat!(stringify!($area), ".", stringify!($knob)), $class, $help]),)*)*
        ];

        /// Every value, by area.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Values {
            $(#[doc = concat!("`", stringify!($area), ".*`")] pub $area: $Area,)*
        }

        $(
            #[doc = concat!("Values of `", stringify!($area), ".*`.")]
            #[derive(Clone, Debug, PartialEq)]
            pub struct $Area {
                $(#[doc = $help] pub $knob: value_type!($kind $range),)*
            }
        )*

        impl Values {
            /// From raw numbers in the order of `TREE`. The fields below are evaluated in exactly that order.
            pub(super) fn from_raw(raw: &[u64]) -> Self {
                let mut raw = raw.iter().copied();
                let mut next = || raw.next().unwrap_or(0);
                Self { $($area: $Area { $($knob: value_of!($kind $range, next()),)* },)* }
            }
        }
    };
}

/// A type whose values are words; the first is the default.
macro_rules! words {
    ($(#[$doc:meta])* $Words:ident { $($(#[$of:meta])* $Word:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $Words { $($(#[$of])* $Word,)* }

        impl $Words {
            const WORDS: &[&str] = &[$($text),*];
            const ALL: &[Self] = &[$(Self::$Word),*];

            fn from_raw(raw: u64) -> Self {
                usize::try_from(raw).ok().and_then(|index| Self::ALL.get(index)).copied().unwrap_or(Self::ALL[0])
            }
        }
    };
}

words! {
    /// Through what workers ask the kernel for connections and bytes.
    NetBackend {
        /// io_uring, and epoll where the host refuses that.
        Auto = "auto",
        /// io_uring, or no start.
        Uring = "uring",
        /// epoll, and no io_uring anywhere.
        Epoll = "epoll",
    }
}

words! {
    /// What becomes of a field whose name has an underscore: origins that turn `-` into `_` read it as another field.
    UnderscoreFields {
        /// The field is left out.
        Drop = "drop",
        /// The field is forwarded.
        Keep = "keep",
        /// 400.
        Refuse = "refuse",
    }
}

words! {
    /// What becomes of `%2F` in a path.
    EncodedSlash {
        /// 400.
        Refuse = "refuse",
        /// It stays as it is: not a separator.
        Keep = "keep",
        /// It becomes `/` before a route is looked for.
        Decode = "decode",
    }
}

words! {
    /// How an origin is told who asks.
    ForwardedFields {
        /// `X-Forwarded-For`, `-Proto`, `-Host`, `-Port`.
        XForwarded = "x_forwarded",
        /// `Forwarded`, RFC 7239.
        Forwarded = "forwarded",
        Both = "both",
    }
}

words! {
    /// What becomes of the segment size that SYNs announce by NAT.
    MssClamp {
        /// It is lowered to what the links of both ways take.
        Auto = "auto",
        /// It stays as it is.
        Off = "off",
    }
}

tree! {
    net: Net {
        backend: word[NetBackend] Restart "What moves bytes to and from the kernel: uring, epoll, or auto, which is epoll where io_uring is refused.";
        backlog: count[4096, 16, 65535] Restart "Connections that wait to be accepted, for each listening socket.";
        buffer_bytes: bytes[16 * KIB, 4 * KIB, 256 * KIB] Restart "Size of one receive buffer.";
        buffers: power[1024, 16, 32_768] Restart "Receive buffers of each worker, shared by its connections.";
        connections_max: count[50_000, 1, 10_000_000] Live "Client connections open at a time in each worker; beyond, none is accepted.";
        send_timeout: duration[30 * S, S, HOUR] Live "Longest wait until a peer has taken what was sent to it, or 16KiB of it; then it is closed.";
        splice_bytes_min: bytes[256 * KIB, 0, GIB] Live "With so much left of a body that is clear on both sides, the kernel moves it from one socket to the other; 0 = never.";
        uring_entries: power[1024, 64, 32_768] Restart "Submission entries of each worker's ring.";
    }
    http: Http {
        body_bytes_max: bytes[16 * GIB, 0, 1024 * GIB] Live "Largest request body; 413 beyond.";
        body_rate_min: byte_rate[240, 0, GIB] Live "Slowest average at which a body may come; 0B/s = any.";
        body_timeout: duration[30 * S, S, HOUR] Live "Longest wait for the next bytes of a request's body.";
        chunk_extension_bytes_max: bytes[4 * KIB, 0, 64 * KIB] Live "Bytes of chunk extensions in one body; 400 beyond.";
        drain_bytes_max: bytes[64 * KIB, 0, 16 * MIB] Live "Rest of a refused request's body that is read so that its connection can live on.";
        encoded_slash: word[EncodedSlash] Live "What becomes of %2F in a path: refuse, keep or decode.";
        exchange_timeout: duration[0, 0, DAY] Live "Longest time for a whole exchange behind the head of its request, where its route names none; 504 beyond, 0s = any.";
        exchanges_per_connection_max: count[10_000, 1, 1_000_000_000] Live "Exchanges on one connection before it is closed.";
        field_bytes_max: bytes[16 * KIB, 64, 64 * KIB] Live "Largest field, name and value together; 431 beyond.";
        fields_max: count[100, 1, 256] Live "Fields in one head; 431 beyond.";
        forwarded_fields: word[ForwardedFields] Live "How origins are told who asks: x_forwarded (X-Forwarded-For, -Proto, -Host, -Port), forwarded (RFC 7239) or both.";
        head_bytes_max: bytes[32 * KIB, KIB, 256 * KIB] Live "Largest head of a request; 431 beyond.";
        head_timeout: duration[10 * S, 100 * MS, 10 * MINUTE] Live "From the first byte of a request to the end of its head, an absolute deadline; 408 beyond.";
        idle_timeout: duration[60 * S, 100 * MS, HOUR] Live "A connection without a request for so long is closed.";
        target_bytes_max: bytes[8 * KIB, 64, 64 * KIB] Live "Longest request target; 414 beyond.";
        underscore_fields: word[UnderscoreFields] Live "Fields whose names have an underscore: drop, keep or refuse.";
    }
    tls: Tls {
        handshake_timeout: duration[10 * S, 100 * MS, 5 * MINUTE] New "From the connection to the end of its TLS handshake.";
        session_tickets: count[2, 0, 16] New "TLS 1.3 session tickets sent after a handshake; 0 = no resumption by ticket.";
    }
    upstream: Upstream {
        connect_timeout: duration[5 * S, 10 * MS, 5 * MINUTE] Live "Longest wait for a connection to an endpoint; then another, or 504.";
        dns_addresses_max: count[64, 1, 4096] Live "Addresses of one name, or targets of one service, that are taken; more are left out.";
        dns_start_timeout: duration[2 * S, 0, 20 * S] Live "How long a start or a reload waits for names that were never looked up; then it goes on without.";
        dns_timeout: duration[5 * S, 100 * MS, MINUTE] Live "Longest wait for one answer of the DNS; what was known stays.";
        dns_ttl_max: duration[5 * MINUTE, S, DAY] Live "A name is looked up again after so long, even if its TTL is longer.";
        dns_ttl_min: duration[S, S, HOUR] Live "A name is not looked up again before so long, even if its TTL is shorter.";
        endpoints_max: count[4096, 1, 65_536] Live "Endpoints of one upstream up to which commands may add to it.";
        failed_hold: duration[10 * S, 0, HOUR] Live "How long an endpoint that refused a connection is left out while another one is there.";
        head_bytes_max: bytes[32 * KIB, KIB, 256 * KIB] Live "Largest head of a response; 502 beyond.";
        head_timeout: duration[60 * S, 10 * MS, HOUR] Live "Longest wait for the head of a response; 504 beyond.";
        body_rate_min: byte_rate[0, 0, GIB] Live "Slowest average at which a response's body may come; 0B/s = any.";
        body_timeout: duration[60 * S, 10 * MS, HOUR] Live "Longest wait for the next bytes of a response's body.";
        idle_connections_max: count[1024, 0, 100_000] Live "Idle connections kept to each endpoint by each worker.";
        idle_timeout: duration[55 * S, 100 * MS, HOUR] Live "An idle connection to an endpoint is closed after so long.";
        pending_max: count[128, 0, 1_000_000] Live "Requests that wait for room at an upstream whose limits are reached; 503 beyond.";
        pending_timeout: duration[S, MS, HOUR] Live "Longest wait for room at an upstream; then 503.";
        replay_bytes_max: bytes[64 * KIB, 0, 16 * MIB] Live "A request's body up to this length is kept until the response begins, to be sent again; only where the method allows that.";
        retries_per_second_min: count[10, 0, 100_000] Live "Retries that each worker may make to an upstream in a second whatever its traffic.";
        retry_backoff: duration[25 * MS, 0, 60 * S] Live "Longest wait before the first retry to the same endpoints, doubled for each one after it; the wait is drawn.";
        retry_budget_percent: count[20, 0, 100] Live "Retries and hedges that each worker may make to an upstream, of a hundred calls.";
        retries: count[1, 0, 10] Live "Tries after the first where a route names none; only for requests that are safe to repeat.";
    }
    datapath: Datapath {
        bans_max: count[size::BANS as u64, 1024, 16_777_216] Restart "Sources that can be banned at a time.";
        endpoints_max: count[size::ENDPOINTS as u64, 64, 65_536] Restart "Endpoints that the kernel half can forward to.";
        listeners_max: count[size::LISTENERS as u64, 64, 1_048_576] Restart "Listener addresses of each family that the kernel half knows: once for each port, and once more.";
        mss_clamp: word[MssClamp] Live "Whether a SYN by NAT announces no larger segments than the links of both ways take, and than mss_max says.";
        mss_max: bytes[65_495, 536, 65_495] Live "Largest TCP segment that a SYN by NAT may announce, where a link that this host does not know takes less than its own.";
        nat_flows_max: count[size::NAT_FLOWS as u64, 1024, 16_777_216] Restart "Flows that NAT can hold: ports of all its sources, for TCP and UDP each.";
        prefixes_max: count[size::PREFIXES as u64, 16, 65_536] Restart "Entries for listeners of more than 4096 addresses and ports: of each prefix one for each protocol, and one for what has no ports.";
        ring_pages_max: count[size::RING_PAGES as u64, 1, 65_536] Restart "Pages of 48KiB for the Maglev rings of all upstreams.";
        upstreams_max: count[size::UPSTREAMS as u64, 16, 65_536] Restart "Upstreams that the kernel half can forward to.";
    }
    flow: Flow {
        tcp_brief_timeout: duration[20 * S, S, HOUR] Live "A TCP flow that was never answered, or was closed or reset, loses its NAT port after so long; at most tcp_idle_timeout.";
        tcp_idle_timeout: duration[10 * MINUTE, S, 30 * DAY] Live "A TCP flow without a packet for so long loses its NAT port.";
        udp_idle_timeout: duration[60 * S, S, DAY] Live "A UDP flow without a packet for so long loses its NAT port.";
    }
    guard: Guard {
        ban_identities: count[3, 1, 1000] Live "An address where so many consumers succeeded within ten minutes is never banned.";
        cells_max: power[size::CELLS as u64, 1024, 16_777_216] Restart "Rate cells, 8 bytes each, that XDP and workers share.";
    }
    log: Log {
        buffer_bytes: bytes[64 * KIB, KIB, MIB] Live "Lines of the access log that a worker gathers before they are written, within half a second at most.";
        buffers_max: count[64, 1, 4096] Live "Such buffers of all workers that wait to be written; lines beyond are dropped and counted.";
        sample: count[1, 1, 1_000_000] Live "Of exchanges that went well, one in so many is logged; all that were refused or failed are.";
    }
    admin: Admin {
        request_bytes_max: bytes[MIB, KIB, 64 * MIB] Live "Largest request on the admin socket.";
        request_timeout: duration[10 * S, 100 * MS, 10 * MINUTE] Live "Longest wait for a whole request on the admin socket.";
    }
    worker: Worker {
        count: count[0, 0, 256] Restart "Worker threads; 0 = one for each CPU.";
        descriptors_reserve: count[64, 0, 100_000] Live "Descriptors that clients never get, for endpoints, logs and the admin socket: short of them, all are in use.";
        drain_timeout: duration[30 * S, 0, DAY] Live "How long open exchanges may take to end in a drain or a reload.";
        lag_max: duration[500, 10 * MS, MINUTE] Live "The loop is fully used when it takes so long to come round, again and again.";
        memory_max: bytes[0, 0, 1024 * GIB] Live "Memory that the daemon may hold; 0 = what its control group may, if that has a limit.";
        overload_close_percent: count[88, 1, 1000] Live "With so much used of descriptors or memory, connections end with their exchange; above 100 hardly ever.";
        overload_lean_percent: count[80, 1, 1000] Live "With so much used of descriptors or memory, buffers are small.";
        overload_refuse_percent: count[94, 1, 1000] Live "With so much used of descriptors, memory or time, requests are refused with 503.";
        overload_rest_percent: count[97, 1, 1000] Live "With so much used of descriptors, memory or time, no connection is accepted.";
    }
}
