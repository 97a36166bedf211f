//! What the kernel half must do with one packet, told a second time: from its rules, in plain Rust, with nothing clever.
//!
//! A witness, so it shares with the product only what the two halves of the product share, too: the values of maps, the
//! names of verdicts, the flow hash. Packets are read from slices, written into vectors, and each
//! checksum is added up in full. Fixture tests, generated packets and fuzzing all compare the kernel half, or its parser, with it.

mod nat;
mod read;
mod send;
mod state;
mod sum;
pub mod write;

use proxy_ebpf::abi::{Listener, mode, option};
use proxy_ebpf::verdict::Verdict;

pub use read::{Part, Read, read};
pub use state::{Entry, Sizes, State};

use state::{listener_of, listener_of_prefix};

/// A packet, and where and when it came in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    pub frame: &'a [u8],
    /// How many bytes of it can be read: the first of the driver's buffers.
    pub first_buffer_bytes: usize,
    pub ifindex: u32,
    /// CLOCK_MONOTONIC_COARSE.
    pub now_ns: u64,
    pub cpu: usize,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    /// The interface that it leaves by, where it is sent.
    pub ifindex: Option<u32>,
    pub bytes: Vec<u8>,
}

/// The kernel half and all that it remembers.
pub struct Model {
    pub state: State,
    /// What the last packet changed, for whoever compares.
    pub touched: Vec<Entry>,
}

/// A packet on its way through the model, VLAN tags off.
struct Passage<'a> {
    /// The frame without its tags.
    bytes: Vec<u8>,
    packet: Read,
    /// Eight bytes as they stood, outermost first; zero where there is none.
    tags: [u8; 8],
    arrival: Arrival<'a>,
}

/// A packet that leaves.
struct Sent {
    verdict: Verdict,
    ifindex: u32,
    /// Without tags.
    bytes: Vec<u8>,
    tags: [u8; 8],
}

impl Model {
    /// A kernel half that remembers nothing yet.
    pub fn new(state: State) -> Self {
        Self {
            state,
            touched: vec![],
        }
    }

    /// The way of one packet. What is not sent on is as it came.
    pub fn judge(&mut self, arrival: Arrival) -> Outcome {
        self.touched.clear();
        match self.decide(arrival) {
            Ok(sent) => Outcome {
                verdict: sent.verdict,
                ifindex: Some(sent.ifindex),
                bytes: write::tagged(&sent.bytes, &sent.tags),
            },
            Err(verdict) => Outcome {
                verdict,
                ifindex: None,
                bytes: arrival.frame.to_vec(),
            },
        }
    }

    fn decide(&mut self, arrival: Arrival) -> Result<Sent, Verdict> {
        let (bytes, tags) = write::untagged(arrival.frame);
        let readable = arrival
            .first_buffer_bytes
            .saturating_sub(arrival.frame.len() - bytes.len());
        let readable = &bytes[..bytes.len().min(readable)];
        let mut packet = read(readable, |port| self.state.is_wanted(port))?;
        if !self.knows_ports(&mut packet, arrival.now_ns) {
            return Err(self.judge_by_address(&packet, arrival.now_ns));
        }
        let listener = self.find_listener(&packet).ok_or(Verdict::NotOurs)?;
        if packet.ip_end > bytes.len() {
            return Err(Verdict::Malformed);
        }
        let passage = Passage {
            bytes,
            packet,
            tags,
            arrival,
        };
        if listener.mode == mode::NAT_RETURN {
            self.follow_fragment_rule(&passage, 0)?;
            return self.give_back(&passage, listener.target);
        }
        self.refuse_banned(&passage.packet, arrival.now_ns)?;
        if listener.mode != mode::SERVE {
            self.follow_fragment_rule(&passage, listener.options)?;
        }
        let outcome = match listener.mode {
            mode::SERVE => Err(Verdict::Serve),
            mode::NAT => self.forward_by_nat(&passage, listener.target),
            mode::DIRECT | mode::IPIP | mode::GUE => self.send_on(&passage, &listener),
            _ => return Err(Verdict::NotOurs),
        };
        if outcome.is_ok() || matches!(outcome, Err(Verdict::Serve)) {
            self.state
                .count_listener(listener.id, passage.packet.ip_end as u64);
            self.touched.push(Entry::ListenerTraffic(listener.id));
        }
        outcome
    }

    /// Later fragments get the ports of the first one; without them, and behind headers that are not read, there are none.
    fn knows_ports(&self, packet: &mut Read, now_ns: u64) -> bool {
        match packet.part {
            Part::Unread => false,
            Part::Later => match self.state.first_fragment(packet, now_ns) {
                Some((source, destination)) => {
                    packet.source_port = source;
                    packet.destination_port = destination;
                    true
                }
                None => false,
            },
            _ => true,
        }
    }

    /// A packet of which only the addresses are known goes to Linux, unless it is refused.
    fn judge_by_address(&mut self, packet: &Read, now_ns: u64) -> Verdict {
        let exact = self.state.listeners.get(&(packet.destination, 0, 0));
        // Port 0 among the ports of prefixes: there are some.
        let of_prefix = || {
            let is_any = self.state.is_prefix_port(0);
            is_any.then(|| listener_of_prefix(&self.state, packet.destination, 0, 0))?
        };
        let Some(address) = exact.copied().or_else(of_prefix) else {
            return Verdict::NotOurs;
        };
        let drops = address.options & option::FRAGMENTS_DROP != 0;
        if let Err(refused) = self.refuse_banned(packet, now_ns) {
            return refused;
        }
        if drops && packet.part == Part::Later {
            return Verdict::FragmentRefused;
        }
        Verdict::Unsupported
    }

    /// The listener of a packet, or the NAT source that it came back to.
    fn find_listener(&self, packet: &Read) -> Option<Listener> {
        let port = packet.destination_port;
        if self.state.is_listener_port(port)
            && let Some(listener) = listener_of(&self.state, packet)
        {
            return Some(listener);
        }
        let at = |protocol| self.state.listeners.get(&(packet.destination, 0, protocol));
        if self.state.is_nat_port(port)
            && let Some(address) = at(0)
            && address.mode == mode::NAT_RETURN
        {
            return Some(*address);
        }
        // Port 0 among the ports: somebody has all ports of an address.
        let open = self.state.is_listener_port(0);
        if let Some(listener) = at(packet.protocol).filter(|_| open) {
            return Some(*listener);
        }
        let of_prefix = listener_of_prefix(&self.state, packet.destination, port, packet.protocol);
        of_prefix.filter(|_| self.state.is_prefix_port(port))
    }

    /// A ban counts for listeners only, and until its end.
    fn refuse_banned(&mut self, packet: &Read, now_ns: u64) -> Result<(), Verdict> {
        let key = packet.sender.ban_key();
        let Some(ban) = self.state.bans.get_mut(&key) else {
            return Ok(());
        };
        if now_ns >= ban.until_ns {
            return Ok(());
        }
        ban.dropped += 1;
        let rule = ban.rule;
        self.state.count_rule_drop(rule);
        self.touched
            .extend([Entry::Ban(key), Entry::RuleDrops(rule)]);
        Err(Verdict::Banned)
    }

    /// Fragments follow their first one, pass or are dropped.
    fn follow_fragment_rule(&mut self, passage: &Passage, options: u32) -> Result<(), Verdict> {
        let packet = &passage.packet;
        if !matches!(packet.part, Part::First | Part::Later) {
            return Ok(());
        }
        if options & option::FRAGMENTS_DROP != 0 {
            return Err(Verdict::FragmentRefused);
        }
        if options & option::FRAGMENTS_PASS != 0 {
            return Err(Verdict::Unsupported);
        }
        if packet.part == Part::First {
            let key = self
                .state
                .remember_first_fragment(packet, passage.arrival.now_ns);
            self.touched.push(Entry::Fragment(key));
        }
        Ok(())
    }
}
