//! Rule: the map in README.md is made from the captions, so that it can never be wrong.

use std::fmt::Write;

use anyhow::{Result, bail};

use super::Finding;
use super::source::Source;

const BEGIN: &str =
    "<!-- The map is made by `cargo xtask tidy --fix` from the first line of each file. -->";
const END: &str = "<!-- End of the map. -->";
/// Columns before the captions.
const WIDTH: usize = 28;

pub fn check(readme: &str, sources: &[Source]) -> Vec<Finding> {
    let (what, instead) = match rewrite(readme, sources) {
        Ok(fixed) if fixed == readme => return Vec::new(),
        Ok(_) => (
            "the map is not what the captions say".to_owned(),
            "cargo xtask tidy --fix".to_owned(),
        ),
        Err(error) => (
            error.to_string(),
            format!("put these two lines where the map belongs:\n        {BEGIN}\n        {END}"),
        ),
    };
    vec![Finding {
        path: "README.md".into(),
        line: 0,
        what,
        instead,
    }]
}

/// README.md with the map made anew.
pub fn rewrite(readme: &str, sources: &[Source]) -> Result<String> {
    let Some((before, rest)) = readme.split_once(BEGIN) else {
        bail!("the map has no beginning")
    };
    let Some((_, after)) = rest.split_once(END) else {
        bail!("the map has no end")
    };
    Ok(format!(
        "{before}{BEGIN}\n```text\n{}```\n{END}{after}",
        draw(sources)
    ))
}

/// Members, and below each its rooms: files and folders directly in `src`, and those of `src/kernel`.
fn draw(sources: &[Source]) -> String {
    let mut map = String::new();
    for member in ["proxy-ebpf", "proxy-user", "tests", "bench", "xtask"] {
        let prefix = format!("{member}/src/");
        let caption = |name: &str| {
            sources
                .iter()
                .find(|source| source.path == format!("{prefix}{name}"))
                .and_then(Source::caption)
        };
        let Some(own) = caption("lib.rs").or(caption("main.rs")) else {
            continue;
        };
        row(&mut map, &format!("{member}/"), own);
        for source in sources {
            let Some(below) = source.path.strip_prefix(&prefix) else {
                continue;
            };
            let is_room = !below.contains('/')
                || below
                    .strip_prefix("kernel/")
                    .is_some_and(|rest| !rest.contains('/'));
            let is_own = below == "lib.rs" || (below == "main.rs" && caption("lib.rs").is_none());
            if is_room && !is_own {
                row(
                    &mut map,
                    &format!("  src/{}", shown(below, &prefix, sources)),
                    source.caption().unwrap_or_default(),
                );
            }
        }
    }
    map
}

/// `net/` for a room that has a folder, `net.rs` for one that has not.
fn shown(below: &str, prefix: &str, sources: &[Source]) -> String {
    let folder = format!("{prefix}{}/", below.trim_end_matches(".rs"));
    if sources
        .iter()
        .any(|source| source.path.starts_with(&folder))
    {
        format!("{}/", below.trim_end_matches(".rs"))
    } else {
        below.to_owned()
    }
}

fn row(map: &mut String, name: &str, caption: &str) {
    // Writing into a String cannot fail.
    let _ = writeln!(map, "{name:<WIDTH$} {caption}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planted() -> Vec<Source> {
        vec![
            Source::new("proxy-user/src/lib.rs", "//! The user half.\n"),
            Source::new("proxy-user/src/net.rs", "//! Sockets and buffers.\n"),
            Source::new("proxy-user/src/net/uring.rs", "//! The ring.\n"),
            Source::new("proxy-user/src/drain.rs", "//! An orderly stop.\n"),
        ]
    }

    #[test]
    fn a_map_is_made_from_captions_and_then_found_right() {
        let readme = format!("# Title\n{BEGIN}\n{END}\nThe rest.\n");
        assert_eq!(check(&readme, &planted()).len(), 1);
        let fixed = rewrite(&readme, &planted()).expect("a map");
        assert_eq!(check(&fixed, &planted()), []);
        assert!(
            fixed.contains("  src/net/                   Sockets and buffers.\n"),
            "{fixed}"
        );
        assert!(
            !fixed.contains("uring") && fixed.ends_with("\nThe rest.\n"),
            "{fixed}"
        );
    }

    #[test]
    fn a_caption_that_changed_makes_the_map_wrong() {
        let fixed = rewrite(&format!("{BEGIN}{END}"), &planted()).expect("a map");
        let mut sources = planted();
        sources[3] = Source::new("proxy-user/src/drain.rs", "//! Something else.\n");
        assert_eq!(
            check(&fixed, &sources)[0].what,
            "the map is not what the captions say"
        );
    }

    #[test]
    fn a_readme_without_a_place_for_the_map_is_found() {
        assert_eq!(
            check("# Title\n", &planted())[0].what,
            "the map has no beginning"
        );
    }
}
