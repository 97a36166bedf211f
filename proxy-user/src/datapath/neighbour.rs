//! Which MAC leads to an endpoint: the kernel resolves it, we keep asking and note what it found.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use proxy_ebpf::abi::LOCAL;

use super::network::{Link, Neighbour, Network, NextHop};

/// How long a route is believed.
const ROUTE_AGE: Duration = Duration::from_secs(10);

/// How often the kernel is asked to confirm a neighbour that it has no proof of. Packets that XDP sends prove nothing
/// to it, so it would forget one that nobody else talks to.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// Routes that are looked up anew, and neighbours that are asked for, in one look: more wait for the next one, for there
/// may be thousands.
const PER_LOOK: usize = 1024;

/// The discard port (RFC 863): what is sent there only makes the kernel resolve the neighbour.
const DISCARD: u16 = 9;

/// How an endpoint is reached. All zero: not yet known, or no longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub source_mac: [u8; 6],
    /// The longest IP packet that the link takes.
    pub mtu_bytes: u16,
    /// The same where another link of this host takes longer ones; 0 where none does.
    pub plain_mtu_bytes: u16,
    /// The longest that all links take, where another takes no packets as long as this one; 0 where all do.
    pub back_mtu_bytes: u16,
}

/// What is known of the way to each endpoint.
#[derive(Default)]
pub struct Neighbours {
    known: HashMap<IpAddr, Known>,
    /// Those that are not reached through a gateway.
    near: BTreeSet<IpAddr>,
}

#[derive(Default)]
struct Known {
    hop: Option<NextHop>,
    looked: Option<Instant>,
    asked: Option<Instant>,
    /// There is no route, or nobody answers there.
    failed: bool,
    reach: Reach,
}

impl Neighbours {
    /// Believes what a daemon before us found out, until the kernel says otherwise.
    pub fn believe(&mut self, address: IpAddr, reach: Reach) {
        self.known.entry(address).or_default().reach = reach;
    }

    /// From now on these are reached on a link of ours, or not at all.
    pub fn keep_near(&mut self, addresses: BTreeSet<IpAddr>) {
        self.near = addresses;
    }

    /// The same for one more.
    pub fn keep_near_too(&mut self, address: IpAddr) {
        self.near.insert(address);
    }

    /// Forgets all but these.
    pub fn retain(&mut self, is_used: impl Fn(IpAddr) -> bool) {
        self.known.retain(|address, _| is_used(*address));
    }

    /// The gateway that an address is behind, as far as is known.
    pub fn gateway(&self, address: IpAddr) -> Option<IpAddr> {
        let hop = self.known.get(&address)?.hop?;
        (hop.address != address).then_some(hop.address)
    }

    /// Routes are looked up anew: interfaces have changed.
    pub fn forget_routes(&mut self) {
        for known in self.known.values_mut() {
            known.looked = None;
        }
    }

    /// Whether an address is one of this host's, as far as is known.
    pub fn is_local(&self, address: IpAddr) -> bool {
        let hop = self.known.get(&address).and_then(|known| known.hop);
        hop.is_some_and(|hop| hop.ifindex == LOCAL)
    }

    /// How an address is reached, as far as is known.
    pub fn reach(&self, address: IpAddr) -> Reach {
        self.known
            .get(&address)
            .map_or_else(Reach::default, |known| known.reach)
    }

    /// Looks at all `endpoints` again.
    ///
    /// # Errors
    /// rtnetlink does not answer; what was known stays.
    pub fn refresh(
        &mut self,
        network: &mut Network,
        endpoints: impl Iterator<Item = IpAddr>,
        now: Instant,
    ) -> io::Result<()> {
        let links: HashMap<u32, Link> = network
            .links()?
            .into_iter()
            .map(|link| (link.index, link))
            .collect();
        let neighbours = network.neighbours()?;
        let (mut looks, mut asked) = (0, HashSet::new());
        for address in endpoints {
            let known = self.known.entry(address).or_default();
            let is_gone = |hop: NextHop| hop.ifindex != LOCAL && !links.contains_key(&hop.ifindex);
            let is_old = |at: Instant| now.duration_since(at) >= ROUTE_AGE && looks < PER_LOOK;
            if known.hop.is_some_and(is_gone) || known.looked.is_none_or(is_old) {
                looks += 1;
                known.hop = network.next_hop(address)?;
                known.looked = Some(now);
            }
            let neighbour = known
                .hop
                .and_then(|hop| neighbours.get(&(hop.ifindex, hop.address)).copied());
            let is_far = known.hop.is_some_and(|hop| hop.address != address);
            let reach = if is_far && self.near.contains(&address) {
                Reach::default()
            } else {
                reach(known.hop, neighbour, &links, known.reach)
            };
            let proven = neighbour.is_some_and(|neighbour| neighbour.fresh);
            let is_local = known.hop.is_some_and(|hop| hop.ifindex == LOCAL);
            let is_due = known
                .asked
                .is_none_or(|at| now.duration_since(at) >= ASK_EVERY);
            if let Some(hop) = known.hop
                && !is_local
                && !proven
                && is_due
                && asked.len() < PER_LOOK
            {
                known.asked = Some(now);
                // Of all behind a gateway one is enough.
                if asked.insert((hop.ifindex, hop.address)) {
                    ask(address);
                }
            }
            known.reach = reach;
            // Once failed it stays so while it is merely asked again.
            let failed = known.failed || neighbour.is_some_and(|neighbour| neighbour.failed);
            let dark = known
                .hop
                .and_then(|hop| links.get(&hop.ifindex))
                .is_none_or(|link| !link.up);
            let dark = dark && !is_local;
            known.failed = dark || (failed && reach == Reach::default());
        }
        Ok(())
    }

    /// Looks at those of `endpoints` that are not reached; whether each is by now, or is known not to be. One that is there
    /// answers in a millisecond or two.
    ///
    /// # Errors
    /// As `refresh`.
    pub fn seek(
        &mut self,
        network: &mut Network,
        endpoints: impl Iterator<Item = IpAddr>,
    ) -> io::Result<bool> {
        let is_reached = |known: &Known| known.reach != Reach::default() && known.looked.is_some();
        let missed: BTreeSet<IpAddr> = endpoints
            .filter(|address| !self.known.get(address).is_some_and(is_reached))
            .collect();
        if missed.is_empty() {
            return Ok(true);
        }
        self.refresh(network, missed.iter().copied(), Instant::now())?;
        let is_open = |address: &IpAddr| {
            // One that should be near, and is behind a gateway, will not be nearer for waiting.
            let is_refused = self.near.contains(address) && self.gateway(*address).is_some();
            let known = self.known.get(address);
            let is_open = |known: &Known| !known.failed && known.reach == Reach::default();
            !is_refused && known.is_some_and(is_open)
        };
        Ok(!missed.iter().any(is_open))
    }
}

/// What is believed now. A neighbour that the kernel merely forgot is believed to be where it was.
fn reach(
    hop: Option<NextHop>,
    neighbour: Option<Neighbour>,
    links: &HashMap<u32, Link>,
    before: Reach,
) -> Reach {
    if hop.is_some_and(|hop| hop.ifindex == LOCAL) {
        return Reach {
            ifindex: LOCAL,
            ..Reach::default()
        };
    }
    let Some((hop, link)) = hop.and_then(|hop| Some((hop, links.get(&hop.ifindex)?))) else {
        return Reach::default();
    };
    if !link.up {
        return Reach::default();
    }
    // Those that packets may come in or leave by: the loopback, which has no Ethernet address, is none.
    let carriers = || links.values().filter(|link| link.up && link.mac != [0; 6]);
    let there = |mac| Reach {
        ifindex: hop.ifindex,
        mac,
        source_mac: link.mac,
        mtu_bytes: mtu_bytes(link),
        plain_mtu_bytes: if carriers().any(|other| other.mtu > link.mtu) {
            mtu_bytes(link)
        } else {
            0
        },
        back_mtu_bytes: carriers()
            .filter(|other| other.mtu < link.mtu)
            .map(mtu_bytes)
            .min()
            .unwrap_or(0),
    };
    match neighbour {
        Some(Neighbour { mac: Some(mac), .. }) => there(mac),
        Some(Neighbour { failed: true, .. }) => Reach::default(),
        _ if before.ifindex == hop.ifindex => there(before.mac),
        _ => Reach::default(),
    }
}

fn mtu_bytes(link: &Link) -> u16 {
    u16::try_from(link.mtu).unwrap_or(u16::MAX)
}

/// Makes the kernel resolve the way to an address. Nobody needs to answer, so failing is no failure.
fn ask(address: IpAddr) {
    let any: SocketAddr = if address.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    if let Ok(socket) = UdpSocket::bind(any) {
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(&[], (address, DISCARD));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOP: NextHop = NextHop {
        ifindex: 3,
        address: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
    };
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn links() -> HashMap<u32, Link> {
        let link = Link {
            index: 3,
            name: "eth0".to_owned(),
            mac: OURS,
            mtu: 1500,
            up: true,
            xdp: None,
        };
        HashMap::from([(3, link)])
    }

    fn known(mac: Option<[u8; 6]>, failed: bool) -> Option<Neighbour> {
        Some(Neighbour {
            mac,
            failed,
            fresh: false,
        })
    }

    #[test]
    fn a_neighbour_is_believed_until_it_fails_or_its_route_moves() {
        let there = Reach {
            ifindex: 3,
            mac: MAC,
            source_mac: OURS,
            mtu_bytes: 1500,
            plain_mtu_bytes: 0,
            back_mtu_bytes: 0,
        };
        let none = Reach::default();
        assert_eq!(
            reach(Some(HOP), known(Some(MAC), false), &links(), none),
            there
        );
        assert_eq!(reach(Some(HOP), None, &links(), there), there);
        assert_eq!(reach(Some(HOP), known(None, false), &links(), there), there);
        assert_eq!(reach(Some(HOP), known(None, true), &links(), there), none);
        assert_eq!(reach(None, None, &links(), there), none);
        let here = NextHop {
            ifindex: LOCAL,
            ..HOP
        };
        let local = Reach {
            ifindex: LOCAL,
            ..none
        };
        assert_eq!(reach(Some(here), None, &links(), there), local);
        let mut down = links();
        down.values_mut().for_each(|link| link.up = false);
        assert_eq!(
            reach(Some(HOP), known(Some(MAC), false), &down, there),
            none
        );
        // The loopback takes longer packets and brings none; another link does.
        let mut jumbo = links();
        let mut other = jumbo[&3].clone();
        (other.index, other.mtu, other.mac) = (1, 65_536, [0; 6]);
        jumbo.insert(1, other.clone());
        assert_eq!(reach(Some(HOP), None, &jumbo, there), there);
        (other.index, other.mtu, other.mac) = (4, 9000, OURS);
        jumbo.insert(4, other);
        let shorter = Reach {
            plain_mtu_bytes: 1500,
            ..there
        };
        assert_eq!(reach(Some(HOP), None, &jumbo, there), shorter);
        for link in jumbo.values_mut().filter(|link| link.index == 4) {
            link.mtu = 1400;
        }
        let longer = Reach {
            back_mtu_bytes: 1400,
            ..there
        };
        assert_eq!(reach(Some(HOP), None, &jumbo, there), longer);
        let moved = NextHop { ifindex: 4, ..HOP };
        assert_eq!(reach(Some(moved), None, &links(), there), none);
    }
}
