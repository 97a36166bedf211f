//! Flows of NAT: which port they get, how long they keep it, and who gets it next.

use std::collections::HashSet;
use std::net::IpAddr;

use bytemuck::Zeroable;
use proxy_ebpf::abi::{FlowKey, NatFlow, flow_state, name};
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, FIN, Frame, RST, SYN, TCP, UDP, verify_checksums};

use crate::loaded::{TCP_BRIEF_NS, TCP_IDLE_NS, UDP_IDLE_NS, Value, address, now_ns};
use crate::nat::{
    PORT, PORT_FIRST, PORTS, UPSTREAM4, answer, client, endpoint, forward, forwarding, give_back,
    listener, path, source, tcp, udp,
};

fn flow_key(v6: bool, port: u16, protocol: u8) -> FlowKey {
    FlowKey {
        client: address(client(v6)),
        listener: address(listener(v6)),
        client_port: port.to_be_bytes(),
        listener_port: PORT.to_be_bytes(),
        protocol,
        zero: [0; 3],
    }
}

/// Where in `NAT_FLOWS` a TCP port of the IPv4 source stands.
fn tcp4_index(port: u16) -> u32 {
    u32::from(port - PORT_FIRST)
}

#[test]
fn the_same_flow_keeps_port_and_endpoint_when_the_ring_changes() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let before: Vec<_> = (40_000..40_020)
        .map(|port| forward(&mut loaded, &tcp(false, port, SYN)))
        .collect();
    loaded.upstream(UPSTREAM4, &[(2, endpoint(false, 2))]);
    for (port, before) in (40_000..40_020).zip(before) {
        assert_eq!(forward(&mut loaded, &tcp(false, port, ACK)), before);
        assert_eq!(forward(&mut loaded, &tcp(false, port, SYN)), before);
    }
    let (_, to) = forward(&mut loaded, &tcp(false, 50_000, SYN));
    assert_eq!(to, endpoint(false, 2).0);
}

#[test]
fn a_tcp_packet_without_a_flow_is_passed_unless_it_is_a_syn() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for flags in [ACK, FIN, RST, RST | ACK, SYN | ACK, SYN | RST, SYN | FIN, 0] {
        let frame = tcp(false, 40_000, flags).bytes();
        loaded.passes(&frame, Verdict::NoFlow);
    }
    assert_eq!(loaded.flow_count(), 0);
}

#[test]
fn when_every_port_is_taken_new_flows_are_passed_and_old_ones_live() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let mut ports = HashSet::new();
    for client_port in 40_000..40_000 + PORTS {
        ports.insert(forward(&mut loaded, &tcp(false, client_port, SYN)).0);
    }
    assert_eq!(ports.len(), usize::from(PORTS));
    loaded.passes(&tcp(false, 50_000, SYN).bytes(), Verdict::NatExhausted);
    forward(&mut loaded, &tcp(false, 40_000, ACK));
    // The other protocol and the other family have ports of their own.
    forward(&mut loaded, &udp(false, 50_000));
    forward(&mut loaded, &tcp(true, 50_000, SYN));
}

#[test]
fn when_the_flow_table_is_full_no_port_is_lost() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for index in 0..1024u32 {
        let mut key = FlowKey::zeroed();
        key.client.0[..4].copy_from_slice(&index.to_be_bytes());
        let mut flows = loaded.hash::<FlowKey, u64>(name::FLOWS);
        flows.insert(Value(key), Value(0), 0).unwrap();
    }
    for client_port in 40_000..40_010 {
        let frame = tcp(false, client_port, SYN);
        loaded.passes(&frame.bytes(), Verdict::NatExhausted);
    }
    for index in 0..u32::from(PORTS) {
        assert_eq!(loaded.nat_flow(index).seen_ns, 0);
    }
}

/// Takes every TCP port, then makes the first flow this old and in this state; says whether a new flow may take its port.
fn is_taken_over(state: u8, idle_ns: u64) -> Option<bool> {
    let mut loaded = forwarding()?;
    for client_port in 40_000..40_000 + PORTS {
        forward(&mut loaded, &tcp(false, client_port, SYN));
    }
    let index = loaded.find_flow(flow_key(false, 40_000, TCP)).unwrap();
    let mut flow: NatFlow = loaded.nat_flow(index);
    assert_eq!(flow.key, flow_key(false, 40_000, TCP));
    flow.state = state;
    flow.seen_ns = now_ns().saturating_sub(idle_ns).max(1);
    loaded.set_nat_flow(index, flow);
    let mut taken = false;
    for _ in 0..PORTS {
        let outcome = loaded.send(&tcp(false, 50_000, SYN).bytes());
        if outcome.verdict == Verdict::Forward {
            let (port, _) = path(&outcome.bytes);
            assert_eq!(tcp4_index(port), index);
            assert_eq!(loaded.find_flow(flow_key(false, 40_000, TCP)), None);
            assert_eq!(loaded.find_flow(flow_key(false, 50_000, TCP)), Some(index));
            assert_eq!(loaded.flow_count(), usize::from(PORTS));
            taken = true;
            break;
        }
    }
    Some(taken)
}

#[test]
fn an_open_flow_keeps_its_port_until_it_is_idle_too_long() {
    let second = 1_000_000_000;
    let open = flow_state::ANSWERED;
    let half_closed = open | flow_state::CLIENT_CLOSED;
    for state in [open, half_closed] {
        let Some(early) = is_taken_over(state, TCP_IDLE_NS - second * 5) else {
            return;
        };
        assert!(!early);
        // The clock may be younger than the limit; then nothing can be so old.
        if now_ns() > TCP_IDLE_NS + second {
            assert_eq!(is_taken_over(state, TCP_IDLE_NS), Some(true));
        }
    }
}

#[test]
fn flows_never_answered_or_closed_or_reset_give_their_port_up_early() {
    let second = 1_000_000_000;
    let open = flow_state::ANSWERED;
    for state in [
        0,
        open | flow_state::CLIENT_CLOSED | flow_state::ENDPOINT_CLOSED,
        open | flow_state::CLIENT_RESET,
        open | flow_state::ENDPOINT_RESET,
    ] {
        let Some(early) = is_taken_over(state, TCP_BRIEF_NS - second * 5) else {
            return;
        };
        assert!(!early, "state {state}");
        assert_eq!(
            is_taken_over(state, TCP_BRIEF_NS + second),
            Some(true),
            "state {state}"
        );
    }
}

#[test]
fn the_state_of_a_flow_follows_its_packets() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    let index = tcp4_index(port);
    let answered = flow_state::ANSWERED;
    let mut steps: Vec<(bool, u8, u8)> = vec![
        (false, SYN | ACK, answered),
        (true, ACK, answered),
        (true, RST, answered | flow_state::CLIENT_RESET),
        // The client goes on: the RST was not its own.
        (true, ACK, answered),
        (true, FIN | ACK, answered | flow_state::CLIENT_CLOSED),
        (
            false,
            FIN | ACK,
            answered | flow_state::CLIENT_CLOSED | flow_state::ENDPOINT_CLOSED,
        ),
        (
            true,
            ACK,
            answered | flow_state::CLIENT_CLOSED | flow_state::ENDPOINT_CLOSED,
        ),
    ];
    assert_eq!(loaded.nat_flow(index).state, 0);
    for (step, (from_client, flags, state)) in steps.drain(..).enumerate() {
        if from_client {
            forward(&mut loaded, &tcp(false, 40_000, flags));
        } else {
            give_back(&mut loaded, &answer(false, port, to, flags), 40_000);
        }
        assert_eq!(loaded.nat_flow(index).state, state, "step {step}");
    }
}

#[test]
fn a_client_port_whose_connection_has_ended_opens_a_flow_anew() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    for ends in [
        &[(false, RST)][..],
        &[(true, FIN | ACK), (false, FIN | ACK)],
    ] {
        let (port, to) = forward(&mut loaded, &tcp(false, 40_000, SYN));
        give_back(&mut loaded, &answer(false, port, to, SYN | ACK), 40_000);
        // One that goes on is the same, and so is one that only its client calls ended: anybody can forge that.
        for flags in [ACK, SYN, RST, SYN] {
            assert_eq!(forward(&mut loaded, &tcp(false, 40_000, flags)), (port, to));
        }
        give_back(&mut loaded, &answer(false, port, to, SYN | ACK), 40_000);
        for (from_client, flags) in ends {
            match from_client {
                true => drop(forward(&mut loaded, &tcp(false, 40_000, *flags))),
                false => give_back(&mut loaded, &answer(false, port, to, *flags), 40_000),
            }
        }
        // What comes late belongs to it still.
        assert_eq!(forward(&mut loaded, &tcp(false, 40_000, ACK)), (port, to));
        let last = ends.last().map_or(RST, |(_, flags)| *flags);
        give_back(&mut loaded, &answer(false, port, to, last), 40_000);
        // A new connection goes where the ring leads now, from the same port, and the endpoint of the old one has no say in it.
        let other = if to == endpoint(false, 2).0 { 3 } else { 2 };
        loaded.upstream(UPSTREAM4, &[(other, endpoint(false, other))]);
        let next = endpoint(false, other).0;
        assert_eq!(forward(&mut loaded, &tcp(false, 40_000, SYN)), (port, next));
        let flow = loaded.nat_flow(tcp4_index(port));
        assert_eq!((flow.state, flow.endpoint), (0, u32::from(other)));
        let late = answer(false, port, to, FIN | ACK).bytes();
        loaded.passes(&late, Verdict::NotOurs);
        give_back(&mut loaded, &answer(false, port, next, RST), 40_000);
    }
}

#[test]
fn a_live_flow_is_seen_again_and_keeps_its_port() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let (port, to) = forward(&mut loaded, &udp(false, 40_000));
    let index = loaded.find_flow(flow_key(false, 40_000, UDP)).unwrap();
    for from_client in [true, false] {
        let mut flow = loaded.nat_flow(index);
        flow.seen_ns = now_ns() - UDP_IDLE_NS / 2;
        flow.seen_jiffies = flow.seen_jiffies.wrapping_sub(1_000_000);
        loaded.set_nat_flow(index, flow);
        let before_ns = now_ns();
        if from_client {
            forward(&mut loaded, &udp(false, 40_000));
        } else {
            give_back(
                &mut loaded,
                &Frame::udp((to, 8080), (source(false), port)),
                40_000,
            );
        }
        assert!(loaded.nat_flow(index).seen_ns >= before_ns);
    }
}

#[test]
fn an_entry_that_leads_to_another_flow_is_forgotten() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let (first, _) = forward(&mut loaded, &tcp(false, 40_000, SYN));
    let stale = flow_key(false, 41_000, TCP);
    let mut flows = loaded.hash::<FlowKey, u64>(name::FLOWS);
    flows
        .insert(Value(stale), Value(u64::from(tcp4_index(first))), 0)
        .unwrap();
    loaded.passes(&tcp(false, 41_000, ACK).bytes(), Verdict::NoFlow);
    assert_eq!(loaded.find_flow(stale), None);
    let (second, _) = forward(&mut loaded, &tcp(false, 41_000, SYN));
    assert_ne!(first, second);
}

#[test]
fn flows_leave_from_every_source_and_each_port_is_used_once() {
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let second = IpAddr::from([10, 0, 0, 2]);
    loaded.nat(&[source(false), second, source(true)], PORT_FIRST, PORTS);
    let mut seen = HashSet::new();
    for client_port in 40_000..40_000 + 2 * PORTS {
        let outcome = loaded.send(&tcp(false, client_port, SYN).bytes());
        assert_eq!(outcome.verdict, Verdict::Forward);
        assert_eq!(verify_checksums(&outcome.bytes), Ok(()));
        let from: [u8; 4] = outcome.bytes[26..30].try_into().unwrap();
        let (port, to) = path(&outcome.bytes);
        assert!(seen.insert((from, port)), "{from:?}:{port} twice");
        let reply = Frame::tcp((to, 8080), (IpAddr::from(from), port), SYN | ACK);
        assert_eq!(loaded.send(&reply.bytes()).verdict, Verdict::Return);
    }
    assert_eq!(
        seen.iter()
            .map(|(from, _)| from)
            .collect::<HashSet<_>>()
            .len(),
        2
    );
}

#[test]
fn cpus_that_open_flows_at_once_never_share_a_port() {
    const FLOWS: u16 = 400;
    let Some(mut loaded) = forwarding() else {
        return;
    };
    loaded.nat(&[source(false)], PORT_FIRST, 2 * FLOWS);
    let loaded = &loaded;
    let ports: Vec<u16> = std::thread::scope(|scope| {
        let open = |first: u16| {
            scope.spawn(move || {
                let frames = (first..first + FLOWS).map(|port| tcp(false, port, SYN).bytes());
                frames
                    .map(|frame| path(&loaded.run(&frame).1).0)
                    .collect::<Vec<_>>()
            })
        };
        let threads = [open(30_000), open(40_000)];
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let distinct: HashSet<u16> = ports.iter().copied().collect();
    assert_eq!(distinct.len(), usize::from(2 * FLOWS));
    assert!(distinct.iter().all(|port| *port >= PORT_FIRST));
}

#[test]
fn the_cursor_moves_on_by_one_for_each_port_that_is_tried() {
    // A fetch-add that returned its operand instead of the old value would try one and the same port for ever.
    let Some(mut loaded) = forwarding() else {
        return;
    };
    let ports: Vec<u16> = (40_000..40_010)
        .map(|port| forward(&mut loaded, &tcp(false, port, SYN)).0)
        .collect();
    let wanted: Vec<u16> = (PORT_FIRST..PORT_FIRST + 10).collect();
    assert_eq!(ports, wanted);
}
