//! The stage of the demo: field, origins, certificates, configuration, and a running Sluice.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rig::certificate::Authority;
use rig::field::{Field, WEB_V4, WEB_V6};
use rig::http::Curl;
use rig::origin::Origin;
use rig::sandbox;
use rig::sluice::Sluice;

use crate::{say, tree};

/// Where the configuration of the demo stands in the repository.
const CONFIGURATION: &str = "tests/demo";

pub struct Stage {
    pub field: Field,
    pub origins: Vec<Origin>,
    pub sluice: Sluice,
    pub authority: Authority,
    /// The copy of the configuration that Sluice runs with.
    pub folder: PathBuf,
}

impl Stage {
    pub fn set() -> Result<Self> {
        say::section("Setting the stage");
        let field = Field::build()?;
        say::step(
            "field",
            "5 network namespaces: a client, the edge, three origins, joined by veth pairs",
        );
        let origins: Vec<Origin> = field
            .origins
            .iter()
            .map(Origin::start)
            .collect::<Result<_>>()?;
        say::step("origins", "3 nginx, each with a TCP and UDP echo beside it");

        let folder = sandbox::folder("demo")?;
        copy(&tree::root().join(CONFIGURATION), &folder)?;
        let authority = Authority::create(&folder.join("authority"))?;
        let certs = folder.join("certs");
        authority.sign(&certs, "shop.test", &["shop.test"])?;
        authority.sign(&certs, "api.test", &["api.test"])?;
        say::step(
            "certs",
            "an authority of this run, and a certificate each for shop.test and api.test",
        );

        let start = Instant::now();
        let sluice = Sluice::start(&field.edge, &folder.join("sluice.toml"))?;
        let stage = Self {
            field,
            origins,
            sluice,
            authority,
            folder,
        };
        say::step(
            "sluice",
            &format!(
                "run -c {CONFIGURATION}/sluice.toml, ready in {} (keeper {}, daemon {}, XDP {})",
                say::since(start),
                stage.sluice.keeper_pid(),
                stage.sluice.daemon()?,
                stage.xdp_mode()?,
            ),
        );
        Ok(stage)
    }

    /// A curl of the client that trusts the demo's authority.
    pub fn curl(&self) -> Curl {
        Curl::new(&self.field.client, WEB_V4).trusting(&self.authority.certificate())
    }

    /// The same over IPv6.
    pub fn curl_v6(&self) -> Curl {
        Curl::new(&self.field.client, WEB_V6).trusting(&self.authority.certificate())
    }

    /// How XDP is attached, by Sluice's own word: `native` where every interface has it.
    pub fn xdp_mode(&self) -> Result<String> {
        let status = self.sluice.status()?;
        let interfaces = status
            .pointer("/datapath/interfaces")
            .and_then(|value| value.as_array())
            .cloned()
            .unwrap_or_default();
        let modes: Vec<&str> = interfaces
            .iter()
            .filter_map(|interface| interface.get("mode")?.as_str())
            .collect();
        match modes.as_slice() {
            [] => bail!("status names no interface with XDP: {status}"),
            [first, rest @ ..] if rest.iter().all(|mode| mode == first) => Ok((*first).to_owned()),
            mixed => Ok(mixed.join(",")),
        }
    }

    /// Stays until somebody interrupts.
    pub fn keep(&self) {
        let (pid, api) = (sandbox::id(), self.folder.display());
        say::section("Everything stays up until Ctrl-C. From another terminal:");
        let lines = [
            format!(
                "at() {{ sudo nsenter --target {pid} --mount nsenter --net=/run/netns/sluice-{pid}-$1 \"${{@:2}}\"; }}"
            ),
            format!(
                "at client curl --cacert {api}/authority/ca.pem --connect-to ::{WEB_V4}: https://shop.test/"
            ),
            format!(
                "at client curl --cacert {api}/authority/ca.pem --connect-to ::{WEB_V4}: -H 'x-api-key: open sesame' https://api.test/orders/1"
            ),
            "at client bash -c 'exec 3<>/dev/tcp/203.0.113.20/7000; echo hello >&3; head -2 <&3'"
                .to_owned(),
            format!("at edge {}/sluice status", sandbox::WORK),
            format!("at edge {}/sluice sysctl -a --long", sandbox::WORK),
            format!("at edge {}/sluice ban list", sandbox::WORK),
            "at edge curl --unix-socket /run/sluice/main/admin.sock http://localhost/metrics"
                .to_owned(),
        ];
        for line in lines {
            eprintln!("    {line}");
        }
        while !sandbox::interrupted() {
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Stops Sluice in order; all else goes with the process.
    pub fn strike(self) -> Result<()> {
        self.sluice.stop()?;
        say::step("sluice", "stopped by SIGTERM, exit code 0");
        Ok(())
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)
                .with_context(|| format!("copy to {}", target.display()))?;
        }
    }
    Ok(())
}
