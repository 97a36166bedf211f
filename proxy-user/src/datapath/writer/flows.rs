//! Walks over the table of NAT flows, which end though flows come and go meanwhile: a walk begins anew where the key that it stands on is deleted.

use aya::maps::MapError;
use proxy_ebpf::abi::FlowKey;

/// How many flows there are, `bound` at most.
pub(super) fn count<K>(keys: impl Iterator<Item = Result<K, MapError>>, bound: u32) -> u64 {
    keys.filter_map(Result::ok).take(bound as usize).count() as u64
}

/// All flows, each with its index, where none of them lives; `None` where one does, or where there are more than `bound`, which
/// only happens while flows are opened.
///
/// # Errors
/// As of the entries.
pub(super) fn dead(
    entries: impl Iterator<Item = Result<(FlowKey, u32), MapError>>,
    lives: impl Fn(&FlowKey, u32) -> bool,
    bound: u32,
) -> Result<Option<Vec<(FlowKey, u32)>>, MapError> {
    let mut dead = Vec::new();
    for entry in entries {
        let (key, index) = entry?;
        if dead.len() >= bound as usize || lives(&key, index) {
            return Ok(None);
        }
        dead.push((key, index));
    }
    Ok(Some(dead))
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use proxy_ebpf::abi::{Nat, NatFlow, flow_state, protocol};

    use super::*;

    fn key(port: u16) -> FlowKey {
        FlowKey {
            client_port: port.to_be_bytes(),
            protocol: protocol::TCP,
            ..FlowKey::zeroed()
        }
    }

    #[test]
    fn a_walk_that_begins_anew_for_ever_ends_at_its_bound() {
        let endless = || std::iter::repeat_with(|| Ok((key(1), 1)));
        assert_eq!(count(endless(), 1000), 1000);
        let found = dead(endless(), |_, _| false, 1000);
        assert!(matches!(found, Ok(None)));
    }

    #[test]
    fn a_key_that_went_under_the_walk_is_not_counted_and_an_error_is_told() {
        let gone = || [Ok((key(1), 1)), Err(MapError::KeyNotFound), Ok((key(2), 2))].into_iter();
        assert_eq!(count(gone(), 10), 2);
        assert!(dead(gone(), |_, _| false, 10).is_err());
    }

    #[test]
    fn flows_are_dead_only_when_none_of_them_lives() {
        let mut nat = Nat::zeroed();
        (nat.tcp_idle_ns, nat.tcp_brief_ns) = (1000, 10);
        let flow = |seen_ns, state| NatFlow {
            key: key(1),
            seen_ns,
            state,
            ..NatFlow::zeroed()
        };
        let entries = || (1..=3).map(|port| Ok((key(port), u32::from(port))));
        let found = |flow: NatFlow| {
            let lives = |_: &FlowKey, index| index == 2 && flow.lives(&nat, 2000);
            dead(entries(), lives, 3)
                .ok()
                .flatten()
                .map(|dead| dead.len())
        };
        assert_eq!(found(flow(1500, flow_state::ANSWERED)), None);
        assert_eq!(found(flow(900, flow_state::ANSWERED)), Some(3));
        // Never answered; of a port that is free.
        assert_eq!(found(flow(1500, 0)), Some(3));
        assert_eq!(found(flow(0, flow_state::ANSWERED)), Some(3));
    }
}
