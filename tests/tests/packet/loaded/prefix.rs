//! Listeners of prefixes, put into the loaded maps and read back.

use std::net::IpAddr;

use aya::maps::LpmTrie;
use aya::maps::lpm_trie::Key;
use proxy_ebpf::abi::{Listener, Prefix, PrefixKey, mode, name, option};

use super::{Loaded, Value, address};

impl Loaded {
    /// Adds listeners of a prefix, each with ports from a first to a last, in order and apart, and with a mode and a target;
    /// returns the id of the first.
    pub fn prefix(
        &mut self,
        (at, bits): (IpAddr, u32),
        protocol: u8,
        listeners: &[((u16, u16), u32, u32)],
    ) -> u32 {
        let first_id = self.listeners + 1;
        let mut prefix = Prefix::EMPTY;
        for (range, ((first, last), mode, target)) in prefix.ranges.iter_mut().zip(listeners) {
            self.listeners += 1;
            (range.first, range.last) = (*first, *last);
            range.listener = Listener {
                id: self.listeners,
                mode: *mode,
                target: *target,
                options: self.options,
            };
            for port in *first..=*last {
                self.ports.prefix[usize::from(port / 64)] |= 1 << (port % 64);
            }
            prefix.count += 1;
        }
        self.ports.prefix[0] |= 1;
        self.write_ports();
        self.prefix_entry(PrefixKey::new(address(at), bits, protocol), prefix);
        let mut as_such = Prefix::EMPTY;
        as_such.count = 1;
        as_such.ranges[0].first = 0;
        as_such.ranges[0].listener = Listener {
            id: 0,
            mode: mode::ADDRESS,
            target: 0,
            options: self.options & option::FRAGMENTS_DROP,
        };
        self.prefix_entry(PrefixKey::new(address(at), bits, 0), as_such);
        first_id
    }

    fn prefix_entry(&mut self, key: PrefixKey, prefix: Prefix) {
        self.stale.insert(name::PREFIXES);
        let map = self.map_mut(name::PREFIXES);
        let mut trie: LpmTrie<_, [u8; 20], Value<Prefix>> = LpmTrie::try_from(map).unwrap();
        let bytes: [u8; 24] = bytemuck::cast(key);
        let behind = bytes[4..].try_into().unwrap();
        trie.insert(&Key::new(key.bits, behind), Value(prefix), 0)
            .unwrap();
    }

    /// All listeners of prefixes.
    pub fn read_prefixes(&self) -> Vec<(PrefixKey, Prefix)> {
        let map = self.ebpf().map(name::PREFIXES).expect("a map of that name");
        let trie: LpmTrie<_, [u8; 20], Value<Prefix>> = LpmTrie::try_from(map).expect("a trie");
        let entries = trie.iter().map(|entry| entry.expect("an entry"));
        let key = |key: Key<[u8; 20]>| {
            let bytes = [&key.prefix_len().to_ne_bytes()[..], &key.data()].concat();
            *bytemuck::from_bytes(&bytes)
        };
        entries.map(|(at, value)| (key(at), value.0)).collect()
    }
}
