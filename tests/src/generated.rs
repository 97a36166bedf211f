//! Frames of every kind that the packet path must get right, whole and broken, between the addresses of a small world.

use std::net::IpAddr;

use crate::dice::Dice;
use crate::packet::{ACK, FIN, Frame, ICMPV6, RST, SYN, Transport};

/// Who sends to whom: addresses of both families, and ports.
pub struct World {
    pub clients: Vec<IpAddr>,
    pub listeners: Vec<IpAddr>,
    pub client_ports: Vec<u16>,
    pub listener_ports: Vec<u16>,
    /// Answers that an endpoint could give now: from, to.
    pub answers: Vec<(IpAddr, u16, IpAddr, u16)>,
}

impl World {
    /// One more frame.
    pub fn frame(&self, dice: &mut Dice) -> Vec<u8> {
        let mut bytes = match dice.below(10) {
            0..=4 => self.request(dice).bytes(),
            5..=6 => self.answer(dice).bytes(),
            7..=8 => self.error(dice).bytes(),
            _ => self.stranger(dice).bytes(),
        };
        if bytes.len() > 16 && dice.once_in(8) && matches!(bytes[12..14], [0x81, 0x00]) {
            bytes[12..14].copy_from_slice(&[0x88, 0xa8]);
        }
        damage(&mut bytes, dice);
        bytes
    }

    fn two(&self, dice: &mut Dice, of: &[IpAddr], others: &[IpAddr]) -> (IpAddr, IpAddr) {
        let first = dice.one(of);
        let fitting: Vec<IpAddr> = others
            .iter()
            .filter(|other| other.is_ipv4() == first.is_ipv4())
            .copied()
            .collect();
        (first, dice.one(&fitting))
    }

    fn request(&self, dice: &mut Dice) -> Frame {
        let (client, listener) = self.two(dice, &self.clients, &self.listeners);
        let ports = (dice.one(&self.client_ports), dice.one(&self.listener_ports));
        dressed(plain(client, listener, ports, dice), dice)
    }

    fn answer(&self, dice: &mut Dice) -> Frame {
        if self.answers.is_empty() {
            return self.request(dice);
        }
        let (from, from_port, to, to_port) = dice.one(&self.answers);
        dressed(plain(from, to, (from_port, to_port), dice), dice)
    }

    /// An ICMP message, mostly an error about a packet of a listener's or of a NAT source's.
    fn error(&self, dice: &mut Dice) -> Frame {
        let about = if dice.once_in(3) && !self.answers.is_empty() {
            let (endpoint, endpoint_port, source, port) = dice.one(&self.answers);
            plain(source, endpoint, (port, endpoint_port), dice)
        } else {
            let (client, listener) = self.two(dice, &self.clients, &self.listeners);
            let ports = (dice.one(&self.listener_ports), dice.one(&self.client_ports));
            plain(listener, client, ports, dice)
        };
        let about = if dice.once_in(4) {
            dressed(about, dice)
        } else {
            about
        };
        let about = about.with(|frame| frame.vlans.clear());
        let v4 = about.source.is_ipv4();
        let kind = match (dice.once_in(6), v4) {
            (true, true) => dice.one(&[0, 4, 5, 8]),
            (true, false) => dice.one(&[0, 5, 128, 135]),
            (false, true) => dice.one(&[3, 11, 12]),
            (false, false) => dice.one(&[1, 2, 3, 4]),
        };
        let quote = about.bytes().split_off(14);
        let least = if v4 { 28 } else { 48 };
        let quoted = dice.one(&[least, least + 12, 128, 1000, least - 2]);
        let router = self.two(dice, &[about.source], &self.clients).1;
        let to = if dice.once_in(12) {
            about.destination
        } else {
            about.source
        };
        let code = dice.below(5) as u8;
        let mut frame = Frame::new(router, to, Transport::Icmp { kind, code });
        frame.payload = dice.bytes(4);
        frame.payload.extend(&quote[..quoted.min(quote.len())]);
        if dice.once_in(4) {
            frame = dressed(frame, dice);
        }
        frame
    }

    /// Something else: another port, another address, another protocol.
    fn stranger(&self, dice: &mut Dice) -> Frame {
        let (client, listener) = self.two(dice, &self.clients, &self.listeners);
        let number = dice.one(&[1u8, 2, 4, 41, 47, 50, 51, 58, 132, 135]);
        let port = dice.word() as u16;
        let mut frame = plain(client, listener, (port, port.rotate_left(3)), dice);
        match dice.below(3) {
            0 => frame.transport = Transport::Other(number),
            1 => {
                (frame.source, frame.destination) = (listener, client);
            }
            _ => {}
        }
        dressed(frame, dice)
    }
}

/// A TCP or UDP packet.
fn plain(from: IpAddr, to: IpAddr, ports: (u16, u16), dice: &mut Dice) -> Frame {
    let mut frame = if dice.once_in(2) {
        let flags = dice.one(&[SYN, SYN, ACK, ACK, SYN | ACK, FIN | ACK, RST, RST | ACK, 0]);
        let mut frame = Frame::tcp((from, ports.0), (to, ports.1), flags);
        if dice.once_in(2) {
            frame.tcp_options = tcp_options(dice);
        }
        frame
    } else {
        let checksum = !dice.once_in(5);
        Frame::new(from, to, Transport::Udp { ports, checksum })
    };
    let length = match dice.below(20) {
        0 => 0,
        1 => 1300 + dice.below(300),
        2 => 3300 + dice.below(500),
        _ => dice.below(80),
    };
    frame.payload = dice.bytes(length);
    if dice.once_in(4) {
        // What an Initial of QUIC begins with, and what only looks like it.
        let first = dice.one(&[0xc0, 0xcf, 0xd0, 0xe0, 0x40]);
        let version = dice.one(&[1_u32, 0x6b33_43cf, 2]);
        frame.payload.splice(..0, version.to_be_bytes());
        frame.payload.insert(0, first);
    }
    if dice.once_in(3) {
        frame.class = dice.word() as u8;
    }
    frame
}

/// Options as stacks send them, in any order and number, and now and then none that make sense.
fn tcp_options(dice: &mut Dice) -> Vec<u8> {
    let mut options = vec![];
    for _ in 0..dice.below(13) {
        let [high, low] = dice.one(&[536u16, 1240, 1300, 1460, 8960, 0]).to_be_bytes();
        let next = match dice.below(9) {
            0 | 1 => vec![2, 4, high, low],
            2..=4 => vec![1],
            5 => vec![4, 2],
            6 => vec![3, 3, 7],
            7 => [&[8, 10][..], &dice.bytes(8)].concat(),
            _ => vec![dice.word() as u8, dice.below(12) as u8],
        };
        options.extend(next);
    }
    options.truncate(40);
    options.resize(options.len().next_multiple_of(4), 0);
    options
}

/// The same with what is rare: tags, options, extension headers, fragments, the end of its way, another gateway.
fn dressed(mut frame: Frame, dice: &mut Dice) -> Frame {
    if dice.once_in(6) {
        frame.vlans = (0..=dice.below(3)).map(|_| dice.word() as u16).collect();
    }
    if dice.once_in(8) {
        frame.hop_limit = dice.one(&[0, 1, 2, 255]);
    }
    if dice.once_in(8) {
        frame.source_mac[5] = dice.word() as u8;
    }
    let place = dice.one(&[0u16, 0, 1, 2, 3, 9, 185]);
    let more = place == 0 || dice.once_in(2);
    let is_fragment = dice.once_in(5);
    if frame.source.is_ipv4() {
        if is_fragment {
            frame.fragment = (place, more);
        }
        if dice.once_in(6) {
            let words = 1 + dice.below(10);
            frame.options = dice.bytes(words * 4);
        }
        return frame;
    }
    if dice.once_in(4) {
        frame.extensions = (0..=dice.below(5)).map(|_| extension(dice)).collect();
    }
    if is_fragment {
        let [a, b] = (place << 3 | u16::from(more)).to_be_bytes();
        frame
            .extensions
            .push((44, vec![0, a, b, 1, 2, 3, dice.below(3) as u8]));
    }
    // The checksum of what is behind a destination option is the same, and so is that of ICMPv6.
    if matches!(frame.transport, Transport::Other(ICMPV6)) {
        frame.payload.resize(8, 0);
    }
    frame
}

/// An extension header; seldom one that is not stepped over, a long one, or a route that is not used up.
fn extension(dice: &mut Dice) -> (u8, Vec<u8>) {
    let number = match dice.below(12) {
        0 => dice.one(&[44, 51, 135, 139, 140, 59]),
        1..=4 => 43,
        5..=7 => 0,
        _ => 60,
    };
    let units = match dice.below(10) {
        0 if number != 44 => 1 + dice.below(250),
        1..=3 if number != 44 => 1 + dice.below(4),
        _ => 1,
    };
    let mut rest = vec![0; units * 8 - 1];
    if number != 44 {
        rest[0] = (units - 1) as u8;
        rest[2] = u8::from(dice.once_in(8));
    }
    (number, rest)
}

/// Cuts off, adds behind, or turns bits; never below an Ethernet header, which the kernel would not take.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    match dice.below(12) {
        0 => {
            let length = 14 + dice.below(bytes.len() - 13);
            bytes.truncate(length);
        }
        1 => {
            let padding = dice.below(60);
            bytes.resize(bytes.len() + padding, 0xa5);
        }
        2 | 3 => {
            // Mostly in headers.
            let end = if dice.once_in(4) {
                bytes.len()
            } else {
                bytes.len().min(90)
            };
            for _ in 0..=dice.below(4) {
                let at = 12 + dice.below(end - 12);
                bytes[at] ^= 1 << dice.below(8);
            }
        }
        _ => {}
    }
}
