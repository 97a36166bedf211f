//! What the host must offer, asked before anything is begun: kernel, capabilities, io_uring, interfaces, limits.

use std::net::IpAddr;

use super::access_log;
use crate::config::{Config, Diagnostic, Nat};
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
    if let Err(refused) = net::choose(tunables.net.backend) {
        faults.push(
            Diagnostic::error(refused.to_string())
                .help("or let net.backend be \"auto\", and workers use epoll"),
        );
    }
    faults.extend(access_log::fault(config));
    if has_datapath(config) {
        datapath_faults(config, tunables, instance, &mut faults);
    }
    faults.extend(few_descriptors(tunables));
    faults
}

/// A warning where workers will use epoll because io_uring is refused; when they do, the daemon says so itself.
pub fn second_choice(tunables: &Tunables) -> Option<Diagnostic> {
    let refused = net::choose(tunables.net.backend).ok()?.refused?;
    Some(
        Diagnostic::warning(format!("workers will use epoll: {refused}")).help(
            "it serves the same, at more cost; with net.backend = \"epoll\" nothing is said of it",
        ),
    )
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
        let is_own = nat.source.iter().any(|source| !absent(&source));
        let setting = |name| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
        if let (true, Ok(range), Ok(reserved)) = (
            is_own,
            setting("ip_local_port_range"),
            setting("ip_local_reserved_ports"),
        ) {
            faults.extend(shared_ports(nat, &range, &reserved));
        }
    }
}

/// Linux takes ports for its own connections from `range` ("32768 60999") without those of `reserved` ("8080,9000-9100"):
/// from a NAT source to an endpoint that would be two flows with one tuple.
fn shared_ports(nat: &Nat, range: &str, reserved: &str) -> Option<Diagnostic> {
    let span = |text: &str, between: char| -> Option<(u16, u16)> {
        let (first, last) = text.split_once(between).unwrap_or((text, text));
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    let (first, last) = span(range.trim(), '\t')?;
    let (first, last) = (first.max(nat.ports.0), last.min(nat.ports.1));
    let kept: Vec<_> = reserved
        .trim()
        .split(',')
        .filter_map(|part| span(part, '-'))
        .collect();
    let is_kept = |port: u16| kept.iter().any(|(from, to)| (*from..=*to).contains(&port));
    (first..=last).any(|port| !is_kept(port)).then(|| {
        Diagnostic::warning(format!(
            "Linux takes ports {first}-{last} for its own connections, and `nat` does so too"
        ))
        .at(&nat.at)
        .help(format!(
            "keep them apart: sysctl -w net.ipv4.ip_local_reserved_ports={}-{}",
            nat.ports.0, nat.ports.1
        ))
    })
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

    #[test]
    fn ports_that_linux_takes_too_are_told_unless_they_are_reserved() {
        let nat = Nat {
            source: vec![IpAddr::from([10, 0, 0, 1])],
            ports: (20_000, 40_000),
            at: crate::config::Origin::Default,
        };
        let told = |range, reserved| shared_ports(&nat, range, reserved).map(|fault| fault.message);
        let message = told("32768\t60999\n", "\n").unwrap_or_default();
        assert!(message.contains("32768-40000"), "{message}");
        assert!(told("32768\t60999\n", "8080,20000-39999\n").is_some());
        assert_eq!(told("32768\t60999\n", "8080,20000-40000\n"), None);
        assert_eq!(told("40001\t60999\n", "\n"), None);
        assert_eq!(told("1024\t19999\n", "\n"), None);
    }
}
