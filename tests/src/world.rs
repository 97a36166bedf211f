//! The world of whole-proxy tests: field, origins, certificates, and a Sluice with a configuration of the test program's own.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::certificate::Authority;
use crate::client::Tally;
use crate::field::{Field, at};
use crate::http::{Curl, KeepAlive};
use crate::origin::Origin;
use crate::sandbox;
use crate::sluice::Sluice;

/// Everything that a test may touch.
pub struct World {
    pub field: Field,
    pub origins: Vec<Origin>,
    pub authority: Authority,
    pub sluice: Sluice,
    /// Where `sluice.toml` stands.
    pub folder: PathBuf,
}

impl World {
    /// Builds it around the text of a configuration, which finds certificates for `web.test` and `api.test` in `certs`.
    pub fn build(configuration: &str) -> Result<Self> {
        let field = Field::build()?;
        let origins: Vec<Origin> = field
            .origins
            .iter()
            .map(Origin::start)
            .collect::<Result<_>>()?;
        let folder = sandbox::folder("etc")?;
        let authority = Authority::create(&folder.join("authority"))?;
        authority.sign(&folder.join("certs"), "web", &["web.test", "api.test"])?;
        fs::write(folder.join("sluice.toml"), configuration).context("write the configuration")?;
        let sluice = Sluice::start(&field.edge, &folder.join("sluice.toml"))?;
        Ok(Self {
            field,
            origins,
            authority,
            sluice,
            folder,
        })
    }

    /// A curl of the client that trusts our authority and asks `to`, whatever the name.
    pub fn curl(&self, to: &str) -> Curl {
        Curl::new(&self.field.client, to).trusting(&self.authority.certificate())
    }

    /// So many requests of the client for `host`, one after the other, each over a connection of its own.
    pub fn requests(&self, to: SocketAddr, host: &str, count: u64) -> Tally {
        self.field.client.inside(|| {
            let mut tally = Tally::default();
            for _ in 0..count {
                let answer = KeepAlive::connect(None, to)
                    .and_then(|mut connection| connection.get(host, "/", "Connection: close\r\n"));
                tally.count(answer.and_then(|response| {
                    ensure!(response.status == 200, "{response:?}");
                    Ok((response.origin().unwrap_or_default().to_owned(), 1))
                }));
            }
            tally
        })
    }

    /// Writes another configuration in the place of the present one.
    pub fn write(&self, configuration: &str) -> Result<()> {
        fs::write(self.folder.join("sluice.toml"), configuration).context("write the configuration")
    }

    /// What a reader of a failure wants to know.
    pub fn last_words(&self) -> String {
        self.sluice.last_words()
    }
}

/// `address:port` as a socket address.
pub fn socket(address: &str, port: u16) -> Result<SocketAddr> {
    at(address, port)
        .parse()
        .with_context(|| format!("{address} and {port} are no address"))
}
