//! Bans by hand: who is refused, for how long, and how many fit.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use rig::field::{ATTACKER_V4, ATTACKER_V6, CLIENT_V4, L4_V4, L4_V6, WEB_V4};
use rig::http::KeepAlive;
use rig::sluice::PATIENCE;
use rig::wait;
use rig::world::socket;
use serde_json::Value;

use crate::stage::{CONFIGURATION, PLAIN, Stage, banned, post_ban};

pub fn a_ban_by_hand_stops_that_source_and_ends_by_itself(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    ensure!(!stage.is_ignored(ATTACKER_V4, L4_V4)?);
    sluice.command(&["ban", "add", ATTACKER_V4, "--for", "3s"])?;
    ensure!(stage.is_ignored(ATTACKER_V4, L4_V4)?, "L4 answers it");
    ensure!(stage.is_ignored(ATTACKER_V4, WEB_V4)?, "L7 answers it");
    ensure!(!stage.is_ignored(CLIENT_V4, L4_V4)?, "others are refused");
    let list = sluice.json(&["ban", "list"])?;
    ensure!(
        list.pointer("/0/rule").and_then(Value::as_str) == Some("operator"),
        "{list}"
    );
    let dropped = list.pointer("/0/packets_dropped").and_then(Value::as_u64);
    ensure!(dropped >= Some(2), "{list}");
    ensure!(sluice.metrics()?.value("sluice_guard_bans") == 1.0);
    wait::until_true("the ban to end", PATIENCE, || {
        banned(&sluice).is_ok_and(|banned| banned.is_empty())
    })?;
    ensure!(
        !stage.is_ignored(ATTACKER_V4, L4_V4)?,
        "it is refused for ever"
    );
    wait::until_true("the metric", PATIENCE, || {
        let metrics = sluice.metrics().unwrap_or_default();
        metrics.value("sluice_guard_bans") == 0.0
    })?;
    stage.end(sluice)
}

pub fn a_ban_closes_what_the_source_has_open_with_and_without_a_datapath(
    stage: &mut Stage,
) -> Result<()> {
    let to = socket(WEB_V4, 8080)?;
    let (from, other) = (Some(ATTACKER_V4.parse()?), Some(CLIENT_V4.parse()?));
    for text in [CONFIGURATION, PLAIN] {
        let sluice = stage.start(text, &[])?;
        let connect = |from| stage.field.client.inside(|| KeepAlive::connect(from, to));
        let (mut theirs, mut others) = (connect(from)?, connect(other)?);
        ensure!(theirs.get("web.test", "/", "")?.status == 204);
        ensure!(others.get("web.test", "/", "")?.status == 204);
        sluice.command(&["ban", "add", ATTACKER_V4, "--for", "1h"])?;
        wait::until_true("the connection to be closed", PATIENCE, || {
            let metrics = sluice.metrics().unwrap_or_default();
            metrics.value("sluice_guard_connections_closed_total") == 1.0
        })?;
        ensure!(theirs.get("web.test", "/", "").is_err(), "it is open still");
        if text == CONFIGURATION {
            ensure!(
                stage.is_ignored(ATTACKER_V4, WEB_V4)?,
                "its SYN is answered"
            );
        } else {
            let again = connect(from).and_then(|mut again| again.get("web.test", "/", ""));
            ensure!(again.is_err(), "a banned source is answered");
        }
        ensure!(others.get("web.test", "/", "")?.status == 204, "others are");
        sluice.command(&["ban", "del", ATTACKER_V4])?;
        ensure!(connect(from)?.get("web.test", "/", "")?.status == 204);
        stage.end(sluice)?;
    }
    Ok(())
}

pub fn a_ban_of_an_ipv6_source_is_as_wide_as_its_network(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &[])?;
    sluice.command(&["ban", "add", "fd77:0:0:66::1234", "--for", "1h"])?;
    ensure!(
        stage.is_ignored(ATTACKER_V6, L4_V6)?,
        "its neighbour is answered"
    );
    stage.echo(L4_V6, 7000).context("another network")?;
    sluice.command(&["ban", "del", ATTACKER_V6])?;
    ensure!(banned(&sluice)?.is_empty());
    ensure!(!stage.is_ignored(ATTACKER_V6, L4_V6)?);
    stage.end(sluice)
}

pub fn bans_that_make_no_sense_or_do_not_fit_are_refused(stage: &mut Stage) -> Result<()> {
    let sluice = stage.start(CONFIGURATION, &["--set", "datapath.bans_max=1024"])?;
    for (arguments, why) in [
        (vec!["ban", "add", "0.0.0.0"], "no address of a source"),
        (vec!["ban", "add", "192.0.2.1", "--for", "soon"], "soon"),
        (vec!["ban", "del", "192.0.2.1"], "is not banned"),
    ] {
        let Err(said) = sluice.command(&arguments) else {
            anyhow::bail!("{arguments:?} succeeded");
        };
        ensure!(format!("{said:#}").contains(why), "{said:#}");
    }
    for number in 0..1024_u32 {
        let source = Ipv4Addr::from_bits(0xc633_0000 + number);
        ensure!(post_ban(source)?.starts_with("HTTP/1.1 200"), "{source}");
    }
    let one_more = post_ban(Ipv4Addr::new(192, 0, 2, 1))?;
    ensure!(
        one_more.starts_with("HTTP/1.1 409") && one_more.contains("datapath.bans_max"),
        "{one_more}"
    );
    // One that is there already can still be made longer, and the table is as usable as before.
    ensure!(post_ban(Ipv4Addr::from_bits(0xc633_0000))?.starts_with("HTTP/1.1 200"));
    sluice.command(&["ban", "del", "198.51.0.0"])?;
    sluice.command(&["ban", "add", ATTACKER_V4])?;
    ensure!(stage.is_ignored(ATTACKER_V4, L4_V4)?, "it is not refused");
    stage.echo(L4_V4, 7000)?;
    stage.end(sluice)
}

pub fn without_a_datapath_too_bans_outlive_the_daemon(stage: &mut Stage) -> Result<()> {
    let mut sluice = stage.start(PLAIN, &[])?;
    ensure!(
        sluice
            .status()?
            .pointer("/datapath/state")
            .and_then(Value::as_str)
            == Some("off")
    );
    sluice.command(&["ban", "add", ATTACKER_V4, "--for", "1h"])?;
    let old = sluice.kill_daemon()?;
    sluice.wait_for_other_daemon(old)?;
    ensure!(banned(&sluice)? == [ATTACKER_V4]);
    stage.end(sluice)
}
