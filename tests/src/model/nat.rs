//! Forwarded by NAT, and given back.

use proxy_ebpf::abi::{Nat, NatFlow, Signs, flow_state};
use proxy_ebpf::verdict::Verdict;

use super::read::{Part, Read};
use super::send::{exceeded, tell_too_big};
use super::write::{self, Change};
use super::{Entry, Model, Passage, Sent};
use crate::packet::{FIN, RST, TCP};

/// Ports that are tried for a new flow.
const PORT_TRIES: usize = 8;

impl Model {
    pub(super) fn forward_by_nat(
        &mut self,
        passage: &Passage,
        upstream: u32,
    ) -> Result<Sent, Verdict> {
        let packet = &passage.packet;
        if packet.hop_limit <= 1 {
            return Err(Verdict::HopLimit);
        }
        let index = match self.find_flow(packet) {
            Some(index) => index,
            None => self.open_flow(packet, upstream, passage.arrival.now_ns)?,
        };
        if packet.opens_flow() && self.state.nat_flows[index as usize].has_ended() {
            // A new connection from the port of one that has ended goes where the ring leads now.
            self.state.nat_flows[index as usize].endpoint = self.choose(packet, upstream)?;
        }
        let flow = self.state.nat_flows[index as usize];
        let endpoint = self.reach(flow.endpoint)?;
        if endpoint.address.is_v4() == packet.v6 {
            return Err(Verdict::Inconsistent);
        }
        if let Some(longest) = exceeded(packet, endpoint.plain_mtu_bytes, 0) {
            return tell_too_big(passage, longest);
        }
        if !matches!(packet.part, Part::Error { .. }) {
            self.note(index, passage, true);
        }
        self.state
            .count_endpoint(flow.endpoint, passage.packet.ip_end as u64);
        self.touched.push(Entry::EndpointTraffic(flow.endpoint));
        let change = Change {
            source: (
                self.state.nat.sources[usize::from(flow.source)],
                u16::from_be_bytes(flow.port),
            ),
            destination: (endpoint.address, u16::from_be_bytes(endpoint.port)),
            source_mac: endpoint.source_mac,
            destination_mac: endpoint.mac,
        };
        Ok(Sent {
            verdict: Verdict::Forward,
            ifindex: endpoint.ifindex,
            bytes: write::readdressed(&passage.bytes, packet, &change, endpoint.mss_bytes),
            tags: write::vlan_tag(endpoint.vlan),
        })
    }

    /// A packet at a NAT source belongs to the flow that has its port, if it is from that flow's endpoint. That it fits
    /// the client's interface is the kernel's own word, and the interfaces of a test run take everything.
    pub(super) fn give_back(&mut self, passage: &Passage, source: u32) -> Result<Sent, Verdict> {
        let packet = &passage.packet;
        let nat = &self.state.nat;
        let offset = u32::from(packet.destination_port).wrapping_sub(nat.port_first);
        if offset >= nat.ports {
            return Err(Verdict::NotOurs);
        }
        let index = nat.flow_index(source, packet.protocol, offset);
        let flow = self
            .state
            .nat_flows
            .get(index as usize)
            .ok_or(Verdict::Inconsistent)?;
        let flow = *flow;
        if flow.seen_ns == 0 || flow.key.protocol != packet.protocol || flow.endpoint == 0 {
            return Err(Verdict::NotOurs);
        }
        let endpoint = self.state.endpoints.get(flow.endpoint as usize);
        let endpoint = endpoint.ok_or(Verdict::Inconsistent)?;
        let mss_bytes = endpoint.mss_bytes;
        let sender = (packet.source, packet.source_port.to_be_bytes());
        if sender != (endpoint.address, endpoint.port) {
            return Err(Verdict::NotOurs);
        }
        if packet.hop_limit <= 1 {
            return Err(Verdict::HopLimit);
        }
        if !matches!(packet.part, Part::Error { .. }) {
            self.note(index, passage, false);
        } else if packet.sender == endpoint.address && is_unreachable(passage) {
            self.note_unreachable(index);
        }
        let change = Change {
            source: (
                flow.key.listener,
                u16::from_be_bytes(flow.key.listener_port),
            ),
            destination: (flow.key.client, u16::from_be_bytes(flow.key.client_port)),
            source_mac: flow.edge_mac,
            destination_mac: flow.client_mac,
        };
        Ok(Sent {
            verdict: Verdict::Return,
            ifindex: flow.client_ifindex,
            bytes: write::readdressed(&passage.bytes, packet, &change, mss_bytes),
            tags: flow.client_tags.to_ne_bytes(),
        })
    }

    /// The flow of a packet; an entry that leads to another flow's port is forgotten.
    fn find_flow(&mut self, packet: &Read) -> Option<u32> {
        let key = packet.flow_key();
        let index = *self.state.flows.get(&key)? as u32;
        let flow = self.state.nat_flows.get(index as usize)?;
        if flow.key == key {
            return Some(index);
        }
        self.state.flows.remove(&key);
        self.touched.push(Entry::Flow(key));
        None
    }

    fn open_flow(&mut self, packet: &Read, upstream: u32, now_ns: u64) -> Result<u32, Verdict> {
        if !packet.opens_flow() {
            return Err(Verdict::NoFlow);
        }
        let owner = self.choose(packet, upstream)?;
        let index = self.allocate(packet, now_ns)?;
        let key = packet.flow_key();
        let flow = &mut self.state.nat_flows[index as usize];
        flow.key = key;
        flow.state = 0;
        flow.endpoint = owner;
        flow.client_ifindex = 0;
        if self.state.flows.len() >= self.state.flows_max {
            flow.seen_ns = 0;
            return Err(Verdict::NatExhausted);
        }
        self.state.flows.insert(key, u64::from(index));
        self.touched.push(Entry::Flow(key));
        self.sign(owner, |signs| signs.opened += 1);
        Ok(index)
    }

    /// The endpoint for a new flow.
    fn choose(&mut self, packet: &Read, upstream: u32) -> Result<u32, Verdict> {
        let owner = u32::from(self.place(packet, upstream)?.slot.owner());
        if owner == 0 {
            return Err(Verdict::NoEndpoint);
        }
        if self.reach(owner)?.address.is_v4() == packet.v6 {
            return Err(Verdict::Inconsistent);
        }
        Ok(owner)
    }

    /// The next port that is free, or whose flow has been idle too long: sources in turn, then ports.
    fn allocate(&mut self, packet: &Read, now_ns: u64) -> Result<u32, Verdict> {
        let nat = self.state.nat;
        let (first, count) = if packet.v6 {
            (nat.sources_v4, nat.sources_count - nat.sources_v4)
        } else {
            (0, nat.sources_v4)
        };
        if count == 0 || nat.ports == 0 {
            return Err(Verdict::Inconsistent);
        }
        let area = Nat::area(!packet.v6, packet.protocol);
        self.touched.push(Entry::NatCursor(area));
        for _ in 0..PORT_TRIES {
            let turn = self.state.nat.cursors[area];
            self.state.nat.cursors[area] += 1;
            let source = first + (turn % u64::from(count)) as u32;
            let offset = (turn / u64::from(count) % u64::from(nat.ports)) as u32;
            let index = nat.flow_index(source, packet.protocol, offset);
            let flow = self
                .state
                .nat_flows
                .get(index as usize)
                .ok_or(Verdict::Inconsistent)?;
            let flow: NatFlow = *flow;
            if flow.seen_ns != 0 && now_ns.saturating_sub(flow.seen_ns) < flow.idle_ns(&nat) {
                continue;
            }
            if flow.seen_ns != 0 && self.state.flows.get(&flow.key) == Some(&u64::from(index)) {
                self.state.flows.remove(&flow.key);
                self.touched.push(Entry::Flow(flow.key));
            }
            let flow = &mut self.state.nat_flows[index as usize];
            flow.seen_ns = now_ns;
            flow.port = (nat.port_first as u16)
                .wrapping_add(offset as u16)
                .to_be_bytes();
            flow.source = source as u8;
            self.touched.push(Entry::NatFlow(index));
            return Ok(index);
        }
        Err(Verdict::NatExhausted)
    }

    /// A packet of a flow: it lives, its flags change its state, and a client's says where the client is.
    fn note(&mut self, index: u32, passage: &Passage, from_client: bool) {
        let packet = &passage.packet;
        let flow = &mut self.state.nat_flows[index as usize];
        flow.seen_ns = passage.arrival.now_ns;
        let (before, endpoint) = (flow.state, flow.endpoint);
        let is_taken = before & (flow_state::ANSWERED | flow_state::UNREACHABLE) != 0;
        let mut sign: fn(&mut Signs) = |_| {};
        if !from_client && !is_taken {
            sign = if packet.tcp_flags & RST != 0 {
                |signs| signs.refused += 1
            } else {
                |signs| signs.answered += 1
            };
        }
        if from_client && is_taken && packet.protocol == TCP && packet.opens_flow() {
            sign = |signs| signs.opened += 1;
        }
        if packet.protocol == TCP {
            flow.state = next_state(before, packet, from_client);
        } else if !from_client {
            flow.state |= flow_state::ANSWERED;
        }
        if from_client {
            flow.client_ifindex = passage.arrival.ifindex;
            flow.edge_mac.copy_from_slice(&passage.bytes[..6]);
            flow.client_mac.copy_from_slice(&passage.bytes[6..12]);
            flow.client_tags = u64::from_ne_bytes(passage.tags);
        }
        self.touched.push(Entry::NatFlow(index));
        self.sign(endpoint, sign);
    }

    /// The endpoint's host says that a flow does not get there: that counts before anything else came back.
    fn note_unreachable(&mut self, index: u32) {
        let flow = &mut self.state.nat_flows[index as usize];
        if flow.state & (flow_state::ANSWERED | flow_state::UNREACHABLE) == 0 {
            flow.state |= flow_state::UNREACHABLE;
            let endpoint = flow.endpoint;
            self.touched.push(Entry::NatFlow(index));
            self.sign(endpoint, |signs| signs.refused += 1);
        }
    }

    fn sign(&mut self, endpoint: u32, change: impl FnOnce(&mut Signs)) {
        if let Some(signs) = self.state.endpoint_signs.get_mut(endpoint as usize) {
            change(signs);
            self.touched.push(Entry::EndpointSigns(endpoint));
        }
    }
}

/// Whether an error says that what it quotes did not arrive: destination unreachable, of IPv4 with any code but "too long".
fn is_unreachable(passage: &Passage) -> bool {
    let icmp = &passage.bytes[passage.packet.transport..];
    match passage.packet.v6 {
        true => icmp[0] == 1,
        false => icmp[0] == 3 && icmp[1] != 4,
    }
}

/// The state of a TCP flow after a packet.
fn next_state(state: u8, packet: &Read, from_client: bool) -> u8 {
    let (closed, reset) = if from_client {
        (flow_state::CLIENT_CLOSED, flow_state::CLIENT_RESET)
    } else {
        (flow_state::ENDPOINT_CLOSED, flow_state::ENDPOINT_RESET)
    };
    let mut state = state & !reset;
    if !from_client {
        state |= flow_state::ANSWERED;
    } else if packet.opens_flow() {
        state = 0;
    }
    if packet.tcp_flags & FIN != 0 {
        state |= closed;
    }
    if packet.tcp_flags & RST != 0 {
        state |= reset;
    }
    state
}
