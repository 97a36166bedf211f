//! The stage: a field with origins, at most one Sluice at a time, and what tests ask of both.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::client::{syn_is_ignored, tcp_echo};
use rig::field::{Field, WEB_V4};
use rig::origin::Origin;
use rig::sluice::Sluice;
use rig::world::socket;
use rig::{process, sandbox};

/// Forwards on one address and serves on another.
pub const CONFIGURATION: &str = r#"
[datapath]
interfaces = ["client0", "origin1", "origin2", "origin3"]
mode       = "native"
nat        = { source = ["10.77.9.1", "fd77:9::1"], ports = "20000-29999" }

[[listener]]
name    = "echo"
address = ["203.0.113.20:7000", "[2001:db8::20]:7000"]
forward = { upstream = "echo", via = "nat" }

[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[route]]
match   = { path = "/*" }
respond = { status = 204 }

[[upstream]]
name      = "echo"
endpoints = ["10.77.1.2:7000", "10.77.2.2:7000", "[fd77:3::2]:7000"]
"#;

/// Serves, without a kernel half.
pub const PLAIN: &str = r#"
[[listener]]
name    = "web"
address = "203.0.113.10:8080"

[[route]]
match   = { path = "/*" }
respond = { status = 204 }
"#;

/// Another listener that forwards.
pub const SECOND: &str = r#"
[[listener]]
name    = "second"
address = ["203.0.113.20:7001", "[2001:db8::20]:7001"]
forward = { upstream = "echo", via = "nat" }
"#;

/// Client, edge, origins, and at most one Sluice at a time.
pub struct Stage {
    pub field: Field,
    _origins: Vec<Origin>,
}

impl Stage {
    /// Everything but Sluice.
    pub fn build() -> Result<Self> {
        let field = Field::build()?;
        let origins = field.origins.iter().map(Origin::start);
        let _origins = origins.collect::<Result<_>>()?;
        Ok(Self { field, _origins })
    }

    pub fn path(&self) -> Result<std::path::PathBuf> {
        Ok(sandbox::folder("keeper")?.join("sluice.toml"))
    }

    pub fn write(&self, text: &str) -> Result<()> {
        fs::write(self.path()?, text).context("write the configuration")
    }

    pub fn start(&self, text: &str, arguments: &[&str]) -> Result<Sluice> {
        self.write(text)?;
        Sluice::start_with(&self.field.edge, &self.path()?, arguments)
    }

    /// Stops it and takes its kernel half away: the next test begins on a bare host.
    pub fn end(&self, sluice: Sluice) -> Result<()> {
        sluice.stop()?;
        self.down()
    }

    pub fn down(&self) -> Result<()> {
        let mut command = rig::sluice::command(&self.field.edge)?;
        rig::namespace::output(command.args(["datapath", "down"])).map(drop)
    }

    /// Connections that wait to be accepted, for each socket that listens on a port of the edge, in a lasting order.
    pub fn queues(&self, port: u16) -> Result<Vec<u64>> {
        let table = self
            .field
            .edge
            .inside(|| fs::read_to_string("/proc/thread-self/net/tcp"))?;
        // Columns (proc(5)): 1 the local address, 3 the state (0A is LISTEN), 4 both queues, 9 the inode.
        let mut queues: Vec<(u64, u64)> = table
            .lines()
            .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
            .filter(|columns| columns.get(3) == Some(&"0A"))
            .filter(|columns| columns[1].ends_with(&format!(":{port:04X}")))
            .filter_map(|columns| {
                let (_, received) = columns.get(4)?.split_once(':')?;
                let inode = columns.get(9)?.parse().ok()?;
                Some((inode, u64::from_str_radix(received, 16).ok()?))
            })
            .collect();
        queues.sort_unstable();
        Ok(queues.into_iter().map(|(_, queue)| queue).collect())
    }

    /// One connection of the well-behaved client through the kernel half.
    pub fn echo(&self, address: &str, port: u16) -> Result<()> {
        let to = socket(address, port)?;
        self.field.client.inside(|| tcp_echo(to, 2000, 7)).map(drop)
    }

    /// Whether a SYN from that source is dropped without a word.
    pub fn is_ignored(&self, from: &str, to: &str) -> Result<bool> {
        let from: IpAddr = from.parse()?;
        let to = socket(to, if to == WEB_V4 { 8080 } else { 7000 })?;
        let limit = Duration::from_millis(300);
        self.field.client.inside(|| syn_is_ignored(from, to, limit))
    }
}

pub fn last_words() -> String {
    let log = fs::read_to_string("/run/rig/log/sluice.log").unwrap_or_default();
    process::last_lines(&log, 30)
}

/// Sources that `ban list` shows.
pub fn banned(sluice: &Sluice) -> Result<Vec<String>> {
    let list = sluice.json(&["ban", "list"])?;
    let bans = list.as_array().context("a list of bans")?;
    Ok(bans
        .iter()
        .filter_map(|ban| ban["source"].as_str())
        .map(str::to_owned)
        .collect())
}

/// Bans a source for ten minutes by the admin socket: the whole answer.
pub fn post_ban(source: Ipv4Addr) -> Result<String> {
    let body = format!("{{\"source\":\"{source}\",\"for\":\"10m\"}}");
    let mut stream = UnixStream::connect("/run/sluice/main/admin.sock")?;
    write!(
        stream,
        "POST /bans HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(std::io::read_to_string(stream)?)
}

/// Makes a pinned map one that no system call can write (BPF_MAP_FREEZE).
pub fn freeze(path: &str) -> Result<()> {
    const BPF_OBJ_GET: libc::c_long = 7;
    const BPF_MAP_FREEZE: libc::c_long = 22;
    let path = std::ffi::CString::new(path)?;
    // union bpf_attr: `pathname` and `bpf_fd` of BPF_OBJ_GET; `map_fd` of BPF_MAP_FREEZE.
    let get = [path.as_ptr() as u64, 0];
    // SAFETY: the kernel reads 16 bytes of a live array and the path it points at.
    let map = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, 16) };
    ensure!(map >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it for us.
    let map = unsafe { OwnedFd::from_raw_fd(map as i32) };
    let freeze = [map.as_raw_fd() as u32];
    // SAFETY: the kernel reads 4 bytes of a live array.
    let done = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_FREEZE, &raw const freeze, 4) };
    ensure!(done == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}
