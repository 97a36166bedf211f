//! `[[listener]]`: addresses, and whether they are served here or forwarded in the kernel.

use super::address::parse_listen_address;
use super::certificate::certificates;
use super::context::Context;
use super::hops;
use super::problem::Spot;
use super::table::{Section, Value};
use super::{
    AllDown, Fragments, ListenAddress, Listener, ListenerMode, ListenerTls, Protocol, UdpFlows, Via,
};

/// Most addresses of one listener.
const ADDRESSES_MAX: usize = 1024;

/// A listener with the places that later checks point at.
pub(super) struct ListenerDraft<'s> {
    pub listener: Listener,
    pub addresses: Vec<Spot<'s>>,
    pub section: Spot<'s>,
}

/// What `serve` says.
#[derive(Clone, Copy, PartialEq)]
enum Serve {
    Http,
    Https,
}

pub(super) fn listener<'s>(
    section: &Section<'s>,
    context: &Context<'s>,
) -> Option<ListenerDraft<'s>> {
    let name = section.find("name").and_then(|value| value.as_text());
    let addresses = section
        .need("address", "address = \"0.0.0.0:8080\"")
        .and_then(|value| addresses(&value));
    let (serve, tls, forward) = (
        section.find("serve"),
        section.find("tls"),
        section.find("forward"),
    );
    let [trusted, via, log] = ["trusted", "via", "log"].map(|key| section.find(key));
    let of_l7 = [&serve, &tls, &trusted, &via, &log].map(Option::clone);
    let forwards = forward.is_some();
    let mode = match forward {
        Some(forward) => forwarding(&forward, of_l7, context),
        None => serving(section, serve, tls, context),
    };
    let trusted = match trusted {
        Some(value) => hops::trusted(&value).map(Some),
        None => Some(None),
    };
    let via = match via {
        Some(value) => value.parsed(hops::parse_pseudonym).map(Some),
        None => Some(None),
    };
    let is_logged = log.map_or(Some(true), |value| value.switch());
    section.finish();
    let (addresses, spots): (Vec<_>, Vec<_>) = addresses?.into_iter().unzip();
    check_family(forwards, &addresses, &spots)?;
    let mode = mode?;
    let listener = Listener {
        name: name?.to_owned(),
        addresses,
        mode,
        trusted: trusted?,
        via: via?,
        is_logged: is_logged?,
        at: section.spot.origin(),
    };
    Some(ListenerDraft {
        listener,
        addresses: spots,
        section: section.spot,
    })
}

fn addresses<'s>(value: &Value<'s>) -> Option<Vec<(ListenAddress, Spot<'s>)>> {
    let items = value.one_or_more()?;
    if items.is_empty() || items.len() > ADDRESSES_MAX {
        return value.spot.refuse(
            format!("a listener has 1 to {ADDRESSES_MAX} addresses"),
            "",
            None,
        );
    }
    let parsed: Vec<_> = items
        .iter()
        .map(|item| Some((item.parsed(parse_listen_address)?, item.spot)))
        .collect();
    parsed.into_iter().collect()
}

/// `forward = { upstream = "...", via = "nat" }`: nothing of L7 beside it.
fn forwarding<'s>(
    forward: &Value<'s>,
    l7: [Option<Value<'s>>; 5],
    context: &Context<'s>,
) -> Option<ListenerMode> {
    let mut is_good = true;
    for value in l7.into_iter().flatten() {
        is_good = false;
        let message = format!(
            "`{}` and `forward` exclude each other: the kernel half does not look into what it forwards",
            value.name
        );
        value
            .spot
            .refuse_with::<()>(message, "", forward.spot, "this listener forwards");
    }
    let inner = forward.section()?;
    let upstream = inner
        .need("upstream", "upstream = \"app\"")
        .and_then(|value| context.upstreams.resolve(&value));
    let via = [Via::Nat, Via::Direct, Via::Ipip, Via::Gue].map(|via| (via.word(), via));
    let via = inner
        .find("via")
        .map_or(Some(Via::Nat), |value| value.word(&via, &[]));
    let fragments = [
        ("follow", Fragments::Follow),
        ("pass", Fragments::Pass),
        ("drop", Fragments::Drop),
    ];
    let fragments = inner
        .find("fragments")
        .map_or(Some(Fragments::Follow), |value| value.word(&fragments, &[]));
    let udp = [("stay", UdpFlows::Stay), ("move", UdpFlows::Move)];
    let udp = inner
        .find("udp")
        .map_or(Some(UdpFlows::Stay), |value| value.word(&udp, &[]));
    let all_down = [
        ("refuse", AllDown::Refuse),
        ("last_known", AllDown::LastKnown),
    ];
    let all_down = inner
        .find("all_down")
        .map_or(Some(AllDown::Refuse), |value| value.word(&all_down, &[]));
    inner.finish();
    let mode = ListenerMode::Forward {
        upstream: upstream?,
        via: via?,
        fragments: fragments?,
        udp: udp?,
        all_down: all_down?,
    };
    is_good.then_some(mode)
}

fn serving<'s>(
    section: &Section<'s>,
    serve: Option<Value<'s>>,
    tls: Option<Value<'s>>,
    context: &Context<'s>,
) -> Option<ListenerMode> {
    let words = [("http", Serve::Http), ("https", Serve::Https)];
    let mode = serve.as_ref().map_or(Some(Serve::Http), |value| {
        value.word(&words, &["tcp", "udp"])
    });
    let parsed = tls.as_ref().map(|value| listener_tls(value, context));
    let tls = match (mode?, parsed, tls) {
        (Serve::Http, None, _) => None,
        (Serve::Https, Some(parsed), _) => Some(parsed?),
        (Serve::Https, None, _) => {
            let spot = serve.map_or(section.spot, |value| value.spot);
            let help = "write tls = { certificates = \"/etc/sluice/certs\" }".to_owned();
            return spot.refuse("a listener that serves https has no `tls`", "", Some(help));
        }
        (Serve::Http, Some(_), tls) => {
            let spot = tls.map_or(section.spot, |value| value.spot);
            return spot.refuse(
                "a listener that serves http has `tls`",
                "",
                Some("write serve = \"https\"".to_owned()),
            );
        }
    };
    Some(ListenerMode::Serve { tls })
}

fn listener_tls(value: &Value<'_>, context: &Context<'_>) -> Option<ListenerTls> {
    let section = value.section()?;
    let found = section.need("certificates", "certificates = \"/etc/sluice/certs\"");
    section.later("client_ca");
    section.later("client");
    let certificates = found.and_then(|value| certificates(&value, context));
    section.finish();
    Some(ListenerTls {
        certificates: certificates?,
    })
}

/// HTTP is served over TCP; the kernel half forwards only for addresses that it can look up.
fn check_family(forwards: bool, addresses: &[ListenAddress], spots: &[Spot<'_>]) -> Option<()> {
    let mut is_good = true;
    for (address, spot) in addresses.iter().zip(spots) {
        if !forwards && address.protocol == Protocol::Udp {
            is_good = false;
            let help = "leave /udp out, or give the listener a `forward`".to_owned();
            spot.refuse::<()>(
                "HTTP is served over TCP, and this address is UDP",
                "",
                Some(help),
            );
        }
        if !forwards && !address.is_single() {
            is_good = false;
            let message = "a listener that serves has single addresses and ports: each is a socket";
            let help = "give it a `forward`, or write them one by one".to_owned();
            spot.refuse::<()>(message, "stands for many", Some(help));
        }
        if forwards && address.socket.ip().is_unspecified() {
            is_good = false;
            let message = "a listener that forwards needs the very address that packets carry";
            let help = "write it like 203.0.113.53:53".to_owned();
            spot.refuse::<()>(message, "stands for all addresses", Some(help));
        }
    }
    is_good.then_some(())
}
