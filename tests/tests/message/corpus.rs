//! The messages on file, one after the other, while others use the same connections to the origin.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rig::dice::Dice;
use rig::http::read_reaction;
use rig::load::Load;
use rig::message::{Answer, Case, Client, Origin, Pool, Then, read_all};
use rig::scripted::{Heard, Script};
use rig::sluice::Metrics;
use rig::{client, wait};

use crate::{DIRECT, World, edge, witness};

/// Sent behind each message in the same breath: whoever takes it for a part of the message, or the other way round, is found out.
const SECOND: &[u8] = b"GET /second HTTP/1.1\r\nHost: second.test\r\n\r\n";
const SECOND_END: &[u8] = b"\r\n\r\nsecond";

/// Responses that are wounded.
const WOUNDED: usize = 300;

/// Fewer are no proof: see the design.
const CASES_MIN: usize = 200;

/// Each request is sent whole, and byte by byte.
pub fn requests(world: &mut World) -> Result<()> {
    let cases = read_all("request")?;
    let all = cases.len() + read_all("response")?.len();
    ensure!(all >= CASES_MIN, "{all} messages are not enough");
    run_all(world, &cases, |world, case| {
        run_one(world, case, usize::MAX)?;
        // Who waits for a deadline waits once.
        if case.client == Client::Waits {
            return Ok(());
        }
        run_one(world, case, 1).context("sent byte by byte")
    })
}

/// Each response is said whole, and byte by byte.
pub fn responses(world: &mut World) -> Result<()> {
    run_all(world, &read_all("response")?, |world, case| {
        let Some(said) = &case.said else {
            bail!("the origin says nothing");
        };
        let script = |is_dribbled| Script {
            said: said.clone(),
            manner: case.origin,
            is_dribbled,
        };
        world.origin.say(&case.path(), script(false));
        run_one(world, case, usize::MAX)?;
        if !is_the_same_in_pieces(case) {
            return Ok(());
        }
        world.origin.say(&case.path(), script(true));
        run_one(world, case, usize::MAX).context("said byte by byte")
    })
}

/// Whatever is made of a wounded response, it is one answer at most, and the second request gets its own.
pub fn wounded(world: &mut World) -> Result<()> {
    let mut dice = Dice::new(9);
    let cases: Vec<Case> = (0..WOUNDED)
        .map(|number| wound(number, &mut dice))
        .collect();
    run_all(world, &cases, |world, case| {
        let script = Script {
            said: case.said.clone().unwrap_or_default(),
            manner: case.origin,
            ..Script::default()
        };
        world.origin.say(&case.path(), script);
        let (got, is_ended) = world
            .field
            .client
            .inside(|| send(case, DIRECT, usize::MAX))?;
        check_wounded(&got, is_ended).with_context(|| {
            let said = case.said.as_deref().unwrap_or_default();
            format!("{} became {}", shown(said), shown(&got))
        })
    })
}

/// A good response with a small wound or two.
fn wound(number: usize, dice: &mut Dice) -> Case {
    let good: [&[u8]; 4] = [
        b"HTTP/1.1 200 OK\r\nX: 1\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: 1\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
    ];
    let another = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let spice = [
        "\r",
        "\n",
        "\r\n",
        "\r\n\r\n",
        "\0",
        " ",
        ":",
        ";",
        "0",
        "1",
        "f",
        "-",
        ",",
        "\u{e9}",
        "Content-Length: 3\r\n",
        another,
    ];
    let mut said = good[number % good.len()].to_vec();
    for _ in 0..=dice.below(2) {
        let at = dice.below(said.len());
        match dice.below(3) {
            0 => drop(said.remove(at)),
            1 => said[at] ^= 1 << dice.below(8),
            _ => drop(said.splice(at..at, dice.one(&spice).bytes())),
        }
    }
    let name = format!("wounded-{number}");
    // Who stays is waited for where more should come, which takes its time.
    let origin = match number % 15 {
        0 => Origin::Stays,
        _ => Origin::Closes,
    };
    Case {
        sent: format!("GET /{name} HTTP/1.1\r\nHost: a.test\r\n\r\n").into(),
        name,
        said: Some(said),
        origin,
        ..Case::default()
    }
}

fn check_wounded(got: &[u8], is_ended: bool) -> Result<()> {
    let mut responses = witness::responses(got, false)?;
    if !is_ended {
        let second = responses.pop().context("nothing at all")?;
        let is_own = second.is_whole && second.bytes.ends_with(SECOND_END);
        ensure!(is_own, "the second request got another answer");
    }
    let is_final = |response: &&witness::Response| response.status >= 200;
    let finals = responses.iter().filter(is_final).count();
    ensure!(finals <= 1, "{finals} answers to one request");
    let is_whole = responses.iter().all(|response| response.is_whole);
    let is_answered = finals == 1 && is_whole;
    ensure!(is_ended || is_answered, "torn, and the connection lives on");
    Ok(())
}

/// Whether what becomes of a response is known however it comes: of bytes that were not asked for it is not, which may come
/// behind the next question, and of a fault in the body, behind which the head may have gone on.
fn is_the_same_in_pieces(case: &Case) -> bool {
    let is_fault_of_the_head = |answer: &Answer| match &answer.reason {
        Some(reason) => !reason.starts_with("chunk") && reason != "trailer",
        None => false,
    };
    let is_late = case.answers.iter().any(|answer| answer.status == 504);
    let is_kept = case.pool != Some(Pool::Dropped);
    !is_late && (is_kept || case.answers.iter().any(is_fault_of_the_head))
}

/// Runs all while others use the same connections; says all that failed.
fn run_all(world: &World, cases: &[Case], run: impl Fn(&World, &Case) -> Result<()>) -> Result<()> {
    let others = Load::echoes(&world.field.client, edge(DIRECT)?, 4)?;
    others.wait_for(20)?;
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let error = run(world, case).err()?;
            Some(format!("{}, {}: {error:#}", case.name, case.title))
        })
        .collect();
    others.stop()?.expect_no_failure().context("others")?;
    let (failed, all) = (failures.len(), cases.len());
    ensure!(failed == 0, "{failed} of {all}:\n{}", failures.join("\n"));
    Ok(())
}

fn run_one(world: &World, case: &Case, piece: usize) -> Result<()> {
    world.origin.take_heard();
    let before = world.sluice.metrics()?;
    let (got, is_ended) = world.field.client.inside(|| send(case, DIRECT, piece))?;
    let heard = world.origin.take_heard();

    check_answers(case, &got, is_ended).with_context(|| format!("got {}", shown(&got)))?;
    check_heard(case, &heard)?;
    check_reasons(case, &before, &world.sluice.metrics()?)?;
    check_pool(world, case, &heard)
}

/// Sends a message on a connection that was used before: all that came back, and whether the connection was ended.
pub fn send(case: &Case, port: u16, piece: usize) -> Result<(Vec<u8>, bool)> {
    let mut stream = client::connect(None, edge(port)?)?;
    stream.write_all(b"GET /bystander/first HTTP/1.1\r\nHost: first.test\r\n\r\n")?;
    let first = read_until(&mut stream, b"/bystander/first")?;
    ensure!(!first.1, "the request before was not answered");
    let mut bytes = case.sent.clone();
    if case.client == Client::GoesOn {
        bytes.extend_from_slice(SECOND);
    }
    for part in bytes.chunks(piece.min(bytes.len()).max(1)) {
        // Who is refused early may find the connection gone.
        if stream.write_all(part).is_err() {
            break;
        }
    }
    if case.client == Client::Ends {
        stream.shutdown(Shutdown::Write)?;
    }
    if case.then == Then::Open && case.client == Client::GoesOn {
        return read_until(&mut stream, SECOND_END);
    }
    let reaction = read_reaction(&mut stream, Instant::now(), client::PATIENCE)?;
    Ok((reaction.bytes, reaction.closed))
}

/// Reads until what came ends so, or the connection is ended, or nothing comes any more.
fn read_until(stream: &mut TcpStream, end: &[u8]) -> Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    while !bytes.ends_with(end) {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok((bytes, true)),
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok((bytes, true)),
            Err(error) => {
                return Err(error).with_context(|| format!("waiting behind {}", shown(&bytes)));
            }
        }
    }
    Ok((bytes, false))
}

/// The statuses in their order, the bytes where the file has them, and what became of the connection.
fn check_answers(case: &Case, got: &[u8], is_ended: bool) -> Result<()> {
    let is_second = case.then == Then::Open && case.client == Client::GoesOn;
    let mut responses = witness::responses(got, case.sent.starts_with(b"HEAD "))?;
    if is_second {
        let second = responses.pop().context("nothing at all")?;
        ensure!(
            second.status == 200 && !is_ended,
            "the second request was not answered"
        );
    } else {
        ensure!(
            is_ended == (case.then != Then::Open),
            "the connection is ended: {is_ended}"
        );
    }
    let statuses: Vec<u16> = responses.iter().map(|response| response.status).collect();
    let expected: Vec<u16> = case.answers.iter().map(|answer| answer.status).collect();
    ensure!(statuses == expected, "{statuses:?} instead of {expected:?}");
    let is_torn = responses.iter().any(|response| !response.is_whole);
    ensure!(
        is_torn == (case.then == Then::Torn),
        "an answer is torn: {is_torn}"
    );
    if let Some(expected) = &case.got {
        let got: Vec<u8> = responses
            .into_iter()
            .flat_map(|response| response.bytes)
            .collect();
        ensure!(
            got == *expected,
            "the client got\n{}\ninstead of\n{}",
            shown(&got),
            shown(expected)
        );
    }
    Ok(())
}

/// What reached the origin, byte for byte; the second request only behind a connection that lives.
fn check_heard(case: &Case, heard: &[Heard]) -> Result<()> {
    let is_second = |heard: &&Heard| heard.head.starts_with(b"GET /second ");
    let seconds = heard.iter().filter(is_second).count();
    let expected = usize::from(case.then == Then::Open && case.client == Client::GoesOn);
    ensure!(
        seconds == expected,
        "the second request reached the origin {seconds} times"
    );
    let mut reached = Vec::new();
    for heard in heard
        .iter()
        .filter(|heard| !is_second(heard) && heard.is_whole)
    {
        reached.extend(witness::without_claims(heard)?);
    }
    // Of a response only its own file says what asked for it.
    let Some(expected) = &case.reached else {
        let is_asked = case.said.is_some();
        ensure!(
            reached.is_empty() || is_asked,
            "reached: {}",
            shown(&reached)
        );
        return Ok(());
    };
    ensure!(
        reached == *expected,
        "what reached the origin was\n{}\ninstead of\n{}",
        shown(&reached),
        shown(expected)
    );
    Ok(())
}

/// Each refusal is counted under its name, and nothing else is.
fn check_reasons(case: &Case, before: &Metrics, after: &Metrics) -> Result<()> {
    let reasons = |metrics: &Metrics| metrics.by_label("sluice_http_rejected_total", "reason");
    let (before, mut after) = (reasons(before), reasons(after));
    after.retain(|reason, count| {
        *count -= before.get(reason).unwrap_or(&0);
        *count > 0
    });
    let mut expected = BTreeMap::new();
    for reason in case
        .answers
        .iter()
        .filter_map(|answer| answer.reason.clone())
    {
        *expected.entry(reason).or_insert(0) += 1;
    }
    // Of an answer that is torn the client is told nothing, but it is counted.
    if case.then == Then::Torn {
        return Ok(());
    }
    ensure!(
        after == expected,
        "counted {after:?}, expected {expected:?}"
    );
    Ok(())
}

/// Whether the connection to the origin may serve others afterwards.
fn check_pool(world: &World, case: &Case, heard: &[Heard]) -> Result<()> {
    let Some(pool) = case.pool else { return Ok(()) };
    let path = case.path();
    let is_own = |heard: &&Heard| String::from_utf8_lossy(&heard.head).contains(&path);
    let own = heard.iter().find(is_own).context("nothing was heard")?;
    match pool {
        Pool::Kept => ensure!(!world.origin.has_ended(own.connection), "it was dropped"),
        Pool::Dropped => wait::until_true("the end of it", Duration::from_secs(2), || {
            world.origin.has_ended(own.connection)
        })?,
    }
    Ok(())
}

fn shown(bytes: &[u8]) -> String {
    let text: String = bytes
        .iter()
        .take(2000)
        .map(|byte| char::from(*byte))
        .collect();
    format!("{text:?}").replace("\\r\\n", "\\r\\n\n    ")
}
