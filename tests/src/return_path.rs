//! Origins that answer the client by themselves: they have the listener's address and a link of their own to the client, and unwrap what comes wrapped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::field::{CLIENT_V4, CLIENT_V6, Field, L4_V4, L4_V6};
use crate::namespace::Namespace;

/// Where endpoints expect generic UDP encapsulation.
const GUE_PORT: u16 = 6080;

/// From include/uapi/linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const UDP_NO_CHECK6_RX: libc::c_int = 102;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// Gives every origin the listener's addresses, a way to the client that does not lead over the edge, and a `decap` device
/// where what was inside IP or UDP comes out. It lasts as long as the field.
pub fn lay(field: &Field) -> Result<()> {
    let loose = |namespace: &Namespace| -> Result<()> {
        // Packets come in by another interface than answers leave by: that is the point here.
        namespace.set("ipv4/conf/all/rp_filter", "0")?;
        namespace.set("ipv4/conf/default/rp_filter", "0")?;
        namespace.set("ipv4/conf/eth0/rp_filter", "0")
    };
    loose(&field.client)?;
    for (number, origin) in (1..).zip(&field.origins) {
        loose(origin)?;
        let back = format!("back{number}");
        // A neighbour is asked for from an address of the link. The service address is none, so it takes a link-local one:
        // without it Linux asks nobody, and says nothing.
        field.client.ip(&format!(
            "link add {back} type veth peer name back netns {}
             link set {back} addrgenmode none up
             address add 10.78.{number}.1/24 dev {back}
             address add fd78:{number}::1/64 dev {back} nodad
             address add fe80::1/64 dev {back} nodad",
            origin.name()
        ))?;
        origin.ip(&format!(
            "link set back addrgenmode none up
             address add 10.78.{number}.2/24 dev back
             address add fd78:{number}::2/64 dev back nodad
             address add fe80::2/64 dev back nodad
             address add {L4_V4} dev lo
             address add {L4_V6} dev lo nodad
             route add {CLIENT_V4}/32 via 10.78.{number}.1 dev back src {L4_V4}
             route add {CLIENT_V6}/128 via fd78:{number}::1 dev back src {L4_V6}"
        ))?;
        unwrap(origin).with_context(|| format!("unwrap packets in {}", origin.label()))?;
    }
    Ok(())
}

/// Starts the threads that take the outer headers off.
fn unwrap(origin: &Namespace) -> Result<()> {
    let tun = origin.inside(tun)?;
    origin.ip("link set decap mtu 9000 up")?;
    for (domain, number) in [
        (Domain::IPV4, libc::IPPROTO_IPIP),
        (Domain::IPV4, libc::IPPROTO_IPV6),
        (Domain::IPV6, libc::IPPROTO_IPIP),
        (Domain::IPV6, libc::IPPROTO_IPV6),
    ] {
        let socket = origin
            .inside(|| Socket::new(domain, Type::RAW, Some(Protocol::from(number))))
            .context("make a raw socket")?;
        let tun = tun.try_clone().context("share the device")?;
        origin.thread("decap-ipip", move || {
            pour(&tun, |buffer| {
                let length = read(socket.as_raw_fd(), buffer)?;
                // A raw socket of IPv4 gives the outer header too, one of IPv6 does not.
                let header = match domain {
                    Domain::IPV4 => usize::from(buffer[0] & 15) * 4,
                    _ => 0,
                };
                Ok((header, length))
            })
        })?;
    }
    let socket = origin.inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, GUE_PORT)))?;
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one int of the size that is said.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_UDP,
            UDP_NO_CHECK6_RX,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error()).context("take datagrams without a checksum");
    }
    origin.thread("decap-gue", move || {
        pour(&tun, |buffer| Ok((0, read(socket.as_raw_fd(), buffer)?)))
    })?;
    Ok(())
}

/// Writes into the device what lies between the two ends that `next` tells, until one of them is gone.
fn pour(tun: &File, mut next: impl FnMut(&mut [u8]) -> std::io::Result<(usize, usize)>) {
    let mut buffer = vec![0; 65_536];
    while let Ok((start, end)) = next(&mut buffer) {
        // A packet that the stack does not take is lost, as on any link.
        let _ = (&mut &*tun).write(buffer.get(start..end).unwrap_or_default());
    }
}

fn read(fd: i32, buffer: &mut [u8]) -> std::io::Result<usize> {
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let length = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(length).map_err(|_| std::io::Error::last_os_error())
}

/// A device whose packets are what is written to it, headers of IP first.
fn tun() -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("open /dev/net/tun")?;
    let request = Request {
        name: *b"decap\0\0\0\0\0\0\0\0\0\0\0",
        flags: (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short,
        rest: [0; 22],
    };
    // SAFETY: the kernel reads and writes an ifreq, which is 40 bytes, of a live value.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) } != 0 {
        return Err(std::io::Error::last_os_error()).context("make a TUN device");
    }
    Ok(file)
}
