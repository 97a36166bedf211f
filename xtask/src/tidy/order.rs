//! Rule: a room of the user half uses only rooms below its own line. Most crates end in one knot of modules without it.

use super::Finding;
use super::source::{Source, is_word};

/// From top to bottom. Rooms on one line do not know each other.
const ORDER: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["admin", "keeper"],
    &["control"],
    &["worker", "datapath"],
    &["listener"],
    &["connection"],
    &["exchange", "tunnel"],
    &["call"],
    &["origin", "snapshot"],
    &["codec"],
    &["tls"],
    &["route", "policy", "cache", "upstream", "access_log"],
    // Above `config`: an offence carries the ban that its rule asks for.
    &["offload", "report", "overload"],
    &["net", "file", "config"],
    &["tunable", "message"],
    &["drain", "metric"],
];

/// Rooms that few may name, although they stand above it.
const RESERVED: &[(&str, &[&str])] = &[("datapath", &["keeper", "control", "cli"])];

pub fn check(sources: &[Source]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for source in sources {
        match source.room() {
            Some("lib") | None => {}
            Some(room) => check_room(source, room, &mut findings),
        }
    }
    findings
}

fn check_room(source: &Source, room: &str, findings: &mut Vec<Finding>) {
    let mut find = |line, what: String, instead: String| {
        findings.push(Finding {
            path: source.path.clone(),
            line,
            what,
            instead,
        });
    };
    let Some(own) = line_of(room) else {
        find(0, format!("the room `{room}` has no place"), "give it a line in xtask/src/tidy/order.rs, or put the file into the room it belongs to".into());
        return;
    };
    for (line, used) in uses(source) {
        let reserved = RESERVED.iter().find(|(name, _)| *name == used);
        if used == room {
        } else if let Some((_, users)) = reserved
            && !users.contains(&room)
        {
            find(
                line,
                format!("`{room}` names `{used}`"),
                format!(
                    "only {} may: pass a value down, or a report up",
                    users.join(", ")
                ),
            );
        } else if line_of(&used).is_some_and(|other| other <= own) {
            find(line, format!("`{room}` uses `{used}`, which is not below it"), "take what is needed as an argument or a trait of the lower room; the order is in xtask/src/tidy/order.rs".into());
        }
    }
}

fn line_of(room: &str) -> Option<usize> {
    ORDER.iter().position(|line| line.contains(&room))
}

/// The rooms that a file names outside its tests, by `crate::room` or `sluice::room` (in `main`), with the line.
fn uses(source: &Source) -> Vec<(usize, String)> {
    let code = source.code.as_str();
    let mut found = Vec::new();
    for prefix in ["crate::", "sluice::"] {
        for (at, _) in code.match_indices(prefix) {
            let before = at.checked_sub(1).map(|index| code.as_bytes()[index]);
            let (line, is_test) = source.line_at(at);
            if is_test || before.is_some_and(|byte| is_word(byte) || byte == b':') {
                continue;
            }
            for name in first_names(&code[at + prefix.len()..]) {
                found.push((line, name));
            }
        }
    }
    found
}

/// The first names after `crate::`: one, or those at the top of a group.
fn first_names(rest: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim_start()
            .bytes()
            .take_while(|byte| is_word(*byte))
            .map(char::from)
            .collect()
    };
    let Some(group) = rest.strip_prefix('{') else {
        return vec![word(rest)];
    };
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, byte) in group.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => {
                names.push(word(&group[start..at]));
                break;
            }
            b'}' => depth -= 1,
            b',' if depth == 0 => {
                names.push(word(&group[start..at]));
                start = at + 1;
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
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
    fn a_room_that_reaches_up_is_found() {
        assert_eq!(
            found(
                "proxy-user/src/message/head.rs",
                "use crate::net::Buffer;\n"
            ),
            [(1, "`message` uses `net`, which is not below it".to_owned())]
        );
    }

    #[test]
    fn a_group_is_read_to_its_end() {
        let text = "use crate::{\n    metric::{Counter, Gauge},\n    exchange,\n};\n";
        assert_eq!(
            found("proxy-user/src/net.rs", text),
            [(1, "`net` uses `exchange`, which is not below it".to_owned())]
        );
    }

    #[test]
    fn neighbours_on_one_line_do_not_know_each_other() {
        assert_eq!(
            found(
                "proxy-user/src/route.rs",
                "fn a(b: &crate::policy::Policy) {}"
            )
            .len(),
            1
        );
    }

    #[test]
    fn only_its_users_name_the_datapath() {
        assert_eq!(
            found(
                "proxy-user/src/admin/status.rs",
                "use crate::datapath::Counters;"
            ),
            [(1, "`admin` names `datapath`".to_owned())]
        );
        assert_eq!(
            found(
                "proxy-user/src/control.rs",
                "use crate::datapath::Counters;"
            ),
            []
        );
    }

    #[test]
    fn rooms_below_tests_and_comments_are_free() {
        let text = "//! See crate::cli.\nuse crate::metric;\n#[cfg(test)]\nmod tests {\n    use crate::exchange;\n}\n";
        assert_eq!(found("proxy-user/src/net.rs", text), []);
    }

    #[test]
    fn a_room_without_a_place_is_found() {
        assert_eq!(
            found("proxy-user/src/stuff.rs", ""),
            [(0, "the room `stuff` has no place".to_owned())]
        );
    }

    #[test]
    fn main_names_rooms_by_the_name_of_the_library() {
        assert_eq!(
            found("proxy-user/src/main.rs", "fn main() { sluice::cli::run() }"),
            []
        );
    }
}
