//! The origin: gives the same answer to each request, counts them, and looks whether they are what was asked.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use memchr::memmem;
use sluice::net::{self, Listener, Stream};
use socket2::{Domain, Socket, Type};

use super::{Plan, tally::Tally};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;
/// Bytes of a request as the proxy sends it on.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// Listens, and answers until the loop ends.
pub fn serve(plan: &Plan, body: &Arc<[u8]>, tally: &Rc<Tally>) -> Result<()> {
    let listener = listener(plan)?;
    let answer: Arc<[u8]> = [head(body.len()).as_bytes(), body].concat().into();
    let line: Rc<str> = format!("GET {} HTTP/1.1\r\n", plan.exchange.path).into();
    let tally = tally.clone();
    net::spawn(async move {
        loop {
            match listener.accept().await {
                Ok(stream) => net::spawn(talk(stream, answer.clone(), line.clone(), tally.clone())),
                Err(error) => {
                    tally.fault(&format!("the origin cannot accept: {error}"));
                    return;
                }
            }
        }
    });
    Ok(())
}

/// Six fields, as an application server sends them.
fn head(body_bytes: usize) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nServer: origin\r\nContent-Type: application/octet-stream\r\nContent-Length: {body_bytes}\r\n\
         Cache-Control: no-store\r\nETag: \"9e3779b97f4a7c15\"\r\nVary: Accept-Encoding\r\n\r\n"
    )
}

/// Where the proxy expects the origin.
pub fn listener(plan: &Plan) -> Result<Listener> {
    let socket = match &plan.origin_namespace {
        Some(namespace) => namespace.inside(|| listen(plan.origin)),
        None => listen(plan.origin),
    };
    let socket = socket.with_context(|| format!("listen on {}", plan.origin))?;
    Ok(Listener::from_fd(socket.into())?)
}

/// A socket that listens, for a loop to accept from.
///
/// # Errors
/// What socket(2), bind(2) or listen(2) say.
pub fn listen(address: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// One connection of the proxy. That it closes one is its own affair.
async fn talk(stream: Stream, answer: Arc<[u8]>, line: Rc<str>, tally: Rc<Tally>) {
    let mut rest = Vec::new();
    while let Ok(Some(chunk)) = stream.recv().await {
        // A request nearly always comes in one piece: nothing is copied then.
        let arrived: &[u8] = if rest.is_empty() {
            &chunk
        } else {
            rest.extend_from_slice(&chunk);
            &rest
        };
        let mut done = 0;
        while let Some(end) = memmem::find(&arrived[done..], b"\r\n\r\n") {
            let head = &arrived[done..done + end];
            if !head.starts_with(line.as_bytes()) {
                let found = String::from_utf8_lossy(&head[..head.len().min(80)]).into_owned();
                tally.fault(&format!("the origin was asked {found:?}"));
                return;
            }
            done += end + 4;
            tally.request();
            if stream.send(answer.clone()).await.is_err() {
                return;
            }
        }
        rest = arrived[done..].to_vec();
        if rest.len() > HEAD_BYTES_MAX {
            tally.fault("the origin was sent a request without an end");
            return;
        }
    }
}
