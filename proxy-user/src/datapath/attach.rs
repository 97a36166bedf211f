//! What needs privileges: loading the programs, making or adopting the pins, attaching, and taking it all away again.

mod obstacle;
mod status;
mod steer;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use aya::maps::{Array, HashMap, MapData, ProgramArray};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, SkReuseport, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use proxy_ebpf::abi::{self, name};
use serde::{Deserialize, Serialize};

use super::map::Value;
use super::network::{Link, Network};
use super::{Mode, pin_folder};
use crate::config::{Datapath, DatapathMode, HashKey};
use crate::tunable::Tunables;

pub use obstacle::obstacles;
pub use status::{Status, capabilities_missing, down, status};

const BPFFS: &str = "/sys/fs/bpf";

/// Links are pinned by the index of their interface: bpffs forbids the dots that names may have.
const LINK_PREFIX: &str = "link_";

/// How long the kernel may take to detach what nothing holds any more; it takes a few milliseconds.
const RELEASE_LIMIT: Duration = Duration::from_secs(1);

/// The kernel half as the keeper holds it.
pub struct Kernel {
    ebpf: Ebpf,
    /// Where XDP is attached.
    pub interfaces: Vec<Interface>,
    /// What an operator should know about how it came up.
    pub notes: Vec<String>,
    folder: PathBuf,
    maps: Vec<(&'static str, OwnedFd)>,
    groups: BTreeMap<SocketAddr, u32>,
    cpus: u32,
    undo: Undo,
}

/// XDP on an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    pub mode: Mode,
    /// Id of the program, as in `bpftool prog show id`.
    pub program: u32,
}

impl Kernel {
    /// Loads the programs over new maps or over those that are pinned, and attaches them to the interfaces. What runs
    /// already is replaced in one step, so that no packet goes past it.
    ///
    /// # Errors
    /// Each with what was tried and what the operator can do.
    pub fn up(instance: &str, wanted: &Datapath, tunables: &Tunables) -> Result<Self> {
        let mut notes = Vec::new();
        mount_bpffs(&mut notes)?;
        // Everything that can be refused is refused before anything is made.
        let obstacles = obstacles(instance, wanted, tunables)?;
        if !obstacles.is_empty() {
            bail!("{}", obstacles.join("; "));
        }
        let folder = pin_folder(instance);
        let adopted = folder.join(name::ABI).exists();
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let links = Network::open()?.links()?;
        let links: Vec<&Link> = wanted
            .interfaces
            .iter()
            .filter_map(|name| links.iter().find(|link| link.name == *name))
            .collect();
        let undo = Undo {
            instance: instance.to_owned(),
            adopted,
            links: Vec::new(),
            armed: true,
        };
        let mut kernel = Self {
            ebpf: load(&folder, &sizes(tunables))?,
            interfaces: Vec::new(),
            notes,
            folder,
            maps: Vec::new(),
            groups: BTreeMap::new(),
            cpus: u32::try_from(aya::util::nr_cpus().map_err(|(_, error)| error)?)?,
            undo,
        };
        kernel.prepare(wanted.hash_key)?;
        for link in &links {
            let interface = kernel.attach(link, wanted.mode)?;
            kernel.interfaces.push(interface);
        }
        detach_others(&kernel.folder, &links)?;
        Ok(kernel)
    }

    /// Lets it outlive us. Until then, whatever was made anew goes when this goes.
    pub fn keep(&mut self) {
        self.undo.armed = false;
    }

    /// Attaches to interfaces that went and came back, under the same name and another index: those, as they are now. One
    /// that is there as it was, and without our program, was taken away by somebody who may have meant it.
    ///
    /// # Errors
    /// rtnetlink does not answer, or the kernel refuses.
    pub fn reattach(&mut self, mode: DatapathMode) -> Result<Vec<Interface>> {
        let links = Network::open()?.links()?;
        let mut back = Vec::new();
        for at in 0..self.interfaces.len() {
            let Interface { name, index, .. } = &self.interfaces[at];
            let is_back = |link: &&Link| {
                link.name == *name && link.index != *index && link.xdp.is_none() && link.up
            };
            let Some(link) = links.iter().find(is_back) else {
                continue;
            };
            // The link that is pinned there leads to nothing any more.
            let stale = self.folder.join(format!("{LINK_PREFIX}{index}"));
            if stale.exists() {
                fs::remove_file(&stale).with_context(|| format!("remove {}", stale.display()))?;
            }
            let interface = self.attach(link, mode)?;
            back.push(interface.clone());
            self.interfaces[at] = interface;
        }
        Ok(back)
    }

    /// The ABI number, the keys of the flow hash, and no steering of an earlier keeper's sockets.
    fn prepare(&mut self, hash_key: Option<HashKey>) -> Result<()> {
        let abi_map = self
            .ebpf
            .map_mut(name::ABI)
            .ok_or_else(|| anyhow!("the map abi is missing"))?;
        Array::<_, u32>::try_from(abi_map)?.set(0, abi::ABI, 0)?;
        let keys = self
            .ebpf
            .map_mut(name::HASH_KEYS)
            .ok_or_else(|| anyhow!("the map hash_keys is missing"))?;
        let mut keys = Array::<_, Value<abi::HashKeys>>::try_from(keys)?;
        if let Some(HashKey(wanted)) = hash_key {
            keys.set(0, Value(abi::HashKeys { keys: wanted }), 0)?;
        } else if keys.get(&0, 0)?.0.keys == [0; 11] {
            let mut random = [0u8; size_of::<abi::HashKeys>()];
            // SAFETY: the buffer is as long as we say.
            let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
            if got != random.len() as isize {
                bail!("the system has no random bytes");
            }
            keys.set(0, Value(bytemuck::cast(random)), 0)?;
        }
        let steer = self
            .ebpf
            .map_mut(name::STEER)
            .ok_or_else(|| anyhow!("the map steer is missing"))?;
        let mut steer = HashMap::<_, Value<abi::SteerKey>, u32>::try_from(steer)?;
        let old: Vec<_> = steer.keys().collect::<Result<_, _>>()?;
        for key in old {
            steer.remove(&key)?;
        }
        for program in [name::RARE, name::INGRESS, name::SELECT] {
            self.load_program(program).with_context(|| {
                format!("load the program {program}: the kernel must be Linux 6.1 or later")
            })?;
        }
        self.lead_to_rare()?;
        for map in name::MAPS {
            let pinned = MapData::from_pin(self.folder.join(map))?;
            let descriptor = pinned.fd().as_fd().try_clone_to_owned()?;
            self.maps.push((map, descriptor));
        }
        Ok(())
    }

    /// The program that packets come to first hands rare ones to the other.
    fn lead_to_rare(&mut self) -> Result<()> {
        let rare = self
            .ebpf
            .program(name::RARE)
            .ok_or_else(|| anyhow!("the program rare is missing"))?;
        let rare = <&Xdp>::try_from(rare)?.fd()?.try_clone()?;
        let programs = self
            .ebpf
            .map_mut(name::PROGRAMS)
            .ok_or_else(|| anyhow!("the map programs is missing"))?;
        ProgramArray::try_from(programs)?.set(0, &rare, 0)?;
        Ok(())
    }

    fn load_program(&mut self, program: &str) -> Result<(), ProgramError> {
        let Some(found) = self.ebpf.program_mut(program) else {
            return Err(ProgramError::InvalidName {
                name: program.to_owned(),
            });
        };
        match program {
            name::INGRESS | name::RARE => <&mut Xdp>::try_from(found)?.load(),
            _ => <&mut SkReuseport>::try_from(found)?.load(),
        }
    }

    fn xdp(&mut self) -> Result<&mut Xdp> {
        let program = self
            .ebpf
            .program_mut(name::INGRESS)
            .ok_or_else(|| anyhow!("the program ingress is missing"))?;
        Ok(program.try_into()?)
    }

    fn attach(&mut self, link: &Link, mode: DatapathMode) -> Result<Interface> {
        let pin = self.folder.join(format!("{LINK_PREFIX}{}", link.index));
        let native_now = link.xdp.map(|(_, native)| native);
        let fits = match mode {
            DatapathMode::Native => native_now == Some(true),
            DatapathMode::Generic => native_now == Some(false),
            DatapathMode::Auto | DatapathMode::Off => native_now.is_some(),
        };
        let native = if pin.exists() && fits && self.replace(&pin)? {
            native_now == Some(true)
        } else {
            self.attach_anew(link, mode, &pin)?
        };
        let program = self.xdp()?.info()?.id();
        Ok(Interface {
            name: link.name.clone(),
            index: link.index,
            mode: if native { Mode::Native } else { Mode::Generic },
            program,
        })
    }

    /// Puts our program into a link that is pinned; `false` where the link has lost its interface.
    fn replace(&mut self, pin: &Path) -> Result<bool> {
        let link = PinnedLink::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
        let link = XdpLink::try_from(FdLink::from(link))
            .with_context(|| format!("{} is no XDP link", pin.display()))?;
        let xdp = self.xdp()?;
        match xdp.attach_to_link(link) {
            Ok(id) => {
                // The pin alone holds the link: then `datapath down` needs nobody's consent.
                drop(FdLink::try_from(xdp.take_link(id)?)?);
                Ok(true)
            }
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOLINK) =>
            {
                Ok(false)
            }
            Err(error) => {
                Err(error).with_context(|| format!("replace the program of {}", pin.display()))
            }
        }
    }

    /// Whether it is attached natively. What ran there in another mode has to go first; it comes back where the new
    /// mode is refused.
    fn attach_anew(&mut self, link: &Link, mode: DatapathMode, pin: &Path) -> Result<bool> {
        let replaced = pin.exists();
        if replaced {
            release(pin)?;
        }
        let attached = self.attach_by(link, mode, pin);
        match (&attached, link.xdp) {
            (Err(_), Some((_, native))) if replaced => {
                let before = if native {
                    XdpMode::Driver
                } else {
                    XdpMode::Skb
                };
                self.attach_as(link, before, pin)
                    .with_context(|| format!("put XDP back on {}", link.name))?;
            }
            (Ok(_), _) if !replaced => {
                self.undo.links.push(pin.to_owned());
            }
            _ => {}
        }
        attached
    }

    fn attach_by(&mut self, link: &Link, mode: DatapathMode, pin: &Path) -> Result<bool> {
        let name = &link.name;
        if mode != DatapathMode::Generic {
            match self.attach_as(link, XdpMode::Driver, pin) {
                Ok(()) => return Ok(true),
                Err(error) if mode == DatapathMode::Native => {
                    return Err(error).with_context(|| {
                        format!(
                            "attach XDP to {name} natively: the driver refuses; set datapath.mode = \"auto\" or \"generic\""
                        )
                    });
                }
                Err(error) => self.notes.push(format!(
                    "{name}: no native XDP ({error:#}), so it runs in generic mode, which is much slower"
                )),
            }
        }
        self.attach_as(link, XdpMode::Skb, pin).with_context(|| {
            format!("attach XDP to {name} in generic mode; set datapath.mode = \"off\"")
        })?;
        Ok(false)
    }

    fn attach_as(&mut self, link: &Link, mode: XdpMode, pin: &Path) -> Result<()> {
        let xdp = self.xdp()?;
        let id = xdp.attach_to_if_index(link.index, mode)?;
        let attached =
            FdLink::try_from(xdp.take_link(id)?).map_err(|error: LinkError| anyhow!(error))?;
        attached
            .pin(pin)
            .with_context(|| format!("pin the link of {}", link.name))?;
        Ok(())
    }

    /// The memory of the rate cells.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn cells(&self) -> Result<OwnedFd> {
        let cells = self.maps.iter().find(|(map, _)| *map == name::CELLS);
        let (_, cells) = cells.ok_or_else(|| anyhow!("the map cells is missing"))?;
        Ok(cells.try_clone()?)
    }

    /// The maps by name: for the daemon, which may use them but could not open the pins.
    pub fn descriptors(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        let own =
            |map: &str| [name::SOCKETS, name::STEER, name::ABI, name::PROGRAMS].contains(&map);
        self.maps
            .iter()
            .filter(move |(map, _)| !own(map))
            .map(|(map, descriptor)| (*map, descriptor.as_fd()))
    }
}

/// What goes again when a start comes to nothing.
struct Undo {
    /// Until the kernel half is kept.
    armed: bool,
    instance: String,
    /// The pins were there before; then only links that are new go.
    adopted: bool,
    links: Vec<PathBuf>,
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let undone = if self.adopted {
            self.links.iter().try_for_each(|pin| release(pin))
        } else {
            down(&self.instance).map(drop)
        };
        if let Err(error) = undone {
            log::error!(
                "cannot take the kernel half away again: {error:#}; run `sluice datapath down`"
            );
        }
    }
}

fn mount_bpffs(notes: &mut Vec<String>) -> Result<()> {
    let mounted = statfs(BPFFS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if mounted {
        return Ok(());
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None::<&str>,
    )
    .with_context(|| {
        format!("mount the BPF file system: run `mount -t bpf bpf {BPFFS}` as root")
    })?;
    notes.push(format!(
        "mounted the BPF file system at {BPFFS}: it was not there"
    ));
    Ok(())
}

/// Sizes that differ from those in the object.
fn sizes(tunables: &Tunables) -> BTreeMap<&'static str, u32> {
    let datapath = &tunables.datapath;
    BTreeMap::from([
        (name::LISTENERS4, datapath.listeners_max),
        (name::LISTENERS6, datapath.listeners_max),
        (name::PREFIXES, datapath.prefixes_max),
        (name::LISTENER_TRAFFIC, datapath.listeners_max),
        (name::STEER, datapath.listeners_max),
        (name::UPSTREAMS, datapath.upstreams_max),
        (name::ENDPOINTS, datapath.endpoints_max),
        (name::ENDPOINT_TRAFFIC, datapath.endpoints_max),
        (name::ENDPOINT_SIGNS, datapath.endpoints_max),
        (name::RINGS, datapath.ring_pages_max),
        (name::STAMPS, datapath.ring_pages_max),
        (name::FLOWS, datapath.nat_flows_max),
        (name::NAT_FLOWS, datapath.nat_flows_max),
        (name::BANS, datapath.bans_max),
        (name::CELLS, tunables.guard.cells_max),
    ])
}

fn load(folder: &Path, sizes: &BTreeMap<&'static str, u32>) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for map in name::MAPS {
        loader.map_pin_path(map, folder.join(map));
    }
    for (map, entries) in sizes {
        loader.map_max_entries(map, *entries);
    }
    loader.load(proxy_ebpf::object::KERNEL).with_context(|| {
        format!(
            "make the maps of the kernel half in {}; as root, or with CAP_BPF and CAP_NET_ADMIN",
            folder.display()
        )
    })
}

/// Detaches from interfaces that are not configured any more, and forgets those that are gone.
fn detach_others(folder: &Path, links: &[&Link]) -> Result<()> {
    for (index, path) in pinned_links(folder) {
        if !links.iter().any(|link| link.index == index) {
            release(&path)?;
        }
    }
    Ok(())
}

/// Removes the pin of a link, which detaches its program. The kernel does that a moment later, in the background: waits
/// for it, so that who attaches next finds nobody.
fn release(pin: &Path) -> Result<()> {
    let program = PinnedLink::from_pin(pin)
        .ok()
        .and_then(|pinned| FdLink::from(pinned).info().ok())
        .map(|info| info.program_id());
    fs::remove_file(pin).with_context(|| format!("remove {}; run it as root", pin.display()))?;
    let end = Instant::now() + RELEASE_LIMIT;
    while let Some(program) = program
        && Instant::now() < end
    {
        let links = Network::open()?.links()?;
        let attached = |link: &Link| link.xdp.is_some_and(|(id, _)| id == program);
        let index = pin_index(pin);
        if !links
            .iter()
            .any(|link| Some(link.index) == index && attached(link))
        {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The index of the interface whose link is pinned there.
fn pin_index(pin: &Path) -> Option<u32> {
    let name = pin.file_name()?.to_str()?;
    name.strip_prefix(LINK_PREFIX)?.parse().ok()
}

/// Index and path of each pinned link.
fn pinned_links(folder: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((pin_index(&entry.path())?, entry.path())))
        .collect()
}
