//! Rule: files have names that say something, and a length that can be read in one sitting.

use super::Finding;
use super::source::Source;

/// Lines of a file without its tests.
const LINES_MAX: usize = 600;
/// Words that name nothing.
const EMPTY_WORDS: &[&str] = &[
    "manager", "handler", "util", "utils", "common", "helper", "helpers", "misc",
];

pub fn check(sources: &[Source]) -> Vec<Finding> {
    sources.iter().flat_map(check_one).collect()
}

fn check_one(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |what: String, instead: &str| {
        findings.push(Finding {
            path: source.path.clone(),
            line: 0,
            what,
            instead: instead.to_owned(),
        });
    };
    if source.path.ends_with("/mod.rs") {
        find(
            "mod.rs".into(),
            "name the file after its folder and put it beside it: net.rs with net/",
        );
    }
    let parts = source.path.split(['/', '_', '.']);
    for word in parts.filter(|part| EMPTY_WORDS.contains(part)) {
        find(
            format!("`{word}` says nothing"),
            "name it after what it is: the words are in the architecture page",
        );
    }
    let lines = source.lines().count();
    if lines > LINES_MAX {
        find(
            format!("{lines} lines without tests, of {LINES_MAX}"),
            "make a folder of its name beside it, with a file for each part",
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_too_long_is_found_and_its_tests_do_not_count() {
        let lines = "fn a() {}\n".repeat(LINES_MAX);
        let tests = format!("#[cfg(test)]\nmod tests {{\n{lines}}}\n");
        assert_eq!(
            check(&[Source::new("a/b.rs", &format!("{lines}{tests}"))]),
            []
        );
        assert_eq!(
            check(&[Source::new("a/b.rs", &format!("{lines}fn b() {{}}\n"))]).len(),
            1
        );
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        for path in [
            "proxy-user/src/net/mod.rs",
            "proxy-user/src/util.rs",
            "tests/src/common/a.rs",
            "xtask/src/string_helpers.rs",
        ] {
            assert_eq!(check(&[Source::new(path, "")]).len(), 1, "{path}");
        }
        assert_eq!(
            check(&[Source::new("proxy-user/src/utility_company.rs", "")]),
            []
        );
    }
}
