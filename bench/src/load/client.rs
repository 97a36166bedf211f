//! One client: sends the same request again and again, and compares what comes back.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::answer::{Answer, Progress};
use super::{Plan, pace::Turns, tally::Tally, wire::Wire};

/// Twenty thousand handshakes take the slowest proxy half of this.
const OPENING_MAX: Duration = Duration::from_secs(120);

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
         Accept-Language: en\r\nConnection: {connection}\r\n{}\r\n",
        plan.exchange.path, plan.exchange.fields
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
        let mut wire = match connection.take() {
            Some(wire) => wire,
            None => open_wire(&plan, &tally).await?,
        };
        wire.send(&expectation.request)
            .await
            .context("send a request")?;
        let goes_on = receive(&mut wire, &expectation.body).await?;
        tally.answer(intended);
        if plan.reuse && goes_on {
            connection = Some(wire);
        }
    }
}

async fn open_wire(plan: &Plan, tally: &Tally) -> Result<Wire> {
    let wire = Wire::open(plan).await?;
    if let Some(was_resumed) = wire.was_resumed() {
        tally.handshake(was_resumed);
    }
    Ok(wire)
}

/// Opens `count` connections, by `openers` clients at once, and lets each have one exchange. Those that the proxy keeps are open as
/// long as what is returned.
pub async fn open(
    plan: &Rc<Plan>,
    expectation: &Expectation,
    tally: &Rc<Tally>,
    openers: usize,
    count: usize,
) -> Rc<RefCell<Vec<Wire>>> {
    let wires = Rc::new(RefCell::new(Vec::new()));
    for number in 0..openers {
        let share = (number..count).step_by(openers).len();
        let (plan, expectation) = (plan.clone(), expectation.clone());
        let (counted, opened) = (tally.clone(), wires.clone());
        tally.spawn(async move {
            for _ in 0..share {
                let mut wire = Wire::open(&plan).await?;
                wire.send(&expectation.request)
                    .await
                    .context("send a request")?;
                let goes_on = receive(&mut wire, &expectation.body).await?;
                counted.answer(None);
                if goes_on {
                    opened.borrow_mut().push(wire);
                }
            }
            Ok(())
        });
    }
    tally.wait_for_clients(OPENING_MAX).await;
    wires
}

/// Receives one answer, all of it and nothing more: whether another request may follow.
async fn receive(wire: &mut Wire, body: &[u8]) -> Result<bool> {
    let mut answer = Answer::new(body);
    loop {
        let chunk = wire
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
