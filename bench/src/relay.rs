//! A proxy that looks at nothing: what TCP and our loop cost, below which nobody comes who reads what he passes on.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use sluice::net::{self, Listener, Stream};

/// Listens, and joins each connection to one of its own to the origin, until it is ended by a signal.
pub fn serve(listen: SocketAddr, origin: SocketAddr) -> Result<()> {
    let socket = crate::load::listen(listen).with_context(|| format!("listen on {listen}"))?;
    net::run(&net::Settings::default(), async {
        let listener = Listener::from_fd(OwnedFd::from(socket))?;
        loop {
            let client = listener.accept().await?;
            net::spawn(async move {
                // Whoever cannot be served sees his connection closed; the load counts that as a fault.
                if let Ok(server) = net::connect(origin).await {
                    join(client, server).await;
                }
            });
        }
    })
    .context("make a uring for the relay")?
}

/// Both ways at once, until one side ends.
async fn join(client: Stream, server: Stream) {
    net::select(pass(&client, &server), pass(&server, &client)).await;
}

async fn pass(from: &Stream, to: &Stream) {
    while let Ok(Some(chunk)) = from.recv().await {
        if to.send(chunk).await.is_err() {
            return;
        }
    }
}
