//! Connections are taken by the worker of the CPU that took their packets.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, anyhow};
use aya::maps::{HashMap, ReusePortSockArray};
use aya::programs::SkReuseport;
use proxy_ebpf::abi::{self, name};

use super::Kernel;
use crate::datapath::map::Value;
use crate::datapath::{address, port};

impl Kernel {
    /// Steers new connections to an address to the socket of the CPU that took the packet. All of `sockets` are one
    /// SO_REUSEPORT group that listens already, each with the CPU of its worker.
    ///
    /// # Errors
    /// There are too many groups, or the system refuses.
    pub fn steer(&mut self, listener: SocketAddr, sockets: &[(u32, BorrowedFd<'_>)]) -> Result<()> {
        let Some((_, first)) = sockets.first() else {
            return Ok(());
        };
        let base = self.group(listener)?;
        let map = self
            .ebpf
            .map_mut(name::SOCKETS)
            .ok_or_else(|| anyhow!("the map sockets is missing"))?;
        let mut array = ReusePortSockArray::try_from(map)?;
        for (cpu, socket) in sockets.iter().filter(|(cpu, _)| *cpu < self.cpus) {
            array
                .set(base + cpu, socket, 0)
                .with_context(|| format!("steer {listener} on CPU {cpu}"))?;
        }
        let map = self
            .ebpf
            .map_mut(name::STEER)
            .ok_or_else(|| anyhow!("the map steer is missing"))?;
        HashMap::<_, Value<abi::SteerKey>, u32>::try_from(map)?.insert(
            Value(steer_key(listener)),
            base,
            0,
        )?;
        let select = self
            .ebpf
            .program(name::SELECT)
            .ok_or_else(|| anyhow!("the program select is missing"))?;
        let select: &SkReuseport = select.try_into()?;
        select
            .attach(first)
            .with_context(|| format!("attach the steering of {listener}"))?;
        Ok(())
    }

    /// Forgets an address whose sockets are about to be closed.
    pub fn unsteer(&mut self, listener: SocketAddr) {
        if self.groups.remove(&listener).is_some()
            && let Some(map) = self.ebpf.map_mut(name::STEER)
            && let Ok(mut steer) = HashMap::<_, Value<abi::SteerKey>, u32>::try_from(map)
        {
            // Sockets leave the array by themselves when they are closed.
            let _ = steer.remove(&Value(steer_key(listener)));
        }
    }

    /// The first index of an address's sockets.
    fn group(&mut self, listener: SocketAddr) -> Result<u32> {
        if let Some(base) = self.groups.get(&listener) {
            return Ok(*base);
        }
        let base = (0..abi::size::SOCKETS / self.cpus)
            .map(|n| n * self.cpus)
            .find(|base| !self.groups.values().any(|b| b == base));
        let base = base.ok_or_else(|| {
            anyhow!(
                "no more than {} addresses can be steered",
                self.groups.len()
            )
        })?;
        self.groups.insert(listener, base);
        Ok(base)
    }
}

fn steer_key(listener: SocketAddr) -> abi::SteerKey {
    abi::SteerKey {
        address: match listener.ip() {
            // The group is bound to this very address; an IPv4 one stands mapped, also the unspecified one.
            std::net::IpAddr::V4(v4) => abi::Address::v4(v4.octets()),
            v6 => address(v6),
        },
        port: port(listener.port()),
        protocol: abi::protocol::TCP,
        zero: [0; 5],
    }
}
