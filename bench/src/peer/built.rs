//! A proxy that cargo builds: one of crates.io, or a minimal program of ours on a library. Outside of the workspace, once, into target/.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use rig::namespace::output;

use super::downloads;
use crate::say;

/// What to build.
#[derive(Clone, Copy, Debug)]
pub enum Crate {
    /// A program of crates.io, with the lock that it brings.
    Registry {
        package: &'static str,
        version: &'static str,
    },
    /// `bench/peers/FOLDER`, a workspace of its own with its own lock.
    Ours {
        folder: &'static str,
        program: &'static str,
    },
}

impl Crate {
    /// Does nothing where it is there already. Takes minutes the first time.
    pub fn install(self) -> Result<()> {
        if self.program().is_ok() {
            return Ok(());
        }
        let start = Instant::now();
        let target = self.folder()?;
        say::note(&format!(
            "building {} into {}: minutes, once",
            self.name(),
            target.display()
        ));
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        match self {
            Self::Registry { package, version } => cargo
                .args([
                    "install",
                    "--locked",
                    package,
                    "--version",
                    version,
                    "--root",
                ])
                .arg(&target)
                .arg("--target-dir")
                .arg(target.join("build")),
            Self::Ours { folder, .. } => cargo
                .args(["build", "--release", "--locked", "--manifest-path"])
                .arg(
                    Path::new(env!("CARGO_MANIFEST_DIR"))
                        .join("peers")
                        .join(folder)
                        .join("Cargo.toml"),
                )
                .arg("--target-dir")
                .arg(&target),
        };
        output(cargo.arg("--quiet").env_remove("RUSTFLAGS"))?;
        say::note(&format!("built in {:.0} s", start.elapsed().as_secs_f32()));
        Ok(())
    }

    /// Where its program is.
    pub fn program(self) -> Result<PathBuf> {
        let path = match self {
            Self::Registry { package, .. } => self.folder()?.join("bin").join(package),
            Self::Ours { program, .. } => self.folder()?.join("release").join(program),
        };
        path.is_file()
            .then_some(path)
            .with_context(|| format!("not installed: cargo could not build {}", self.name()))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Registry { package, .. } => package,
            Self::Ours { folder, .. } => folder,
        }
    }

    fn folder(self) -> Result<PathBuf> {
        Ok(downloads()?.join(match self {
            Self::Registry { package, version } => format!("{package}-{version}"),
            Self::Ours { folder, .. } => folder.to_owned(),
        }))
    }
}
