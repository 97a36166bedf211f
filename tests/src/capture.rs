//! What arrives at the far ends of the edge's links, captured by their namespaces' own Linux, and every checksum in it added up.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use nix::net::if_::if_nametoindex;

use crate::namespace::Namespace;
use crate::packet::verify_all;

/// How much may wait until it is looked at; a test sends less.
const BUFFER_BYTES: libc::c_int = 64 << 20;
/// Frames that are looked at; what comes after them is only counted.
const FRAMES_MAX: u64 = 200_000;
/// How long a reader waits before it looks whether it shall end.
const PACE: libc::timeval = libc::timeval {
    tv_sec: 0,
    tv_usec: 20_000,
};

/// Captures that run.
pub struct Captures {
    running: Vec<(String, JoinHandle<Result<Seen>>)>,
    ends: Arc<AtomicBool>,
}

/// What one of them has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Frames whose every checksum was right.
    pub right: u64,
    /// The first faults, each with its frame.
    pub faults: Vec<String>,
    /// Frames that were not looked at.
    pub missed: u64,
}

impl Captures {
    /// Captures what comes to `eth0` of each of these namespaces from now on.
    pub fn start<'a>(namespaces: impl IntoIterator<Item = &'a Namespace>) -> Result<Self> {
        let ends = Arc::new(AtomicBool::new(false));
        let mut running = vec![];
        for namespace in namespaces {
            // Segments that are merged have no checksum of their own.
            namespace.run(&["ethtool", "-K", "eth0", "gro", "off"])?;
            let socket = namespace
                .inside(|| open("eth0"))
                .with_context(|| format!("capture in {}", namespace.label()))?;
            let ends = Arc::clone(&ends);
            let reader = std::thread::Builder::new()
                .name("capture".to_owned())
                .spawn(move || read(&socket, &ends))?;
            running.push((namespace.label().to_owned(), reader));
        }
        Ok(Self { running, ends })
    }

    /// Ends them, once nothing more waits to be looked at. How many frames were right; an error tells of the first that was not.
    pub fn finish(self) -> Result<u64> {
        self.ends.store(true, Relaxed);
        let mut right = 0;
        for (label, reader) in self.running {
            let seen = reader
                .join()
                .map_err(|_| anyhow!("a capture panicked"))?
                .with_context(|| format!("capture in {label}"))?;
            ensure!(
                seen.faults.is_empty() && seen.missed == 0,
                "{label}: {seen:?}"
            );
            right += seen.right;
        }
        Ok(right)
    }
}

/// A socket that gets every frame of an interface (packet(7)).
fn open(interface: &str) -> Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // Of no protocol until it is bound: it would get what passes the loopback, whose checksums nobody makes.
    // SAFETY: the call takes numbers, and a descriptor that it answers is nobody's yet.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error()).context("make a packet socket");
        }
        OwnedFd::from_raw_fd(socket)
    };
    set(&socket, libc::SO_RCVBUFFORCE, &BUFFER_BYTES)?;
    set(&socket, libc::SO_RCVTIMEO, &PACE)?;
    // SAFETY: all zero is a value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = if_nametoindex(interface)? as i32;
    // SAFETY: the address is as long as we say.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    ensure!(
        bound == 0,
        "bind to {interface}: {}",
        io::Error::last_os_error()
    );
    Ok(socket)
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> Result<()> {
    // SAFETY: the value is as long as we say.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const *value).cast(),
            size_of::<T>() as u32,
        )
    };
    ensure!(done == 0, "set a socket up: {}", io::Error::last_os_error());
    Ok(())
}

fn read(socket: &OwnedFd, ends: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut frame = vec![0; 1 << 16];
    loop {
        // SAFETY: all zero is a value of it.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_bytes = size_of_val(&from) as u32;
        // SAFETY: both buffers are as long as we say.
        let bytes = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
                (&raw mut from).cast(),
                &raw mut from_bytes,
            )
        };
        let Ok(bytes) = usize::try_from(bytes) else {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock if ends.load(Relaxed) => return lost(socket, seen),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => continue,
                _ => return Err(error).context("read a packet socket"),
            }
        };
        // What leaves has checksums that are not made yet.
        if from.sll_pkttype == libc::PACKET_OUTGOING {
            continue;
        }
        if seen.right >= FRAMES_MAX {
            seen.missed += 1;
            continue;
        }
        match verify_all(&frame[..bytes]) {
            Ok(()) => seen.right += 1,
            Err(fault) if seen.faults.len() < 3 => {
                let hex: String = frame[..bytes]
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect();
                seen.faults.push(format!("{fault}: {hex}"));
            }
            Err(_) => {}
        }
    }
}

/// Adds what the kernel had no room for.
fn lost(socket: &OwnedFd, mut seen: Seen) -> Result<Seen> {
    let mut counts = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut bytes = size_of_val(&counts) as u32;
    // SAFETY: the buffer is as long as we say.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut counts).cast(),
            &raw mut bytes,
        )
    };
    ensure!(
        done == 0,
        "read what was lost: {}",
        io::Error::last_os_error()
    );
    seen.missed += u64::from(counts.tp_drops);
    Ok(seen)
}
