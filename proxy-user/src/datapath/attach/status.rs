//! The kernel half as it stands, without changing it; taking it away; and what a process lacks to load it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, PinnedLink};
use proxy_ebpf::abi::name;
use serde::{Deserialize, Serialize};

use super::{Interface, pinned_links, release};
use crate::datapath::network::Network;
use crate::datapath::{Mode, pin_folder};

/// What stands in the kernel for an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub interfaces: Vec<Interface>,
    /// Where the maps are pinned; absent where there are none.
    pub pins: Option<PathBuf>,
}

/// Where XDP of this instance is attached.
///
/// # Errors
/// The pins cannot be read.
pub fn status(instance: &str) -> Result<Status> {
    let folder = pin_folder(instance);
    if !folder
        .join(name::ABI)
        .try_exists()
        .with_context(|| format!("look at {}; run it as root", folder.display()))?
    {
        return Ok(Status::default());
    }
    let links = Network::open()?.links()?;
    let mut interfaces = Vec::new();
    for (index, path) in pinned_links(&folder) {
        let Some(link) = links.iter().find(|link| link.index == index) else {
            continue;
        };
        let pinned =
            PinnedLink::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
        let program = FdLink::from(pinned).info()?.program_id();
        let Some((id, native)) = link.xdp else {
            continue;
        };
        if id == program {
            let mode = if native { Mode::Native } else { Mode::Generic };
            interfaces.push(Interface {
                name: link.name.clone(),
                index,
                mode,
                program,
            });
        }
    }
    interfaces.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Status {
        interfaces,
        pins: Some(folder),
    })
}

/// Detaches this instance's programs and removes its pins, and nothing else. Answers what was removed.
///
/// # Errors
/// A pin cannot be removed.
pub fn down(instance: &str) -> Result<Status> {
    let status = status(instance)?;
    let folder = pin_folder(instance);
    // Links first: from then on packets go to Linux, and the maps are nobody's.
    for (_, link) in pinned_links(&folder) {
        release(&link)?;
    }
    for path in name::MAPS.map(|map| folder.join(map)) {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("remove {}; run it as root", path.display()));
            }
            _ => {}
        }
    }
    // Others may keep things beside ours; then the folder stays.
    if fs::remove_dir(&folder).is_ok()
        && let Some(parent) = folder.parent()
    {
        let _ = fs::remove_dir(parent);
    }
    Ok(status)
}

/// Capabilities that the kernel half needs and this process has not.
pub fn capabilities_missing() -> Vec<&'static str> {
    const ADMIN: u32 = 21;
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = line
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective >> bit & 1 == 1;
    let needed = [
        ("CAP_NET_ADMIN", has(12)),
        ("CAP_BPF", has(39) || has(ADMIN)),
    ];
    needed
        .into_iter()
        .filter(|(_, held)| !held)
        .map(|(name, _)| name)
        .collect()
}
