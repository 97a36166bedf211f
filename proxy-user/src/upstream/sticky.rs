//! The cookie that brings a client back to its endpoint: a keyed hash of the endpoint's name, so that it tells nobody an address.

use std::collections::HashMap;
use std::fmt::Write;
use std::net::SocketAddr;

use sha2::{Digest, Sha256};

use super::key::cookie;
use crate::config::{self, SameSite};
use crate::message::RequestHead;

/// The cookies of an upstream's endpoints.
#[derive(Debug)]
pub(super) struct Sticky {
    cookie: String,
    /// What stands behind name and value; `Secure` is added by the client's connection.
    attributes: String,
    is_secure: Option<bool>,
    /// By index of the endpoint.
    values: Vec<String>,
    by_value: HashMap<String, usize>,
}

/// Bytes of a hash that stand in a cookie, as hex.
const VALUE_BYTES: usize = 16;

impl Sticky {
    /// Of the endpoints of an upstream of this name. `seed` is what cookies are made with where the configuration has no key.
    pub fn new<'e>(
        sticky: &config::Sticky,
        upstream: &str,
        endpoints: impl Iterator<Item = &'e SocketAddr>,
        seed: u64,
    ) -> Self {
        let key = sticky
            .key
            .unwrap_or_else(|| Sha256::digest(seed.to_le_bytes()).into());
        let values: Vec<String> = endpoints
            .map(|address| value(&key, upstream, address))
            .collect();
        Self {
            cookie: sticky.cookie.clone(),
            attributes: attributes(sticky),
            is_secure: sticky.is_secure,
            by_value: values.iter().cloned().zip(0..).collect(),
            values,
        }
    }

    /// The endpoint whose cookie a request has.
    pub fn find(&self, head: &RequestHead) -> Option<usize> {
        let value = std::str::from_utf8(cookie(head, &self.cookie)?).ok()?;
        self.by_value.get(value).copied()
    }

    /// The value of `Set-Cookie` that names an endpoint, for a client that came over TLS or in the clear.
    pub fn set_cookie(&self, endpoint: usize, is_tls: bool) -> Option<String> {
        let (name, value) = (&self.cookie, self.values.get(endpoint)?);
        let secure = match self.is_secure.unwrap_or(is_tls) {
            true => "; Secure",
            false => "",
        };
        Some(format!("{name}={value}{}{secure}", self.attributes))
    }
}

/// Half of SHA-256 over key, upstream and address. The key has a fixed length and half of the hash stays hidden, so that
/// nothing can be appended; who has one cookie cannot make another.
fn value(key: &[u8; 32], upstream: &str, address: &SocketAddr) -> String {
    let mut hash = Sha256::new();
    hash.update(key);
    hash.update((upstream.len() as u64).to_le_bytes());
    hash.update(upstream);
    hash.update(address.to_string());
    let mut text = String::with_capacity(2 * VALUE_BYTES);
    for byte in &hash.finalize()[..VALUE_BYTES] {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn attributes(sticky: &config::Sticky) -> String {
    let mut text = format!("; Path={}", sticky.path);
    if let Some(ttl) = sticky.ttl {
        text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
    }
    text.push_str(match sticky.same_site {
        SameSite::Strict => "; SameSite=Strict",
        SameSite::Lax => "; SameSite=Lax",
        SameSite::None => "; SameSite=None",
    });
    if sticky.is_http_only {
        text.push_str("; HttpOnly");
    }
    text
}
