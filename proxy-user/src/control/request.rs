//! What the admin socket asks of control, and how the answer comes back.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::status::Status;
use super::{BanStatus, EndpointChange, EndpointRequest};
use crate::config::Diagnostic;
use crate::tunable::{Answer, Form, Query};

/// One question, with the way back.
#[derive(Debug)]
pub enum Request {
    Status(oneshot::Sender<Status>),
    Metrics(oneshot::Sender<String>),
    Sysctl(SysctlRequest, oneshot::Sender<Answer>),
    Bans(oneshot::Sender<Vec<BanStatus>>),
    Ban(IpAddr, Duration, oneshot::Sender<Result<(), String>>),
    Unban(IpAddr, oneshot::Sender<Result<bool, String>>),
    /// Answered with the new generation.
    Reload(oneshot::Sender<Result<u64, Vec<Diagnostic>>>),
    Endpoint(EndpointRequest, Instant, EndpointAnswer),
    Limits(oneshot::Sender<(usize, Duration)>),
}

type EndpointAnswer = oneshot::Sender<Result<EndpointChange, String>>;

/// `sluice sysctl` of the running daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SysctlRequest {
    Query(Query),
    /// Assignments, each `key=value` or `-key=value`, and how the answer is printed.
    Write {
        assignments: Vec<String>,
        form: Form,
    },
}

impl Request {
    /// Whether it makes another snapshot of the one in force.
    pub fn changes_snapshot(&self) -> bool {
        match self {
            Self::Sysctl(request, _) => matches!(request, SysctlRequest::Write { .. }),
            Self::Endpoint(..) => true,
            _ => false,
        }
    }
}

/// How others ask.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
}

impl Handle {
    pub(super) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests }
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        self.requests.send(request(sender)).await.ok()?;
        receiver.await.ok()
    }

    /// `None`, here and below: the daemon is ending.
    pub async fn status(&self) -> Option<Status> {
        self.ask(Request::Status).await
    }

    /// OpenMetrics text.
    pub async fn metrics(&self) -> Option<String> {
        self.ask(Request::Metrics).await
    }

    /// Reads or writes tunables.
    pub async fn sysctl(&self, request: SysctlRequest) -> Option<Answer> {
        self.ask(|way_back| Request::Sysctl(request, way_back))
            .await
    }

    /// Every ban.
    pub async fn bans(&self) -> Option<Vec<BanStatus>> {
        self.ask(Request::Bans).await
    }

    /// Bans a source by hand.
    pub async fn ban(&self, source: IpAddr, duration: Duration) -> Option<Result<(), String>> {
        self.ask(|way_back| Request::Ban(source, duration, way_back))
            .await
    }

    /// Lifts a ban; whether there was one.
    pub async fn unban(&self, source: IpAddr) -> Option<Result<bool, String>> {
        self.ask(|way_back| Request::Unban(source, way_back)).await
    }

    /// Reads the configuration again: the new generation, or what is wrong with it.
    pub async fn reload(&self) -> Option<Result<u64, Vec<Diagnostic>>> {
        self.ask(Request::Reload).await
    }

    /// Changes an endpoint.
    pub async fn endpoint(
        &self,
        request: EndpointRequest,
    ) -> Option<Result<EndpointChange, String>> {
        let arrived = Instant::now();
        self.ask(|way_back| Request::Endpoint(request, arrived, way_back))
            .await
    }

    /// Largest request in bytes, and how long one may take.
    pub async fn limits(&self) -> Option<(usize, Duration)> {
        self.ask(Request::Limits).await
    }
}
