//! `http1-routes`: what a route costs when it stands among many, at the beginning of the configuration and at its end.

use super::{Case, saturated};

const BODY_BYTES: usize = 128;

pub fn cases(_: u32) -> Vec<Case> {
    let mut cases = Vec::new();
    for routes in [10, 1_000, 10_000] {
        for (place, number) in [("first", 0), ("last", routes - 1)] {
            let only_64 = saturated(BODY_BYTES).into_iter().take(1);
            cases.extend(only_64.map(|mut case| {
                case.name = format!("{routes}-{place}");
                case.site.routes = routes;
                case.exchange.path = format!("/route{number}/answer");
                case
            }));
        }
    }
    cases
}
