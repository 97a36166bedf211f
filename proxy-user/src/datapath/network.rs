//! What rtnetlink says about this host: interfaces, addresses, next hops, neighbours. Reading needs no privilege.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, LinkXdp, XdpAttached};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use proxy_ebpf::abi::LOCAL;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Its Ethernet address; zero where it has none.
    pub mac: [u8; 6],
    pub mtu: u32,
    /// It is switched on, and there is something at the other end.
    pub up: bool,
    /// The program attached to XDP, by id, and whether natively.
    pub xdp: Option<(u32, bool)>,
}

/// Where packets for an address go first. An address of this host has `abi::LOCAL` for its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    pub ifindex: u32,
    /// The gateway, or the address itself where it is on the link.
    pub address: IpAddr,
}

/// What the kernel knows of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub mac: Option<[u8; 6]>,
    /// The kernel tried and got no answer.
    pub failed: bool,
    /// The kernel has proof, or will not ask for one.
    pub fresh: bool,
}

/// One conversation with rtnetlink.
pub struct Network {
    socket: Socket,
    sequence: u32,
}

impl Network {
    /// Opens a socket in the network namespace of this thread.
    ///
    /// # Errors
    /// What the system says.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Every interface.
    ///
    /// # Errors
    /// What the system says.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), true)?;
        Ok(answers.into_iter().filter_map(link).collect())
    }

    /// Every address of this host, with the index of its interface.
    ///
    /// # Errors
    /// What the system says.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, IpAddr)>> {
        let answers = self.ask(
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            true,
        )?;
        let addresses = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => {
                // With a peer `Address` is the peer's and `Local` is ours; IPv6 often has `Address` alone.
                let local = message
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        AddressAttribute::Local(ip) => Some(*ip),
                        _ => None,
                    });
                let any = message
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        AddressAttribute::Address(ip) => Some(*ip),
                        _ => None,
                    });
                Some((message.header.index, local.or(any)?))
            }
            _ => None,
        });
        Ok(addresses.collect())
    }

    /// Where packets for `to` go first; `None` where they go nowhere.
    ///
    /// # Errors
    /// What the system says, apart from "unreachable".
    pub fn next_hop(&mut self, to: IpAddr) -> io::Result<Option<NextHop>> {
        let mut message = RouteMessage::default();
        message.header.address_family = if to.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
        message
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::from(to)));
        let answers = match self.ask(RouteNetlinkMessage::GetRoute(message), false) {
            Ok(answers) => answers,
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES)
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        Ok(answers.into_iter().find_map(|answer| next_hop(answer, to)))
    }

    /// Every neighbour, by interface and address.
    ///
    /// # Errors
    /// What the system says.
    pub fn neighbours(&mut self) -> io::Result<HashMap<(u32, IpAddr), Neighbour>> {
        let answers = self.ask(
            RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
            true,
        )?;
        Ok(answers.into_iter().filter_map(neighbour).collect())
    }

    /// Sends one request and collects the answers to it.
    fn ask(
        &mut self,
        request: RouteNetlinkMessage,
        dump: bool,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(request);
        message.header.flags = if dump {
            NLM_F_REQUEST | NLM_F_DUMP
        } else {
            NLM_F_REQUEST
        };
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                let length = (answer.header.length as usize)
                    .next_multiple_of(4)
                    .clamp(1, rest.len());
                rest = &rest[length..];
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(answers),
                    _ => {}
                }
                if !dump {
                    return Ok(answers);
                }
            }
        }
    }
}

fn link(answer: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = answer else {
        return None;
    };
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        up: message
            .header
            .flags
            .contains(LinkFlags::Up | LinkFlags::LowerUp),
        xdp: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Xdp(xdp) => link.xdp = xdp_program(&xdp),
            _ => {}
        }
    }
    Some(link)
}

fn xdp_program(xdp: &[LinkXdp]) -> Option<(u32, bool)> {
    let id = xdp.iter().find_map(|one| match one {
        LinkXdp::ProgId(id) if *id != 0 => Some(*id),
        _ => None,
    })?;
    let native = xdp.iter().any(|one| {
        matches!(
            one,
            LinkXdp::Attached(XdpAttached::Driver | XdpAttached::Hardware)
        )
    });
    Some((id, native))
}

fn next_hop(answer: RouteNetlinkMessage, to: IpAddr) -> Option<NextHop> {
    let RouteNetlinkMessage::NewRoute(message) = answer else {
        return None;
    };
    if message.header.kind == RouteType::Local {
        let ifindex = LOCAL;
        return Some(NextHop {
            ifindex,
            address: to,
        });
    }
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let mut hop = NextHop {
        ifindex: 0,
        address: to,
    };
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.ifindex = index,
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => hop.address = gateway.into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => hop.address = gateway.into(),
            _ => {}
        }
    }
    (hop.ifindex != 0).then_some(hop)
}

fn neighbour(answer: RouteNetlinkMessage) -> Option<((u32, IpAddr), Neighbour)> {
    let RouteNetlinkMessage::NewNeighbour(message) = answer else {
        return None;
    };
    let mut address = None;
    let mut mac = None;
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::from(ip))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::from(ip))
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok(),
            _ => {}
        }
    }
    use NeighbourState::{Failed, Incomplete, Noarp, Permanent, Reachable};
    let state = message.header.state;
    let known = !matches!(state, Failed | Incomplete | NeighbourState::None);
    let neighbour = Neighbour {
        mac: mac.filter(|_| known),
        failed: state == Failed,
        fresh: matches!(state, Reachable | Permanent | Noarp),
    };
    Some(((message.header.ifindex, address?), neighbour))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_known_and_its_addresses_are_this_hosts() -> io::Result<()> {
        let mut network = Network::open()?;
        let links = network.links()?;
        let Some(lo) = links.iter().find(|link| link.name == "lo") else {
            panic!("no loopback in {links:?}");
        };
        assert_eq!(lo.mac, [0; 6]);
        let addresses = network.addresses()?;
        if addresses.contains(&(lo.index, IpAddr::from([127, 0, 0, 1]))) {
            let own = IpAddr::from([127, 0, 0, 1]);
            let hop = network.next_hop(own)?;
            assert_eq!(
                hop.map(|hop| (hop.ifindex, hop.address)),
                Some((LOCAL, own))
            );
        }
        network.neighbours()?;
        Ok(())
    }
}
