//! A client that goes on after its limit: refused with 429, then banned in the kernel, then free again.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rig::client::syn_is_ignored;
use rig::field::{ATTACKER_V4, WEB_V4, at};
use rig::{client, sandbox, wait};

use super::layer7::{Case, check};
use super::live::Requests;
use super::report::{Ban, Layer7};
use super::stage::Stage;
use crate::say;

/// The policy that bans, as the configuration calls it.
const RULE: &str = "fair-use";
/// Requests after which it must have happened.
const REQUESTS_MAX: usize = 100;

pub fn play(stage: &Stage, sum: &mut Layer7) -> Result<Ban> {
    say::section("A client that goes on after its limit");
    let others = Requests::start(stage, "well-behaved", 1)?;
    let drops = || -> Result<u64> {
        Ok(stage
            .sluice
            .metrics()?
            .labelled("sluice_guard_dropped_packets_total", "rule", RULE) as u64)
    };
    let before = drops()?;
    let (within, refused) = go_on(stage, sum)?;
    say::step(
        "limited",
        &format!(
            "{within} requests of {ATTACKER_V4} were answered, then {refused} refused with 429 and Retry-After"
        ),
    );

    let bans = stage.sluice.json(&["ban", "list"])?;
    let named = bans.to_string().contains(RULE) && bans.to_string().contains(ATTACKER_V4);
    let rule = if named {
        RULE.to_owned()
    } else {
        format!("not named in {bans}")
    };
    let start = Instant::now();
    say::step(
        "banned",
        &format!("`sluice ban list` names {ATTACKER_V4}, by the rule {rule}"),
    );

    let (from, to): (IpAddr, SocketAddr) = (ATTACKER_V4.parse()?, at(WEB_V4, 443).parse()?);
    let ignored = stage
        .field
        .client
        .inside(|| syn_is_ignored(from, to, Duration::from_millis(1500)))?;
    let dropped = drops()? - before;
    say::step(
        "dropped",
        &format!(
            "its next SYN {}: XDP dropped {dropped} packets by that rule",
            if ignored {
                "got no answer"
            } else {
                "WAS ANSWERED"
            }
        ),
    );

    let reach = || {
        stage
            .field
            .client
            .inside(|| client::connect(Some(from), to).is_ok())
    };
    wait::until_true("the ban to end", Duration::from_secs(15), reach)?;
    let ended_after_s = start.elapsed().as_secs_f64();
    let tally = others.stop()?;
    say::step(
        "ended",
        &format!(
            "by itself after {ended_after_s:.1} s; {} requests of others meanwhile, {} failed",
            tally.requests, tally.failed
        ),
    );
    let others_failed = tally.failed;
    sum.add(&tally);
    Ok(Ban {
        rule,
        syn_dropped: if ignored { dropped } else { 0 },
        ended_after_s,
        others_failed,
    })
}

/// Sends requests until the ban: how many were answered, and how many refused.
fn go_on(stage: &Stage, sum: &mut Layer7) -> Result<(usize, usize)> {
    let curl = stage.curl().from(ATTACKER_V4);
    let (mut within, mut refused) = (0, 0);
    for _ in 0..REQUESTS_MAX {
        if sandbox::interrupted() {
            anyhow::bail!("interrupted");
        }
        // Short patience: the one that meets the ban gets no answer at all.
        let Ok(response) = curl.fetch(
            "https://api.test/login",
            &["--connect-timeout", "0.5", "--max-time", "0.7"],
        ) else {
            return Ok((within, refused));
        };
        let good = match response.status {
            // Also after a refusal: the limit gives one back every now and then.
            200 => true,
            429 => response.field("retry-after").is_some(),
            _ => false,
        };
        sum.count(response.origin(), good);
        match response.status {
            200 => within += 1,
            _ => refused += 1,
        }
    }
    check(
        &curl,
        &Case {
            what: "still there",
            url: "https://api.test/login",
            fields: &[],
            status: 0,
            origin: "",
        },
        sum,
    )?;
    None.with_context(|| format!("{REQUESTS_MAX} requests and no ban"))
}
