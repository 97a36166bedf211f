//! Prefixes: each entry tells all that holds for its addresses, what shorter ones say of them included.

use std::collections::BTreeMap;

use proxy_ebpf::abi::{self, PortRange, Prefix, PrefixKey, mode, option};

use super::{Planner, State, Wanted, WantedPrefix, Write, entry};
use crate::config::{ListenAddress, shares};
use crate::datapath::{Full, address};

impl Planner {
    /// The entries that prefixes shall have. By protocol 0 what has no ports is judged by its address, and dropped only where all
    /// that stand there would drop it.
    pub(super) fn prefix_entries(
        &self,
        wanted: &Wanted,
    ) -> Result<BTreeMap<PrefixKey, Prefix>, Full> {
        let mut entries = BTreeMap::new();
        for one in &wanted.prefixes {
            let of = &one.address;
            let holding: Vec<&WantedPrefix> = (wanted.prefixes.iter())
                .filter(|other| other.address.covers(of))
                .collect();
            let drops = holding
                .iter()
                .all(|other| other.options & option::FRAGMENTS_DROP != 0);
            let dropped = if drops { option::FRAGMENTS_DROP } else { 0 };
            let as_such = range((0, u16::MAX), entry(0, mode::ADDRESS, 0, dropped));
            entries.insert(key(of, 0), encode([as_such])?);

            let key = key(of, one.protocol);
            if entries.contains_key(&key) {
                continue;
            }
            let holding: Vec<&WantedPrefix> = (holding.into_iter())
                .filter(|other| other.protocol == one.protocol)
                .collect();
            let addresses: Vec<ListenAddress> = holding.iter().map(|other| other.address).collect();
            let ranges = shares(&addresses).into_iter().map(|share| {
                let owner = holding[share.owner];
                let listener = self.listener(&owner.name, owner.upstream, owner.options, wanted);
                range((share.first, share.last), listener)
            });
            entries.insert(key, encode(ranges)?);
        }
        let capacity = self.state.capacity.prefixes;
        // Old and new ones are in the map together for a moment.
        let gone = self.state.prefixes.keys();
        let gone = gone.filter(|key| !entries.contains_key(key)).count();
        if entries.len() + gone > capacity as usize {
            return Err(Full::new("prefixes", capacity));
        }
        Ok(entries)
    }

    /// Writes those that are new or others than before.
    pub(super) fn add_prefixes(&mut self, before: &State, entries: &BTreeMap<PrefixKey, Prefix>) {
        for (key, entry) in entries {
            if before.prefixes.get(key) != Some(entry) {
                self.writes.push(Write::Prefix(*key, Box::new(*entry)));
            }
        }
    }

    /// Removes those that are not wanted any more.
    pub(super) fn remove_prefixes(
        &mut self,
        before: &State,
        entries: &BTreeMap<PrefixKey, Prefix>,
    ) {
        let gone = before.prefixes.keys();
        let gone = gone.filter(|key| !entries.contains_key(key));
        self.writes.extend(gone.copied().map(Write::RemovePrefix));
    }
}

/// The ports of all prefixes; port 0 among them says that there are any.
pub(super) fn ports(wanted: &Wanted) -> Vec<(u16, u16)> {
    let mut ports: Vec<(u16, u16)> = (wanted.prefixes.iter())
        .map(|prefix| prefix.address.port_range())
        .collect();
    if !ports.is_empty() {
        ports.push((0, 0));
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn key(of: &ListenAddress, protocol: u8) -> PrefixKey {
    PrefixKey::new(address(of.socket.ip()), u32::from(of.prefix_bits), protocol)
}

const fn range((first, last): (u16, u16), listener: abi::Listener) -> PortRange {
    PortRange {
        first,
        last,
        zero: 0,
        listener,
    }
}

/// One entry. That its ranges are too many, the configuration's own check has told before.
fn encode(ranges: impl IntoIterator<Item = PortRange>) -> Result<Prefix, Full> {
    let mut prefix = Prefix::EMPTY;
    for range in ranges {
        let place = prefix.ranges.get_mut(prefix.count as usize);
        *place.ok_or(Full::new("prefix_ranges", Prefix::RANGES as u32))? = range;
        prefix.count += 1;
    }
    Ok(prefix)
}
