//! What fuzzing feeds with bytes, and plain tests feed with the corpus that it left: each panics where two witnesses differ.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use proxy_ebpf::abi::{
    Address, Endpoint, Listener, Slot, Tunnel, Upstream, mode, option, protocol,
};
use proxy_ebpf::packet::{self as product, Family, Frame, Outer, Packet, Rewrite};
use proxy_ebpf::verdict::{Disposition, Verdict};

use crate::dice::Dice;
use crate::model::{self, Arrival, Model, Part, Read, Sizes, State, write as witness};

/// A frame, read by the parser and by the model.
pub fn parse(data: &[u8]) {
    let wanted = |port: u16| port != 22;
    let by_model = model::read(data, wanted);
    let mut frame = data.to_vec();
    let by_product = parsed::<true>(&mut frame, wanted);
    assert_eq!(
        by_product
            .as_ref()
            .map(in_words_of_the_model)
            .map_err(|v| *v),
        by_model
    );
    assert_eq!(frame, data, "reading writes nothing");
    // Without the rare kinds the parser says the same of whole packets, and of the others which they are.
    match (parsed::<false>(&mut frame, wanted), &by_product) {
        (Ok(brief), Ok(full)) if brief.part == product::Part::Whole => assert_eq!(brief, *full),
        (Err(brief), full) => assert_eq!(Err(brief), full.map(|_| ())),
        (Ok(brief), full) => {
            let whole = brief.part == product::Part::Whole;
            assert!(!whole || full.is_ok(), "{brief:?} became {full:?}");
        }
    }
}

fn parsed<const RARE: bool>(
    frame: &mut [u8],
    wanted: impl Fn(u16) -> bool,
) -> Result<Packet, Verdict> {
    Packet::parse::<RARE>(&Frame::new(frame), |port| wanted(u16::from_be_bytes(port)))
}

fn in_words_of_the_model(packet: &Packet) -> Read {
    Read {
        v6: packet.family == Family::V6,
        part: match packet.part {
            product::Part::Whole => Part::Whole,
            product::Part::First => Part::First,
            product::Part::Later => Part::Later,
            product::Part::Error => Part::Error {
                quote: packet.quote_offset,
                quoted: packet.quoted_offset,
            },
            product::Part::Opaque => Part::Unread,
        },
        source: packet.source,
        destination: packet.destination,
        source_port: u16::from_be_bytes(packet.source_port),
        destination_port: u16::from_be_bytes(packet.destination_port),
        protocol: packet.protocol,
        tcp_flags: packet.tcp_flags,
        hop_limit: packet.hop_limit,
        sender: packet.sender,
        fragment_id: packet.fragment_id,
        transport: packet.transport_offset,
        ip_end: packet.frame_bytes_min as usize,
    }
}

/// Eight bytes choose what becomes of the frame behind them: other addresses, an outer header, an answer.
pub fn write(data: &[u8]) {
    let Some((seed, frame)) = data.split_first_chunk::<8>() else {
        return;
    };
    let mut dice = Dice::new(u64::from_le_bytes(*seed));
    let mut bytes = frame.to_vec();
    let Ok(packet) = parsed::<true>(&mut bytes, |_| true) else {
        return;
    };
    let read = in_words_of_the_model(&packet);
    if packet.part == product::Part::Opaque || read.ip_end > frame.len() {
        return;
    }
    if packet.hop_limit > 1 {
        readdress(frame, &packet, &read, &mut dice);
    }
    for v4 in [false, true] {
        for gue in [false, true] {
            encapsulate(frame, &packet, &read, (v4, gue), &mut dice);
        }
    }
    if frame.len() >= 14 + product::QUOTE_BYTES {
        let room = product::too_big_bytes(packet.family);
        let mut answer = vec![0; room];
        answer.extend(&frame[..14 + product::QUOTE_BYTES]);
        let macs = Frame::new(&mut bytes).macs();
        let macs = macs.expect("a frame that was read has them");
        product::too_big(&Frame::new(&mut answer), &packet, macs, 1480).expect("the room is there");
        assert_eq!(answer, witness::too_big(frame, &read, 1480));
    }
}

fn address(v4: bool, dice: &mut Dice) -> Address {
    if v4 {
        return Address::v4_word(dice.word() as u32);
    }
    let mut address = Address([0x20; 16]);
    address.0.copy_from_slice(&dice.bytes(16));
    // No address of the other family.
    address.0[0] |= 0x20;
    address
}

fn readdress(frame: &[u8], packet: &Packet, read: &Read, dice: &mut Dice) {
    let v4 = !read.v6;
    let (source, destination) = (address(v4, dice), address(v4, dice));
    let ports = (dice.word() as u16, dice.word() as u16);
    let change = witness::Change {
        source: (source, ports.0),
        destination: (destination, ports.1),
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
    };
    let to = Rewrite {
        source,
        destination,
        source_port: ports.0.to_be_bytes(),
        destination_port: ports.1.to_be_bytes(),
        source_mac: change.source_mac,
        destination_mac: change.destination_mac,
    };
    let mut bytes = frame.to_vec();
    let done = product::rewrite_rare(&Frame::new(&mut bytes), packet, &to);
    done.expect("what was read can be written");
    assert_eq!(bytes, witness::readdressed(frame, read, &change, 0));
    let mss_bytes = dice.one(&[1, 536, 1240, 1460, u16::MAX]);
    if packet.is_syn() {
        product::clamp_mss(&Frame::new(&mut bytes), packet, mss_bytes);
    }
    let clamped = witness::readdressed(frame, read, &change, mss_bytes);
    assert_eq!(bytes, clamped);
}

fn encapsulate(
    frame: &[u8],
    packet: &Packet,
    read: &Read,
    (v4, gue): (bool, bool),
    dice: &mut Dice,
) {
    let room = product::outer_bytes(v4, gue);
    if read.ip_end - 14 + room > 65_535 {
        return;
    }
    let endpoint = endpoint(address(v4, dice));
    let outer = witness::Outer {
        source: address(v4, dice),
        gue_port: gue.then_some([0x17, 0xc0]),
        entropy: dice.word() as u32,
    };
    let same = Outer {
        source: outer.source,
        destination: endpoint.address,
        gue_port: outer.gue_port,
        entropy: outer.entropy,
        source_mac: endpoint.source_mac,
        destination_mac: endpoint.mac,
    };
    let mut bytes = vec![0; room];
    bytes.extend(frame);
    product::encapsulate(&Frame::new(&mut bytes), packet, &same).expect("the room is there");
    assert_eq!(bytes, witness::encapsulated(frame, read, &endpoint, &outer));
}

fn endpoint(address: Address) -> Endpoint {
    let mut endpoint: Endpoint = bytemuck::Zeroable::zeroed();
    endpoint.address = address;
    endpoint.port = 8080u16.to_be_bytes();
    endpoint.mac = [2, 0, 0, 0, 1, 1];
    endpoint.source_mac = [2, 0, 0, 0, 1, 2];
    endpoint.ifindex = 2;
    endpoint
}

/// Eight bytes choose a state; frames follow, a byte with their length in units of four before each.
pub fn judge(data: &[u8]) {
    let Some((seed, _)) = data.split_first_chunk::<8>() else {
        return;
    };
    let mut dice = Dice::new(u64::from_le_bytes(*seed));
    let mut model = Model::new(state(&mut dice));
    let mut now_ns = 1 << 40;
    for frame in frames(data) {
        now_ns += 1 << 28;
        let outcome = model.judge(Arrival {
            frame,
            first_buffer_bytes: 3520,
            ifindex: 1,
            now_ns,
            cpu: 0,
        });
        let is_sent = outcome.verdict.disposition() == Disposition::Send;
        assert_eq!(outcome.ifindex.is_some(), is_sent);
        if !is_sent {
            assert_eq!(outcome.bytes, frame);
        }
    }
}

/// The frames in an input of `judge`.
pub fn frames(data: &[u8]) -> Vec<&[u8]> {
    let mut rest = data.get(8..).unwrap_or_default();
    let mut frames = vec![];
    while let Some((length, behind)) = rest.split_first() {
        let (frame, next) = behind.split_at((usize::from(*length) * 4).min(behind.len()));
        frames.push(frame);
        rest = next;
    }
    frames
}

/// The inputs of a target that fuzzing left, by name.
///
/// # Errors
///
/// As of reading a folder of the source.
pub fn corpus(target: &str) -> std::io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut inputs = vec![];
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let input = std::fs::read(&path)?;
        inputs.push((path, input));
    }
    inputs.sort();
    Ok(inputs)
}

/// Listeners of every mode on two addresses, and NAT with few ports.
fn state(dice: &mut Dice) -> State {
    let mut state = State::new(Sizes {
        upstreams: 4,
        ring_pages: 2,
        endpoints: 4,
        flows: 16,
        nat_flows: 32,
        rules: 2,
        listeners: 8,
    });
    *state.ports = bytemuck::Zeroable::zeroed();
    state.ports.listener[1] = u64::MAX;
    state.ports.nat[312] = u64::MAX;
    let v6 = |last: u8| {
        let mut address = Address([0; 16]);
        (address.0[0], address.0[1], address.0[15]) = (0x20, 0x01, last);
        address
    };
    let ends = [(Address::v4([10, 0, 0, 1]), 1), (v6(1), 2)];
    for (at, upstream) in ends {
        for (port, mode) in
            (64..).zip([mode::NAT, mode::DIRECT, mode::IPIP, mode::GUE, mode::SERVE])
        {
            let options = dice.one(&[
                0,
                option::FRAGMENTS_DROP,
                option::FRAGMENTS_PASS,
                option::UDP_MOVE,
            ]);
            for number in [protocol::TCP, protocol::UDP] {
                let listener = Listener {
                    id: mode,
                    mode,
                    target: upstream,
                    options,
                };
                state.listeners.insert((at, port, number), listener);
            }
        }
        let as_such = Listener {
            id: 0,
            mode: mode::ADDRESS,
            target: 0,
            options: 0,
        };
        state.listeners.insert((at, 0, 0), as_such);
    }
    for (index, source) in [Address::v4([10, 0, 0, 2]), v6(2)].into_iter().enumerate() {
        let back = Listener {
            id: 0,
            mode: mode::NAT_RETURN,
            target: index as u32,
            options: 0,
        };
        state.listeners.insert((source, 0, 0), back);
        state.nat.sources[index] = source;
    }
    (state.nat.sources_count, state.nat.sources_v4) = (2, 1);
    (state.nat.port_first, state.nat.ports) = (312 * 64, 4);
    state.endpoints[1] = endpoint(Address::v4([10, 0, 0, 3]));
    state.endpoints[2] = endpoint(v6(3));
    state.endpoints[3] = endpoint(Address::v4([10, 0, 0, 4]));
    state.endpoints[1].mtu_bytes = dice.one(&[0, 200]);
    for upstream in [1, 2] {
        state.upstreams[upstream] = Upstream {
            page: 0,
            slots: 4096,
        };
    }
    let owners = [
        Slot::new(1, 0),
        Slot::new(2, 0),
        Slot::new(1, 3),
        Slot::new(3, 3),
    ];
    for slot in &mut state.rings[0] {
        *slot = dice.one(&owners);
    }
    state.tunnel = Tunnel {
        source4: Address::v4([10, 0, 0, 5]),
        source6: v6(5),
        entropy4: 0xff00_0000,
        entropy6: u32::MAX,
        gue_port: [0x17, 0xc0],
        zero: [0; 6],
    };
    state
}

/// Frames to begin with, one of each kind that there are rules for.
pub fn seeds() -> Vec<Vec<u8>> {
    let world = crate::generated::World {
        clients: vec![
            IpAddr::from([10, 9, 9, 9]),
            IpAddr::from([0x2001, 9, 0, 0, 0, 0, 0, 9]),
        ],
        listeners: vec![
            IpAddr::from([10, 0, 0, 1]),
            IpAddr::from([0x2001, 0, 0, 0, 0, 0, 0, 1]),
        ],
        client_ports: vec![40_000],
        listener_ports: (64..69).collect(),
        answers: vec![],
    };
    let mut dice = Dice::new(1);
    let frames = (0..60).map(|_| world.frame(&mut dice));
    frames.filter(|frame| frame.len() < 500).collect()
}
