//! What of a request chooses its endpoint, as a number that every node of a fleet finds alike.

use std::net::IpAddr;

use crate::config::{Attribute, PathMatch};
use crate::message::RequestHead;

/// The number for a request of this client on a route with this path; that of the client's address where the request
/// does not have what is wanted.
pub(super) fn key(kind: &Attribute, head: &RequestHead, peer: IpAddr, path: &PathMatch) -> u64 {
    let found = match kind {
        Attribute::Address => None,
        Attribute::Host => Some(head.host().as_bytes()).filter(|host| !host.is_empty()),
        Attribute::Header(name) => head.fields().value(name),
        Attribute::Cookie(name) => cookie(head, name),
        Attribute::Path => Some(head.path().as_bytes()),
        Attribute::Query => head.query().map(str::as_bytes),
        Attribute::Parameter(name) => parameter(head, name),
        Attribute::Capture(name) => capture(head, name, path),
    };
    match (found, peer.to_canonical()) {
        (Some(found), _) => hash(found),
        (None, IpAddr::V4(v4)) => hash(&v4.octets()),
        (None, IpAddr::V6(v6)) => hash(&v6.octets()),
    }
}

/// The value of the first cookie of this name (RFC 6265 section 4.2.1).
pub(super) fn cookie<'h>(head: &'h RequestHead, name: &'h str) -> Option<&'h [u8]> {
    let mut pairs = head
        .fields()
        .values("cookie")
        .flat_map(|value| value.split(|byte| *byte == b';'));
    pairs.find_map(|pair| {
        let rest = pair.trim_ascii().strip_prefix(name.as_bytes())?;
        rest.strip_prefix(b"=")
    })
}

fn parameter<'h>(head: &'h RequestHead, name: &str) -> Option<&'h [u8]> {
    let mut pairs = head.query()?.split('&');
    pairs.find_map(|pair| {
        pair.strip_prefix(name)?
            .strip_prefix('=')
            .map(str::as_bytes)
    })
}

/// What the template of a route captured under this name.
fn capture<'h>(head: &'h RequestHead, name: &str, path: &PathMatch) -> Option<&'h [u8]> {
    let PathMatch::Template { segments, captures } = path else {
        return None;
    };
    let wanted = captures.iter().position(|capture| capture == name)?;
    let pairs = segments
        .iter()
        .zip(head.path().strip_prefix('/')?.split('/'));
    let mut captured = pairs.filter(|(literal, _)| literal.is_none());
    captured.nth(wanted).map(|(_, value)| value.as_bytes())
}

/// FNV-1a, with the finaliser of MurmurHash3 so that its high bits, which choose the slot, depend on every byte. It has no
/// secret: nodes must agree, and who aims at one endpoint is held by `load_percent_max`.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Limits;

    #[test]
    fn each_attribute_is_found_and_the_address_stands_in_for_what_is_missing() {
        let mut head = RequestHead::default();
        let text = "GET /shop/4/rose?user=7&userx=8 HTTP/1.1\r\nhost: A.example:80\r\nx-tenant: t\r\n\
            cookie: sidx=0; sid=4\r\ncookie: last=9\r\n\r\n";
        assert!(head.parse(text.as_bytes(), &Limits::default()).is_ok());
        let peer: IpAddr = "192.0.2.1".parse().expect("an address");
        let path = PathMatch::Template {
            segments: vec![Some("shop".into()), None, None],
            captures: vec!["shop".into(), "item".into()],
        };
        let of = |kind: Attribute| key(&kind, &head, peer, &path);
        let address = hash(&[192, 0, 2, 1]);
        assert_eq!(of(Attribute::Address), address);
        assert_eq!(of(Attribute::Header("x-tenant".into())), hash(b"t"));
        assert_eq!(of(Attribute::Header("x-other".into())), address);
        assert_eq!(of(Attribute::Cookie("sid".into())), hash(b"4"));
        assert_eq!(of(Attribute::Cookie("last".into())), hash(b"9"));
        assert_eq!(of(Attribute::Cookie("si".into())), address);
        assert_eq!(of(Attribute::Path), hash(b"/shop/4/rose"));
        assert_eq!(of(Attribute::Host), hash(b"a.example"));
        assert_eq!(of(Attribute::Capture("item".into())), hash(b"rose"));
        assert_eq!(of(Attribute::Capture("other".into())), address);
        assert_eq!(of(Attribute::Query), hash(b"user=7&userx=8"));
        assert_eq!(of(Attribute::Parameter("user".into())), hash(b"7"));
        assert_eq!(of(Attribute::Parameter("use".into())), address);
    }
}
