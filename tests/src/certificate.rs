//! Certificates on the fly: an authority, and leaves signed by it, made by openssl as PEM files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::namespace::output;

/// An authority that nobody trusts but who is told to.
pub struct Authority {
    folder: PathBuf,
}

impl Authority {
    /// Makes one in `folder`: `ca.pem` and `ca.key`.
    pub fn create(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let authority = Self {
            folder: folder.to_owned(),
        };
        output(
            request(
                "/CN=Sluice test authority",
                &authority.file("ca.key"),
                &authority.certificate(),
            )
            .args(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]),
        )
        .context("make a certificate authority")?;
        Ok(authority)
    }

    /// The certificate that clients are told to trust.
    pub fn certificate(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// Makes `<stem>.pem` (the leaf) and `<stem>.key` in `folder` for these names (`example.test`, or an IP address).
    pub fn sign(&self, folder: &Path, stem: &str, names: &[&str]) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let key = folder.join(format!("{stem}.key"));
        let subject = names
            .first()
            .map(|name| format!("/CN={name}"))
            .context("a certificate without a name")?;
        let alternatives: Vec<String> = names.iter().map(|name| alternative(name)).collect();
        output(
            request(&subject, &key, &folder.join(format!("{stem}.pem")))
                .arg("-CA")
                .arg(self.certificate())
                .arg("-CAkey")
                .arg(self.file("ca.key"))
                .args([
                    "-addext",
                    &format!("subjectAltName={}", alternatives.join(",")),
                ])
                .args(["-addext", "basicConstraints=critical,CA:FALSE"]),
        )
        .with_context(|| format!("sign a certificate for {names:?}"))?;
        // The daemon that reads it has no privileges, and nobody else sees this file system.
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644))?;
        Ok(())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

fn request(subject: &str, key: &Path, certificate: &Path) -> Command {
    let mut command = Command::new("openssl");
    command
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "30",
        ])
        .args(["-subj", subject])
        .arg("-keyout")
        .arg(key)
        .arg("-out")
        .arg(certificate);
    command
}

fn alternative(name: &str) -> String {
    let kind = if name.parse::<std::net::IpAddr>().is_ok() {
        "IP"
    } else {
        "DNS"
    };
    format!("{kind}:{name}")
}
