//! `download`, `upload`: one body of 1 GiB, clear and over TLS; `tls-bulk`: many of 1 MiB. Bytes count, and not requests.

use super::{Case, Work, paced};
use crate::load::Direction;

/// Bodies of 1 MiB per second: a fifth of what the slowest proxy can.
const BULK_PER_S: u32 = 200;

pub fn bulk(_: u32) -> Vec<Case> {
    let mut cases = paced(BULK_PER_S, 1 << 20);
    cases.truncate(1);
    for case in &mut cases {
        case.name = format!("16-at-{BULK_PER_S}");
        case.connections = 16;
        case.site.tls = true;
        case.site.bulk = true;
    }
    cases
}

pub fn download(_: u32) -> Vec<Case> {
    both(Direction::Down)
}

pub fn upload(_: u32) -> Vec<Case> {
    both(Direction::Up)
}

fn both(direction: Direction) -> Vec<Case> {
    [("clear", false), ("tls", true)]
        .map(|(name, tls)| {
            let mut case = one(direction);
            case.name = name.into();
            case.site.tls = tls;
            case
        })
        .into()
}

/// On one connection.
pub fn one(direction: Direction) -> Case {
    let mut case = paced(1, 128).remove(0);
    case.connections = 1;
    case.site.bulk = true;
    case.work = Work::Transfer(direction);
    case
}
