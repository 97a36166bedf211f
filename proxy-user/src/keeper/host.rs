//! What the host must offer, asked before anything is begun: kernel, capabilities, io_uring, interfaces, limits.

use std::net::IpAddr;

use crate::config::{Config, Diagnostic};
use crate::control::configuration::has_datapath;
use crate::datapath::{capabilities_missing, network::Network, obstacles};
use crate::net;
use crate::tunable::Tunables;

/// The oldest kernel that has all we use.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// What keeps this configuration from running on this host, and warnings about what will not go well.
pub fn faults(config: &Config, tunables: &Tunables, instance: &str) -> Vec<Diagnostic> {
    let mut faults = Vec::new();
    faults.extend(old_kernel(&release()));
    if let Err(error) = net::probe() {
        faults.push(Diagnostic::error(error.to_string()));
    }
    if has_datapath(config) {
        datapath_faults(config, tunables, instance, &mut faults);
    }
    faults.extend(few_descriptors(tunables));
    faults
}

fn datapath_faults(
    config: &Config,
    tunables: &Tunables,
    instance: &str,
    faults: &mut Vec<Diagnostic>,
) {
    let datapath = &config.datapath;
    let missing = capabilities_missing();
    if missing.is_empty() {
        match obstacles(instance, datapath, tunables) {
            Ok(found) => faults.extend(
                found
                    .into_iter()
                    .map(|obstacle| Diagnostic::error(obstacle).at(&datapath.at)),
            ),
            Err(error) => faults.push(Diagnostic::error(format!("{error:#}")).at(&datapath.at)),
        }
    } else {
        faults.push(
            Diagnostic::error(format!("the kernel half needs {}, which this process has not", missing.join(" and ")))
                .at(&datapath.at)
                .help("start as root, or set datapath.mode = \"off\" (or --datapath off) to run without the kernel half"),
        );
    }
    let own = Network::open().and_then(|mut network| network.addresses());
    let Ok(addresses) = own else { return };
    if let Some(nat) = &config.datapath.nat {
        let absent = |source: &&IpAddr| !addresses.iter().any(|(_, own)| own == *source);
        for source in nat.source.iter().filter(absent) {
            faults.push(
                Diagnostic::warning(format!("no interface of this host has the NAT source {source}"))
                    .at(&nat.at)
                    .help("unless it is routed to this host, no reply of an endpoint will find its way back"),
            );
        }
    }
}

fn few_descriptors(tunables: &Tunables) -> Option<Diagnostic> {
    use nix::sys::resource::{Resource, getrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let root = nix::unistd::Uid::effective().is_root();
    (hard < 1024 && !root).then(|| {
        Diagnostic::warning(format!(
            "this process may open {hard} files, for up to {} connections of each worker",
            tunables.net.connections_max
        ))
        .help("raise the limit (LimitNOFILE=, ulimit -n)")
    })
}

fn old_kernel(release: &str) -> Option<Diagnostic> {
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next()?, numbers.next()?);
    (version < KERNEL_MIN).then(|| {
        let (major, minor) = KERNEL_MIN;
        Diagnostic::error(format!("the kernel {release} is too old"))
            .help(format!("run Linux {major}.{minor} or later"))
    })
}

fn release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_6_1_are_refused() {
        assert!(
            old_kernel("5.15.0-91-generic").is_some_and(|fault| fault.message.contains("5.15"))
        );
        assert!(old_kernel("6.0.19").is_some());
        assert!(old_kernel("6.1.0-18-amd64").is_none());
        assert!(old_kernel("7.0").is_none());
    }
}
