//! One client: sends the same request again and again, and compares what comes back.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use sluice::net::{self, Instant, Stream};

use super::answer::{Answer, Progress};
use super::{PATIENCE, Plan, pace::Turns, tally::Tally};

/// What a client sends and what it must get for it.
#[derive(Clone)]
pub struct Expectation {
    request: Arc<[u8]>,
    body: Arc<[u8]>,
}

/// The request of a plan, with five fields, and the body that must come back.
pub fn expectation(plan: &Plan, body: &Arc<[u8]>) -> Expectation {
    let connection = if plan.reuse { "keep-alive" } else { "close" };
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: bench.test\r\nUser-Agent: sluice-bench/1\r\nAccept: */*\r\n\
         Accept-Language: en\r\nConnection: {connection}\r\n\r\n",
        plan.exchange.path
    );
    Expectation {
        request: request.into_bytes().into(),
        body: body.clone(),
    }
}

/// Exchanges until the round is over.
pub async fn talk(
    plan: Rc<Plan>,
    expectation: Expectation,
    mut turns: Option<Turns>,
    tally: Rc<Tally>,
) -> Result<()> {
    let mut connection = None;
    loop {
        let intended = match &mut turns {
            Some(turns) => match turns.next().await {
                Some(moment) => Some(moment),
                None => return Ok(()),
            },
            None if tally.is_stopping() => return Ok(()),
            None => None,
        };
        let stream = match connection.take() {
            Some(stream) => stream,
            None => connect(&plan).await?,
        };
        stream
            .send(expectation.request.clone())
            .await
            .context("send a request")?;
        let goes_on = receive(&stream, &expectation.body).await?;
        tally.answer(intended);
        if plan.reuse && goes_on {
            connection = Some(stream);
        }
    }
}

async fn connect(plan: &Plan) -> Result<Stream> {
    net::timeout(Instant::read() + PATIENCE, net::connect(plan.proxy))
        .await
        .context("connect to the proxy")?
        .context("connect to the proxy")
}

/// Receives one answer, all of it and nothing more: whether another request may follow.
async fn receive(stream: &Stream, body: &[u8]) -> Result<bool> {
    let mut answer = Answer::new(body);
    loop {
        let chunk = stream
            .recv()
            .await
            .context("receive an answer")?
            .context("the proxy closed the connection before the end of an answer")?;
        match answer.take(&chunk)? {
            Progress::More => {}
            Progress::Whole { goes_on } => return Ok(goes_on),
        }
    }
}
