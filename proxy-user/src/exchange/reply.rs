//! Answers that no origin gave: refusals, fixed responses, redirects.

use super::{Exchange, Next, settle};
use crate::codec::h1::{Body, HeadError};
use crate::message::{Delivery, Form, Framing, Method, Reply, RequestHead, encode_reply};
use crate::net;

impl Exchange<'_> {
    /// There is no request; its sender is told why, if anybody can still hear it.
    pub(super) async fn refuse_head(&self, error: HeadError, request: &RequestHead) -> Next {
        let reply = match error {
            HeadError::Gone | HeadError::CutShort => return Next::Close,
            HeadError::Late => Reply::new(408, "head_timeout"),
            HeadError::Refused(reject) => Reply::from(reject),
        };
        self.refuse(&reply, request).await
    }

    /// Counts why the exchange came to no good end.
    pub(super) fn reject(&self, reason: &'static str) {
        self.gateway.metrics().reject(reason);
        self.notes.reason.set(reason);
    }

    /// Refuses, counts why, and ends the connection, for nothing more can be found on it.
    pub(super) async fn refuse(&self, reply: &Reply, request: &RequestHead) -> Next {
        self.reject(reply.reason);
        let bytes = self.encode(reply, request, false);
        if self.send(reply.status, bytes).await {
            Next::Close
        } else {
            Next::Abort
        }
    }

    /// Refuses the request, and counts why.
    pub(super) async fn reply(
        &self,
        reply: Reply,
        request: &RequestHead,
        body: &mut Body<'_>,
    ) -> Next {
        self.reject(reply.reason);
        let keep_alive = self.may_keep_alive(request, body);
        let bytes = self.encode(&reply, request, keep_alive);
        self.finish(reply.status, bytes, body, keep_alive).await
    }

    /// Answers with what the configuration says.
    pub(super) async fn respond<'f>(
        &self,
        status: u16,
        fields: impl Iterator<Item = (&'f str, &'f str)>,
        content: &[u8],
        request: &RequestHead,
        body: &mut Body<'_>,
    ) -> Next {
        let keep_alive = self.may_keep_alive(request, body);
        let mut bytes = Vec::new();
        let sent = encode_reply(
            &mut bytes,
            status,
            fields,
            content,
            &self.delivery(request, keep_alive, &self.gateway.date()),
        );
        self.notes.sent_bytes.set(sent as u64);
        self.finish(status, bytes, body, keep_alive).await
    }

    /// A refusal as bytes: in the form that the client likes best, or as the route has it.
    fn encode(&self, reply: &Reply, request: &RequestHead, keep_alive: bool) -> Vec<u8> {
        let form = Form::choose(request.fields().values("accept"));
        let route = self.notes.route.get();
        let route = route.and_then(|route| self.snapshot.config.routes.get(route as usize));
        let page = route.and_then(|route| route.errors.find(reply.status));
        let mut bytes = Vec::new();
        let date = self.gateway.date();
        let delivery = self.delivery(request, keep_alive, &date);
        let sent = reply.encode(&mut bytes, &delivery, form, page);
        self.notes.sent_bytes.set(sent as u64);
        bytes
    }

    fn delivery<'d>(
        &self,
        request: &'d RequestHead,
        keep_alive: bool,
        date: &'d str,
    ) -> Delivery<'d> {
        Delivery {
            date,
            request_id: request.id(),
            keep_alive,
            is_http10: request.is_http10(),
            is_head: request.method() == Method::Head,
        }
    }

    /// Behind a request that is answered before its body was read, the next one is found only if the body is short, and
    /// surely sent: a client that waits for a 100 may send it or not (RFC 9110 section 10.1.1).
    fn may_keep_alive(&self, request: &RequestHead, body: &Body<'_>) -> bool {
        let drained_max = self.snapshot.tunables.http.drain_bytes_max as u64;
        let is_short = match request.framing() {
            Framing::Length(length) => length <= drained_max,
            Framing::Chunked => true,
            Framing::None | Framing::UntilClose => true,
        };
        self.keep_alive() && (body.is_ended() || (is_short && !request.expects_continue()))
    }

    /// Sends a whole answer, and finds the next request behind the body of this one.
    async fn finish(
        &self,
        status: u16,
        bytes: Vec<u8>,
        body: &mut Body<'_>,
        keep_alive: bool,
    ) -> Next {
        if self.send(status, bytes).await {
            settle(self, body, keep_alive).await
        } else {
            Next::Abort
        }
    }

    /// Sends a whole answer; false for a client that takes nothing any more.
    async fn send(&self, status: u16, bytes: Vec<u8>) -> bool {
        let deadline = net::now() + self.snapshot.tunables.net.send_timeout;
        let is_idle = matches!(net::timeout(deadline, self.out.idle()).await, Ok(Ok(())));
        let is_sent = is_idle && self.out.queue([bytes.into()]).is_ok();
        if is_sent {
            self.notes.status.set(status);
        }
        is_sent
    }
}
