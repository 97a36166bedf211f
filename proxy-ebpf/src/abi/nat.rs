//! NAT as both halves see it: how ports are laid out, and what is remembered of the flow that has one.

use bytemuck::{Pod, Zeroable};

use super::{Address, FlowKey, protocol, size};

/// Layout of NAT ports. Index of a port in `NAT_FLOWS` =
/// ((source * 2 + (0 TCP, 1 UDP)) * `ports` + (port - `port_first`)), source an index into `sources`.
/// Sources and ports must not change while flows live: the way back is computed from them.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Nat {
    /// Addresses that flows leave from; a flow takes one of its endpoint's family.
    pub sources: [Address; size::NAT_SOURCES],
    /// How many of `sources` are in use; IPv4 ones first.
    pub sources_count: u32,
    /// How many of them are IPv4.
    pub sources_v4: u32,
    /// First port, host order.
    pub port_first: u32,
    /// How many ports from there; 0 = NAT is not configured.
    pub ports: u32,
    /// Nanoseconds after its last packet in which an open TCP flow keeps its port.
    pub tcp_idle_ns: u64,
    /// The same for a TCP flow that was never answered, or that both sides closed or one reset:
    /// without it a flood of SYNs, or many short connections, would hold every port for `tcp_idle_ns`.
    pub tcp_brief_ns: u64,
    /// The same for UDP.
    pub udp_idle_ns: u64,
    /// Written by the kernel half: allocations so far, by `Nat::area`; the next port to try follows from it.
    pub cursors: [u64; 4],
}
const _: () = assert!(size_of::<Nat>() == 200);

impl Nat {
    /// Which of `cursors` serves a family and protocol: a cursor of its own each, because with a
    /// shared one TCP and UDP taking turns would each see only every second port.
    pub const fn area(v4: bool, protocol: u8) -> usize {
        (v4 as usize) * 2 + (protocol == protocol::UDP) as usize
    }

    /// Index in `NAT_FLOWS` of the port `offset` ports above `port_first`, of the source of that index.
    pub const fn flow_index(&self, source: u32, protocol: u8, offset: u32) -> u32 {
        let half = source
            .wrapping_mul(2)
            .wrapping_add((protocol == protocol::UDP) as u32);
        half.wrapping_mul(self.ports).wrapping_add(offset)
    }
}

/// A NAT flow; the index is the allocated port, so its way back is one array look-up.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct NatFlow {
    /// The key under which `FLOWS` holds this index; all zero = the port was never used.
    pub key: FlowKey,
    /// Endpoint id; 0 while the port changes hands. It and the interface are one aligned word, written as one then.
    pub endpoint: u32,
    /// The interface and MACs that lead back to the client: where its packet came from.
    pub client_ifindex: u32,
    pub client_mac: [u8; 6],
    pub edge_mac: [u8; 6],
    /// What the index says, so that the way out needs no division: the port in network order.
    pub port: [u8; 2],
    /// The same: index into `Nat::sources`.
    pub source: u8,
    /// Bits of `flow_state`.
    pub state: u8,
    /// CLOCK_MONOTONIC_COARSE of the last packet, ns, up to 3 s late; 0 = the port is free.
    pub seen_ns: u64,
    /// The kernel's jiffies when `seen_ns` was written: reading them is free, the clock costs 15 ns.
    pub seen_jiffies: u64,
    /// VLAN tags of the client's packets, as they stand there: outermost first, zero where there is none.
    pub client_tags: u64,
}
const _: () = assert!(size_of::<NatFlow>() == 88);
const _: () = assert!(core::mem::offset_of!(NatFlow, endpoint) % 8 == 0);

/// What a NAT flow has seen.
pub mod flow_state {
    /// A packet came back from the endpoint.
    pub const ANSWERED: u8 = 1;
    /// The client sent FIN.
    pub const CLIENT_CLOSED: u8 = 2;
    /// The endpoint sent FIN.
    pub const ENDPOINT_CLOSED: u8 = 4;
    /// The client sent RST, and nothing else since: one that somebody else forged is soon disproved.
    pub const CLIENT_RESET: u8 = 8;
    /// The endpoint sent RST, and nothing else since.
    pub const ENDPOINT_RESET: u8 = 16;
    /// The endpoint's host said by ICMP, before anything came back, that it is not reached there.
    pub const UNREACHABLE: u8 = 32;
    /// It is known how the endpoint took the flow.
    pub const TAKEN: u8 = ANSWERED | UNREACHABLE;
}

impl NatFlow {
    /// Whether its connection is over, and its endpoint says so, too: it has reset it, or both sides have closed it.
    pub const fn has_ended(&self) -> bool {
        const CLOSED: u8 = flow_state::CLIENT_CLOSED | flow_state::ENDPOINT_CLOSED;
        self.state & flow_state::ENDPOINT_RESET != 0 || self.state & CLOSED == CLOSED
    }

    /// Whether the flow still has its port at a time of CLOCK_MONOTONIC_COARSE.
    pub const fn lives(&self, nat: &Nat, now_ns: u64) -> bool {
        self.seen_ns != 0 && now_ns.saturating_sub(self.seen_ns) < self.idle_ns(nat)
    }

    /// Nanoseconds after its last packet in which the flow keeps its port.
    pub const fn idle_ns(&self, nat: &Nat) -> u64 {
        if self.key.protocol != protocol::TCP {
            return nat.udp_idle_ns;
        }
        let open = self.state & flow_state::ANSWERED != 0
            && self.state & flow_state::CLIENT_RESET == 0
            && !self.has_ended();
        if open {
            nat.tcp_idle_ns
        } else {
            nat.tcp_brief_ns
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_nat_port_has_an_index_of_its_own() {
        let mut nat = Nat::zeroed();
        nat.ports = 3;
        let mut indices = vec![];
        for source in 0..size::NAT_SOURCES as u32 {
            for protocol in [protocol::TCP, protocol::UDP] {
                indices.extend((0..3).map(|offset| nat.flow_index(source, protocol, offset)));
            }
        }
        assert_eq!(indices, (0..48).collect::<Vec<u32>>());
    }
}
