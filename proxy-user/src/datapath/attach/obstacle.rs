//! What keeps the kernel half from coming up, found before anything is made: by `run`, and by `check`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use aya::maps::{Array, Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};
use proxy_ebpf::abi::{self, name};

use super::{BPFFS, LINK_PREFIX, sizes};
use crate::config::{Datapath, HashKey};
use crate::datapath::map::Value;
use crate::datapath::network::{Link, Network};
use crate::datapath::pin_folder;
use crate::tunable::Tunables;

/// Everything that would make `Kernel::up` refuse this section for this instance, each with what to do about it.
/// Needs the privileges that `Kernel::up` needs.
///
/// # Errors
/// The interfaces cannot be read.
pub fn obstacles(instance: &str, wanted: &Datapath, tunables: &Tunables) -> Result<Vec<String>> {
    let folder = pin_folder(instance);
    let mut network = Network::open().context("open a netlink socket")?;
    let links = network
        .links()
        .context("read the interfaces of this host")?;
    let mut found = Vec::new();
    for name in &wanted.interfaces {
        let refused = match links.iter().find(|link| link.name == *name) {
            Some(link) => refuse_foreign(link, &folder).err(),
            None => Some(no_interface(name, &links)),
        };
        found.extend(refused);
    }
    found.extend(check_pins(&folder, &sizes(tunables)).err());
    if let Some(key) = wanted.hash_key {
        found.extend(check_hash_key(&folder, key).err());
    }
    Ok(found.iter().map(|error| format!("{error:#}")).collect())
}

fn no_interface(name: &str, links: &[Link]) -> anyhow::Error {
    let known: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
    anyhow!(
        "datapath.interfaces: there is no interface {name}; there are {}",
        known.join(", ")
    )
}

/// Another program on the interface is somebody's, and stays.
fn refuse_foreign(link: &Link, folder: &Path) -> Result<()> {
    let Some((id, _)) = link.xdp else {
        return Ok(());
    };
    let ours = PinnedLink::from_pin(folder.join(format!("{LINK_PREFIX}{}", link.index)));
    if ours.is_ok_and(|ours| {
        FdLink::from(ours)
            .info()
            .is_ok_and(|info| info.program_id() == id)
    }) {
        return Ok(());
    }
    let owner = owner(link.index).unwrap_or_else(|| program_owner(id));
    bail!(
        "another XDP program is attached to {}: {owner}; detach it (`ip link set dev {} xdp off`, or by what attached it), \
         or leave the interface out of datapath.interfaces",
        link.name,
        link.name
    )
}

/// The instance of ours that has a link there.
fn owner(index: u32) -> Option<String> {
    let instances = fs::read_dir(Path::new(BPFFS).join("sluice")).ok()?;
    let pinned = |instance: &fs::DirEntry| {
        instance
            .path()
            .join(format!("{LINK_PREFIX}{index}"))
            .exists()
    };
    let name = instances.flatten().find(pinned)?.file_name();
    let name = name.to_string_lossy();
    Some(format!(
        "that of the Sluice instance {name} (`sluice datapath down --instance {name}` removes it)"
    ))
}

fn program_owner(id: u32) -> String {
    let program = aya::programs::loaded_programs()
        .flatten()
        .find(|program| program.id() == id);
    match program {
        Some(program) => {
            let name = program
                .name_as_str()
                .filter(|name| !name.is_empty())
                .unwrap_or("without a name");
            let user = program
                .created_by_uid()
                .map_or(String::new(), |uid| format!(", loaded by uid {uid}"));
            format!("program {id} {name}{user}")
        }
        None => format!("program {id}"),
    }
}

/// Flows that live would be hashed to other endpoints.
fn check_hash_key(folder: &Path, wanted: HashKey) -> Result<()> {
    let pin = folder.join(name::HASH_KEYS);
    if !pin.exists() {
        return Ok(());
    }
    let map = MapData::from_pin(&pin).with_context(|| format!("open {}", pin.display()))?;
    let map = Array::<_, Value<abi::HashKeys>>::try_from(Map::Array(map))?;
    let Value(pinned) = map.get(&0, 0)?;
    if pinned.keys != wanted.0 && pinned.keys != [0; 11] {
        bail!(
            "datapath.hash_key is not what {} was made with, and flows would move to other endpoints: \
             run `sluice datapath down`, which ends its flows and bans, and start again",
            folder.display()
        );
    }
    Ok(())
}

/// Pins of another version or other sizes are not adopted.
fn check_pins(folder: &Path, sizes: &BTreeMap<&str, u32>) -> Result<()> {
    let remedy = "run `sluice datapath down`, which ends its flows and bans, and start again";
    let abi_pin = folder.join(name::ABI);
    if abi_pin.exists() {
        let map =
            MapData::from_pin(&abi_pin).with_context(|| format!("open {}", abi_pin.display()))?;
        let pinned = Array::<_, u32>::try_from(Map::Array(map))?.get(&0, 0)?;
        // Zero: whoever made the pins was interrupted before anything could run on them.
        if pinned != abi::ABI && pinned != 0 {
            bail!(
                "{} holds maps of ABI {pinned}, this is ABI {}: {remedy}",
                folder.display(),
                abi::ABI
            );
        }
    }
    for (map, wanted) in sizes {
        let pin = folder.join(map);
        if !pin.exists() {
            continue;
        }
        let entries = MapData::from_pin(&pin)
            .with_context(|| format!("open {}", pin.display()))?
            .info()?
            .max_entries();
        if entries != *wanted {
            bail!(
                "the pinned map {map} has room for {entries} entries, the tunables say {wanted}: {remedy}"
            );
        }
    }
    Ok(())
}
