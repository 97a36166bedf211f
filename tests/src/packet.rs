//! Builds frames byte by byte, and checks the checksums of others: written apart from the product's own parser, as a witness.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP flags (RFC 9293 section 3.1).
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// IP protocol numbers.
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;

/// A frame to be built. Change what a test is about, leave the rest.
#[derive(Clone, Debug)]
pub struct Frame {
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    /// VLAN ids, outermost first (802.1Q).
    pub vlans: Vec<u16>,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Type of service, or traffic class.
    pub class: u8,
    pub hop_limit: u8,
    /// IPv4 options; a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv4 fragment: offset in units of 8 bytes, and whether more follow.
    pub fragment: (u16, bool),
    /// IPv6 extension headers, outermost first: number, and the bytes from the second on.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub transport: Transport,
    /// TCP options; a multiple of four bytes.
    pub tcp_options: Vec<u8>,
    pub payload: Vec<u8>,
}

/// What stands behind the IP header.
#[derive(Clone, Debug)]
pub enum Transport {
    Tcp {
        ports: (u16, u16),
        flags: u8,
    },
    /// A checksum of zero says that there is none.
    Udp {
        ports: (u16, u16),
        checksum: bool,
    },
    /// The first four bytes of ICMP or ICMPv6 are type, code and checksum.
    Icmp {
        kind: u8,
        code: u8,
    },
    /// Any other protocol: the payload as it is.
    Other(u8),
}

impl Frame {
    /// A TCP packet between two addresses of one family.
    pub fn tcp(source: (IpAddr, u16), destination: (IpAddr, u16), flags: u8) -> Self {
        let ports = (source.1, destination.1);
        Self::new(source.0, destination.0, Transport::Tcp { ports, flags })
    }

    /// A UDP packet with a checksum.
    pub fn udp(source: (IpAddr, u16), destination: (IpAddr, u16)) -> Self {
        let transport = Transport::Udp {
            ports: (source.1, destination.1),
            checksum: true,
        };
        Self::new(source.0, destination.0, transport)
    }

    /// A packet of any kind.
    pub fn new(source: IpAddr, destination: IpAddr, transport: Transport) -> Self {
        Self {
            destination_mac: [0x02, 0, 0, 0, 0, 0x01],
            source_mac: [0x02, 0, 0, 0, 0, 0x02],
            vlans: vec![],
            source,
            destination,
            class: 0xb8,
            hop_limit: 64,
            options: vec![],
            fragment: (0, false),
            extensions: vec![],
            transport,
            tcp_options: vec![],
            payload: b"a payload of odd length".to_vec(),
        }
    }

    /// The same packet with other contents.
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The bytes on the wire, without the frame check sequence.
    pub fn bytes(&self) -> Vec<u8> {
        let (ethertype, packet) = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                (0x0800u16, self.ipv4(source, destination))
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                (0x86dd, self.ipv6(source, destination))
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        };
        let mut bytes = [self.destination_mac, self.source_mac].concat();
        for vlan in &self.vlans {
            bytes.extend(0x8100u16.to_be_bytes());
            bytes.extend(vlan.to_be_bytes());
        }
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(packet);
        bytes
    }

    fn ipv4(&self, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let pseudo = [&source.octets()[..], &destination.octets()].concat();
        let (number, transport) = self.transport(pseudo);
        let header_bytes = 20 + self.options.len();
        let fragment = self.fragment.0 | if self.fragment.1 { 0x2000 } else { 0 };
        let mut ip = vec![0x40 | (header_bytes / 4) as u8, self.class];
        ip.extend(((header_bytes + transport.len()) as u16).to_be_bytes());
        ip.extend([0xab, 0xcd]);
        ip.extend(fragment.to_be_bytes());
        ip.extend([self.hop_limit, number, 0, 0]);
        ip.extend(source.octets());
        ip.extend(destination.octets());
        ip.extend(&self.options);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum);
        ip.extend(transport);
        ip
    }

    fn ipv6(&self, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let pseudo = [&source.octets()[..], &destination.octets()].concat();
        let (number, transport) = self.transport(pseudo);
        let mut ip = vec![0x60 | self.class >> 4, self.class << 4 | 0x0f, 0xee, 0xdd];
        let mut body = vec![];
        let mut next = number;
        for (extension, rest) in self.extensions.iter().rev() {
            body.splice(0..0, [&[next][..], rest].concat());
            next = *extension;
        }
        body.extend(transport);
        ip.extend((body.len() as u16).to_be_bytes());
        ip.extend([next, self.hop_limit]);
        ip.extend(source.octets());
        ip.extend(destination.octets());
        ip.extend(body);
        ip
    }

    /// The protocol's number, and header and payload with their checksum.
    fn transport(&self, addresses: Vec<u8>) -> (u8, Vec<u8>) {
        let mut bytes = vec![];
        let (number, checksum_at, wanted) = match self.transport {
            Transport::Tcp { ports, flags } => {
                bytes.extend(ports.0.to_be_bytes());
                bytes.extend(ports.1.to_be_bytes());
                bytes.extend([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
                let words = 5 + self.tcp_options.len() as u8 / 4;
                bytes.extend([words << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
                bytes.extend(&self.tcp_options);
                (TCP, 16, true)
            }
            Transport::Udp { ports, checksum } => {
                bytes.extend(ports.0.to_be_bytes());
                bytes.extend(ports.1.to_be_bytes());
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                (UDP, 6, checksum)
            }
            Transport::Icmp { kind, code } => {
                bytes.extend([kind, code, 0, 0]);
                let v4 = addresses.len() == 8;
                (if v4 { ICMP } else { ICMPV6 }, 2, true)
            }
            Transport::Other(number) => (number, 0, false),
        };
        bytes.extend(&self.payload);
        if wanted {
            let mut summed = vec![];
            if number != ICMP {
                summed = pseudo_header(&addresses, number, bytes.len());
            }
            summed.extend(&bytes);
            let sum = match checksum(&summed) {
                [0, 0] if number == UDP => [0xff, 0xff],
                sum => sum,
            };
            bytes[checksum_at..checksum_at + 2].copy_from_slice(&sum);
        }
        (number, bytes)
    }
}

/// An ARP request (RFC 826) for an address.
pub fn arp(target: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([0x02, 0, 0, 0, 0, 0x02, 0x08, 0x06]);
    bytes.extend([0, 1, 0x08, 0, 6, 4, 0, 1]);
    bytes.extend([0x02, 0, 0, 0, 0, 0x02, 10, 0, 0, 2]);
    bytes.extend([0; 6]);
    bytes.extend(target.octets());
    bytes
}

/// The Internet checksum (RFC 1071); an odd last byte counts as if a zero followed.
pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for (index, byte) in bytes.iter().enumerate() {
        sum += if index % 2 == 0 {
            u32::from(*byte) << 8
        } else {
            u32::from(*byte)
        };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// RFC 9293 section 3.1 for IPv4, RFC 8200 section 8.1 for IPv6: the two give the same sum, for
/// zeros add nothing.
fn pseudo_header(addresses: &[u8], number: u8, bytes: usize) -> Vec<u8> {
    let mut pseudo = addresses.to_vec();
    pseudo.extend((bytes as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, number]);
    pseudo
}

/// Computes both checksums of a TCP or UDP frame without extension headers in full; names the one that is wrong.
pub fn verify_checksums(frame: &[u8]) -> Result<(), &'static str> {
    let ip = frame.get(14..).ok_or("no IP header")?;
    let (number, addresses, transport) = match ip.first().map(|byte| byte >> 4) {
        Some(4) => {
            let header_bytes = usize::from(ip[0] & 15) * 4;
            if checksum(&ip[..header_bytes]) != [0, 0] {
                return Err("the IPv4 header checksum is wrong");
            }
            let total_bytes = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            (ip[9], &ip[12..20], &ip[header_bytes..total_bytes])
        }
        Some(6) => {
            let payload_bytes = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
            (ip[6], &ip[8..40], &ip[40..40 + payload_bytes])
        }
        _ => return Err("neither IPv4 nor IPv6"),
    };
    if number == UDP && transport[6..8] == [0, 0] {
        return Ok(());
    }
    let mut summed = pseudo_header(addresses, number, transport.len());
    summed.extend(transport);
    if checksum(&summed) != [0, 0] {
        return Err("the TCP or UDP checksum is wrong");
    }
    Ok(())
}

/// Checks every checksum of a frame as it is on the wire: of IPv4 headers, of TCP, UDP, ICMP and ICMPv6 that are whole, and of
/// what is inside IP packets inside it. What is no IP has none.
///
/// # Errors
///
/// What is wrong, or cut short.
pub fn verify_all(frame: &[u8]) -> Result<(), String> {
    match frame.get(12..14) {
        Some([0x08, 0x00] | [0x86, 0xdd]) => verify_ip(&frame[14..]),
        _ => Ok(()),
    }
}

fn verify_ip(ip: &[u8]) -> Result<(), String> {
    let cut = || "a packet is cut short".to_owned();
    let v4 = match ip.first().map(|byte| byte >> 4) {
        Some(4) => true,
        Some(6) => false,
        _ => return Err("neither IPv4 nor IPv6".to_owned()),
    };
    let fixed = ip.get(..if v4 { 20 } else { 40 }).ok_or_else(cut)?;
    let number = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
    let header_bytes = if v4 {
        usize::from(fixed[0] & 15) * 4
    } else {
        40
    };
    let end = if v4 { number(2) } else { 40 + number(4) };
    let packet = ip.get(..end).ok_or_else(cut)?;
    let payload = packet.get(header_bytes..).ok_or_else(cut)?;
    if v4 && checksum(&packet[..header_bytes]) != [0, 0] {
        return Err("the checksum of an IPv4 header is wrong".to_owned());
    }
    let protocol = if v4 { fixed[9] } else { fixed[6] };
    let is_fragment = v4 && number(6) & 0x3fff != 0;
    if is_fragment {
        return Ok(());
    }
    let addresses = if v4 { &fixed[12..20] } else { &fixed[8..40] };
    let pseudo = |protocol| pseudo_header(addresses, protocol, payload.len());
    let summed = match protocol {
        // IPv4 and IPv6 inside.
        4 | 41 => return verify_ip(payload),
        UDP if payload.get(6..8).ok_or_else(cut)? == [0, 0] => return Ok(()),
        TCP | UDP | ICMPV6 => [&pseudo(protocol), payload].concat(),
        ICMP => payload.to_vec(),
        // Extension headers, and what has no checksum that we know.
        _ => return Ok(()),
    };
    if checksum(&summed) != [0, 0] {
        return Err(format!("the checksum of protocol {protocol} is wrong"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_known_ipv4_header_comes_out() {
        // A header whose checksum, b861, is published in many places.
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(checksum(&header), [0xb8, 0x61]);
    }

    #[test]
    fn a_frame_that_was_built_verifies_until_a_byte_changes() {
        let client = (IpAddr::from([10, 0, 0, 2]), 40_000);
        let listener = (IpAddr::from([10, 0, 0, 1]), 80);
        let bytes = Frame::tcp(client, listener, SYN).bytes();
        assert_eq!(verify_checksums(&bytes), Ok(()));
        for position in 14..bytes.len() {
            let mut broken = bytes.clone();
            broken[position] ^= 1;
            let verified = std::panic::catch_unwind(|| verify_checksums(&broken));
            assert!(!matches!(verified, Ok(Ok(()))), "byte {position}");
        }
    }

    #[test]
    fn every_checksum_of_a_frame_is_looked_at_inside_other_packets_too() {
        let ends = [IpAddr::from([10, 0, 0, 2]), IpAddr::from([10, 0, 0, 1])];
        let tcp = Frame::tcp((ends[0], 40_000), (ends[1], 80), SYN);
        let echo = Frame::new(ends[0], ends[1], Transport::Icmp { kind: 8, code: 0 });
        let mut wrapped = Frame::new(ends[0], ends[1], Transport::Other(4));
        wrapped.payload = tcp.bytes().split_off(14);
        for frame in [tcp, echo, wrapped] {
            let bytes = frame.bytes();
            assert_eq!(verify_all(&bytes), Ok(()));
            for position in (24..26).chain(bytes.len() - 3..bytes.len()) {
                let mut broken = bytes.clone();
                broken[position] ^= 1;
                assert!(verify_all(&broken).is_err(), "byte {position}");
            }
        }
    }
}
