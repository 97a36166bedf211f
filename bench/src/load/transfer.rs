//! One long body, either way, compared while it comes.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memchr::memmem;
use sluice::net::{self, Instant, Stream};

use super::origin;
use super::tally::Tally;
use super::wire::Wire;
use super::{Outcome, Plan, body, on_a_uring};
use crate::histogram::Histogram;
use crate::sample::{self, Sample};

/// Sent at once; bodies repeat it.
const BLOCK_BYTES: usize = 256 << 10;
/// What is measured, and what goes before.
const BYTES: u64 = 1 << 30;
const WARM_UP_BYTES: u64 = 32 << 20;
/// A proxy that moves less than 20 MiB a second is not waited for.
const TRANSFER_MAX: Duration = Duration::from_secs(50);
const HEAD_BYTES_MAX: usize = 8 << 10;

/// Which way the long body goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Down,
    Up,
}

/// Makes the thread that calls it the load: one body from the origin to a client, or the other way.
pub fn transfer(plan: Plan, direction: Direction) -> Result<Outcome> {
    on_a_uring(async {
        let tally = Rc::new(Tally::new());
        let block: Arc<[u8]> = body(BLOCK_BYTES).into();
        serve(&plan, direction, &block, &tally)?;
        exchange(&plan, direction, WARM_UP_BYTES, &block).await?;
        if let Some(pid) = plan.proxy_pid {
            sample::expect_on_core(pid, plan.cores.proxy)?;
        }
        let before = Sample::take(plan.proxy_pid, plan.cores)?;
        let done = exchange(&plan, direction, BYTES, &block).await;
        let after = Sample::take(plan.proxy_pid, plan.cores)?;
        // What the origin found wrong is the reason for what the client saw.
        tally.expect_no_fault().and(done)?;
        Ok(Outcome {
            span: before.until(&after),
            answers: 1,
            bytes: BYTES,
            latencies: Histogram::new(),
        })
    })
}

/// The client's side.
async fn exchange(plan: &Plan, direction: Direction, bytes: u64, block: &Arc<[u8]>) -> Result<()> {
    let work = async {
        let mut wire = Wire::open(plan).await?;
        let (request, answer_bytes) = match direction {
            Direction::Down => (format!("GET /bench/{bytes} HTTP/1.1\r\n"), bytes),
            Direction::Up => (
                format!("POST /bench/{bytes} HTTP/1.1\r\nContent-Length: {bytes}\r\n"),
                0,
            ),
        };
        let head = format!(
            "{request}Host: bench.test\r\nUser-Agent: sluice-bench/1\r\n{}\r\n",
            plan.exchange.fields
        );
        wire.send(&head.into_bytes().into())
            .await
            .context("send a request")?;
        if direction == Direction::Up {
            for _ in 0..bytes / block.len() as u64 {
                wire.send(block).await.context("send a body")?;
            }
        }
        receive(&mut wire, answer_bytes, block).await
    };
    net::timeout(Instant::read() + TRANSFER_MAX, work)
        .await
        .with_context(|| format!("transfer {bytes} bytes"))?
}

async fn receive(wire: &mut Wire, bytes: u64, block: &[u8]) -> Result<()> {
    let mut head = Vec::new();
    let mut offset = None;
    while offset != Some(bytes) {
        let chunk = wire.recv().await.context("receive an answer")?;
        let chunk = chunk.context("the proxy closed the connection before the end of an answer")?;
        match offset {
            Some(so_far) => offset = Some(check(block, so_far, &chunk)?),
            None => {
                head.extend_from_slice(&chunk);
                let Some(end) = memmem::find(&head, b"\r\n\r\n") else {
                    ensure!(head.len() <= HEAD_BYTES_MAX, "a head without an end");
                    continue;
                };
                let text = String::from_utf8_lossy(&head[..end]).to_ascii_lowercase();
                ensure!(text.starts_with("http/1.1 200"), "answered {text:?}");
                ensure!(
                    text.contains(&format!("\r\ncontent-length: {bytes}")),
                    "an answer of {bytes} bytes has the head {text:?}"
                );
                offset = Some(check(block, 0, &head[end + 4..])?);
            }
        }
    }
    Ok(())
}

/// Compares a piece of a body that begins at an offset: the offset of the next one.
fn check(block: &[u8], mut offset: u64, mut piece: &[u8]) -> Result<u64> {
    while !piece.is_empty() {
        let at = (offset % block.len() as u64) as usize;
        let (now, later) = piece.split_at(piece.len().min(block.len() - at));
        ensure!(
            *now == block[at..at + now.len()],
            "a body is not what was sent, {offset} bytes from its start"
        );
        offset += now.len() as u64;
        piece = later;
    }
    Ok(offset)
}

/// The origin: sends or takes as many bytes as the path says.
fn serve(plan: &Plan, direction: Direction, block: &Arc<[u8]>, tally: &Rc<Tally>) -> Result<()> {
    let listener = origin::listener(plan)?;
    let (block, tally) = (block.clone(), tally.clone());
    net::spawn(async move {
        while let Ok(stream) = listener.accept().await {
            let (block, tally) = (block.clone(), tally.clone());
            net::spawn(async move {
                if let Err(error) = talk(&stream, direction, &block).await {
                    tally.fault(&format!("the origin: {error:#}"));
                }
            });
        }
    });
    Ok(())
}

async fn talk(stream: &Stream, direction: Direction, block: &Arc<[u8]>) -> Result<()> {
    loop {
        let mut arrived = Vec::new();
        let end = loop {
            if let Some(end) = memmem::find(&arrived, b"\r\n\r\n") {
                break end;
            }
            ensure!(
                arrived.len() <= HEAD_BYTES_MAX + BLOCK_BYTES,
                "a head without an end"
            );
            // That the proxy closes an idle connection is its own affair.
            match stream.recv().await {
                Ok(Some(chunk)) => arrived.extend_from_slice(&chunk),
                _ => return Ok(()),
            }
        };
        let head = String::from_utf8_lossy(&arrived[..end]).to_ascii_lowercase();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let bytes: u64 = path
            .rsplit('/')
            .next()
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("was asked {head:?}"))?;
        let answer_bytes = match direction {
            Direction::Down => bytes,
            Direction::Up => 0,
        };
        if direction == Direction::Up {
            let mut offset = check(block, 0, &arrived[end + 4..])?;
            while offset < bytes {
                let chunk = stream.recv().await?.context("a body ended too early")?;
                offset = check(block, offset, &chunk)?;
            }
        }
        let head = format!(
            "HTTP/1.1 200 OK\r\nServer: origin\r\nContent-Type: application/octet-stream\r\nContent-Length: {answer_bytes}\r\n\r\n"
        );
        stream.send(head.into_bytes()).await?;
        for _ in 0..answer_bytes / block.len() as u64 {
            stream.send(block.clone()).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_differs_anywhere_is_noticed() {
        let block = body(1000);
        let sent = [&block[..], &block, &block].concat();
        for cut in [1, 999, 1000, 1001, 2500] {
            let next = check(&block, 0, &sent[..cut]).unwrap();
            assert_eq!(check(&block, next, &sent[cut..]).unwrap(), 3000);
        }
        assert!(check(&block, 1, &sent).is_err());
    }
}
