//! What stands behind the proxy: nginx for HTTP, an echo for TCP and UDP that says which origin it is.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::namespace::Namespace;
use crate::process::{self, Process};
use crate::{sandbox, wait};

/// The port of the HTTP server of an origin.
pub const HTTP_PORT: u16 = 8080;
/// The port of the echo, TCP and UDP.
pub const ECHO_PORT: u16 = 7000;

/// One origin: a web server and an echo, in a namespace of their own.
pub struct Origin {
    name: String,
    namespace: Namespace,
    /// None while it is dead on purpose.
    nginx: Option<Process>,
    echo: Arc<Echoed>,
}

/// What an echo has seen.
#[derive(Default)]
pub struct Echoed {
    /// TCP connections accepted.
    pub connections: AtomicU64,
    /// UDP datagrams answered.
    pub datagrams: AtomicU64,
}

impl Origin {
    /// Starts both, named after the namespace, and waits until they answer.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        let name = namespace.label().to_owned();
        let echo = start_echo(namespace, &name)?;
        let mut origin = Self {
            name,
            namespace: namespace.clone(),
            nginx: None,
            echo,
        };
        origin.start_web()?;
        Ok(origin)
    }

    /// Starts the web server, and waits until it answers.
    pub fn start_web(&mut self) -> Result<()> {
        let mut nginx = start_nginx(&self.namespace, &self.name)?;
        let address = (Ipv6Addr::LOCALHOST, HTTP_PORT);
        wait::until_true("nginx to listen", Duration::from_secs(10), || {
            self.namespace
                .inside(|| TcpStream::connect(address).is_ok())
        })
        .or_else(|error| nginx.expect_running().and(Err(error)))?;
        self.nginx = Some(nginx);
        Ok(())
    }

    /// Ends the web server: its port refuses from now on.
    pub fn end_web(&mut self) -> Result<()> {
        let mut nginx = self
            .nginx
            .take()
            .context("the web server is dead already")?;
        nginx.signal(Signal::SIGTERM)?;
        nginx.wait(Duration::from_secs(10)).map(drop)
    }

    /// Stops the web server where it stands: the kernel goes on accepting connections for it, and nobody answers them.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let nginx = self.nginx.as_ref().context("the web server is dead")?;
        for worker in process::children(nginx.pid()) {
            kill(Pid::from_raw(worker as i32), signal).context("signal nginx")?;
        }
        Ok(())
    }

    /// Its name, which stands in `x-origin` of every response and in front of every echo.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it lives.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// What its echo has seen.
    pub fn echoed(&self) -> &Echoed {
        &self.echo
    }

    /// The requests that its web server finished: method, path, status and the fields a test looks at, one per line.
    pub fn requests(&self) -> Vec<String> {
        let path = format!("{}/{}/access.log", sandbox::WORK, self.name);
        fs::read_to_string(path)
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

/// Every path answers with the origin's name and the request's; `/large` is 8 MiB; `/slow` drips; `/broken` is so at origin1.
fn start_nginx(namespace: &Namespace, name: &str) -> Result<Process> {
    let folder = sandbox::folder(name)?;
    let large: Vec<u8> = (0..8 * 1024 * 1024_u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    fs::write(folder.join("large"), large).context("write the large file")?;
    let prefix = folder.display();
    let broken = if name == "origin1" { 500 } else { 200 };
    let text = format!(
        r#"
daemon off;
user root;
worker_processes 1;
pid {prefix}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 1024; }}
http {{
    log_format seen '$request_method $request_uri $status host=$host forwarded=$http_x_forwarded_for edge=$http_x_edge secret=$http_x_secret';
    access_log {prefix}/access.log seen;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    client_max_body_size 64m;
    keepalive_requests 1000000;
    default_type text/plain;
    server {{
        listen [::]:{HTTP_PORT} ipv6only=off reuseport backlog=1024;
        add_header x-origin {name} always;
        add_header x-powered-by "nginx of {name}" always;
        location / {{ return 200 "{name} $request_method $request_uri\n"; }}
        location = /healthz {{ access_log off; return 200 "well\n"; }}
        location = /broken {{ return {broken} "{name}\n"; }}
        location = /large {{ root {prefix}; }}
        location = /slow {{ root {prefix}; try_files /large =404; limit_rate 1m; }}
    }}
}}
"#
    );
    let configuration = folder.join("nginx.conf");
    fs::write(&configuration, text).context("write nginx.conf")?;
    let mut command = namespace.command("/usr/sbin/nginx");
    command.arg("-p").arg(&folder).arg("-c").arg(&configuration);
    Process::start(&format!("nginx-{name}"), command)
}

/// Both echoes first say who they are: TCP with one line at the start, UDP with the name and a space before each datagram.
fn start_echo(namespace: &Namespace, name: &str) -> Result<Arc<Echoed>> {
    let echoed = Arc::new(Echoed::default());
    let listener = namespace
        .inside(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT)))
        .context("bind the TCP echo")?;
    let socket = namespace
        .inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT)))
        .context("bind the UDP echo")?;

    let (label, counts) = (name.to_owned(), Arc::clone(&echoed));
    namespace.thread("tcp-echo", move || {
        for stream in listener.incoming().flatten() {
            counts.connections.fetch_add(1, Ordering::Relaxed);
            let label = label.clone();
            // An echo that cannot start a thread closes the connection, which the client counts as failed.
            let _ = thread::Builder::new()
                .stack_size(128 * 1024)
                .spawn(move || echo_stream(stream, &label));
        }
    })?;
    let (label, counts) = (name.to_owned(), Arc::clone(&echoed));
    namespace.thread("udp-echo", move || echo_datagrams(&socket, &label, &counts))?;
    Ok(echoed)
}

fn echo_stream(mut stream: TcpStream, label: &str) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(format!("{label}\n").as_bytes())?;
    let mut buffer = [0; 16 * 1024];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&buffer[..length])?;
    }
}

fn echo_datagrams(socket: &UdpSocket, label: &str, counts: &Echoed) {
    let mut buffer = vec![0; 65_536];
    let prefix = format!("{label} ");
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, peer)) => {
                let mut answer = prefix.clone().into_bytes();
                answer.extend_from_slice(&buffer[..length]);
                if socket.send_to(&answer, peer).is_ok() {
                    counts.datagrams.fetch_add(1, Ordering::Relaxed);
                }
            }
            // An ICMP error about an earlier answer.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(_) => return,
        }
    }
}
