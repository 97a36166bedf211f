//! The admin socket: HTTP/1.1 for `sluice` itself, `curl --unix-socket` and Prometheus.

mod answer;

use std::convert::Infallible;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};

pub use answer::BanRequest;

use crate::control::Handle;

/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 64;

/// A connection on which nothing is asked for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves the socket until the daemon ends. Call it on the control thread.
pub fn serve(listener: UnixListener, control: Handle) {
    tokio::task::spawn_local(async move {
        if let Err(error) = accept(listener, control).await {
            log::error!("the admin socket is not served: {error}");
        }
    });
}

async fn accept(listener: UnixListener, control: Handle) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: later there may be one.
                log::warn!("cannot accept on the admin socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let control = control.clone();
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| respond(request, control.clone()));
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(IDLE_TIMEOUT);
            // A client that goes away in the middle is no event.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
            drop(place);
        });
    }
}

async fn respond(
    request: Request<Incoming>,
    control: Handle,
) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(answer::answer(request, &control).await)
}
