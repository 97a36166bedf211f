//! Drop-in files: which of them count, in which order, and what a line says. As procps reads `sysctl.d`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Origin, unit};

/// Folders of drop-in files, weakest first.
pub const DIRECTORIES: [&str; 3] = [
    "/usr/lib/sluice/sysctl.d",
    "/run/sluice/sysctl.d",
    "/etc/sluice/sysctl.d",
];

/// The operator's own drop-in: what `sysctl -p` reads without a name, and where advice says to write.
pub const LOCAL_FILE: &str = "/etc/sluice/sysctl.d/99-local.conf";

/// `key = value`, from wherever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    pub key: String,
    pub value: String,
    /// Written as `-key`: a failure is no error.
    pub ignore_failure: bool,
    pub origin: Origin,
}

/// A line that says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    pub origin: Origin,
    /// A sentence.
    pub reason: String,
}

/// Whether a file of this path is read at start.
pub fn in_drop_in_directory(path: &str) -> bool {
    let folder = Path::new(path).parent();
    DIRECTORIES
        .iter()
        .any(|directory| folder == Some(Path::new(directory)))
}

/// Which files count, in the order of reading: `*.conf` sorted by name whatever their folder; of one name only
/// the one in the strongest folder. `paths` lists the folders' files, weakest folder first.
pub fn select(paths: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut by_name: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for path in paths {
        let is_conf = path
            .extension()
            .is_some_and(|extension| extension == "conf");
        if let (true, Some(name)) = (is_conf, path.file_name()) {
            by_name.insert(name.to_owned(), path);
        }
    }
    by_name.into_values().collect()
}

/// Parse one file: `key = value` a line; `#` and `;` begin comments; `-key` ignores failure. Good lines and bad ones.
pub fn parse_file(path: &str, text: &str) -> (Vec<Assignment>, Vec<BadLine>) {
    let path: std::sync::Arc<str> = path.into();
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for (line, number) in text.lines().zip(1..) {
        let written = line.trim();
        if written.is_empty() || written.starts_with(['#', ';']) {
            continue;
        }
        let before = line.len() - line.trim_start().len();
        let column = u32::try_from(line[..before].chars().count() + 1).unwrap_or(u32::MAX);
        let origin = Origin::File {
            path: path.clone(),
            line: number,
            column,
        };
        match parse_assignment(written, origin.clone()) {
            Ok(assignment) => good.push(assignment),
            Err(reason) => bad.push(BadLine { origin, reason }),
        }
    }
    (good, bad)
}

/// Parse `key=value` of a command line or a file's line; white space around both is left out.
///
/// # Errors
/// A sentence: no `=`, or no key.
pub fn parse_assignment(text: &str, origin: Origin) -> Result<Assignment, String> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(format!(
            "`{}` assigns nothing: write it like http.head_timeout=10s",
            unit::shown(text)
        ));
    };
    let key = key.trim();
    let (key, ignore_failure) = key
        .strip_prefix('-')
        .map_or((key, false), |key| (key.trim(), true));
    if key.is_empty() {
        return Err(format!("`{}` has no key before its `=`", unit::shown(text)));
    }
    Ok(Assignment {
        key: key.to_owned(),
        value: value.trim().to_owned(),
        ignore_failure,
        origin,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_sorted_by_name_and_the_strongest_folder_masks_the_others() {
        let paths = [
            "/usr/lib/sluice/sysctl.d/50-vendor.conf",
            "/usr/lib/sluice/sysctl.d/90-late.conf",
            "/run/sluice/sysctl.d/50-vendor.conf",
            "/etc/sluice/sysctl.d/10-site.conf",
            "/etc/sluice/sysctl.d/50-vendor.conf",
            "/etc/sluice/sysctl.d/README",
        ];
        let selected = select(paths.map(PathBuf::from));
        let expected = [
            "/etc/sluice/sysctl.d/10-site.conf",
            "/etc/sluice/sysctl.d/50-vendor.conf",
            "/usr/lib/sluice/sysctl.d/90-late.conf",
        ];
        assert_eq!(selected, expected.map(PathBuf::from));
    }

    #[test]
    fn comments_and_empty_lines_say_nothing_and_a_line_without_an_equals_sign_is_bad() {
        let text = "# one\n; two\n\n  http.head_timeout = 5s \n-h2.nothing=1\nnonsense\n = 3\n";
        let (good, bad) = parse_file("/etc/sluice/sysctl.d/a.conf", text);
        let said: Vec<_> = good
            .iter()
            .map(|a| (a.key.as_str(), a.value.as_str(), a.ignore_failure))
            .collect();
        assert_eq!(
            said,
            [
                ("http.head_timeout", "5s", false),
                ("h2.nothing", "1", true)
            ]
        );
        assert_eq!(
            good[0].origin.to_string(),
            "/etc/sluice/sysctl.d/a.conf:4:3"
        );
        let lines: Vec<_> = bad.iter().map(|b| b.origin.to_string()).collect();
        assert_eq!(
            lines,
            [
                "/etc/sluice/sysctl.d/a.conf:6:1",
                "/etc/sluice/sysctl.d/a.conf:7:2"
            ]
        );
    }
}
