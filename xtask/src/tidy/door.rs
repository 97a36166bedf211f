//! Rule: one door per foreign library. Whoever replaces one opens one door.

use super::Finding;
use super::source::{Source, is_word};

/// A library of the user half and the rooms that may name it.
const DOORS: &[(&str, &[&str])] = &[
    ("io_uring", &["net"]),
    ("tokio_uring", &["file", "control"]),
    ("aya", &["datapath", "offload"]),
    ("netlink_sys", &["datapath"]),
    ("rustls", &["tls"]),
    ("tokio_rustls", &["tls"]),
    ("rustls_native_certs", &["tls"]),
    ("httparse", &["message"]),
    ("h2", &["codec"]),
    ("tokio", &["control", "admin", "origin", "file"]),
    ("hickory_resolver", &["control"]),
    ("prometheus_client", &["metric"]),
    ("toml", &["config", "tunable"]),
    ("annotate_snippets", &["config"]),
    ("clap", &["cli", "main"]),
];

pub fn check(sources: &[Source]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in sources {
        let Some(room) = source.room() else { continue };
        for (library, rooms) in DOORS.iter().filter(|(_, rooms)| !rooms.contains(&room)) {
            for (line, _) in source.lines().filter(|(_, code)| names(code, library)) {
                findings.push(Finding {
                    path: source.path.clone(),
                    line,
                    what: format!("`{room}` names `{library}`"),
                    instead: format!("only {} may: use what it offers, or add to that; the doors are in xtask/src/tidy/door.rs", rooms.join(", ")),
                });
            }
        }
    }
    findings
}

/// Whether a line names a library: as the first part of a path (`aya::`), or in `use aya;`, `use aya as`.
fn names(code: &str, library: &str) -> bool {
    code.match_indices(library).any(|(at, _)| {
        let before = code[..at].bytes().next_back();
        let after = &code[at + library.len()..];
        let leads = match before {
            Some(b':') => {
                code[..at].trim_end_matches("::").is_empty() || code[..at].ends_with(" ::")
            }
            Some(byte) => !is_word(byte),
            None => true,
        };
        let path = after.starts_with("::");
        let whole =
            code[..at].trim_end().ends_with("use") && !after.bytes().next().is_some_and(is_word);
        leads && (path || whole)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<usize> {
        check(&[Source::new(path, text)])
            .into_iter()
            .map(|finding| finding.line)
            .collect()
    }

    #[test]
    fn a_library_named_beside_its_door_is_found() {
        assert_eq!(
            found(
                "proxy-user/src/exchange.rs",
                "use std::io;\nuse tokio::net::TcpStream;\n"
            ),
            [2]
        );
        assert_eq!(
            found(
                "proxy-user/src/cli/run.rs",
                "use aya;\nfn a() -> ::rustls::Error {}\n"
            ),
            [1, 2]
        );
    }

    #[test]
    fn behind_its_door_and_in_other_words_it_is_free() {
        assert!(found("proxy-user/src/net/uring.rs", "use io_uring::IoUring;\n").is_empty());
        assert!(
            found(
                "proxy-user/src/call.rs",
                "use crate::codec::h2::Stream; let aya = my_tokio::x; // aya::Ebpf\n"
            )
            .is_empty()
        );
        assert!(found("tests/src/lib.rs", "use aya::Ebpf;\n").is_empty());
    }
}
