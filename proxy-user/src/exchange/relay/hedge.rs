//! Hedged requests: another endpoint is asked, too, when the first one takes long, and the first answer wins
//! (Dean, Barroso: The Tail at Scale, 2013).

use std::mem::swap;
use std::pin::{Pin, pin};
use std::time::Duration;

use super::{Failure, Relay, encode_request};
use crate::call::{Call, Tries};
use crate::codec::h1::HeadError;
use crate::config::{Hedge, HedgeAfter};
use crate::message::{Framing, ResponseHead};
use crate::net::{self, Either};

/// The call that answered first, or the first one of all where none did; and whether it is another one than the first.
type Raced<'r> = (Call<'r>, Result<(), Failure>, bool);

/// Who answered.
enum Winner<'r> {
    Own(Result<(), Failure>),
    /// Another one; and why the own call could not.
    Other(Box<Call<'r>>, Option<Failure>),
}

impl<'r> Relay<'r> {
    /// How the route wants the request to be hedged, if it may be asked twice at a time.
    pub(super) fn hedge(&self) -> Option<Hedge> {
        let is_bodiless = matches!(self.request.framing(), Framing::None | Framing::Length(0));
        let may_hedge = is_bodiless && self.request.method().is_idempotent();
        self.route.hedge.filter(|_| may_hedge)
    }

    /// Asks, and asks another endpoint when that takes long. Whoever loses is dropped, and with it its connection.
    pub(super) async fn race(
        &self,
        call: Call<'r>,
        tries: &Tries,
        response: &mut ResponseHead,
        hedge: Hedge,
    ) -> (Call<'r>, Result<(), Failure>) {
        let (caller, snapshot) = (self.exchange.gateway.caller(), self.exchange.snapshot);
        let wait = match hedge.after {
            HedgeAfter::Time(time) => Some(time),
            HedgeAfter::Percentile(_) => caller.long_call(snapshot, self.route_index),
        };
        let started = net::now();
        let left = wait.map_or(0, |_| hedge.max);
        let (call, heard, is_other) = self
            .race_on(call, *tries, response, wait.unwrap_or_default(), left)
            .await;
        // Of a first call that has lost it is known that it would have taken longer: above the percentile, however far.
        if let (HedgeAfter::Percentile(percent), Ok(())) = (hedge.after, &heard) {
            caller.learn_call(snapshot, self.route_index, net::now() - started, percent);
        }
        if is_other {
            caller.count_hedge_won(&call);
        }
        (call, heard)
    }

    /// One call, and one more beside it as often as may be.
    fn race_on<'f>(
        &'f self,
        mut call: Call<'r>,
        tries: Tries,
        response: &'f mut ResponseHead,
        wait: Duration,
        left: u32,
    ) -> Pin<Box<dyn Future<Output = Raced<'r>> + 'f>> {
        Box::pin(async move {
            let index = call.index;
            let mut other_response = ResponseHead::default();
            let winner = {
                let mut own = pin!(self.hear(&mut call, &tries, response));
                let heard = match left {
                    0 => Some(own.as_mut().await),
                    _ => net::timeout(net::now() + wait, own.as_mut()).await.ok(),
                };
                if let Some(heard) = heard {
                    Winner::Own(heard)
                } else {
                    let other = self.ask_another(index, tries, &mut other_response, wait, left - 1);
                    let mut other = pin!(other);
                    match net::select(own.as_mut(), other.as_mut()).await {
                        Either::Left(Ok(())) => Winner::Own(Ok(())),
                        Either::Left(Err(failure)) => match other.await {
                            Some(other) => Winner::Other(Box::new(other), Some(failure)),
                            None => Winner::Own(Err(failure)),
                        },
                        Either::Right(Some(other)) => Winner::Other(Box::new(other), None),
                        Either::Right(None) => Winner::Own(own.await),
                    }
                }
            };
            match winner {
                Winner::Own(heard) => (call, heard, false),
                Winner::Other(other, failure) => {
                    if let Some(failure) = failure {
                        self.lose(call, &failure);
                    }
                    swap(response, &mut other_response);
                    (*other, Ok(()), true)
                }
            }
        })
    }

    /// The call to another endpoint, once it is answered; None where there is no other, or it has failed, too.
    async fn ask_another(
        &self,
        index: usize,
        tries: Tries,
        response: &mut ResponseHead,
        wait: Duration,
        left: u32,
    ) -> Option<Call<'r>> {
        let (caller, snapshot) = (self.exchange.gateway.caller(), self.exchange.snapshot);
        let mut tries = tries.beside(index);
        let call = caller
            .begin_hedge(snapshot, self.upstream, &mut tries)
            .await?;
        let (call, heard, _) = self.race_on(call, tries, response, wait, left).await;
        match heard {
            Ok(()) => Some(call),
            Err(failure) => {
                self.lose(call, &failure);
                None
            }
        }
    }

    /// A call has failed that is not made again. That its endpoint had closed a connection which waited too long is nobody's
    /// failure.
    fn lose(&self, call: Call<'_>, failure: &Failure) {
        if !(call.is_reused && failure.is_stale()) {
            self.blame(call, failure);
        }
    }

    /// Sends a request without a body, and reads the head of the response.
    async fn hear(
        &self,
        call: &mut Call<'_>,
        tries: &Tries,
        response: &mut ResponseHead,
    ) -> Result<(), Failure> {
        let head = encode_request(self.exchange, self.route, call, self.request);
        let (mut reader, origin) = call.connection.wire.split();
        let answered = match origin.queue([head.into()]) {
            Ok(()) => {
                let times = self.times(tries);
                self.await_final(&mut reader, None, response, times).await
            }
            Err(_) => Err(Failure::Head(HeadError::Gone)),
        };
        let (active, trial) = (&call.active, &mut call.trial);
        self.conclude(call.is_reused, active, trial, &answered, response);
        answered
    }
}
