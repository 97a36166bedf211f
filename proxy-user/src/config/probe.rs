//! `probe` of an `[[upstream]]`: how the health of its endpoints is asked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::certificate::has_block;
use super::context::Context;
use super::health::{Statuses, statuses};
use super::pattern::{parse_host, parse_path};
use super::table::{Section, Value};
use super::{HostMatch, PathMatch};
use crate::tunable::unit::shown;

const MS: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);

/// The question whose answer is an endpoint's health.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    pub kind: ProbeKind,
    pub interval: Duration,
    pub timeout: Duration,
    /// Good answers in a row until an endpoint is believed healthy again.
    pub rise: u32,
    /// Bad answers in a row until it is believed dead.
    pub fall: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeKind {
    /// A connection is accepted.
    Tcp,
    /// A GET is answered with a good status.
    Http(HttpProbe),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProbe {
    /// And query, as it is sent.
    pub path: String,
    /// `Host`; `None`: the endpoint's address.
    pub host: Option<String>,
    pub good: Statuses,
    /// Over TLS.
    pub tls: Option<Trust>,
}

/// Whose certificates are taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Trust {
    /// `None`: the authorities that this host trusts.
    pub ca: Option<CaPem>,
    /// The name that a server must show; `None`: that of `host`, else its address.
    pub server_name: Option<String>,
    /// False: any certificate will do.
    pub verify: bool,
}

/// Certificates of authorities, as read from a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CaPem {
    pub path: PathBuf,
    pub pem: Arc<[u8]>,
}

/// `{ http = "/healthz" }`, `{ https = "/healthz" }` or `{ tcp = true }`, with interval, timeout, rise and fall.
pub(super) fn probe(value: &Value<'_>, context: &Context<'_>) -> Option<Probe> {
    let section = value.section()?;
    let kind = probe_kind(value, &section, context);
    let interval_value = section.find("interval");
    let interval = interval_value
        .as_ref()
        .map_or(Some(2000 * MS), |value| value.duration(100 * MS..=HOUR));
    let timeout_value = section.find("timeout");
    let timeout = timeout_value
        .as_ref()
        .map(|value| value.duration(10 * MS..=HOUR));
    let rise = section
        .find("rise")
        .map_or(Some(2), |value| value.number(1..=100));
    let fall = section
        .find("fall")
        .map_or(Some(3), |value| value.number(1..=100));
    section.finish();
    let interval = interval?;
    let timeout = timeout.unwrap_or_else(|| Some(interval.min(1000 * MS)))?;
    if timeout > interval {
        let spot = timeout_value.map_or(value.spot, |value| value.spot);
        return spot.refuse(
            "the `timeout` of a probe is longer than its `interval`",
            "",
            Some("the next probe would overtake it".to_owned()),
        );
    }
    Some(Probe {
        kind: kind?,
        interval,
        timeout,
        rise: rise?,
        fall: fall?,
    })
}

fn probe_kind(
    value: &Value<'_>,
    section: &Section<'_>,
    context: &Context<'_>,
) -> Option<ProbeKind> {
    let asked = ["http", "https", "tcp"].map(|key| section.find(key));
    match &asked {
        [Some(path), None, None] => http_probe(path, None, section),
        [None, Some(path), None] => {
            let trust = trust(section, context);
            http_probe(path, Some(trust), section)
        }
        [None, None, Some(tcp)] => tcp.yes().map(|()| ProbeKind::Tcp),
        _ => {
            let help = "write http = \"/healthz\", https = \"/healthz\" or tcp = true".to_owned();
            let message = "a probe asks over `http`, `https` or `tcp`, one of them";
            value.spot.refuse(message, "", Some(help))
        }
    }
}

fn http_probe(
    path: &Value<'_>,
    trust: Option<Option<Trust>>,
    section: &Section<'_>,
) -> Option<ProbeKind> {
    let path = path.parsed(probe_path);
    let host = section.find("host").map(|value| value.parsed(probe_host));
    let good = section.find("status").map(|value| statuses(&value));
    Some(ProbeKind::Http(HttpProbe {
        path: path?,
        host: match host {
            Some(host) => Some(host?),
            None => None,
        },
        good: good.unwrap_or_else(|| Some(Statuses::good()))?,
        tls: match trust {
            Some(trust) => Some(trust?),
            None => None,
        },
    }))
}

/// `ca`, `server_name` and `verify`.
fn trust(section: &Section<'_>, context: &Context<'_>) -> Option<Trust> {
    let ca = section.find("ca");
    let pem = ca.as_ref().map(|value| authorities(value, context));
    let server_name = section.find("server_name");
    let name = server_name.as_ref().map(|value| value.parsed(server));
    let verify = section.find("verify").map(|value| value.truth());
    let verify = verify.unwrap_or(Some(true))?;
    if let Some(ca) = ca.filter(|_| !verify) {
        let help = "leave out `ca`, or `verify`".to_owned();
        let message = "with `verify = false` any certificate is taken, and `ca` has no meaning";
        return ca.spot.refuse(message, "", Some(help));
    }
    Some(Trust {
        ca: match pem {
            Some(pem) => Some(pem?),
            None => None,
        },
        server_name: match name {
            Some(name) => Some(name?),
            None => None,
        },
        verify,
    })
}

fn authorities(value: &Value<'_>, context: &Context<'_>) -> Option<CaPem> {
    let (path, bytes) = context.file(value)?;
    if !has_block(&bytes, "CERTIFICATE-----") {
        return value.spot.refuse(
            format!("there is no certificate in {}", path.display()),
            "",
            Some("it needs a PEM block -----BEGIN CERTIFICATE-----".to_owned()),
        );
    }
    let pem = bytes.into();
    Some(CaPem { path, pem })
}

/// The name of a server, or its address, as certificates have it.
fn server(text: &str) -> Result<String, String> {
    match text.parse::<IpAddr>() {
        Ok(ip) => Ok(ip.to_string()),
        Err(_) => exact_host(text),
    }
}

/// What `Host` may be (RFC 9110 section 7.2).
fn probe_host(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() => {
            exact_host(name).map(|name| format!("{name}:{port}"))
        }
        _ => exact_host(text),
    }
}

fn exact_host(text: &str) -> Result<String, String> {
    match parse_host(text)? {
        HostMatch::Exact(host) => Ok(host),
        _ => Err(format!(
            "`{}` is no single host: write it like app.internal",
            shown(text)
        )),
    }
}

/// A path to ask for, as it is sent: a query may follow.
fn probe_path(text: &str) -> Result<String, String> {
    let (path, query) = text
        .split_once('?')
        .map_or((text, None), |(path, query)| (path, Some(query)));
    match parse_path(path)? {
        PathMatch::Exact(_) => {}
        _ => return Err("a probe asks for one path: write it like /healthz".to_owned()),
    }
    if query.is_some_and(|query| {
        !query
            .bytes()
            .all(|byte| (b'!'..=b'~').contains(&byte) && byte != b'#')
    }) {
        return Err("the query of a probe has a character that stands in no query".to_owned());
    }
    Ok(text.to_owned())
}
