//! nginx and HAProxy behind us: whatever is taken means the same to both, and what we meant.

use std::fs;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::dice::Dice;
use rig::message::{Case, Client, Then, read_all};
use rig::process::Process;
use rig::scripted::{Heard, Scripted};
use rig::{sandbox, wait};

use crate::corpus::send;
use crate::tool::expect_program;
use crate::witness::{Meaning, meaning};
use crate::{DIRECT, HAPROXY, NGINX, World, second};

/// How many messages are made up beside those on file.
const GENERATED: usize = 600;

/// What others refuse though we take it. That is their right; reading it otherwise is not.
const REFUSED_BY_OTHERS: &[(&str, &str)] = &[
    ("method-lower-case", "nginx"),
    ("target-asterisk", "nginx"),
    ("target-asterisk-absolute", "nginx"),
];

/// Servers that forward what they read to an origin that keeps it.
struct Behind {
    nginx: Scripted,
    haproxy: Scripted,
    _processes: [Process; 2],
}

pub fn compare(world: &mut World) -> Result<()> {
    expect_program("haproxy")?;
    let behind = Behind::start(world)?;
    let is_taken = |case: &Case| case.reached.is_some() && case.then != Then::Torn;
    // The host that a client of HTTP/1.0 did not name is the endpoint's, and these are three.
    let is_named = |case: &Case| case.name != "host-missing-on-http10";
    let mut cases = read_all("request")?;
    cases.retain(|case| is_taken(case) && is_named(case));
    let on_file = cases.len();
    let mut dice = Dice::new(26);
    let generated = (0..GENERATED).map(|number| {
        let mut case = any(number, &mut dice);
        if number % 2 == 1 {
            wound(&mut case.sent, &mut dice);
        }
        case
    });
    cases.extend(generated);

    let (mut taken, mut refused) = (0, Vec::new());
    for (number, case) in cases.iter().enumerate() {
        let meant = heard(world, &world.origin, case, DIRECT)?;
        ensure!(
            number >= on_file || !meant.is_empty(),
            "{} is not taken",
            case.name
        );
        taken += usize::from(!meant.is_empty());
        for (who, origin, port) in [
            ("nginx", &behind.nginx, NGINX),
            ("HAProxy", &behind.haproxy, HAPROXY),
        ] {
            let read = heard(world, origin, case, port)?;
            ensure!(
                read.iter().all(|one| meant.contains(one)) && read.len() <= meant.len(),
                "{who} reads {} differently:\n{meant:#?}\nbecame\n{read:#?}",
                case.name
            );
            // nginx takes methods of upper-case letters only.
            let is_odd = |one: &Meaning| one.start.split(' ').next().is_some_and(is_odd_method);
            let is_made_up = number >= on_file;
            if read != meant && !(is_made_up && meant.iter().any(is_odd)) {
                refused.push((case.name.as_str(), who));
            }
        }
    }
    refused.sort_unstable();
    ensure!(
        refused == REFUSED_BY_OTHERS,
        "refused by others: {refused:?}"
    );
    ensure!(
        taken > on_file + GENERATED / 2,
        "what is made up is too odd to tell anything: {taken} are taken"
    );
    Ok(())
}

impl Behind {
    fn start(world: &World) -> Result<Self> {
        let namespace = &world.field.origins[0];
        let folder = sandbox::folder("behind")?;
        let prefix = folder.display();
        let start = |name: &str, program: &str, arguments: [&str; 2], text: String| {
            let file = folder.join(format!("{name}.conf"));
            fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
            let mut command = namespace.command(program);
            command.args(arguments).arg(&file);
            Process::start(name, command)
        };
        let nginx = format!(
            "daemon off; user root; worker_processes 1; pid {prefix}/nginx.pid; error_log stderr;
             events {{ worker_connections 256; }}
             http {{
                 access_log off; client_body_temp_path {prefix}/body; proxy_temp_path {prefix}/proxy;
                 fastcgi_temp_path {prefix}/fastcgi; uwsgi_temp_path {prefix}/uwsgi; scgi_temp_path {prefix}/scgi;
                 underscores_in_headers on; ignore_invalid_headers off; merge_slashes off;
                 large_client_header_buffers 8 64k; keepalive_requests 1000000;
                 server {{
                     listen 9001;
                     location / {{
                         proxy_pass http://127.0.0.1:9011; proxy_http_version 1.1;
                         proxy_set_header Host $http_host; proxy_set_header Connection \"\";
                     }}
                 }}
             }}"
        );
        let haproxy = "global
    tune.bufsize 65536
    tune.http.maxhdr 300
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend all
    bind :9002
    default_backend origin
backend origin
    server origin 127.0.0.1:9012
";
        let behind = Self {
            nginx: Scripted::start(namespace, 9011)?,
            haproxy: Scripted::start(namespace, 9012)?,
            _processes: [
                start("nginx", "/usr/sbin/nginx", ["-q", "-c"], nginx)?,
                start(
                    "haproxy",
                    "/usr/sbin/haproxy",
                    ["-db", "-f"],
                    haproxy.to_owned(),
                )?,
            ],
        };
        for origin in [&behind.nginx, &behind.haproxy] {
            second(origin);
        }
        for port in [9001, 9002] {
            wait::until_true(
                "nginx and HAProxy to listen",
                Duration::from_secs(10),
                || namespace.inside(|| TcpStream::connect(("127.0.0.1", port)).is_ok()),
            )?;
        }
        Ok(behind)
    }
}

fn is_odd_method(name: &str) -> bool {
    !name
        .bytes()
        .all(|byte| byte.is_ascii_uppercase() || byte == b'-')
}

/// What an origin understood of a case sent to this port of the edge; the second request, which is the same for all, left out.
fn heard(world: &World, origin: &Scripted, case: &Case, port: u16) -> Result<Vec<Meaning>> {
    origin.take_heard();
    world
        .field
        .client
        .inside(|| send(case, port, usize::MAX))
        .with_context(|| format!("{} to port {port}", case.name))?;
    let is_own = |heard: &Heard| heard.is_whole && !heard.head.starts_with(b"GET /second ");
    let heard = origin.take_heard();
    heard
        .iter()
        .filter(|heard| is_own(heard))
        .map(meaning)
        .collect()
}

/// A request of odd parts that are fine each, most of the time.
fn any(number: usize, dice: &mut Dice) -> Case {
    let mut sent = Vec::new();
    let methods = [
        "GET", "GET", "POST", "PUT", "DELETE", "PURGE", "OPTIONS", "PATCH", "M-SEARCH",
    ];
    sent.extend_from_slice(dice.one(&methods).as_bytes());
    sent.extend_from_slice(b" /generated");
    for _ in 0..dice.below(4) {
        let parts = [
            "/a", "/.", "/..", "//", "/%2e", "/%C3%A9", "/a;b=c", "/a.b", "/a+b", "/~x", "/%41",
            "/a%20b", "/'(x)'", "/a,b", "/a:b@c", "/$&*!", "/%25", "/%7C",
        ];
        sent.extend_from_slice(dice.one(&parts).as_bytes());
    }
    let queries = [
        "", "", "?", "?a=b", "?a=%2F&b", "?x=/../y", "?a?b", "?q='%00'", "?a=b;c=d",
    ];
    sent.extend_from_slice(dice.one(&queries).as_bytes());
    let hosts = [
        "a.test",
        "A.TEST:80",
        "a.test.",
        "[2001:db8::1]:81",
        "192.0.2.1",
        "a_b.test:",
    ];
    sent.extend_from_slice(format!(" HTTP/1.1\r\nHost: {}\r\n", dice.one(&hosts)).as_bytes());
    for _ in 0..dice.below(7) {
        field(&mut sent, dice);
    }
    let length = dice.below(3) * dice.below(3000);
    let body: Vec<u8> = dice.bytes(length);
    match dice.below(3) {
        0 => sent.extend_from_slice(b"\r\n"),
        1 => {
            sent.extend_from_slice(format!("Content-Length: {length}\r\n\r\n").as_bytes());
            sent.extend_from_slice(&body);
        }
        _ => {
            sent.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            for chunk in body.chunks(1 + dice.below(700)) {
                let extension = dice.one(&["", ";a", ";a=\"b;c\"", ";x=y;z"]);
                sent.extend_from_slice(format!("{:X}{extension}\r\n", chunk.len()).as_bytes());
                sent.extend_from_slice(chunk);
                sent.extend_from_slice(b"\r\n");
            }
            let end = dice.one(&[
                "0\r\n\r\n",
                "000\r\n\r\n",
                "0;e\r\n\r\n",
                "0\r\nX-T: 1\r\n\r\n",
            ]);
            sent.extend_from_slice(end.as_bytes());
        }
    }
    Case {
        name: format!("generated {number}"),
        client: Client::GoesOn,
        then: Then::Open,
        sent,
        ..Case::default()
    }
}

/// One small wound to the head: mostly it is refused then; where it is not, it must be read alike.
fn wound(sent: &mut Vec<u8>, dice: &mut Dice) {
    let head = sent.windows(4).position(|four| four == b"\r\n\r\n");
    let at = dice.below(head.unwrap_or(sent.len()));
    let line = sent[..at].windows(2).rposition(|two| two == b"\r\n");
    match dice.below(4) {
        0 => {
            let spice = [
                " ", "\t", ":", ",", ";", "%", "%2e", "..", "/", "\\", "?", "#", "@", "\u{7f}",
                "\u{b}", "\u{e9}", "0", "+", "-", "_", "\r", "\0", "chunked", "\"", "'", "[", "*",
                "//", "/../", "%00",
            ];
            sent.splice(at..at, dice.one(&spice).bytes());
        }
        1 if !b"\r\n".contains(&sent[at]) => drop(sent.remove(at)),
        2 if sent[at].is_ascii_alphabetic() => sent[at] ^= 0x20,
        _ => {
            let lines = [
                "Content-Length: 3\r\n",
                "Transfer-Encoding: chunked\r\n",
                "Host: b.test\r\n",
                "Expect: 100-continue\r\n",
                "Connection: x-a, host\r\n",
                "Connection: close\r\n",
                "Upgrade: h2c\r\n",
                "X-A: b\r\n",
                " folded\r\n",
                "X-B\r\n",
            ];
            let at = line.map_or(0, |line| line + 2);
            sent.splice(at..at, dice.one(&lines).bytes());
        }
    }
}

fn field(sent: &mut Vec<u8>, dice: &mut Dice) {
    let names = [
        "Accept",
        "cookie",
        "COOKIE",
        "X-A",
        "x-a",
        "X'Odd!",
        "X.Y",
        "X_Y",
        "Range",
        "Authorization",
        "TE",
        "Keep-Alive",
        "Via2",
        "Content-Type",
        "X-Content-Length",
        "X-Transfer-Encoding",
        "Hostx",
        "X-Forwarded-For",
    ];
    let values = [
        "",
        "1",
        "a, b",
        "\"q;,\\\"x\"",
        "caf\u{e9}",
        "a\tb",
        "Host: b",
        "chunked",
        "close",
        "<x>",
        "a=b; c=d",
        "\u{20ac}",
    ];
    let spaces = ["", " ", "  ", "\t"];
    let line = format!(
        "{}:{}{}{}\r\n",
        dice.one(&names),
        dice.one(&spaces),
        dice.one(&values),
        dice.one(&spaces)
    );
    sent.extend_from_slice(line.as_bytes());
}
