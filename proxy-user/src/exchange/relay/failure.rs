//! Why a request has no whole response: whose fault it is, whether it is worth another try, what the client is told.

use crate::call::{AnswerError, Cause, ConnectError};
use crate::codec::h1::{BodyError, HeadError, TransferError};
use crate::message::Reply;

/// Why there is no whole response. Whose fault it is decides what the client is told, and whether another endpoint is asked.
#[derive(Debug)]
pub(super) enum Failure {
    Connect(ConnectError),
    /// The endpoint sent no head, or none that is taken.
    Head(HeadError),
    /// The endpoint broke its response off.
    Response(TransferError),
    /// The client's body came to no end.
    Request(TransferError),
    /// The client is gone.
    Client,
    /// The client takes nothing any more.
    ClientLate,
    /// The route's deadline has passed.
    Late,
}

impl Failure {
    /// The endpoint is to blame.
    pub(super) fn is_by_origin(&self) -> bool {
        matches!(self, Self::Head(_) | Self::Response(_))
    }

    /// There is nobody who could be told.
    pub(super) fn is_by_client(&self) -> bool {
        matches!(self, Self::Client | Self::ClientLate)
    }

    /// A connection has ended before anything came.
    pub(super) fn is_stale(&self) -> bool {
        matches!(self, Self::Head(HeadError::Gone))
    }

    /// A deadline of the call has passed.
    pub(super) fn is_late(&self) -> bool {
        matches!(
            self,
            Self::Connect(ConnectError::Late) | Self::Head(HeadError::Late)
        )
    }

    /// As `retry.on` names it; connections are tried again where they are made.
    pub(super) fn cause(&self) -> Option<Cause> {
        match self {
            Self::Head(HeadError::Gone | HeadError::CutShort) => Some(Cause::Reset),
            Self::Head(HeadError::Late) => Some(Cause::Timeout),
            _ => None,
        }
    }

    /// What the client is told, if it can still be told anything, and the reason that is counted.
    pub(super) fn reply(&self) -> Reply {
        match self {
            Self::Connect(ConnectError::NoEndpoint) => {
                Reply::new(503, "no_endpoint").field("retry-after", "1")
            }
            Self::Connect(ConnectError::Full) => {
                Reply::new(503, "upstream_full").field("retry-after", "1")
            }
            Self::Connect(ConnectError::PendingLate) => {
                Reply::new(503, "upstream_pending_timeout").field("retry-after", "1")
            }
            Self::Connect(ConnectError::Exhausted) => {
                Reply::new(503, "no_descriptor").field("retry-after", "1")
            }
            // Every try was refused before a byte was sent: there is nobody to ask now, as where no endpoint is healthy.
            Self::Connect(ConnectError::Refused) => {
                Reply::new(503, "origin_unreachable").field("retry-after", "1")
            }
            Self::Connect(ConnectError::Open(left_ns)) => {
                let left_s = left_ns.div_ceil(1_000_000_000).max(1);
                Reply::new(503, "circuit_open").field("retry-after", left_s.to_string())
            }
            Self::Connect(ConnectError::Late) => Reply::new(504, "origin_connect_timeout"),
            Self::Head(HeadError::Gone | HeadError::CutShort) => Reply::new(502, "origin_closed"),
            Self::Head(HeadError::Late) => Reply::new(504, "origin_head_timeout"),
            Self::Head(HeadError::Refused(reject)) => Reply::new(502, reject.reason),
            Self::Response(TransferError::Body(BodyError::Refused(reject))) => {
                Reply::new(502, reject.reason)
            }
            Self::Response(TransferError::Late) => Reply::new(504, "origin_body_timeout"),
            Self::Response(_) => Reply::new(502, "origin_body_cut_short"),
            Self::Request(TransferError::Body(BodyError::Refused(reject))) => Reply::from(*reject),
            Self::Request(TransferError::Late) => Reply::new(408, "body_timeout"),
            Self::Request(TransferError::TooLarge) => Reply::new(413, "body_too_large"),
            Self::Request(_) => Reply::new(400, "body_cut_short"),
            Self::Client => Reply::new(499, "client_gone"),
            Self::ClientLate => Reply::new(499, "client_send_timeout"),
            Self::Late => Reply::new(504, "exchange_timeout"),
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        Self::Connect(error)
    }
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Self {
        match error {
            AnswerError::Head(error) => Self::Head(error),
            AnswerError::Upload(error) => Self::Request(error),
        }
    }
}
