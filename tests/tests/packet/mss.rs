//! The segment size that SYNs announce: lowered by NAT both ways where an endpoint says so, and nothing else changed.

use proxy_ebpf::abi::mode;
use proxy_ebpf::verdict::Verdict;
use rig::packet::{ACK, Frame, SYN, TCP, verify_checksums};

use crate::loaded::{INGRESS, Loaded};
use crate::nat::{
    UPSTREAM4, answer, endpoint, forward, forwarded, forwarding, give_back, path, tcp,
};

/// NAT with one endpoint of each family, whose flows announce 1240 bytes at most.
fn clamping() -> Option<Loaded> {
    let mut loaded = forwarding()?;
    for (v6, upstream, id) in [(false, UPSTREAM4, 1), (true, 2, 11)] {
        loaded.endpoint_entry(id, endpoint(v6, 1), INGRESS, |endpoint| {
            endpoint.mss_bytes = 1240;
        });
        loaded.upstream(upstream, &[(id, endpoint(v6, 1))]);
    }
    Some(loaded)
}

fn with_options(frame: Frame, options: &[u8]) -> Frame {
    frame.with(|frame| frame.tcp_options = options.to_vec())
}

/// Where options stand, how a SYN has them, and how it leaves.
const LOWERED: [(&[u8], &[u8]); 6] = [
    (&[2, 4, 0x05, 0xb4], &[2, 4, 0x04, 0xd8]),
    // Not larger than it may be.
    (&[2, 4, 0x04, 0xd8], &[2, 4, 0x04, 0xd8]),
    (&[2, 4, 0x02, 0x18], &[2, 4, 0x02, 0x18]),
    // Behind others, at an odd place.
    (
        &[1, 2, 4, 0x23, 0x28, 3, 3, 7],
        &[1, 2, 4, 0x04, 0xd8, 3, 3, 7],
    ),
    (
        &[
            4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 7, 2, 4, 0xff, 0xff, 0,
        ],
        &[
            4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 3, 3, 7, 2, 4, 0x04, 0xd8, 0,
        ],
    ),
    // Only the first one counts.
    (
        &[2, 4, 0x05, 0xb4, 2, 4, 0x05, 0xb4],
        &[2, 4, 0x04, 0xd8, 2, 4, 0x05, 0xb4],
    ),
];

#[test]
fn a_syn_and_its_answer_announce_no_more_than_fits_wherever_the_option_stands() {
    let Some(mut loaded) = clamping() else { return };
    for v6 in [false, true] {
        for (number, (options, lowered)) in (0..).zip(LOWERED) {
            let client_port = 40_000 + number;
            let syn = tcp(v6, client_port, SYN);
            let sent = loaded.send(&with_options(syn.clone(), options).bytes());
            assert_eq!(sent.verdict, Verdict::Forward);
            let (port, to) = path(&sent.bytes);
            let wanted = forwarded(&with_options(syn, lowered), v6, port, to);
            assert_eq!(sent.bytes, wanted, "{options:?}");
            assert_eq!(verify_checksums(&sent.bytes), Ok(()));

            let reply = answer(v6, port, to, SYN | ACK);
            let sent = loaded.send(&with_options(reply.clone(), options).bytes());
            assert_eq!(sent.verdict, Verdict::Return);
            assert_eq!(verify_checksums(&sent.bytes), Ok(()));
            let at = if v6 { 74 } else { 54 };
            assert_eq!(&sent.bytes[at..at + lowered.len()], lowered, "{options:?}");
        }
    }
}

#[test]
fn options_that_make_no_sense_stay_as_they_are_and_so_does_what_is_no_syn() {
    let Some(mut loaded) = clamping() else { return };
    let (port, to) = forward(&mut loaded, &tcp(false, 39_000, SYN));
    let large = [2, 4, 0x05, 0xb4];
    forward(&mut loaded, &with_options(tcp(false, 39_000, ACK), &large));
    give_back(
        &mut loaded,
        &with_options(answer(false, port, to, ACK), &large),
        39_000,
    );
    let strange: [&[u8]; 7] = [
        // Ended before; a length of nothing; another length; cut off.
        &[0, 2, 4, 0x05, 0xb4, 0, 0, 0],
        &[8, 0, 2, 4, 0x05, 0xb4, 0, 0],
        &[2, 6, 0x05, 0xb4, 0, 0, 0, 0],
        &[2, 3, 0x05, 1],
        &[1, 1, 2, 4],
        &[200, 255, 2, 4, 0x05, 0xb4, 0, 0],
        // Behind more options than are looked at.
        &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 0x05, 0xb4, 0, 0],
    ];
    for (number, options) in (0..).zip(strange) {
        forward(
            &mut loaded,
            &with_options(tcp(false, 41_000 + number, SYN), options),
        );
    }
}

#[test]
fn a_flow_of_a_clamped_syn_is_opened_and_counted_once() {
    let Some(mut loaded) = clamping() else { return };
    let syn = with_options(tcp(false, 40_000, SYN), &[2, 4, 0x05, 0xb4]);
    loaded.send(&syn.bytes());
    assert_eq!(loaded.flow_count(), 1);
    assert_eq!(loaded.signs(1).opened, 1);
    // Ways that are not NAT leave it as it is: the answer that matters does not pass here.
    let at = ([192, 0, 2, 77].into(), 80);
    loaded.listener(at, TCP, mode::DIRECT, UPSTREAM4);
    let frame = Frame::tcp((crate::nat::client(false), 1), at, SYN);
    let frame = with_options(frame, &[2, 4, 0x05, 0xb4]).bytes();
    let sent = loaded.send(&frame);
    assert_eq!(sent.verdict, Verdict::Forward);
    assert_eq!(sent.bytes[14..], frame[14..]);
}
