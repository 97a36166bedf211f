//! Addresses that stand for more than would each get an entry of the kernel half's: which they are, and who of several has a port.

use std::collections::{BTreeSet, HashSet};

use super::ListenAddress;

/// Addresses and ports that are written one by one: each is an entry of the kernel half's, which finds them fastest.
const ENTRIES_MAX: u128 = 4096;

/// How closely an address names what it stands for: the longest prefix first, then the fewest ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nearness {
    /// It is written, and does not stand for all addresses of this host.
    is_named: bool,
    prefix_bits: u8,
    fewness: u16,
}

impl Nearness {
    /// How closely an address names what it stands for.
    pub fn of(address: &ListenAddress) -> Self {
        let ports = match address.port_last {
            0 => u16::MAX,
            last => last - address.socket.port(),
        };
        Self {
            is_named: !address.socket.ip().is_unspecified(),
            prefix_bits: address.prefix_bits,
            fewness: u16::MAX - ports,
        }
    }

    /// Whether it is as close as another one, whatever the ports.
    pub fn is_as_near(self, other: Self) -> bool {
        (self.is_named, self.prefix_bits) >= (other.is_named, other.prefix_bits)
    }
}

impl ListenAddress {
    /// Its ports as numbers, the first and the last.
    pub fn port_range(&self) -> (u16, u16) {
        match self.port_last {
            0 => (0, u16::MAX),
            last => (self.socket.port(), last),
        }
    }

    /// Whether all addresses of another one are also its.
    pub fn covers(&self, other: &Self) -> bool {
        self.prefix_bits <= other.prefix_bits && self.has_ip(other.socket.ip())
    }

    fn is_wide(&self) -> bool {
        self.entries() > ENTRIES_MAX
    }
}

/// Those that the kernel half has as prefixes: the ones that stand for too much, and of those for all ports that share an
/// address with one of them, because only there is it known who is nearer.
pub fn prefixes<'a>(addresses: impl Iterator<Item = &'a ListenAddress>) -> HashSet<ListenAddress> {
    let (wide, narrow): (Vec<ListenAddress>, Vec<_>) =
        addresses.copied().partition(ListenAddress::is_wide);
    let meets = |address: &ListenAddress| {
        let shares = |other: &ListenAddress| {
            other.protocol == address.protocol && (other.covers(address) || address.covers(other))
        };
        address.port_last == 0 && wide.iter().any(shares)
    };
    let met: Vec<_> = narrow.into_iter().filter(meets).collect();
    wide.into_iter().chain(met).collect()
}

/// Ports that one of several has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub first: u16,
    pub last: u16,
    /// Whose they are, by its index.
    pub owner: usize,
}

/// Who of `addresses`, which all hold the same address, has which ports there: the nearest, and of those that are as near
/// the last. In order, and apart.
pub fn shares(addresses: &[ListenAddress]) -> Vec<Share> {
    let mut edges = BTreeSet::new();
    for (first, last) in addresses.iter().map(ListenAddress::port_range) {
        edges.extend([u32::from(first), u32::from(last) + 1]);
    }
    let edges: Vec<u32> = edges.into_iter().collect();
    let mut shares: Vec<Share> = Vec::new();
    for edge in edges.windows(2) {
        let (Ok(first), Ok(last)) = (u16::try_from(edge[0]), u16::try_from(edge[1] - 1)) else {
            continue;
        };
        let has = |(_, address): &(usize, &ListenAddress)| {
            let (from, to) = address.port_range();
            (from..=to).contains(&first)
        };
        let nearest = addresses
            .iter()
            .enumerate()
            .filter(has)
            .max_by_key(|(_, address)| Nearness::of(address));
        let Some((owner, _)) = nearest else { continue };
        match shares.last_mut() {
            Some(share) if share.owner == owner && share.last + 1 == first => share.last = last,
            _ => shares.push(Share { first, last, owner }),
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::super::address::parse_listen_address;
    use super::*;

    fn parsed(texts: &[&str]) -> Vec<ListenAddress> {
        let parse = |text: &&str| parse_listen_address(text).expect(text);
        texts.iter().map(parse).collect()
    }

    #[test]
    fn only_what_stands_for_too_much_is_a_prefix_and_all_ports_of_what_it_meets() {
        let addresses = parsed(&[
            "203.0.112.0/20:443",
            "203.0.112.0/20:443-444",
            "203.0.113.7:*",
            "203.0.113.7:*/udp",
            "198.51.100.7:*",
            "203.0.113.7:443",
            "[2001:db8::]/64:443",
        ]);
        let found = prefixes(addresses.iter());
        let is_prefix = addresses.iter().map(|address| found.contains(address));
        let expected = [false, true, true, false, false, false, true];
        assert_eq!(is_prefix.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_longest_prefix_has_a_port_and_then_who_has_the_fewest() {
        let addresses = parsed(&[
            "203.0.112.0/20:*",
            "203.0.112.0/20:8000-8099",
            "203.0.113.0/24:8050-9000",
        ]);
        let share = |first, last, owner| Share { first, last, owner };
        assert_eq!(
            shares(&addresses),
            [
                share(0, 7999, 0),
                share(8000, 8049, 1),
                share(8050, 9000, 2),
                share(9001, 65_535, 0)
            ]
        );
        let apart = parsed(&["203.0.112.0/20:443", "203.0.112.0/20:8000-8099"]);
        assert_eq!(shares(&apart), [share(443, 443, 0), share(8000, 8099, 1)]);
        assert_eq!(shares(&[]), []);
    }
}
