//! A thousand keep-alive clients on shared connections to one origin: each answer carries the id of its request, or it crossed over.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::resource::{Resource, setrlimit};
use rig::client;
use rig::dice::Dice;
use rig::scripted::{Heard, chunks_end, field, path_of, take_body, take_head};
use socket2::SockRef;

use crate::{CROWD, World, edge};

const THREADS: usize = 8;
const CLIENTS: usize = 1000;
const TIME: Duration = Duration::from_secs(6);
const ORIGIN_PORT: u16 = 9003;

/// While it is set, the origin gives one in so many answers the id of another request.
static CROSSES: AtomicBool = AtomicBool::new(false);
const CROSSED_ONE_IN: u64 = 300;

/// What a request asks of the origin, or does to it, and how often of a hundred times.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    /// A body both ways.
    Post,
    /// A chunked answer in two pieces.
    Chunked,
    /// Answered before the body was read.
    Early,
    /// The origin closes behind its answer, and does not say so.
    Close,
    /// The origin says a second answer in the same breath.
    More,
    /// The origin resets within its answer.
    Reset,
    /// An answer so large that the kernel moves it.
    Large,
    /// The origin resets within such an answer.
    Torn,
    /// The client resets within such an answer.
    Abandon,
    /// The origin answers too late.
    Late,
    /// A GET whose body is another request, at an origin that reads no body of a GET and answers both (CL.0).
    Smuggle,
    /// The client resets right behind its request.
    Leave,
    /// The client closes within its body.
    Half,
}

impl Kind {
    fn any(dice: &mut Dice) -> Self {
        match dice.below(1000) {
            0..500 => Self::Plain,
            500..700 => Self::Post,
            700..800 => Self::Chunked,
            800..850 => Self::Early,
            850..875 => Self::Close,
            875..885 => Self::Large,
            885..890 => Self::Torn,
            890..895 => Self::Abandon,
            895..920 => Self::More,
            920..950 => Self::Reset,
            950 => Self::Late,
            951..970 => Self::Smuggle,
            970..985 => Self::Leave,
            _ => Self::Half,
        }
    }

    fn has_body(self) -> bool {
        matches!(self, Self::Post | Self::Early | Self::Half)
    }

    /// The body of a request and of its answer: of many lengths, and full of its id.
    fn body(self, id: &str) -> String {
        let count = match self {
            Self::Large | Self::Torn | Self::Abandon => 400_000 / id.len(),
            _ => 1 + id.bytes().map(usize::from).sum::<usize>() % 97,
        };
        format!("{id} ").repeat(count)
    }

    fn of(name: &str) -> Option<Self> {
        let all = [
            Self::Plain,
            Self::Post,
            Self::Chunked,
            Self::Early,
            Self::Close,
            Self::More,
            Self::Reset,
            Self::Large,
            Self::Torn,
            Self::Abandon,
            Self::Late,
            Self::Smuggle,
            Self::Leave,
            Self::Half,
        ];
        all.into_iter().find(|kind| format!("{kind:?}") == name)
    }
}

/// What a load came to.
#[derive(Default)]
struct Tally {
    right: u64,
    /// Answers that were due to the fault that was asked for.
    at_fault: u64,
    /// Connections of the pool that died under a request that is not repeated.
    unlucky: u64,
    wrong: Vec<String>,
}

pub fn crowd(world: &mut World) -> Result<()> {
    start_origin(world)?;
    CROSSES.store(false, Ordering::Relaxed);
    let tally = run(world, TIME)?;
    let Tally {
        right,
        at_fault,
        unlucky,
        wrong,
    } = tally;
    ensure!(
        wrong.is_empty(),
        "{} of {right} are wrong: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
    ensure!(right > 5 * CLIENTS as u64, "{right} answers tell nothing");
    ensure!(at_fault > right / 50, "{at_fault} faults of {right}");
    ensure!(
        unlucky < right / 20,
        "{unlucky} of {right} met a dead connection"
    );
    Ok(())
}

/// The same with an origin that crosses answers over: whoever does not notice that would notice nothing.
pub fn planted(world: &mut World) -> Result<()> {
    CROSSES.store(true, Ordering::Relaxed);
    let tally = run(world, Duration::from_secs(1))?;
    ensure!(!tally.wrong.is_empty(), "nobody noticed");
    Ok(())
}

/// Runs all clients for so long, and reloads the configuration all the while.
fn run(world: &World, time: Duration) -> Result<Tally> {
    // As many descriptors for the origin as for the clients.
    setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192).context("ask for descriptors")?;
    let end = Instant::now() + time;
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let body = move || clients(number, end);
            world.field.client.thread("crowd", body)
        })
        .collect::<Result<_>>()?;
    let mut reloads = 0;
    while Instant::now() < end {
        world.sluice.reload()?;
        reloads += 1;
        thread::sleep(Duration::from_millis(100));
    }
    let mut sum = Tally::default();
    for thread in threads {
        let tally = thread.join().map_err(|_| anyhow!("a client panicked"))??;
        sum.right += tally.right;
        sum.at_fault += tally.at_fault;
        sum.unlucky += tally.unlucky;
        sum.wrong.extend(tally.wrong);
    }
    ensure!(reloads >= time.as_secs(), "{reloads} reloads");
    Ok(sum)
}

/// A part of the crowd: all of it asks, then each hears its answer, and again.
fn clients(number: usize, end: Instant) -> Result<Tally> {
    let mut dice = Dice::new(number as u64);
    let mut tally = Tally::default();
    let mut connections: Vec<Option<TcpStream>> = Vec::new();
    connections.resize_with(CLIENTS / THREADS, || None);
    let mut count = 0;
    while Instant::now() < end {
        let mut asked = Vec::new();
        for connection in &mut connections {
            count += 1;
            let id = format!("{number}-{count}");
            let kind = Kind::any(&mut dice);
            let stream = match connection.take() {
                Some(stream) => stream,
                None => client::connect(None, edge(CROWD)?)?,
            };
            let sent = ask(stream, kind, &id);
            asked.push((connection, sent, kind, id));
        }
        // Nobody else's answer shall wait for a client that waits in vain.
        asked.sort_by_key(|(_, _, kind, _)| *kind == Kind::Late);
        for (connection, sent, kind, id) in asked {
            // A server may end a connection between two exchanges.
            let Ok(Some(mut stream)) = sent else { continue };
            match hear(&mut stream, kind, &id, &mut tally) {
                Ok(true) => *connection = Some(stream),
                Ok(false) => {}
                Err(error) => tally.wrong.push(format!("{kind:?} {id}: {error:#}")),
            }
        }
    }
    Ok(tally)
}

/// Sends a request; None where no answer is waited for.
fn ask(mut stream: TcpStream, kind: Kind, id: &str) -> std::io::Result<Option<TcpStream>> {
    let method = if kind.has_body() { "POST" } else { "GET" };
    let body = if kind.has_body() {
        kind.body(id)
    } else {
        String::new()
    };
    let length = match kind.has_body() {
        true => format!("Content-Length: {}\r\n", body.len()),
        false => String::new(),
    };
    let (length, body) = match kind {
        Kind::Smuggle => (
            format!("Content-Length: {}\r\n", SMUGGLED.len()),
            SMUGGLED.to_owned(),
        ),
        _ => (length, body),
    };
    let head = format!("{method} /{kind:?}/{id} HTTP/1.1\r\nHost: crowd.test\r\n{length}\r\n");
    let mut bytes = (head + &body).into_bytes();
    if kind == Kind::Half {
        bytes.truncate(bytes.len() - body.len() / 2);
    }
    stream.write_all(&bytes)?;
    if kind == Kind::Leave {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(Some(stream).filter(|_| !matches!(kind, Kind::Leave | Kind::Half)))
}

/// The answer to this is nobody's.
const SMUGGLED: &str = "GET /Plain/smuggled HTTP/1.1\r\nHost: crowd.test\r\n\r\n";

/// Reads the answer to a request: whether its connection lives on.
fn hear(stream: &mut TcpStream, kind: Kind, id: &str, tally: &mut Tally) -> Result<bool> {
    let mut read = Vec::new();
    let head = match take_head(stream, &mut read) {
        Ok(Some(head)) => head,
        // A reset of the origin's before its answer was seen, or our request met the end of an idle connection.
        Ok(None) if read.is_empty() => {
            tally.unlucky += 1;
            return Ok(false);
        }
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {
            tally.unlucky += 1;
            return Ok(false);
        }
        other => bail!("no head: {other:?} {read:?}"),
    };
    if kind == Kind::Abandon {
        SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
        ensure!(
            field(&head, "x-id").as_deref() == Some(id),
            "another answer"
        );
        return Ok(false);
    }
    let status = String::from_utf8_lossy(head.get(9..12).unwrap_or_default()).into_owned();
    let is_whole = read_body(stream, &head, &mut read)?;
    let lives = is_whole && field(&head, "connection").is_none();
    if status != "200" {
        let is_fault = matches!(kind, Kind::Reset | Kind::Torn | Kind::Late);
        let is_ours = field(&head, "x-id").is_none();
        ensure!(is_ours, "the origin said {status}");
        // Who asks for a change is not asked for it twice, when a connection dies that waited.
        ensure!(
            is_fault || kind.has_body(),
            "{status}: {:?}",
            String::from_utf8_lossy(&read)
        );
        match is_fault {
            true => tally.at_fault += 1,
            false => tally.unlucky += 1,
        }
        return Ok(lives);
    }
    let answered = field(&head, "x-id");
    ensure!(answered.as_deref() == Some(id), "answered as {answered:?}");
    let mut expected = kind.body(id).into_bytes();
    if matches!(kind, Kind::Reset | Kind::Torn) {
        let is_own = expected.starts_with(&read);
        ensure!(!is_whole && is_own, "whole {is_whole}, its own {is_own}");
        tally.at_fault += 1;
        return Ok(false);
    }
    if kind == Kind::Chunked {
        read = rig::scripted::data_of(&head, &read);
    }
    if kind == Kind::Early {
        expected.truncate(id.len());
    }
    let is_own = expected.starts_with(&read);
    ensure!(
        is_whole && read == expected,
        "whole: {is_whole}, its own: {is_own}, {} of {} bytes",
        read.len(),
        expected.len()
    );
    tally.right += 1;
    Ok(lives)
}

/// Reads the body behind a head: whether it came to its end. Nothing may stand behind it.
fn read_body(stream: &mut TcpStream, head: &[u8], read: &mut Vec<u8>) -> Result<bool> {
    let length: Option<usize> = match field(head, "content-length") {
        Some(length) => Some(length.parse()?),
        None => None,
    };
    let mut buffer = [0; 16 << 10];
    loop {
        let end = match length {
            Some(length) => Some(length).filter(|length| *length <= read.len()),
            None => chunks_end(read),
        };
        if let Some(end) = end {
            ensure!(end == read.len(), "more than was asked for");
            return Ok(true);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(length) => read.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error).context("read a body"),
        }
    }
}

fn start_origin(world: &World) -> Result<()> {
    let namespace = &world.field.origins[0];
    let listener = namespace
        .inside(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, ORIGIN_PORT)))
        .context("bind the origin of the crowd")?;
    let count = Arc::new(AtomicU64::new(1));
    namespace.thread("crowd-origin", move || {
        for stream in listener.incoming().flatten() {
            let count = Arc::clone(&count);
            // Who cannot be heard is closed, which its client counts.
            let _ = thread::Builder::new()
                .stack_size(128 << 10)
                .spawn(move || serve(stream, &count));
        }
    })?;
    Ok(())
}

fn serve(mut stream: TcpStream, count: &AtomicU64) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut read = Vec::new();
    while let Some(head) = take_head(&mut stream, &mut read)? {
        let path = path_of(&head);
        let (kind, id) = path[1..].split_once('/').unwrap_or_default();
        // Nobody knows what else a smuggled request may say.
        let kind = Kind::of(kind).unwrap_or(Kind::Plain);
        let number = count.fetch_add(1, Ordering::Relaxed);
        let is_crossed = CROSSES.load(Ordering::Relaxed) && number.is_multiple_of(CROSSED_ONE_IN);
        let id = if is_crossed { "0-0" } else { id };
        let body = kind.body(id);
        let whole = |body: &str| {
            let length = body.len();
            format!("HTTP/1.1 200 OK\r\nX-Id: {id}\r\nContent-Length: {length}\r\n\r\n{body}")
        };
        if kind == Kind::Early {
            stream.write_all(whole(id).as_bytes())?;
        }
        let mut heard = Heard {
            head,
            ..Heard::default()
        };
        if kind != Kind::Smuggle && !take_body(&mut stream, &mut read, &mut heard)? {
            return Ok(());
        }
        match kind {
            Kind::Early => {}
            Kind::Plain if id == "smuggled" => {
                // Long enough for another request to have taken its connection.
                thread::sleep(Duration::from_millis(20));
                stream.write_all(whole(&body).as_bytes())?;
            }
            Kind::Chunked => {
                let (one, two) = body.split_at(body.len() / 2);
                let start = format!(
                    "HTTP/1.1 200 OK\r\nX-Id: {id}\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{one}\r\n",
                    one.len()
                );
                stream.write_all(start.as_bytes())?;
                thread::yield_now();
                let end = format!("{:x}\r\n{two}\r\n0\r\n\r\n", two.len());
                stream.write_all(end.as_bytes())?;
            }
            Kind::Close => return stream.write_all(whole(&body).as_bytes()),
            Kind::More => stream.write_all((whole(&body) + &whole("evil")).as_bytes())?,
            Kind::Reset | Kind::Torn => {
                let answer = whole(&body);
                stream.write_all(&answer.as_bytes()[..answer.len() - 2])?;
                SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                return Ok(());
            }
            Kind::Late => {
                thread::sleep(Duration::from_millis(2500));
                stream.write_all(whole(&body).as_bytes())?;
            }
            _ => stream.write_all(whole(&body).as_bytes())?,
        }
    }
    Ok(())
}
