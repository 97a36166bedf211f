//! `cargo xtask setup`: installs what building and testing need and this machine lacks, and says what and why.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{say, tree};

/// A Debian package and what it is for.
pub struct Package<'a> {
    pub name: &'a str,
    pub purpose: &'a str,
}

/// Packages that start a service when they are installed, and its name. We start our own, on their own ports, where they are needed.
const SERVICES: &[(&str, &str)] = &[
    ("nginx-light", "nginx"),
    ("haproxy", "haproxy"),
    ("varnish", "varnish"),
    ("varnish", "varnishncsa"),
];

/// Debian's `rustc-web` brings what the kernel half needs ready made: a compiler whose LLVM is 22, and `core` for
/// bpfel-unknown-none. It stands beside rustup's toolchain, which builds the user half.
const PACKAGES: &[Package<'static>] = &[
    package("rustc-web", "compiles the kernel half"),
    package("libstd-rust-web-dev-bpf", "core, compiled for BPF"),
    package("llvm-22-dev", "bpf-linker is built on LLVM 22"),
    package("libpolly-22-dev", "bpf-linker is built on LLVM 22"),
    package("gcc", "compiles the cryptography of the user half (aws-lc)"),
    package("g++", "links bpf-linker with LLVM"),
    package("libc6-dev", "headers for both"),
    package("nginx-light", "the origins of demo and tests"),
    package("curl", "the client of demo and tests"),
    package("dnsmasq-base", "the name server of tests"),
    package("openssl", "makes certificates for demo and tests"),
    package("iproute2", "makes network namespaces"),
    package("ethtool", "sets up veth pairs, and reads their statistics"),
    package("procps", "ps and sysctl, to look at what runs"),
];

/// What some tests drive us with; the demo does without.
const TOOLS: &[Package<'static>] = &[
    package("haproxy", "reads in tests what we forward, and is measured"),
    package("slowhttptest", "slow clients"),
    package("varnish", "varnishtest, which scripts both sides of a test"),
    package("python3", "a client of its own kind"),
];

const BPF_LINKER: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22/bin";
/// Debian's own switch: while this answers 101, no package starts a service when it is installed.
const POLICY: &str = "/usr/sbin/policy-rc.d";

const fn package(name: &'static str, purpose: &'static str) -> Package<'static> {
    Package { name, purpose }
}

/// Brings the machine into shape. Does nothing, quickly, where it is already.
pub fn run() -> Result<()> {
    say::section("Setup");
    install(PACKAGES)?;
    install_bpf_linker()?;
    install_components()
}

/// What the tests want beside; a test skips, aloud, what could not be installed.
pub fn tools() -> Result<()> {
    install(TOOLS)
}

/// Installs those of these packages that are missing.
pub fn install(packages: &[Package]) -> Result<()> {
    let missing: Vec<&Package> = packages
        .iter()
        .filter(|package| !is_installed(package.name))
        .collect();
    if missing.is_empty() {
        say::step(
            "packages",
            &format!("all {} Debian packages are there", packages.len()),
        );
        return Ok(());
    }
    for package in &missing {
        say::begin(
            "missing",
            &format!("{:<24} {}", package.name, package.purpose),
        );
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if !on_path("apt-get") {
        bail!(
            "this is no Debian: install by hand what these packages bring: {}",
            names.join(" ")
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "installing packages needs root; run: sudo apt-get install --no-install-recommends {}",
            names.join(" ")
        );
    }
    let start = Instant::now();
    let _quiet = NoServices::begin()?;
    say::begin("apt-get", "update");
    apt(&["update"])?;
    say::begin("apt-get", &format!("install {}", names.join(" ")));
    apt(&[
        &["install", "--yes", "--no-install-recommends"],
        names.as_slice(),
    ]
    .concat())?;
    for (_, service) in SERVICES
        .iter()
        .filter(|(package, _)| names.contains(package))
    {
        // The machine's owner asked for none.
        if Path::new("/run/systemd/system").exists() {
            let _ = Command::new("systemctl")
                .args(["disable", "--now", service])
                .output();
        }
    }
    say::step(
        "packages",
        &format!("{} installed in {}", names.len(), say::since(start)),
    );
    Ok(())
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .is_ok_and(|done| done.status.success() && done.stdout == b"installed")
}

fn apt(arguments: &[&str]) -> Result<()> {
    let done = Command::new("apt-get")
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("start apt-get")?;
    if !done.status.success() {
        eprint!(
            "{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
        bail!("apt-get {} ({})", arguments.join(" "), done.status);
    }
    Ok(())
}

/// While this lives, packages start no services. A policy that is there already stays as it is.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn begin() -> Result<Self> {
        let ours = !Path::new(POLICY).exists();
        if ours {
            fs::write(POLICY, "#!/bin/sh\nexit 101\n")
                .with_context(|| format!("write {POLICY}"))?;
            fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            say::failed(&format!(
                "remove {POLICY} by hand, or no service starts at its installation: {error}"
            ));
        }
    }
}

fn install_bpf_linker() -> Result<()> {
    let wanted = format!("bpf-linker {BPF_LINKER}");
    let path = cargo_home()?.join("bin/bpf-linker");
    let found = Command::new(&path).arg("--version").output().ok();
    if found.is_some_and(|done| String::from_utf8_lossy(&done.stdout).trim() == wanted) {
        say::step("bpf-linker", &format!("{BPF_LINKER} is there"));
        return Ok(());
    }
    say::begin(
        "bpf-linker",
        &format!("building {BPF_LINKER}, which links the kernel half (about a minute)"),
    );
    let start = Instant::now();
    let path = format!("{LLVM}:{}", std::env::var("PATH").unwrap_or_default());
    let done = tree::cargo(&[
        "install",
        "bpf-linker",
        "--version",
        BPF_LINKER,
        "--locked",
        "--force",
    ])
    .args(["--no-default-features", "--features", "llvm-22"])
    .env("PATH", path)
    .env_remove("RUSTFLAGS")
    .output()
    .context("start cargo install")?;
    if !done.status.success() {
        eprint!("{}", String::from_utf8_lossy(&done.stderr));
        bail!("cargo install bpf-linker ({})", done.status);
    }
    say::step(
        "bpf-linker",
        &format!("{BPF_LINKER} built in {}", say::since(start)),
    );
    Ok(())
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = std::env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(Path::new(&home).join(".cargo"))
}

/// The parts of a Rust toolchain that a minimal one lacks.
fn install_components() -> Result<()> {
    let missing: Vec<&str> = [("fmt", "rustfmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(command, _)| {
            !tree::cargo(&[command, "--version"])
                .output()
                .is_ok_and(|done| done.status.success())
        })
        .map(|(_, component)| component)
        .collect();
    if !missing.is_empty() {
        say::begin("rustup", &format!("adding {}", missing.join(" and ")));
        tree::run(
            Command::new("rustup")
                .args(["--quiet", "component", "add"])
                .args(&missing),
        )?;
    }
    say::step("rust", "rustfmt and clippy are there");
    Ok(())
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
