//! From files and flags to a configuration that can be applied: the keeper and the daemon both go this way.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{
    self, Config, DatapathMode, Diagnostic, ListenerMode, Loaded, ProbeKind, Reader,
};
use crate::tls;
use crate::tunable::Origin;

/// What the command line says beside the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flags {
    /// `--set`: key and value, in order.
    pub set: Vec<(String, String)>,
    /// `--datapath`: one of `auto`, `native`, `generic`, `off`.
    pub datapath: Option<String>,
}

/// Loads the file and puts the flags over it.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn load(reader: &dyn Reader, main: &Path, flags: &Flags) -> Result<Loaded, Vec<Diagnostic>> {
    let check = |pem: &config::CertificatePem| {
        tls::Certificate::parse(&pem.chain, &pem.key)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let mut loaded = config::load_checked(reader, main, &check)?;
    let mut faults = Vec::new();
    for (key, value) in &flags.set {
        if let Err(error) = loaded.tunables.assign(key, value, Origin::Flag) {
            faults.push(Diagnostic::error(format!("--set {key}={value}: {error}")));
        }
    }
    if let Some(word) = &flags.datapath {
        match datapath_mode(word) {
            Some(mode) => loaded.config.datapath.mode = mode,
            None => faults.push(Diagnostic::error(format!(
                "--datapath {word}: it is auto, native, generic or off"
            ))),
        }
    }
    faults.extend(forwards_nowhere(&loaded.config));
    faults.extend(trusts_nobody(&loaded.config));
    if faults.is_empty() {
        Ok(loaded)
    } else {
        Err(faults)
    }
}

/// Probes over TLS that could believe no endpoint.
fn trusts_nobody(config: &Config) -> Vec<Diagnostic> {
    let fault = |upstream: &config::Upstream| {
        let ProbeKind::Http(http) = &upstream.probe.as_ref()?.kind else {
            return None;
        };
        let error = tls::Connector::new(http.tls.as_ref()?).err()?;
        let message = format!("the probe of `{}` trusts nobody: {error}", upstream.name);
        Some(Diagnostic::error(message).at(&upstream.at))
    };
    config.upstreams.iter().filter_map(fault).collect()
}

/// Whether the configuration asks for a kernel half.
pub fn has_datapath(config: &Config) -> bool {
    !config.datapath.interfaces.is_empty() && config.datapath.mode != DatapathMode::Off
}

fn datapath_mode(word: &str) -> Option<DatapathMode> {
    match word {
        "auto" => Some(DatapathMode::Auto),
        "native" => Some(DatapathMode::Native),
        "generic" => Some(DatapathMode::Generic),
        "off" => Some(DatapathMode::Off),
        _ => None,
    }
}

/// Listeners that forward need the kernel half: there is no other forwarding yet.
fn forwards_nowhere(config: &Config) -> Vec<Diagnostic> {
    if has_datapath(config) {
        return Vec::new();
    }
    let forwards =
        |listener: &&config::Listener| matches!(listener.mode, ListenerMode::Forward { .. });
    let fault = |listener: &config::Listener| {
        Diagnostic::error(format!("the listener `{}` forwards in the kernel, and the datapath is off", listener.name))
            .at(&listener.at)
            .help("name the interfaces in [datapath] and let its mode be auto, native or generic, or serve the listener")
    };
    config
        .listeners
        .iter()
        .filter(forwards)
        .map(fault)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Bundle;

    const FILE: &str = "
        [datapath]
        interfaces = [\"eth0\"]
        nat = { source = [\"192.0.2.1\"], ports = \"20000-29999\" }
        [[listener]]
        name = \"echo\"
        address = \"192.0.2.9:7\"
        forward = { upstream = \"u\", via = \"nat\" }
        [[upstream]]
        name = \"u\"
        endpoints = [\"10.0.0.1:7\"]
    ";

    fn loaded(flags: &Flags) -> Result<Loaded, Vec<Diagnostic>> {
        load(
            &Bundle::of_files([("/c/sluice.toml", FILE)]),
            Path::new("/c/sluice.toml"),
            flags,
        )
    }

    fn flags(set: &[(&str, &str)], datapath: Option<&str>) -> Flags {
        let set = set
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Flags {
            set: set.collect(),
            datapath: datapath.map(str::to_owned),
        }
    }

    #[test]
    fn flags_win_over_the_file_and_bad_ones_are_all_told() {
        let good = loaded(&flags(&[("http.head_timeout", "3s")], Some("generic"))).expect("good");
        assert_eq!(good.config.datapath.mode, DatapathMode::Generic);
        assert_eq!(
            good.tunables.http.head_timeout,
            std::time::Duration::from_secs(3)
        );
        let bad = loaded(&flags(
            &[("http.head_timeot", "3s"), ("http.head_timeout", "0s")],
            Some("fast"),
        ))
        .expect_err("bad");
        assert_eq!(bad.len(), 3, "{bad:?}");
    }

    #[test]
    fn forwarding_with_the_datapath_off_is_refused_by_name() {
        let bad = loaded(&flags(&[], Some("off"))).expect_err("nothing would forward");
        assert!(bad[0].message.contains("`echo`"), "{bad:?}");
    }

    #[test]
    fn an_authority_that_is_none_is_refused_with_the_upstream_whose_probe_needs_it() {
        let text = "
            [[listener]]
            name = \"web\"
            address = \"127.0.0.1:80\"
            [[route]]
            match = { path = \"/*\" }
            upstream = \"app\"
            [[upstream]]
            name = \"app\"
            endpoints = [\"10.0.0.1:443\"]
            probe = { https = \"/\", ca = \"ca.pem\" }
        ";
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let files = Bundle::of_files([("/c/sluice.toml", text), ("/c/ca.pem", broken)]);
        let bad = load(&files, Path::new("/c/sluice.toml"), &Flags::default());
        let bad = bad.expect_err("nobody would be believed");
        assert!(bad[0].message.contains("/c/ca.pem"), "{bad:?}");
    }
}
