//! What every part of the walk needs: the reader, where problems go, the names, and how files and secrets are read.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use super::CertificatePem;
use super::names::Names;
use super::problem::Problems;
use super::source::{Reader, failure};
use super::table::Value;
use super::{EMBEDDED_FILES, EMBEDDED_FOLDER};
use crate::tunable::unit::shown;

/// Whether a certificate can be used: the `tls` room knows, and `config` does not know the `tls` room.
pub type CertificateCheck<'c> = dyn Fn(&CertificatePem) -> Result<(), String> + 'c;

/// Longest secret, in bytes.
const SECRET_BYTES_MAX: usize = 8192;

pub(super) struct Context<'s> {
    pub reader: &'s dyn Reader,
    pub problems: &'s Problems,
    pub check_certificate: &'s CertificateCheck<'s>,
    /// How many files have been read: the index of the next.
    pub files: Cell<usize>,
    pub listeners: Names<'s>,
    pub policies: Names<'s>,
    pub upstreams: Names<'s>,
}

impl<'s> Context<'s> {
    /// The index of a file that is read on the way.
    pub fn next_index(&self) -> usize {
        self.files.replace(self.files.get() + 1)
    }

    /// The path that a value names, seen from the folder of its file.
    pub fn path(&self, value: &Value<'_>) -> Option<PathBuf> {
        let text = value.text()?;
        if text.is_empty() || text.contains('\0') {
            return value
                .spot
                .refuse(format!("`{}` is no path", value.name), "", None);
        }
        Some(value.spot.source.folder().join(text))
    }

    /// The bytes of the file that a value names.
    pub fn file(&self, value: &Value<'_>) -> Option<(PathBuf, Vec<u8>)> {
        let path = self.path(value)?;
        match read(self.reader, &path) {
            Ok(bytes) => Some((path, bytes)),
            Err(error) => {
                let message = format!("cannot read {}: {}", path.display(), failure(&error));
                value.spot.refuse(message, "", None)
            }
        }
    }

    /// A string that may stand elsewhere: `"..."`, `{ file = "..." }`, `{ env = "..." }`. No message repeats it.
    pub fn secret(&self, value: &Value<'_>) -> Option<String> {
        if let Some(text) = value.as_text() {
            return Some(text.to_owned());
        }
        if !value.is_table() {
            let message = format!(
                "`{}` is a string, {{ file = \"...\" }} or {{ env = \"...\" }}",
                value.name
            );
            return value.spot.refuse_unseen(message);
        }
        let section = value.section()?;
        let (file, env) = (section.find("file"), section.find("env"));
        section.finish();
        let text = match (file, env) {
            (Some(file), None) => self.secret_file(&file)?,
            (None, Some(env)) => self.secret_env(&env)?,
            _ => {
                return value.spot.refuse(
                    format!("`{}` needs `file` or `env`, one of both", value.name),
                    "",
                    None,
                );
            }
        };
        if text.len() > SECRET_BYTES_MAX {
            return value.spot.refuse(
                format!("`{}` is longer than {SECRET_BYTES_MAX} bytes", value.name),
                "",
                None,
            );
        }
        Some(text)
    }

    fn secret_file(&self, file: &Value<'_>) -> Option<String> {
        let (path, bytes) = self.file(file)?;
        self.warn_if_open(file, &path);
        match String::from_utf8(bytes) {
            Ok(text) => Some(text.trim_end_matches(['\r', '\n']).to_owned()),
            Err(_) => file
                .spot
                .refuse(format!("{} is no text", path.display()), "", None),
        }
    }

    fn secret_env(&self, env: &Value<'_>) -> Option<String> {
        let name = env.text()?;
        let found = if name.is_empty() || name.contains(['=', '\0']) {
            None
        } else {
            self.reader.env(name)
        };
        found.or_else(|| {
            let help = "the environment of `sluice run` counts, and of `sluice check` for checking";
            env.spot.refuse(
                format!("the environment has no variable `{}`", shown(name)),
                "",
                Some(help.to_owned()),
            )
        })
    }

    /// Warn when everybody on this host can read a file of secrets.
    pub fn warn_if_open(&self, value: &Value<'_>, path: &Path) {
        if let Some(mode) = self.reader.mode(path).filter(|mode| mode & 0o004 != 0) {
            let message = format!(
                "everybody can read the secrets in {} (mode {mode:04o})",
                path.display()
            );
            value
                .spot
                .warn(message, "", Some(format!("chmod o-rwx {}", path.display())));
        }
    }
}

/// Read a file, or one of those that are built in.
pub(super) fn read(reader: &dyn Reader, path: &Path) -> std::io::Result<Vec<u8>> {
    let Ok(name) = path.strip_prefix(EMBEDDED_FOLDER) else {
        return reader.read(path);
    };
    let found = EMBEDDED_FILES
        .iter()
        .find(|(file, _)| Path::new(file) == name);
    found
        .map(|(_, text)| text.as_bytes().to_vec())
        .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENOENT))
}
