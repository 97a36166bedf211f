//! A minimal proxy on Pingora: what Sluice is measured beside, with the routes and the TLS of a scenario and nothing else.
//!
//! `bench-pingora LISTEN ORIGIN ROUTES [CERTIFICATE]`: without routes everything goes to the origin, else `/route0/` and so on.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::Result;
use pingora::listeners::tls::TlsSettings;
use pingora::prelude::{Error, ErrorType, HttpPeer, Session};
use pingora::proxy::{ProxyHttp, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;

struct Edge {
    origin: HttpPeer,
    /// By the first segment of the path; None: one route for everything.
    routes: Option<HashMap<String, HttpPeer>>,
}

#[async_trait]
impl ProxyHttp for Edge {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, session: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        let Some(routes) = &self.routes else {
            return Ok(Box::new(self.origin.clone()));
        };
        let path = session.req_header().uri.path();
        let first = path.split('/').nth(1).unwrap_or_default();
        match routes.get(first) {
            Some(peer) => Ok(Box::new(peer.clone())),
            None => Error::e_explain(ErrorType::HTTPStatus(404), "no route"),
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (listen, origin, routes, certificate) = match words.as_slice() {
        [listen, origin, routes] => (listen, origin, routes, None),
        [listen, origin, routes, certificate] => (listen, origin, routes, Some(certificate)),
        _ => {
            println!("pingora 0.9.1");
            return;
        }
    };
    let origin = HttpPeer::new(origin.as_str(), false, String::new());
    let count: usize = routes.parse().expect("ROUTES is a number");
    let routes = (count > 0).then(|| {
        (0..count)
            .map(|number| (format!("route{number}"), origin.clone()))
            .collect()
    });
    let conf = ServerConf {
        // One worker per core under test.
        threads: 1,
        // As many idle connections as clients, or it closes and opens them under load.
        upstream_keepalive_pool_size: 1024,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let conf = Arc::clone(&server.configuration);
    let mut service = http_proxy_service(&conf, Edge { origin, routes });
    match certificate {
        None => service.add_tcp(listen),
        Some(file) => {
            let settings = TlsSettings::intermediate(file, file)
                .expect("a certificate and its key in one file");
            service.add_tls_with_settings(listen, None, settings);
        }
    }
    server.add_service(service);
    server.run_forever();
}
