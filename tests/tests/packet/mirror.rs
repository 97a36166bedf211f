//! Each packet a second time through the model, and what the maps hold afterwards compared with what it remembers.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::Ordering::Relaxed;

use proxy_ebpf::abi::{
    Address, Ban, FlowKey, FragmentKey, FragmentPorts, Inserts, Listener, ListenerKey4,
    ListenerKey6, Nat, NatFlow, RingPage, StampPage, name, stamp,
};
use proxy_ebpf::verdict::Disposition;
use rig::model::{Arrival, Entry, Sizes, State};

use super::loaded::{Action, INGRESS, Loaded, Outcome};
use super::pool;

/// What BPF_PROG_TEST_RUN puts into the first buffer: a page without headroom and without what the kernel keeps at its end.
const FIRST_BUFFER_BYTES: usize = 4096 - 256 - 320;

/// How late a flow's last packet may be noted.
const SEEN_LATE_NS: u64 = 3_000_000_000;

/// A model's tables of these sizes, empty as the maps are.
pub fn state(sizes: &pool::Sizes) -> State {
    let of = |map| sizes.of(map) as usize;
    State::new(Sizes {
        upstreams: of(name::UPSTREAMS),
        ring_pages: of(name::RINGS),
        endpoints: of(name::ENDPOINTS),
        flows: of(name::FLOWS),
        nat_flows: of(name::NAT_FLOWS),
        rules: of(name::RULE_DROPS),
        listeners: of(name::LISTENER_TRAFFIC),
    })
}

impl Loaded {
    /// Tells the model what a test has written into maps.
    pub fn refresh(&mut self) {
        if self.unseen.swap(false, Relaxed) {
            self.stale.extend([name::FLOWS, name::NAT_FLOWS, name::NAT]);
            self.stale
                .extend([name::MOVED, name::FRAGMENTS, name::BANS]);
            self.stale.extend([name::STAMPS, name::INSERTS]);
        }
        for map in std::mem::take(&mut self.stale) {
            self.read_map(map);
        }
    }

    fn read_map(&mut self, map: &'static str) {
        let size = self.sizes.of(map);
        match map {
            name::PORTS => *self.model.state.ports = self.at(map, 0),
            name::LISTENERS4 | name::LISTENERS6 => {
                self.model.state.listeners = self.read_listeners()
            }
            name::PREFIXES => self.model.state.prefixes = self.read_prefixes(),
            name::UPSTREAMS => {
                self.model.state.upstreams = (0..size).map(|id| self.at(map, id)).collect()
            }
            name::RINGS => {
                let page = |index| self.at::<RingPage>(map, index).slots.to_vec();
                self.model.state.rings = (0..size).map(page).collect();
            }
            name::STAMPS => {
                let page = |index| self.at::<StampPage>(map, index).stamps.to_vec();
                self.model.state.stamps = (0..size).map(page).collect();
            }
            name::ENDPOINTS => {
                self.model.state.endpoints = (0..size).map(|id| self.at(map, id)).collect()
            }
            name::HASH_KEYS => self.model.state.hash_keys = self.at(map, 0),
            name::TUNNEL => self.model.state.tunnel = self.at(map, 0),
            name::MOVED => self.model.state.moved = self.entries(map).into_iter().collect(),
            name::INSERTS => {
                let inserts = self.per_cpu::<Inserts>(map, 0);
                self.model.state.inserts = inserts.into_iter().enumerate().collect();
            }
            name::FRAGMENTS => self.model.state.fragments = self.entries(map).into_iter().collect(),
            name::NAT => self.model.state.nat = self.at(map, 0),
            name::FLOWS => self.model.state.flows = self.entries(map).into_iter().collect(),
            name::NAT_FLOWS => {
                self.model.state.nat_flows = (0..size).map(|index| self.nat_flow(index)).collect();
            }
            name::BANS => self.model.state.bans = self.entries(map).into_iter().collect(),
            // Of these the model knows nothing: the filter only saves look-ups.
            name::GUARD | name::STEER => {}
            _ => panic!("the model cannot read {map}"),
        }
    }

    fn read_listeners(&self) -> HashMap<(Address, u16, u8), Listener> {
        let v4 = self.entries::<ListenerKey4, Listener>(name::LISTENERS4);
        let v4 = v4.into_iter().map(|(key, listener)| {
            let port = u16::from_be_bytes(key.port);
            ((Address::v4(key.address), port, key.protocol), listener)
        });
        let v6 = self.entries::<ListenerKey6, Listener>(name::LISTENERS6);
        let v6 = v6.into_iter().map(|(key, listener)| {
            let port = u16::from_be_bytes(key.port);
            ((Address(key.address), port, key.protocol), listener)
        });
        v4.chain(v6).collect()
    }

    /// Compares what became of a packet, and what is remembered after it.
    #[track_caller]
    pub fn compare(&mut self, frame: &[u8], kernel: &Outcome, cpu: usize, span_ns: (u64, u64)) {
        let outcome = self.model.judge(Arrival {
            frame,
            first_buffer_bytes: FIRST_BUFFER_BYTES,
            ifindex: INGRESS,
            now_ns: span_ns.1,
            cpu,
        });
        let action = match (outcome.verdict.disposition(), outcome.ifindex) {
            (Disposition::Drop, _) => Action::Drop,
            (Disposition::Pass, _) => Action::Pass,
            (Disposition::Send, Some(INGRESS)) => Action::Tx,
            (Disposition::Send, _) => Action::Redirect,
        };
        let model = Outcome {
            verdict: outcome.verdict,
            action,
            bytes: outcome.bytes,
        };
        assert!(
            *kernel == model,
            "of the frame {}\nthe kernel half made {} {:?}\n{}\nthe model      {} {:?}\n{}",
            hex(frame),
            kernel.verdict.name(),
            kernel.action,
            hex(&kernel.bytes),
            model.verdict.name(),
            model.action,
            hex(&model.bytes)
        );
        for entry in self.model.touched.clone() {
            let difference = self.compare_entry(entry, span_ns);
            assert!(
                difference.is_none(),
                "after the frame {} {entry:?} differs: {}",
                hex(frame),
                difference.unwrap_or_default()
            );
        }
    }

    /// Compares one entry, takes over when it was written, and says what differs.
    fn compare_entry(&mut self, entry: Entry, (from_ns, to_ns): (u64, u64)) -> Option<String> {
        let stamps = [stamp(from_ns), stamp(to_ns)];
        match entry {
            Entry::Ban(key) => differ(
                self.find::<_, Ban>(name::BANS, key),
                self.model.state.bans.get(&key).copied(),
            ),
            Entry::RuleDrops(rule) if rule >= self.sizes.of(name::RULE_DROPS) => None,
            Entry::RuleDrops(rule) => differ(
                self.rule_drops(rule),
                self.model.state.rule_drops[rule as usize],
            ),
            Entry::Fragment(key) => {
                let kernel: Option<FragmentPorts> = self.find(name::FRAGMENTS, key);
                let model = self.model.state.fragments.get_mut(&key);
                if let (Some(kernel), Some(model)) = (&kernel, model)
                    && stamps.contains(&kernel.seen)
                {
                    model.seen = kernel.seen;
                }
                differ(kernel, self.model.state.fragments.get(&key).copied())
            }
            Entry::Moved(key) => differ(
                self.find::<_, u64>(name::MOVED, key),
                self.model.state.moved.get(&key).copied(),
            ),
            Entry::Inserts(cpu) => {
                let kernel = self.per_cpu::<Inserts>(name::INSERTS, 0)[cpu];
                if stamps[0] != stamps[1] {
                    self.model.state.inserts.insert(cpu, kernel);
                }
                differ(Some(kernel), self.model.state.inserts.get(&cpu).copied())
            }
            Entry::Stamp(page, slot) => {
                let kernel = self.at::<StampPage>(name::STAMPS, page).stamps[slot];
                let model = &mut self.model.state.stamps[page as usize][slot];
                if stamps.contains(&kernel) {
                    *model = kernel;
                }
                differ(kernel, *model)
            }
            Entry::Flow(key) => differ(
                self.find::<_, u64>(name::FLOWS, key),
                self.model.state.flows.get(&key).copied(),
            ),
            Entry::NatFlow(index) => {
                let kernel = self.nat_flow(index);
                let model = &mut self.model.state.nat_flows[index as usize];
                if (kernel.seen_ns == 0) == (model.seen_ns == 0)
                    && kernel.seen_ns <= to_ns
                    && kernel.seen_ns + SEEN_LATE_NS >= model.seen_ns.min(from_ns)
                {
                    model.seen_ns = kernel.seen_ns;
                    model.seen_jiffies = kernel.seen_jiffies;
                }
                differ(kernel, *model)
            }
            Entry::NatCursor(area) => {
                let kernel = self.at::<Nat>(name::NAT, 0).cursors[area];
                differ(kernel, self.model.state.nat.cursors[area])
            }
            Entry::ListenerTraffic(id) => {
                let model = self.model.state.listener_traffic.get(id as usize)?;
                differ(self.traffic(name::LISTENER_TRAFFIC, id), *model)
            }
            Entry::EndpointTraffic(id) => {
                let model = self.model.state.endpoint_traffic.get(id as usize)?;
                differ(self.traffic(name::ENDPOINT_TRAFFIC, id), *model)
            }
            Entry::EndpointSigns(id) => {
                let model = self.model.state.endpoint_signs.get(id as usize)?;
                differ(self.signs(id), *model)
            }
        }
    }

    /// Compares whole tables: a packet may have changed what the model does not know of.
    pub fn compare_all(&self) {
        if self.unseen.load(Relaxed) {
            return;
        }
        let state = &self.model.state;
        self.compare_hash::<FlowKey, u64>(name::FLOWS, &state.flows);
        self.compare_hash::<FlowKey, u64>(name::MOVED, &state.moved);
        self.compare_hash::<FragmentKey, FragmentPorts>(name::FRAGMENTS, &state.fragments);
        self.compare_hash::<Address, Ban>(name::BANS, &state.bans);
        self.compare_array::<NatFlow>(name::NAT_FLOWS, &state.nat_flows);
        self.compare_array::<Nat>(name::NAT, &[state.nat]);
        if !self.stale.contains(name::STAMPS) {
            for (page, stamps) in (0..).zip(&state.stamps) {
                let kernel = self.at::<StampPage>(name::STAMPS, page).stamps;
                assert!(kernel[..] == stamps[..], "stamps of page {page} differ");
            }
        }
        for (id, traffic) in (0..).zip(&state.listener_traffic) {
            assert_eq!(
                self.traffic(name::LISTENER_TRAFFIC, id),
                *traffic,
                "listener {id}"
            );
        }
        for (id, traffic) in (0..).zip(&state.endpoint_traffic) {
            assert_eq!(
                self.traffic(name::ENDPOINT_TRAFFIC, id),
                *traffic,
                "endpoint {id}"
            );
        }
        for (id, signs) in (0..).zip(&state.endpoint_signs) {
            assert_eq!(self.signs(id), *signs, "endpoint {id}");
        }
    }

    fn compare_hash<K, V>(&self, map: &str, model: &HashMap<K, V>)
    where
        K: bytemuck::Pod + Hash + Eq + Debug,
        V: bytemuck::Pod + PartialEq + Debug,
    {
        if self.stale.contains(map) {
            return;
        }
        let kernel: HashMap<K, V> = self.entries(map).into_iter().collect();
        for (key, value) in &kernel {
            assert_eq!(Some(value), model.get(key), "{map}, {key:?}");
        }
        assert_eq!(kernel.len(), model.len(), "{map}");
    }

    fn compare_array<T: bytemuck::Pod + PartialEq + Debug>(&self, map: &str, model: &[T]) {
        if self.stale.contains(map) {
            return;
        }
        for (index, value) in (0..).zip(model) {
            assert_eq!(self.at::<T>(map, index), *value, "{map}, {index}");
        }
    }
}

fn differ<T: PartialEq + Debug>(kernel: T, model: T) -> Option<String> {
    (kernel != model).then(|| format!("{kernel:?} in the kernel, {model:?} in the model"))
}

/// Bytes as a test can take them back.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
