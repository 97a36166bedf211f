//! Rule: nothing half done anywhere, and nothing that panics where bytes from the network are at work.

use super::Finding;
use super::source::{Source, is_word};

/// Never, in any file.
const UNFINISHED: &[&str] = &["todo!", "unimplemented!", "dbg!"];
/// Not in data paths.
const PANICS: &[&str] = &[".unwrap()", ".expect(", "panic!"];
/// The rooms that bytes from the network pass.
const DATA_PATHS: &[&str] = &[
    "net",
    "tls",
    "codec",
    "message",
    "route",
    "policy",
    "exchange",
    "connection",
    "call",
    "tunnel",
    "listener",
    "worker",
    "origin",
    "cache",
    "upstream",
    "offload",
];

pub fn check(sources: &[Source]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in sources {
        let data_path = source.room().is_some_and(|room| DATA_PATHS.contains(&room))
            || source.path.starts_with("proxy-ebpf/src/");
        for (line, code) in source.lines() {
            let mut find = |words: &[&str], instead: &str| {
                for word in words.iter().filter(|word| has(code, word)) {
                    findings.push(Finding {
                        path: source.path.clone(),
                        line,
                        what: format!("`{}`", word.trim_end_matches('(')),
                        instead: instead.to_owned(),
                    });
                }
            };
            find(UNFINISHED, "finish it, or leave it out");
            if data_path && !is_excused(source, line) {
                find(
                    PANICS,
                    "a packet or a message may never panic us: return an error, or choose a type that cannot fail; where no input can cause it, say so with #[expect(clippy::expect_used, reason = \"...\")]",
                );
            }
        }
    }
    findings
}

/// Whether an attribute of the lines just above says why this cannot happen.
fn is_excused(source: &Source, line: usize) -> bool {
    let above = source
        .code
        .lines()
        .take(line - 1)
        .skip(line.saturating_sub(9));
    above.fold(false, |excused, code| {
        if code.contains("clippy::expect_used")
            || code.contains("clippy::unwrap_used")
            || code.contains("clippy::panic")
        {
            return true;
        }
        excused && !code.starts_with('}')
    })
}

fn has(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        word.starts_with('.') || !code[..at].bytes().next_back().is_some_and(is_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<(usize, String)> {
        check(&[Source::new(path, text)])
            .into_iter()
            .map(|finding| (finding.line, finding.what))
            .collect()
    }

    #[test]
    fn what_is_half_done_is_found_anywhere() {
        assert_eq!(
            found("xtask/src/a.rs", "fn a() { todo!() }\n"),
            [(1, "`todo!`".to_owned())]
        );
    }

    #[test]
    fn what_panics_is_found_in_data_paths_only() {
        let text = "fn a() { b().unwrap(); }\nfn c() { d().expect(\"e\") }\n";
        assert_eq!(found("proxy-user/src/codec/h1.rs", text).len(), 2);
        assert_eq!(found("proxy-ebpf/src/packet.rs", text).len(), 2);
        assert_eq!(found("proxy-user/src/cli/run.rs", text), []);
    }

    #[test]
    fn what_says_why_it_cannot_happen_is_excused_and_nothing_after_it() {
        let text = "fn a() {\n    #[expect(clippy::expect_used, reason = \"b\")]\n    c().expect(\"d\")\n}\nfn e() { f().expect(\"g\") }\n";
        assert_eq!(
            found("proxy-user/src/net.rs", text),
            [(5, "`.expect`".to_owned())]
        );
    }

    #[test]
    fn tests_comments_and_longer_words_are_free() {
        let text = "//! No todo! here.\n#[expect(unused)]\nfn a() { b.unwrap_or(1); my_todo!(); }\n#[cfg(test)]\nmod tests { fn c() { d.unwrap(); } }\n";
        assert_eq!(found("proxy-user/src/net.rs", text), []);
    }
}
