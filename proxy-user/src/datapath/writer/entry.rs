//! Single entries of maps: their keys, how one is changed, and per-CPU counters summed.

use std::io;
use std::net::IpAddr;

use aya::maps::{MapError, lpm_trie};
use proxy_ebpf::abi;

use crate::datapath::map::{Counters, Table, Value};
use crate::datapath::plan::Key;

pub(super) fn key_of(address: IpAddr, port: [u8; 2], protocol: u8) -> Key {
    Key {
        address,
        port: u16::from_be_bytes(port),
        protocol,
    }
}

/// The key of a prefix as a trie has it, and back.
pub(super) fn trie_key(key: &abi::PrefixKey) -> lpm_trie::Key<[u8; 20]> {
    let mut behind = [0; 20];
    behind.copy_from_slice(&bytemuck::bytes_of(key)[4..]);
    lpm_trie::Key::new(key.bits, behind)
}

pub(super) fn prefix_of(key: &lpm_trie::Key<[u8; 20]>) -> abi::PrefixKey {
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&key.prefix_len().to_ne_bytes());
    bytes[4..].copy_from_slice(&key.data());
    bytemuck::cast(bytes)
}

/// Inserts or removes; what is not there need not be removed.
pub(super) fn change<K: bytemuck::Pod, V: bytemuck::Pod>(
    table: &mut Table<K, V>,
    key: K,
    value: Option<V>,
) -> Result<(), MapError> {
    match value {
        Some(value) => table.insert(Value(key), Value(value), 0),
        None => match table.remove(&Value(key)) {
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        },
    }
}

pub(super) fn is_full(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error) if matches!(error.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)))
}

pub(super) fn reset<V: bytemuck::Pod>(
    counters: &mut Counters<V>,
    index: u32,
) -> Result<(), MapError> {
    let cpus = counters.get(&index, 0)?.len();
    let zero = Value(V::zeroed());
    let values = aya::maps::PerCpuValues::try_from(vec![zero; cpus]).map_err(MapError::IoError)?;
    counters.set(index, values, 0)
}

pub(super) fn sum(counters: &Counters<u64>, index: u32) -> Result<u64, MapError> {
    Ok(counters
        .get(&index, 0)?
        .iter()
        .map(|Value(count)| count)
        .sum())
}

pub(super) fn traffic(
    counters: &Counters<abi::Traffic>,
    index: u32,
) -> Result<abi::Traffic, MapError> {
    let mut total = abi::Traffic::default();
    for Value(one) in counters.get(&index, 0)?.iter() {
        total.packets += one.packets;
        total.bytes += one.bytes;
    }
    Ok(total)
}

pub(super) fn signs(counters: &Counters<abi::Signs>, index: u32) -> Result<abi::Signs, MapError> {
    let mut total = abi::Signs::default();
    for Value(one) in counters.get(&index, 0)?.iter() {
        total.opened += one.opened;
        total.answered += one.answered;
        total.refused += one.refused;
    }
    Ok(total)
}

/// A bit for each port.
pub(super) fn bits(ports: impl Iterator<Item = u16>) -> Vec<u64> {
    let mut words = vec![0; 1024];
    for port in ports {
        words[usize::from(port) / 64] |= 1 << (port % 64);
    }
    words
}
