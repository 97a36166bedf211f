//! Source files as the rules see them: text, and the same text with comments and literals blanked.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// One `.rs` file.
pub struct Source {
    /// Relative to the work tree, with `/`.
    pub path: String,
    /// As it stands.
    pub text: String,
    /// The same, byte for byte in the same places, but comments, strings and characters are blanks.
    pub code: String,
    /// Whether each line belongs to a `#[cfg(test)]` module.
    test_lines: Vec<bool>,
}

impl Source {
    /// Reads `text` as the file of that path.
    pub fn new(path: &str, text: &str) -> Self {
        let code = blank(text);
        // `tests.rs` and what is below `tests/` in a `src` folder is compiled for tests only.
        let test_lines = if path
            .split_once("/src/")
            .is_some_and(|(_, below)| below.ends_with("tests.rs") || below.contains("tests/"))
        {
            vec![true; code.lines().count()]
        } else {
            test_lines(&code)
        };
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            code,
            test_lines,
        }
    }

    /// The lines of code outside tests, with their numbers from 1.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code
            .lines()
            .enumerate()
            .filter(|(index, _)| !self.test_lines[*index])
            .map(|(index, line)| (index + 1, line))
    }

    /// The number, from 1, of the line that holds this byte of `code`, and whether it is a test's.
    pub fn line_at(&self, byte: usize) -> (usize, bool) {
        let line = self.code[..byte].matches('\n').count();
        (
            line + 1,
            self.test_lines.get(line).copied().unwrap_or(false),
        )
    }

    /// The room of the user half that it belongs to: the first part of its path below `proxy-user/src`.
    pub fn room(&self) -> Option<&str> {
        let below = self.path.strip_prefix("proxy-user/src/")?;
        let first = below.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first))
    }

    /// Its first line without `//! `, if it is a caption.
    pub fn caption(&self) -> Option<&str> {
        self.text
            .lines()
            .next()?
            .strip_prefix("//! ")
            .map(str::trim)
            .filter(|caption| !caption.is_empty())
    }
}

/// All sources of the members of the workspace, in the order of their paths.
pub fn read_all(root: &Path) -> Result<Vec<Source>> {
    let mut paths = Vec::new();
    for member in ["proxy-ebpf", "proxy-user", "tests", "xtask", "bench"] {
        collect(&root.join(member), &mut paths)?;
    }
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text =
                fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            let relative = path.strip_prefix(root).unwrap_or(path);
            Ok(Source::new(&relative.to_string_lossy(), &text))
        })
        .collect()
}

fn collect(folder: &Path, paths: &mut Vec<std::path::PathBuf>) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            collect(&path, paths)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
    Ok(())
}

/// Blanks comments (nested ones too), strings (raw ones too) and characters; lifetimes stay.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let length = if rest.starts_with(b"//") {
            rest.iter()
                .position(|byte| *byte == b'\n')
                .unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest, at > 0 && is_word(bytes[at - 1])) {
            length
        } else if rest[0] == b'"' {
            quoted(rest, b'"')
        } else if rest[0] == b'\'' && is_character(rest) {
            quoted(rest, b'\'')
        } else {
            code.push(rest[0]);
            at += 1;
            continue;
        };
        code.extend(
            rest[..length]
                .iter()
                .map(|byte| if *byte == b'\n' { b'\n' } else { b' ' }),
        );
        at += length;
    }
    // Whole characters were blanked or kept, never parts of one.
    String::from_utf8(code).unwrap_or_default()
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of `r"..."`, `r#"..."#`, `br"..."` or `cr"..."` at the start of `rest`.
fn raw_string(rest: &[u8], within_word: bool) -> Option<usize> {
    if within_word {
        return None;
    }
    let start = if rest[0] == b'r' {
        1
    } else if rest.starts_with(b"br") || rest.starts_with(b"cr") {
        2
    } else {
        return None;
    };
    let hashes = rest[start..]
        .iter()
        .take_while(|byte| **byte == b'#')
        .count();
    if rest.get(start + hashes) != Some(&b'"') {
        return None;
    }
    let end = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    let body = start + hashes + 1;
    let found = rest[body..]
        .windows(end.len())
        .position(|window| window == end);
    Some(found.map_or(rest.len(), |found| body + found + end.len()))
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Whether a `'` opens a character and not a lifetime.
fn is_character(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        Some(byte) if byte.is_ascii() => rest.get(2) == Some(&b'\''),
        Some(_) => true,
        None => false,
    }
}

pub fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Marks the lines of items below `#[cfg(test)]`: from the attribute to the brace that closes what follows it.
fn test_lines(code: &str) -> Vec<bool> {
    let mut marks = vec![false; code.lines().count()];
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]") {
        let start = from + found;
        let end = end_of_item(code.as_bytes(), start);
        let (first, last) = (
            code[..start].matches('\n').count(),
            code[..end].matches('\n').count(),
        );
        for mark in marks.iter_mut().take(last + 1).skip(first) {
            *mark = true;
        }
        from = end.max(start + 1);
    }
    marks
}

fn end_of_item(code: &[u8], start: usize) -> usize {
    let mut depth = 0;
    for (at, byte) in code.iter().enumerate().skip(start) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth <= 1 => return at,
            b'}' => depth -= 1,
            b';' if depth == 0 => return at,
            _ => {}
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blank_and_everything_else_stays_in_its_place() {
        let text = "let a = \"x // y\"; // crate::b\nlet c = r#\"d \" e\"#; /* f /* g */ h */ let i: &'static str = 'j';\nlet q = '\\''; let e = 'é';";
        let code = blank(text);
        assert_eq!(code.len(), text.len());
        for gone in ["x // y", "crate", "d", "f", "'j'", "é"] {
            assert!(!code.contains(&format!(" {gone} ")), "{gone} in {code}");
        }
        assert!(code.contains("let i: &'static str ="), "{code}");
        assert!(
            code.contains("let q =") && code.contains("; let e ="),
            "{code}"
        );
    }

    #[test]
    fn lines_of_test_modules_are_left_out() {
        let source = Source::new(
            "a.rs",
            "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { { } }\n}\nfn c() {}\n",
        );
        let lines: Vec<usize> = source.lines().map(|(line, _)| line).collect();
        assert_eq!(lines, [1, 6]);
    }

    #[test]
    fn files_of_tests_have_no_other_lines() {
        for path in [
            "proxy-user/src/net/tests.rs",
            "proxy-ebpf/src/packet/tests/nat.rs",
        ] {
            assert_eq!(
                Source::new(path, "fn a() {}\n").lines().count(),
                0,
                "{path}"
            );
        }
        assert_eq!(
            Source::new("tests/src/client.rs", "fn a() {}\n")
                .lines()
                .count(),
            1
        );
    }

    #[test]
    fn a_room_is_the_first_part_below_the_user_half() {
        assert_eq!(
            Source::new("proxy-user/src/net/uring.rs", "").room(),
            Some("net")
        );
        assert_eq!(
            Source::new("proxy-user/src/exchange.rs", "").room(),
            Some("exchange")
        );
        assert_eq!(Source::new("xtask/src/main.rs", "").room(), None);
    }
}
