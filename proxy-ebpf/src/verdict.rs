//! Every way a packet can leave the kernel half, by name; the value is the index of its counter.

/// The named way in which a packet leaves. Exactly one per packet; each has a counter in `abi::name::VERDICTS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// No listener of ours: untouched, to Linux.
    NotOurs = 0,
    /// Handed up to a `serve` listener: untouched, to Linux, which gives it to a worker's socket.
    Serve = 1,
    /// Rewritten for an endpoint and sent.
    Forward = 2,
    /// A reply of an endpoint, rewritten for the client and sent.
    Return = 3,
    /// The source is banned: dropped, because a policy asked for it.
    Banned = 4,
    /// Headers cut short, or lengths that contradict each other: to Linux, which decides.
    Malformed = 5,
    /// A fragment whose first one is not known or not to be followed, or headers that are not read: to Linux.
    Unsupported = 6,
    /// The listener's upstream has no endpoint in its ring: to Linux.
    NoEndpoint = 7,
    /// The endpoint's neighbour is not resolved yet: to Linux.
    NoNeighbour = 8,
    /// No free NAT port, or the flow table is full: to Linux.
    NatExhausted = 9,
    /// A TCP packet that is no SYN and belongs to no flow of ours: to Linux, which answers with RST.
    NoFlow = 10,
    /// The time to live ran out: to Linux, which tells the sender.
    HopLimit = 11,
    /// A fault of our own: a map entry contradicts another, or an endpoint is not of its listener's family. To Linux.
    Inconsistent = 12,
    /// Too long for the way to its endpoint: the sender is told (ICMP), and that answer is sent instead of it.
    TooBig = 13,
    /// A fragment, and its listener's rule refuses them: dropped, because the operator asked for it.
    FragmentRefused = 14,
    /// The endpoint is this host itself: untouched, to Linux, which has the listener's address too.
    Local = 15,
}

/// What the driver is told to do with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// To Linux, as if we were absent.
    Pass,
    /// Refused, because an operator asked for it.
    Drop,
    /// Sent on by us (XDP_TX or redirect).
    Send,
}

impl Verdict {
    /// How many verdicts there are: the length of the counter array.
    pub const COUNT: usize = 16;

    /// All of them, in the order of their counters.
    pub const ALL: [Self; Self::COUNT] = [
        Self::NotOurs,
        Self::Serve,
        Self::Forward,
        Self::Return,
        Self::Banned,
        Self::Malformed,
        Self::Unsupported,
        Self::NoEndpoint,
        Self::NoNeighbour,
        Self::NatExhausted,
        Self::NoFlow,
        Self::HopLimit,
        Self::Inconsistent,
        Self::TooBig,
        Self::FragmentRefused,
        Self::Local,
    ];

    /// The name in metrics, `--json` and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotOurs => "not_ours",
            Self::Serve => "serve",
            Self::Forward => "forward",
            Self::Return => "return",
            Self::Banned => "banned",
            Self::Malformed => "malformed",
            Self::Unsupported => "unsupported",
            Self::NoEndpoint => "no_endpoint",
            Self::NoNeighbour => "no_neighbour",
            Self::NatExhausted => "nat_exhausted",
            Self::NoFlow => "no_flow",
            Self::HopLimit => "hop_limit",
            Self::Inconsistent => "inconsistent",
            Self::TooBig => "too_big",
            Self::FragmentRefused => "fragment_refused",
            Self::Local => "local",
        }
    }

    /// What becomes of a packet with this verdict. Only what an operator asked to refuse is dropped
    /// (law 1: the kernel half never fails closed).
    pub const fn disposition(self) -> Disposition {
        match self {
            Self::Forward | Self::Return | Self::TooBig => Disposition::Send,
            Self::Banned | Self::FragmentRefused => Disposition::Drop,
            _ => Disposition::Pass,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_verdict_stands_at_its_own_index() {
        for (index, verdict) in Verdict::ALL.into_iter().enumerate() {
            assert_eq!(verdict as usize, index, "{}", verdict.name());
        }
    }

    #[test]
    fn only_what_an_operator_refuses_is_dropped() {
        for verdict in Verdict::ALL {
            let drops = verdict.disposition() == Disposition::Drop;
            let refused = matches!(verdict, Verdict::Banned | Verdict::FragmentRefused);
            assert_eq!(drops, refused, "{}", verdict.name());
        }
    }
}
