//! What needs privileges: loading the programs, making or adopting the pins, attaching, and taking it all away again.

mod status;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use aya::maps::{Array, HashMap, MapData, ReusePortSockArray};
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
use super::{Mode, address, pin_folder, port};
use crate::config::DatapathMode;
use crate::tunable::Tunables;

pub use status::{Status, capabilities_missing, down, status};

const BPFFS: &str = "/sys/fs/bpf";

/// Links are pinned by the index of their interface: bpffs forbids the dots that names may have.
const LINK_PREFIX: &str = "link_";

/// The kernel half as the keeper holds it.
pub struct Kernel {
    ebpf: Ebpf,
    /// Where XDP is attached.
    pub interfaces: Vec<Interface>,
    /// What an operator should know about how it came up.
    pub notes: Vec<String>,
    folder: PathBuf,
    groups: BTreeMap<SocketAddr, u32>,
    cpus: u32,
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
    pub fn up(
        instance: &str,
        names: &[String],
        mode: DatapathMode,
        tunables: &Tunables,
    ) -> Result<Self> {
        let mut notes = Vec::new();
        mount_bpffs(&mut notes)?;
        let folder = pin_folder(instance);
        let mut network = Network::open().context("open a netlink socket")?;
        let links = network
            .links()
            .context("read the interfaces of this host")?;
        let links = choose_links(&links, names)?;
        // Everything that can be refused is refused before anything is made.
        for link in &links {
            refuse_foreign(link, &folder)?;
        }
        let sizes = sizes(tunables);
        check_pins(&folder, &sizes)?;
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let ebpf = load(&folder, &sizes)?;
        let cpus = u32::try_from(aya::util::nr_cpus().map_err(|(_, error)| error)?)?;
        let folder_of = folder.clone();
        let mut kernel = Self {
            ebpf,
            interfaces: Vec::new(),
            notes,
            folder: folder_of,
            groups: BTreeMap::new(),
            cpus,
        };
        kernel.prepare()?;
        detach_others(&folder, &links)?;
        for link in &links {
            let interface = kernel.attach(link, mode, &folder)?;
            kernel.interfaces.push(interface);
        }
        Ok(kernel)
    }

    /// The ABI number, the keys of the flow hash, and no steering of an earlier keeper's sockets.
    fn prepare(&mut self) -> Result<()> {
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
        if keys.get(&0, 0)?.0.keys == [0; 11] {
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
        for program in [name::INGRESS, name::SELECT] {
            self.load_program(program).with_context(|| {
                format!("load the program {program}: the kernel must be Linux 6.1 or later")
            })?;
        }
        Ok(())
    }

    fn load_program(&mut self, program: &str) -> Result<(), ProgramError> {
        let Some(found) = self.ebpf.program_mut(program) else {
            return Err(ProgramError::InvalidName {
                name: program.to_owned(),
            });
        };
        match program {
            name::INGRESS => <&mut Xdp>::try_from(found)?.load(),
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

    fn attach(&mut self, link: &Link, mode: DatapathMode, folder: &Path) -> Result<Interface> {
        let pin = folder.join(format!("{LINK_PREFIX}{}", link.index));
        let native_now = link.xdp.map(|(_, native)| native);
        let fits = match mode {
            DatapathMode::Native => native_now == Some(true),
            DatapathMode::Generic => native_now == Some(false),
            DatapathMode::Auto | DatapathMode::Off => native_now.is_some(),
        };
        let attached = if pin.exists() && fits && self.replace(&pin)? {
            native_now == Some(true)
        } else {
            if pin.exists() {
                fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
            }
            self.attach_anew(link, mode, &pin)?
        };
        let program = self.xdp()?.info()?.id();
        let mode = if attached {
            Mode::Native
        } else {
            Mode::Generic
        };
        Ok(Interface {
            name: link.name.clone(),
            index: link.index,
            mode,
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

    /// Whether it is attached natively.
    fn attach_anew(&mut self, link: &Link, mode: DatapathMode, pin: &Path) -> Result<bool> {
        let native = match mode {
            DatapathMode::Generic => None,
            _ => Some(self.attach_as(link, XdpMode::Driver, pin)),
        };
        match (native, mode) {
            (Some(Ok(())), _) => Ok(true),
            (Some(Err(error)), DatapathMode::Native) => Err(error).with_context(|| {
                format!("attach XDP to {} natively: the driver refuses; set datapath.mode = \"auto\" or \"generic\"", link.name)
            }),
            (native, _) => {
                if let Some(Err(error)) = native {
                    self.notes.push(format!(
                        "{}: no native XDP ({error:#}), so it runs in generic mode, which is much slower",
                        link.name
                    ));
                }
                self.attach_as(link, XdpMode::Skb, pin)
                    .with_context(|| format!("attach XDP to {} in generic mode; set datapath.mode = \"off\"", link.name))?;
                Ok(false)
            }
        }
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
        Ok(MapData::from_pin(self.folder.join(name::CELLS))?
            .fd()
            .as_fd()
            .try_clone_to_owned()?)
    }

    /// Copies of the maps' descriptors, by name: for the daemon, which may use them but could not open the pins.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn descriptors(&self) -> Result<Vec<(String, OwnedFd)>> {
        let descriptor = |map_name: &str| -> Result<(String, OwnedFd)> {
            let map = MapData::from_pin(self.folder.join(map_name))?;
            Ok((map_name.to_owned(), map.fd().as_fd().try_clone_to_owned()?))
        };
        name::MAPS
            .iter()
            .filter(|map| ![name::SOCKETS, name::STEER, name::ABI].contains(map))
            .map(|map| descriptor(map))
            .collect()
    }

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

fn choose_links(links: &[Link], names: &[String]) -> Result<Vec<Link>> {
    names
        .iter()
        .map(|name| {
            let found = links.iter().find(|link| link.name == *name).cloned();
            let known = || {
                links
                    .iter()
                    .map(|link| link.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            found.ok_or_else(|| {
                anyhow!(
                    "datapath.interfaces: there is no interface {name}; there are {}",
                    known()
                )
            })
        })
        .collect()
}

/// Whether each of the interfaces is free of XDP programs of others; one that does not exist is.
///
/// # Errors
/// One is not: whose program it is, and what to do.
pub fn foreign_program(instance: &str, names: &[String]) -> Result<()> {
    let links = Network::open()?.links()?;
    links
        .iter()
        .filter(|link| names.contains(&link.name))
        .try_for_each(|link| refuse_foreign(link, &pin_folder(instance)))
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

/// Sizes that differ from those in the object.
fn sizes(tunables: &Tunables) -> BTreeMap<&'static str, u32> {
    let datapath = &tunables.datapath;
    BTreeMap::from([
        (name::LISTENERS4, datapath.listeners_max),
        (name::LISTENERS6, datapath.listeners_max),
        (name::LISTENER_TRAFFIC, datapath.listeners_max),
        (name::STEER, datapath.listeners_max),
        (name::UPSTREAMS, datapath.upstreams_max),
        (name::ENDPOINTS, datapath.endpoints_max),
        (name::ENDPOINT_TRAFFIC, datapath.endpoints_max),
        (name::RINGS, datapath.ring_pages_max),
        (name::FLOWS, datapath.nat_flows_max),
        (name::NAT_FLOWS, datapath.nat_flows_max),
        (name::BANS, datapath.bans_max),
        (name::CELLS, tunables.guard.cells_max),
    ])
}

/// Pins of another version or other sizes are not adopted.
fn check_pins(folder: &Path, sizes: &BTreeMap<&str, u32>) -> Result<()> {
    let remedy = "run `sluice datapath down`, which ends its flows and bans, and start again";
    let abi_pin = folder.join(name::ABI);
    if abi_pin.exists() {
        let map =
            MapData::from_pin(&abi_pin).with_context(|| format!("open {}", abi_pin.display()))?;
        let pinned = Array::<_, u32>::try_from(aya::maps::Map::Array(map))?.get(&0, 0)?;
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
fn detach_others(folder: &Path, links: &[Link]) -> Result<()> {
    for (index, path) in pinned_links(folder) {
        if !links.iter().any(|link| link.index == index) {
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Index and path of each pinned link.
fn pinned_links(folder: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let index = name.to_str()?.strip_prefix(LINK_PREFIX)?.parse().ok()?;
            Some((index, entry.path()))
        })
        .collect()
}
