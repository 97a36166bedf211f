//! `[log]`: where lines about exchanges go, and what they may say: nothing but what is named.

use std::path::PathBuf;

use super::Origin;
use super::context::Context;
use super::field::parse_field_name;
use super::table::{Section, Value, optional};
use crate::tunable::unit::{nearest, shown};

/// `log.access`: a line for each exchange.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    pub to: LogTarget,
    /// What a line says, in this order.
    pub fields: Vec<LogField>,
    /// One of so many exchanges that went well; `None` = as `log.sample` says.
    pub sample: Option<u32>,
    pub at: Origin,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    Stdout,
    File(PathBuf),
}

/// What a line of the access log may say; see docs/logging.md.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogField {
    Time,
    Id,
    Listener,
    Route,
    Upstream,
    Endpoint,
    Client,
    Peer,
    Consumer,
    Method,
    Scheme,
    Host,
    Path,
    Query,
    Protocol,
    Tls,
    Status,
    Reason,
    ReceivedBytes,
    SentBytes,
    Retries,
    Reused,
    AcceptUs,
    TlsUs,
    HeadUs,
    RouteUs,
    ConnectUs,
    FirstByteUs,
    BodyUs,
    TotalUs,
    /// A field of the request, by its name in lower case.
    Request(String),
    /// A field of the response.
    Response(String),
}

/// Most fields of a line.
const FIELDS_MAX: usize = 64;
const SAMPLE_MAX: u32 = 1_000_000;

/// Fields of requests and responses whose whole purpose is a secret.
const SECRETS: [&str; 4] = [
    "authorization",
    "cookie",
    "proxy-authorization",
    "set-cookie",
];

/// `access = "stdout"`, or `{ file = "access.log", fields = ["time", "status"], sample = 10 }`.
pub(super) fn access_log(section: &Section<'_>, context: &Context<'_>) -> Option<AccessLog> {
    let value = section.need(
        "access",
        "access = { file = \"/var/log/sluice/access.log\" }",
    );
    let access = value.as_ref().and_then(|value| access(value, context));
    section.finish();
    access
}

fn access(value: &Value<'_>, context: &Context<'_>) -> Option<AccessLog> {
    let at = value.spot.origin();
    if !value.is_table() {
        value.word(&[("stdout", ())], &[])?;
        return Some(AccessLog {
            to: LogTarget::Stdout,
            fields: LogField::DEFAULT.to_vec(),
            sample: None,
            at,
        });
    }
    let section = value.section()?;
    let file = section.find("file");
    let stdout = section.find("stdout");
    let fields = section
        .find("fields")
        .map_or_else(|| Some(LogField::DEFAULT.to_vec()), |value| fields(&value));
    let sample = section
        .find("sample")
        .map(|value| value.number(1..=SAMPLE_MAX));
    section.finish();
    let to = match (file, stdout) {
        (Some(file), None) => LogTarget::File(path(&file, context)?),
        (None, Some(stdout)) => {
            stdout.yes()?;
            LogTarget::Stdout
        }
        _ => {
            let help = "write file = \"/var/log/sluice/access.log\" or stdout = true".to_owned();
            return value.spot.refuse(
                "`access` needs `file` or `stdout`, one of both",
                "",
                Some(help),
            );
        }
    };
    Some(AccessLog {
        to,
        fields: fields?,
        sample: optional(sample)?,
        at,
    })
}

fn path(file: &Value<'_>, context: &Context<'_>) -> Option<PathBuf> {
    let path = context.path(file)?;
    if path.file_name().is_none() || file.as_text().is_some_and(|text| text.ends_with('/')) {
        let message = format!("`{}` is a folder, and the log is a file", path.display());
        return file.spot.refuse(message, "", None);
    }
    Some(path)
}

fn fields(value: &Value<'_>) -> Option<Vec<LogField>> {
    let items = value.one_or_more()?;
    if items.is_empty() {
        let message = "a line without fields says nothing";
        return value.spot.refuse(message, "", None);
    }
    let (mut fields, mut is_good) = (Vec::new(), true);
    for item in &items {
        let named = match item.as_text() {
            Some("default") => Some(LogField::DEFAULT.to_vec()),
            _ => item.parsed(parse_field).map(|field| vec![field]),
        };
        for field in named.unwrap_or_else(|| {
            is_good = false;
            Vec::new()
        }) {
            if !fields.contains(&field) {
                fields.push(field);
            } else if item.as_text() != Some("default") {
                is_good = false;
                let message = format!("the field `{}` is named twice", field.name());
                item.spot.refuse::<()>(message, "", None);
            }
        }
    }
    if fields.len() > FIELDS_MAX {
        let message = format!("a line has at most {FIELDS_MAX} fields");
        return value.spot.refuse(message, "", None);
    }
    is_good.then_some(fields)
}

fn parse_field(text: &str) -> Result<LogField, String> {
    if let Some(known) = LogField::PLAIN
        .iter()
        .find(|field| field.plain_name() == text)
    {
        return Ok(known.clone());
    }
    let header = |name: &str| {
        let name = parse_field_name(name)?;
        if SECRETS.contains(&name.as_str()) {
            return Err(format!(
                "`{name}` holds secrets, which are not for logs: log what names the client instead, `client` or `consumer`"
            ));
        }
        Ok(name)
    };
    if let Some(name) = text.strip_prefix("request.") {
        return header(name).map(LogField::Request);
    }
    if let Some(name) = text.strip_prefix("response.") {
        return header(name).map(LogField::Response);
    }
    let names: Vec<&str> = LogField::PLAIN.iter().map(LogField::plain_name).collect();
    let meant = nearest(text, names.iter().copied());
    Err(match meant {
        Some(meant) => format!(
            "there is no field `{}`; did you mean `{meant}`?",
            shown(text)
        ),
        None => format!(
            "there is no field `{}`: there are default, {}, request.NAME and response.NAME",
            shown(text),
            names.join(", ")
        ),
    })
}

/// The names of plain fields, as lines have them.
macro_rules! plain {
    ($($Field:ident = $name:literal,)*) => {
        impl LogField {
            /// Those that are no field of a message.
            pub const PLAIN: &[Self] = &[$(Self::$Field),*];

            /// The name of one that is no field of a message; empty for those.
            pub fn plain_name(&self) -> &'static str {
                match self {
                    $(Self::$Field => $name,)*
                    Self::Request(_) | Self::Response(_) => "",
                }
            }

            /// What stands before the value of such a one in a line: `,"name":`.
            pub const fn plain_key(&self) -> &'static str {
                match self {
                    $(Self::$Field => concat!(",\"", $name, "\":"),)*
                    Self::Request(_) | Self::Response(_) => "",
                }
            }
        }
    };
}

plain! {
    Time = "time",
    Id = "id",
    Listener = "listener",
    Route = "route",
    Upstream = "upstream",
    Endpoint = "endpoint",
    Client = "client",
    Peer = "peer",
    Consumer = "consumer",
    Method = "method",
    Scheme = "scheme",
    Host = "host",
    Path = "path",
    Query = "query",
    Protocol = "protocol",
    Tls = "tls",
    Status = "status",
    Reason = "reason",
    ReceivedBytes = "received_bytes",
    SentBytes = "sent_bytes",
    Retries = "retries",
    Reused = "reused",
    AcceptUs = "accept_us",
    TlsUs = "tls_us",
    HeadUs = "head_us",
    RouteUs = "route_us",
    ConnectUs = "connect_us",
    FirstByteUs = "first_byte_us",
    BodyUs = "body_us",
    TotalUs = "total_us",
}

impl LogField {
    /// As it is configured, and as lines have it.
    pub fn name(&self) -> String {
        match self {
            Self::Request(name) => format!("request.{name}"),
            Self::Response(name) => format!("response.{name}"),
            plain => plain.plain_name().to_owned(),
        }
    }

    /// What a line says where the configuration does not choose: no query, which may hold anything, and no fields.
    pub const DEFAULT: &[Self] = &[
        Self::Time,
        Self::Id,
        Self::Listener,
        Self::Route,
        Self::Upstream,
        Self::Endpoint,
        Self::Client,
        Self::Consumer,
        Self::Method,
        Self::Host,
        Self::Path,
        Self::Protocol,
        Self::Tls,
        Self::Status,
        Self::Reason,
        Self::ReceivedBytes,
        Self::SentBytes,
        Self::Retries,
        Self::Reused,
        Self::AcceptUs,
        Self::TlsUs,
        Self::HeadUs,
        Self::RouteUs,
        Self::ConnectUs,
        Self::FirstByteUs,
        Self::BodyUs,
        Self::TotalUs,
    ];
}
