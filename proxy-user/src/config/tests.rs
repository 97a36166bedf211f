//! Whole configurations: good ones load as meant; bad ones are told as `testdata/config/bad` shows.
//!
//! A case is a folder that stands for `/etc/sluice`, with `expected.txt` beside its files. After a change that is
//! meant to change messages: `SLUICE_BLESS=1 cargo test -p proxy-user config`, then read the difference.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::*;

const MAIN: &str = "/etc/sluice/sluice.toml";

fn bundle(files: &[(&str, &str)]) -> Bundle {
    Bundle::of_files(
        files
            .iter()
            .map(|(name, text)| (format!("/etc/sluice/{name}"), *text)),
    )
}

fn load_text(text: &str) -> Result<Loaded, Vec<Diagnostic>> {
    load(&bundle(&[("sluice.toml", text)]), Path::new(MAIN))
}

fn testdata(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/config")
        .join(folder)
}

/// All files below a folder, as paths below it.
fn files_below(folder: &Path, prefix: &Path, into: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).expect("a folder of test data") {
        let path = entry.expect("an entry").path();
        let name = prefix.join(path.file_name().expect("a name"));
        if path.is_dir() {
            files_below(&path, &name, into);
        } else if !path.ends_with("expected.txt") {
            into.push((name, std::fs::read(&path).expect("a file")));
        }
    }
}

fn case(folder: &Path) -> Bundle {
    let mut files = Vec::new();
    files_below(folder, Path::new("/etc/sluice"), &mut files);
    Bundle::of_files(files).with_env("EMPTY", "")
}

#[test]
fn each_bad_configuration_is_told_as_its_file_shows() {
    let bless = std::env::var_os("SLUICE_BLESS").is_some();
    let (mut wrong, mut count) = (String::new(), 0);
    let folders: BTreeSet<PathBuf> = std::fs::read_dir(testdata("bad"))
        .expect("cases")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    for folder in folders {
        count += 1;
        let refuse_one =
            |certificate: &CertificatePem| match certificate.path.ends_with("mismatch.pem") {
                true => Err("the key does not belong to the certificate".to_owned()),
                false => Ok(()),
            };
        let found = match load_checked(&case(&folder), Path::new(MAIN), &refuse_one) {
            Ok(loaded) => loaded.warnings,
            Err(found) => found,
        };
        let text = format!(
            "{}\n{}\n",
            diagnostic::render(&found, false),
            diagnostic::summary(&found)
        );
        assert!(!text.contains("canary"), "a secret is shown: {text}");
        let expected = folder.join("expected.txt");
        if bless {
            std::fs::write(&expected, &text).expect("written");
        } else if std::fs::read_to_string(&expected).unwrap_or_default() != text {
            wrong.push_str(&format!(
                "--- {} is told like this:\n{text}\n",
                folder.display()
            ));
        }
    }
    assert!(count >= 10, "only {count} cases were found");
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn the_full_example_loads_as_it_is_meant() {
    let loaded = load(&case(&testdata("good")), Path::new(MAIN))
        .map_err(|found| diagnostic::render(&found, false));
    let Loaded {
        config,
        tunables,
        warnings,
    } = loaded.expect("a good configuration");
    assert_eq!(diagnostic::render(&warnings, false), "");
    let names: Vec<_> = config
        .routes
        .iter()
        .map(|route| route.name.as_str())
        .collect();
    assert_eq!(names, ["orders", "site", "route-3", "extra"]);
    let orders = &config.routes[0];
    assert_eq!(orders.listener, Some(0));
    assert_eq!(orders.policies, [0, 1]);
    assert_eq!(orders.action, Action::Upstream(vec![(0, 95), (1, 5)]));
    assert_eq!(
        (orders.retry.retries, orders.timeout.exchange),
        (Some(2), Some(Duration::from_secs(10)))
    );
    assert_eq!(
        config.routes[2].action,
        Action::Redirect {
            status: 301,
            location: "/new".into()
        }
    );
    assert_eq!(
        config.listeners[1].mode,
        ListenerMode::Forward {
            upstream: 2,
            via: Via::Nat,
            fragments: Fragments::Follow,
            udp: UdpFlows::Stay,
            all_down: AllDown::Refuse,
        }
    );
    let modes: Vec<_> = config
        .listeners
        .iter()
        .map(|listener| &listener.mode)
        .collect();
    assert_eq!(
        modes[3..],
        [
            &ListenerMode::Forward {
                upstream: 2,
                via: Via::Gue,
                fragments: Fragments::Drop,
                udp: UdpFlows::Move,
                all_down: AllDown::Refuse,
            },
            &ListenerMode::Forward {
                upstream: 2,
                via: Via::Direct,
                fragments: Fragments::Pass,
                udp: UdpFlows::Stay,
                all_down: AllDown::LastKnown,
            },
        ]
    );
    assert_eq!(orders.trailers, ["grpc-status", "grpc-message"]);
    let plain = &config.listeners[2];
    let trusted = plain.trusted.as_ref().expect("hops");
    let trusts = ["10.9.8.7", "11.0.0.1", "2001:db8:c::1", "2001:db8:c::2"]
        .map(|ip| trusted.contains(ip.parse().expect("an address")));
    assert_eq!(trusts, [true, false, true, false]);
    assert_eq!(
        (trusted.claim, plain.via.as_deref(), plain.is_logged),
        (Claim::Forwarded, Some("edge-1"), false)
    );
    let pages = [503, 404, 429, 500].map(|status| {
        let page = orders.errors.find(status)?;
        Some((page.content_type.as_str(), page.body.len()))
    });
    assert_eq!(
        pages,
        [
            Some(("text/html; charset=utf-8", 14)),
            Some(("application/json", 2)),
            Some(("application/json", 2)),
            None
        ]
    );
    let log = config.access_log.as_ref().expect("a log");
    assert_eq!(log.to, LogTarget::File("/var/log/sluice/access.log".into()));
    assert_eq!((log.sample, orders.is_logged), (Some(10), Some(true)));
    let more: Vec<_> = log.fields[LogField::DEFAULT.len()..]
        .iter()
        .map(LogField::name)
        .collect();
    assert_eq!(
        more,
        ["query", "request.user-agent", "response.content-type"]
    );
    let weights: Vec<_> = config.upstreams[0]
        .endpoints
        .iter()
        .map(|endpoint| endpoint.weight)
        .collect();
    assert_eq!(weights, [1, 2, 1]);
    let orders = &config.upstreams[0];
    let limits = orders.endpoints.iter();
    let limits: Vec<_> = limits.map(|one| (one.calls_max, one.is_backup)).collect();
    assert_eq!(limits, [(None, false), (Some(20), false), (None, true)]);
    assert_eq!(
        orders.balance,
        Balance::Maglev(Hashing {
            key: Attribute::Capture("id".into()),
            load_percent_max: Some(125)
        })
    );
    assert_eq!(
        (
            orders.calls_max,
            orders.endpoint_calls_max,
            orders.queue.pending_max,
            orders.queue.wait
        ),
        (Some(200), Some(50), Some(100), Some(Duration::from_secs(2)))
    );
    let sticky = orders.sticky.as_ref().expect("a cookie");
    assert_eq!(
        (&*sticky.cookie, &*sticky.path, sticky.ttl),
        ("node", "/orders", Some(Duration::from_secs(3600)))
    );
    assert_eq!(
        (sticky.is_secure, sticky.same_site, sticky.is_http_only),
        (Some(true), SameSite::Strict, false)
    );
    assert!(sticky.key.is_some());
    assert_eq!(
        config.upstreams[1].balance,
        Balance::LeastRequest {
            candidates: u32::MAX
        }
    );
    assert_eq!(
        config.datapath.nat.as_ref().map(|nat| nat.ports),
        Some((20_000, 59_999))
    );
    assert_eq!(
        tunables.http.head_timeout,
        Duration::from_secs(20),
        "[tunables] is stronger than a drop-in"
    );
    assert_eq!(
        tunables.http.idle_timeout,
        Duration::from_secs(75),
        "the drop-in is stronger than the default"
    );
    let PolicyKind::ApiKey(keys) = &config.policies[0].kind else {
        panic!("{:?}", config.policies[0])
    };
    assert_eq!(keys.consumers.len(), 2);
    let PolicyKind::RateLimit(limit) = &config.policies[1].kind else {
        panic!("{:?}", config.policies[1])
    };
    assert_eq!((limit.interval_ns, limit.burst), (10_000_000, 200));
}

#[test]
fn what_is_built_in_loads_without_a_file() {
    let Loaded {
        config, warnings, ..
    } = load(&Bundle::default(), Path::new(EMBEDDED)).expect("a good configuration");
    assert!(warnings.is_empty());
    assert_eq!(
        config.listeners[0].addresses[0].to_string(),
        "127.0.0.1:8080/tcp"
    );
    let Action::Respond { status, body, .. } = &config.routes[0].action else {
        panic!("{:?}", config.routes[0])
    };
    assert_eq!(*status, 200);
    let page = std::str::from_utf8(body).expect("text");
    assert!(page.contains("Sluice is running"));
    for outside in ["src=", "href=", "url(", "@import"] {
        assert!(
            !page.contains(outside),
            "the page stands alone, without {outside}"
        );
    }
    let shown = page
        .split("<code>")
        .find(|code| code.starts_with("[[listener]]"))
        .expect("an example");
    let example = shown.split("</code>").next().expect("its end");
    assert!(
        load_text(example).is_ok(),
        "the example of the page is a good configuration"
    );
}

#[test]
fn the_shortest_useful_configuration_loads() {
    let text = "[[listener]]\nname = \"web\"\naddress = \"0.0.0.0:8080\"\n[[route]]\nmatch = { path = \"/*\" }\n\
                upstream = \"app\"\n[[upstream]]\nname = \"app\"\nendpoints = [\"10.0.0.11:8080\", \"10.0.0.12:8080\"]\n";
    let loaded = load_text(text).expect("a good configuration");
    assert_eq!(loaded.config.routes[0].name, "app");
    assert!(loaded.warnings.is_empty());
}

#[test]
fn the_daemon_reads_from_the_bundle_what_the_keeper_read_from_the_files() {
    let good = case(&testdata("good"));
    let recording = RecordingReader::new(&good);
    let first = load(&recording, Path::new(MAIN)).expect("a good configuration");
    let sent = serde_json::to_vec(&recording.into_bundle()).expect("JSON");
    let bundle: Bundle = serde_json::from_slice(&sent).expect("JSON");
    assert_eq!(
        load(&bundle, Path::new(MAIN)).expect("a good configuration"),
        first
    );
}

#[test]
fn files_of_secrets_that_everybody_can_read_are_a_warning() {
    let good = case(&testdata("good"))
        .with_mode("/etc/sluice/consumers.toml", 0o644)
        .with_mode("/etc/sluice/certs/site.key", 0o604)
        .with_mode("/etc/sluice/bob.key", 0o640);
    let loaded = load(&good, Path::new(MAIN)).expect("a good configuration");
    let messages: Vec<_> = loaded
        .warnings
        .iter()
        .map(|warning| warning.message.as_str())
        .collect();
    let expected = [
        "everybody can read the secrets in /etc/sluice/certs/site.key (mode 0604)",
        "everybody can read the secrets in /etc/sluice/consumers.toml (mode 0644)",
    ];
    assert_eq!(messages, expected);
}

#[test]
fn secrets_are_neither_in_debug_output_nor_in_diagnostics() {
    let good = case(&testdata("good"));
    let loaded = load(&good, Path::new(MAIN)).expect("a good configuration");
    assert!(!format!("{loaded:?}{good:?}").contains("canary"));
    let broken = [
        "[[policy]]\nname = \"h\"\nheaders = { request = { set = { authorization = \"canary\" }, sett = {} } }\n",
        "[[policy]]\nname = \"h\"\nheaders = { request = { set = { authorization = \"canary\\u0001\" } } }\n",
        "[[policy]]\nname = \"h\"\nheaders = { request = { set = { authorization = \"canary\n",
        "[[policy]]\nname = \"h\"\n[policy.headers.request.add]\ncookie = [\"canary\", 3]\n",
    ];
    for text in broken {
        let found = load_text(text).expect_err("broken");
        let shown = format!(
            "{}{}{found:?}",
            diagnostic::render(&found, true),
            diagnostic::to_json(&found)
        );
        assert!(!shown.contains("canary"), "{shown}");
    }
}

#[test]
fn a_hash_key_is_derived_alike_everywhere_and_never_shown() {
    let with = |key: &str| load_text(&format!("[datapath]\nhash_key = \"{key}\"\n"));
    let found = with("canary").expect_err("too short");
    let shown = format!("{}{found:?}", diagnostic::render(&found, true));
    assert!(
        shown.contains("openssl rand -hex 32") && !shown.contains("canary"),
        "{shown}"
    );
    let key = HashKey::derive("a key that all nodes have");
    // Words of SHA-256 of a zero byte and of a one byte before the secret: other versions must come to the same.
    assert_eq!(key.0[0], 0x73ac_66ab_d45f_2d6f);
    assert_eq!(key.0[4], 0x8811_4713_ef01_d87a);
    assert_ne!(key, HashKey::derive("a key that all nodes hav3"));
    assert!(key.0.iter().all(|word| *word != 0));
    assert_eq!(format!("{key:?}"), "HashKey");
}

/// A generator good enough to choose mutations (xorshift; the seed is fixed, so a failure can be seen again).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end.max(1) as u64).unwrap_or(0)
    }
}

/// One random change: bytes removed, doubled, replaced, or a piece of TOML put in.
fn mutate(text: &mut Vec<u8>, random: &mut Random) {
    const PIECES: [&[u8]; 14] = [
        b"[",
        b"]",
        b"{",
        b"}",
        b"\"",
        b"=",
        b"\n",
        b"[[x]]\n",
        b"99999999999999999999",
        b"-1",
        b"true",
        b"\xff",
        b"\0",
        "é".as_bytes(),
    ];
    let at = random.below(text.len() + 1);
    let length = random.below(12).min(text.len() - at);
    match random.below(4) {
        0 => drop(text.drain(at..at + length)),
        1 => {
            let copy = text[at..at + length].to_vec();
            text.splice(at..at, copy);
        }
        2 => drop(text.splice(at..at, PIECES[random.below(PIECES.len())].iter().copied())),
        _ => {
            let from = random.below(text.len());
            let copy = text[from..(from + 40).min(text.len())].to_vec();
            text.splice(at..at + length, copy);
        }
    }
}

#[test]
fn no_mutation_of_a_good_configuration_panics_and_every_place_is_in_its_file() {
    let mut files = Vec::new();
    files_below(&testdata("good"), Path::new("/etc/sluice"), &mut files);
    files.sort();
    let mut random = Random(0x5111_ce5e_ed00_0001);
    for _ in 0..1500 {
        let mut mutated = files.clone();
        for _ in 0..=random.below(4) {
            let file = random.below(mutated.len());
            mutate(&mut mutated[file].1, &mut random);
        }
        let lines: std::collections::BTreeMap<String, usize> = mutated
            .iter()
            .map(|(path, bytes)| {
                (
                    path.display().to_string(),
                    bytes.iter().filter(|byte| **byte == b'\n').count() + 1,
                )
            })
            .collect();
        let found = match load(&Bundle::of_files(mutated), Path::new(MAIN)) {
            Ok(loaded) => loaded.warnings,
            Err(found) => found,
        };
        assert!(!diagnostic::render(&found, false).is_empty() || found.is_empty());
        for place in found
            .iter()
            .flat_map(|diagnostic| diagnostic.place.iter().chain(&diagnostic.also))
        {
            assert!(
                place.line >= 1 && place.line as usize <= lines[&*place.path],
                "{place:?}"
            );
        }
    }
}

#[test]
fn more_mistakes_than_anybody_reads_are_counted() {
    let upstreams = |number: usize| {
        format!("[[upstream]]\nname = \"up{number}\"\nendpoints = [\"10.0.0.1:80\"]\n")
    };
    let routes = |number: usize| {
        format!("[[route]]\nmatch = {{ path = \"/{number}\" }}\nupstream = \"uq{number}\"\n")
    };
    let listener = "[[listener]]\nname = \"web\"\naddress = \"0.0.0.0:80\"\n".to_owned();
    let text = (0..300).fold(listener, |text, number| {
        text + &upstreams(number) + &routes(number)
    });
    let found = load_text(&text).expect_err("300 dangling names");
    assert_eq!(found.len(), 201);
    assert_eq!(found[200].message, "100 more errors are not shown");
}

/// The examples of a page: what stands between ```` ```toml ```` and the end of its block.
fn examples(page: &str) -> impl Iterator<Item = &str> {
    let blocks = page.split("```toml\n").skip(1);
    blocks.filter_map(|rest| rest.split("```").next())
}

#[test]
fn each_example_in_the_documentation_is_a_good_configuration() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut pages = vec![root.join("README.md")];
    let docs = std::fs::read_dir(root.join("docs")).expect("docs");
    pages.extend(docs.map(|entry| entry.expect("an entry").path()));
    let mut count = 0;
    for page in pages {
        let text = std::fs::read_to_string(&page).expect("a page");
        for example in examples(&text) {
            count += 1;
            let loaded = load_text(example);
            let found = loaded.map_or_else(|found| found, |loaded| loaded.warnings);
            let told = diagnostic::render(&found, false);
            assert!(found.is_empty(), "{}:\n{example}\n{told}", page.display());
        }
    }
    assert!(count > 1, "{count} examples");
}

#[test]
fn what_the_dns_says_must_fit_the_listeners_that_forward_there() {
    let text = |via: &str| {
        format!(
            "[datapath]\ninterfaces = [\"eth0\"]\n\
             nat = {{ source = [\"192.0.2.1\"], ports = \"20000-29999\" }}\n\
             tunnel = {{ source = [\"192.0.2.1\"] }}\n\
             [[listener]]\nname = \"one\"\naddress = \"203.0.113.1:443\"\n\
             forward = {{ upstream = \"u\", via = \"{via}\" }}\n\
             [[upstream]]\nname = \"u\"\nendpoints = [\"app.test:443\", {{ srv = \"_https._tcp.app.test\" }}]\n"
        )
    };
    let refuses = |via: &str, address: &str| {
        let loaded = load_text(&text(via)).expect("a good configuration");
        let address = address.parse().expect("an address");
        let endpoints = [Endpoint::new(address, 1)];
        let refused = loaded.config.refuse_endpoints(0, &endpoints, Some(address));
        refused.is_some()
    };
    assert!(!refuses("ipip", "10.0.0.1:443"));
    assert!(refuses("ipip", "[2001:db8::1]:443"), "no source for IPv6");
    assert!(refuses("direct", "10.0.0.1:8443"), "the port is kept");
    assert!(!refuses("direct", "[2001:db8::1]:443"));
    assert!(!refuses("nat", "10.0.0.1:8443"));
    assert!(
        !refuses("nat", "[2001:db8::1]:8443"),
        "an address of the other family may come tomorrow"
    );
    let other_port = text("direct").replace("app.test:443", "app.test:8443");
    assert!(load_text(&other_port).is_err());
}
