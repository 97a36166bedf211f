//! `sticky` of an upstream: a cookie that brings a client back to its endpoint.

use std::fmt;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::balance::parse_cookie_name;
use super::context::Context;
use super::table::{Section, Value, optional};

/// A cookie that brings a client back to the endpoint that served it first.
#[derive(Clone, PartialEq, Eq)]
pub struct Sticky {
    /// The cookie's name.
    pub cookie: String,
    /// How long the client keeps it; `None`: until it ends.
    pub ttl: Option<Duration>,
    pub path: String,
    /// `None`: where the client came over TLS.
    pub is_secure: Option<bool>,
    pub same_site: SameSite,
    pub is_http_only: bool,
    /// What cookies are made with, the same on all nodes of a fleet; `None`: made at random by each keeper. No message shows it.
    pub key: Option<[u8; 32]>,
}

/// `SameSite` of a cookie (RFC 6265bis section 4.1.2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameSite {
    Strict,
    Lax,
    None,
}

impl fmt::Debug for Sticky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sticky")
            .field("cookie", &self.cookie)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// Shortest secret, as that of `hash_key`.
const KEY_BYTES_MIN: usize = 16;
/// Browsers keep no cookie longer (RFC 6265bis section 5.5).
const TTL_MAX: Duration = Duration::from_secs(400 * 24 * 3600);

/// `{ cookie = "node", ttl = "1h", path = "/", secure = true, same_site = "lax", http_only = true, key = { file = "..." } }`.
pub(super) fn sticky(value: &Value<'_>, context: &Context<'_>) -> Option<Sticky> {
    let section = value.section()?;
    let cookie = section
        .need("cookie", "cookie = \"node\"")
        .and_then(|value| value.parsed(parse_cookie_name));
    let ttl = section
        .find("ttl")
        .map(|value| value.duration(Duration::from_secs(1)..=TTL_MAX));
    let path = section
        .find("path")
        .map_or(Some("/".to_owned()), |value| value.parsed(parse_path));
    let secure = section.find("secure");
    let is_secure = secure.as_ref().map(Value::truth);
    let same_site = same_site(&section);
    let is_http_only = section
        .find("http_only")
        .map_or(Some(true), |value| value.truth());
    let key = section.find("key").map(|value| key(&value, context));
    section.finish();
    if let (Some(SameSite::None), Some(Some(false))) = (same_site, is_secure) {
        let spot = secure.map_or(value.spot, |value| value.spot);
        let help = "leave `secure` out, or write another `same_site`".to_owned();
        return spot.refuse(
            "browsers take no cookie with `same_site = \"none\"` that is not secure",
            "",
            Some(help),
        );
    }
    Some(Sticky {
        cookie: cookie?,
        ttl: optional(ttl)?,
        path: path?,
        is_secure: optional(is_secure)?,
        same_site: same_site?,
        is_http_only: is_http_only?,
        key: optional(key)?,
    })
}

fn same_site(section: &Section<'_>) -> Option<SameSite> {
    let words = [
        ("strict", SameSite::Strict),
        ("lax", SameSite::Lax),
        ("none", SameSite::None),
    ];
    section
        .find("same_site")
        .map_or(Some(SameSite::Lax), |value| value.word(&words, &[]))
}

/// The path for which a client sends the cookie (RFC 6265 section 4.1.2.4).
fn parse_path(text: &str) -> Result<String, String> {
    let stands = |byte: u8| (b'!'..=b'~').contains(&byte) && byte != b';';
    if !text.starts_with('/') || text.len() > 1024 || !text.bytes().all(stands) {
        return Err("the path of a cookie begins with `/` and has no blanks or `;`".to_owned());
    }
    Ok(text.to_owned())
}

/// A secret that all nodes of a fleet have.
fn key(value: &Value<'_>, context: &Context<'_>) -> Option<[u8; 32]> {
    let secret = context.secret(value)?;
    if secret.len() < KEY_BYTES_MIN {
        return value.spot.refuse_unseen(format!(
            "`key` is shorter than {KEY_BYTES_MIN} bytes: make one with `openssl rand -hex 32`"
        ));
    }
    Some(Sha256::digest(secret).into())
}
