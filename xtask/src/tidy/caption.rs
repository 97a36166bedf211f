//! Rule: each file opens with a caption, one `//!` line that says what it is.

use super::Finding;
use super::source::Source;

pub fn check(sources: &[Source]) -> Vec<Finding> {
    sources
        .iter()
        .filter(|source| source.caption().is_none())
        .map(|source| Finding {
            path: source.path.clone(),
            line: 1,
            what: "no caption".into(),
            instead: "open the file with `//! ` and one sentence that says what it is".into(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_caption_is_found() {
        let sources = [
            Source::new("a.rs", "//! What a is.\nfn a() {}\n"),
            Source::new("b.rs", "// Not a caption.\n"),
            Source::new("c.rs", "//!\n//! Too late.\n"),
            Source::new("d.rs", ""),
        ];
        let found: Vec<String> = check(&sources)
            .into_iter()
            .map(|finding| finding.path)
            .collect();
        assert_eq!(found, ["b.rs", "c.rs", "d.rs"]);
    }
}
