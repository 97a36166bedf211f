//! `l4-tcp`, `l4-connect`, `l4-udp`: the same clients and origin with forwarded packets between them, through veth pairs and network namespaces.
//!
//! The far ends of the pairs have an empty XDP program and no checksum offload, for everybody: who sends by XDP needs both.

use super::{Case, Work, saturated};
use crate::load::Direction;
use crate::peer::Layer;

pub fn tcp(_: u32) -> Vec<Case> {
    let mut download = super::transfer::one(Direction::Down);
    download.name = "download".into();
    let mut cases = saturated(128);
    cases.truncate(1);
    cases.push(download);
    on_packets(cases)
}

pub fn connect(_: u32) -> Vec<Case> {
    let mut cases = saturated(128);
    cases.truncate(1);
    cases[0].reuse = false;
    on_packets(cases)
}

pub fn udp(_: u32) -> Vec<Case> {
    let mut cases = saturated(128);
    cases.truncate(1);
    cases[0].work = Work::Datagrams;
    on_packets(cases)
}

fn on_packets(mut cases: Vec<Case>) -> Vec<Case> {
    for case in &mut cases {
        case.site.layer = Layer::Packets;
    }
    cases
}
