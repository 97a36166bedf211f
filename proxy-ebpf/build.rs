//! Builds the kernel half for the bpf target, so that `object` can embed it: the one place that knows how.
//!
//! Only with the feature `object`: the shared code alone, and the build for bpf that this file starts, need no toolchain but their own.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Debian's compiler, of the package rustc-web: it has core for the bpf target ready made.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Programs of this package for the bpf target.
const OBJECTS: [&str; 2] = ["sluice-kernel", "sluice-floor"];

/// What can build for the bpf target.
enum Toolchain {
    /// rustup's nightly with rust-src, which builds core by itself.
    Nightly,
    /// Debian's rustc-web with libstd-rust-web-dev-bpf.
    Debian,
}

impl Toolchain {
    fn name(&self) -> &'static str {
        match self {
            Self::Nightly => "nightly with rust-src",
            Self::Debian => "Debian's rustc-web",
        }
    }
}

fn main() {
    for path in [
        "build.rs",
        "src",
        "Cargo.toml",
        "../Cargo.toml",
        "../Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=PATH");
    if env::var_os("CARGO_FEATURE_OBJECT").is_none() {
        return;
    }
    if let Err(error) = build() {
        // One line: cargo shows no more of it.
        println!("cargo::error={}", error.replace('\n', " | "));
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let toolchain = toolchain(target)?;
    println!("cargo::rustc-env=SLUICE_BPF_TOOLCHAIN={}", toolchain.name());
    println!("building {target} with {}", toolchain.name());
    let out = PathBuf::from(variable("OUT_DIR")?);
    let target_directory = target_directory(&out);
    let output = command(&toolchain, target, &target_directory)?
        .output()
        .map_err(|error| format!("start cargo for the kernel half: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "the kernel half does not build with {}: {}",
            toolchain.name(),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    // What the compiler warns of, for cargo shows nothing else of a build that succeeds.
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::warning={line}");
    }
    for object in OBJECTS {
        let from = target_directory.join(target).join("bpf").join(object);
        std::fs::copy(&from, out.join(object))
            .map_err(|error| format!("copy {}: {error}", from.display()))?;
    }
    Ok(())
}

/// Decides which toolchain builds: nightly with rust-src where it is installed, else Debian's.
fn toolchain(target: &str) -> Result<Toolchain, String> {
    let sysroot =
        stdout(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    if let Some(sysroot) = sysroot
        && Path::new(&sysroot)
            .join("lib/rustlib/src/rust/library/core")
            .is_dir()
    {
        return Ok(Toolchain::Nightly);
    }
    let libraries =
        stdout(Command::new(DEBIAN_RUSTC).args(["--print", "target-libdir", "--target", target]));
    if let Some(libraries) = libraries
        && Path::new(&libraries).is_dir()
    {
        return Ok(Toolchain::Debian);
    }
    Err(
        "nothing here can build for the bpf target: neither rustup's nightly with rust-src nor \
         Debian's rustc-web with libstd-rust-web-dev-bpf is installed; run `cargo xtask setup`"
            .into(),
    )
}

/// The inner cargo. It must not see what the outer one set up for its own target, nor clippy's wrapper.
fn command(toolchain: &Toolchain, target: &str, directory: &Path) -> Result<Command, String> {
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    let mut command = match toolchain {
        Toolchain::Nightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
            command
        }
        Toolchain::Debian => {
            let mut command = Command::new(variable("CARGO")?);
            command.arg("build");
            command
        }
    };
    for (key, _) in env::vars_os() {
        if leaks(&key) {
            command.env_remove(key);
        }
    }
    if let Toolchain::Debian = toolchain {
        // Core's atomics and aya-ebpf ask for unstable features.
        command
            .env("RUSTC", DEBIAN_RUSTC)
            .env("RUSTC_BOOTSTRAP", "1");
    }
    let flags = [
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        &format!("-Clinker={}", linker()?.display()),
        "-Ctarget-cpu=v3",
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
    ];
    command
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .args([
            "--quiet",
            "--package",
            "proxy-ebpf",
            "--bins",
            "--profile",
            "bpf",
        ])
        .args(["--target", target, "--target-dir"])
        .arg(directory)
        .current_dir(variable("CARGO_MANIFEST_DIR")?);
    if env::var_os("CARGO_FEATURE_TRACE").is_some() {
        command.args(["--features", "trace"]);
    }
    Ok(command)
}

/// Whether a variable of the outer build would change the inner one.
fn leaks(key: &OsString) -> bool {
    const NAMES: [&str; 8] = [
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_ENCODED_RUSTFLAGS",
        "TARGET",
    ];
    const PREFIXES: [&str; 6] = [
        "CARGO_BUILD_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
        "CARGO_UNSTABLE_",
    ];
    let key = key.to_string_lossy();
    NAMES.contains(&key.as_ref()) || PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// Where bpf-linker stands: in PATH, or where `cargo install` puts it.
fn linker() -> Result<PathBuf, String> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|directory| directory.join("bpf-linker"))
        .find(|linker| linker.is_file())
        .ok_or_else(|| "bpf-linker is not installed; run `cargo xtask setup`".into())
}

/// A target directory of its own, for the outer cargo holds the lock of its own one. It lies inside the outer
/// one, so that debug, release and test builds share it and `cargo clean` removes it.
fn target_directory(out: &Path) -> PathBuf {
    out.ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").is_file())
        .unwrap_or(out)
        .join("bpf")
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

/// What a command prints on stdout, trimmed, if it starts and succeeds.
fn stdout(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
