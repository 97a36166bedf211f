//! What each path of the admin socket answers.

use std::net::IpAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::control::{Handle, SysctlRequest};
use crate::tunable::{Form, Query, unit};

const JSON: &str = "application/json";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Body of `POST /bans`.
#[derive(Debug, Serialize, Deserialize)]
pub struct BanRequest {
    pub source: IpAddr,
    /// A duration: `60s`, `1h`.
    #[serde(rename = "for")]
    pub duration: String,
}

type Answer = Response<Full<Bytes>>;

pub async fn answer(request: Request<Incoming>, control: &Handle) -> Answer {
    answered(request, control)
        .await
        .unwrap_or_else(|| fault(StatusCode::SERVICE_UNAVAILABLE, "the daemon is ending"))
}

/// `None`: control does not answer any more.
async fn answered(request: Request<Incoming>, control: &Handle) -> Option<Answer> {
    let (parts, body) = request.into_parts();
    let (bytes_max, timeout) = control.limits().await?;
    let body = match read(body, bytes_max, timeout).await {
        Ok(body) => body,
        Err(refusal) => return Some(refusal),
    };
    let path = parts.uri.path();
    Some(match (&parts.method, path) {
        (&Method::GET, "/status") => json_of(&control.status().await?),
        (&Method::GET, "/metrics") => text(StatusCode::OK, OPENMETRICS, control.metrics().await?),
        (&Method::GET, "/sysctl") => {
            let query = Query {
                all: true,
                form: Form::Json,
                ..Query::default()
            };
            text(
                StatusCode::OK,
                JSON,
                control.sysctl(SysctlRequest::Query(query)).await?.text,
            )
        }
        (&Method::POST, "/sysctl") => match serde_json::from_slice(&body) {
            Ok(request) => json_of(&control.sysctl(request).await?),
            Err(error) => fault(StatusCode::BAD_REQUEST, &error.to_string()),
        },
        (&Method::GET, "/bans") => json_of(&control.bans().await?),
        (&Method::POST, "/bans") => ban(&body, control).await?,
        (&Method::DELETE, path) if path.starts_with("/bans/") => {
            unban(&path["/bans/".len()..], control).await?
        }
        (&Method::GET, "/endpoints") => json_of(&control.status().await?.upstreams),
        (&Method::POST, "/endpoints") => match serde_json::from_slice(&body) {
            Ok(request) => match control.endpoint(request).await? {
                Ok(change) => json_of(&change),
                Err(error) => fault(StatusCode::CONFLICT, &error),
            },
            Err(error) => fault(StatusCode::BAD_REQUEST, &error.to_string()),
        },
        (&Method::POST, "/reload") => match control.reload().await? {
            Ok(generation) => json_of(&json!({ "generation": generation })),
            Err(diagnostics) => {
                let body = json!({ "diagnostics": diagnostics }).to_string();
                text(StatusCode::UNPROCESSABLE_ENTITY, JSON, body)
            }
        },
        (_, "/status" | "/metrics") => not_allowed("GET"),
        (_, "/sysctl" | "/bans" | "/endpoints") => not_allowed("GET, POST"),
        (_, "/reload") => not_allowed("POST"),
        _ => fault(
            StatusCode::NOT_FOUND,
            "there are /status, /metrics, /sysctl, /bans, /endpoints and /reload",
        ),
    })
}

async fn ban(body: &[u8], control: &Handle) -> Option<Answer> {
    let request: BanRequest = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(error) => return Some(fault(StatusCode::BAD_REQUEST, &error.to_string())),
    };
    let duration = match unit::parse_duration(&request.duration) {
        Ok(duration) => duration,
        Err(error) => return Some(fault(StatusCode::BAD_REQUEST, &error)),
    };
    Some(match control.ban(request.source, duration).await? {
        Ok(()) => json_of(&json!({ "source": request.source })),
        Err(error) => fault(StatusCode::CONFLICT, &error),
    })
}

async fn unban(source: &str, control: &Handle) -> Option<Answer> {
    // A client may write the colons of an IPv6 address as they are or encoded.
    let Ok(source) = source
        .replace("%3A", ":")
        .replace("%3a", ":")
        .parse::<IpAddr>()
    else {
        return Some(fault(StatusCode::BAD_REQUEST, "this is no IP address"));
    };
    Some(match control.unban(source).await? {
        Ok(true) => json_of(&json!({ "source": source })),
        Ok(false) => fault(StatusCode::NOT_FOUND, &format!("{source} is not banned")),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, &error),
    })
}

async fn read(body: Incoming, bytes_max: usize, timeout: Duration) -> Result<Bytes, Answer> {
    match tokio::time::timeout(timeout, Limited::new(body, bytes_max).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(fault(
            StatusCode::PAYLOAD_TOO_LARGE,
            "larger than admin.request_bytes_max",
        )),
        Ok(Err(error)) => Err(fault(StatusCode::BAD_REQUEST, &error.to_string())),
        Err(_) => Err(fault(
            StatusCode::REQUEST_TIMEOUT,
            "slower than admin.request_timeout",
        )),
    }
}

fn json_of(value: &impl Serialize) -> Answer {
    text(
        StatusCode::OK,
        JSON,
        serde_json::to_value(value)
            .unwrap_or(Value::Null)
            .to_string(),
    )
}

fn fault(status: StatusCode, message: &str) -> Answer {
    text(status, JSON, json!({ "error": message }).to_string())
}

fn not_allowed(methods: &'static str) -> Answer {
    let mut answer = fault(StatusCode::METHOD_NOT_ALLOWED, &format!("only {methods}"));
    answer
        .headers_mut()
        .insert(ALLOW, hyper::header::HeaderValue::from_static(methods));
    answer
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    answer
}
