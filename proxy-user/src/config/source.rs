//! Where a configuration is read from: real files, a record of what was read, and that record again.
//!
//! The keeper reads the files with its privileges and records them; the daemon, which has none, parses the very
//! same bytes again. So neither can see another configuration than the other.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Largest file that is read, in bytes: a configuration, a certificate, a body.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Most entries of one folder that are looked at.
pub const FOLDER_ENTRIES_MAX: usize = 20_000;

/// All that a configuration can ask of the world.
pub trait Reader {
    /// The bytes of a regular file, at most `FILE_BYTES_MAX`.
    ///
    /// # Errors
    /// As the system says; `InvalidInput` for what is no regular file, `FileTooLarge` for one beyond the limit.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Paths of a folder's entries, sorted by name.
    ///
    /// # Errors
    /// As the system says; `NotADirectory` for a file.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;

    /// Permission bits of a file (`0o640`), where they can be known.
    fn mode(&self, path: &Path) -> Option<u32>;

    /// A variable of the environment.
    fn env(&self, name: &str) -> Option<String>;
}

/// The files and the environment of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Reader for Disk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        // Without O_NONBLOCK, opening a named pipe would wait for somebody to write.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "larger than 1MiB",
            ));
        }
        Ok(bytes)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(path)? {
            if paths.len() == FOLDER_ENTRIES_MAX {
                return Err(io::Error::other(format!(
                    "more than {FOLDER_ENTRIES_MAX} entries"
                )));
            }
            paths.push(entry?.path());
        }
        paths.sort();
        Ok(paths)
    }

    fn mode(&self, path: &Path) -> Option<u32> {
        std::fs::metadata(path)
            .ok()
            .map(|metadata| metadata.mode() & 0o7777)
    }

    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }
}

/// Everything that one load asked for, with the answers. Holds secrets: `Debug` prints names only.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    files: BTreeMap<PathBuf, Result<Content, Failure>>,
    lists: BTreeMap<PathBuf, Result<Vec<PathBuf>, Failure>>,
    modes: BTreeMap<PathBuf, Option<u32>>,
    env: BTreeMap<String, Option<String>>,
}

/// Bytes of a file. Most are text, which JSON carries as it is; bytes would take four times the room.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|error| Self::Bytes(error.into_bytes()), Self::Text)
    }
}

impl From<&Content> for Vec<u8> {
    fn from(content: &Content) -> Self {
        match content {
            Content::Text(text) => text.as_bytes().to_vec(),
            Content::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// An `io::Error` that can be sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Failure {
    /// The number of the system, where it was one of its own.
    errno: Option<i32>,
    message: String,
}

impl From<&io::Error> for Failure {
    fn from(error: &io::Error) -> Self {
        Self {
            errno: error.raw_os_error(),
            message: error.to_string(),
        }
    }
}

impl From<&Failure> for io::Error {
    fn from(failure: &Failure) -> Self {
        match failure.errno {
            Some(errno) => Self::from_raw_os_error(errno),
            None => Self::other(failure.message.clone()),
        }
    }
}

impl Bundle {
    /// A bundle of files alone, for tests and for what is built in.
    pub fn of_files<P: Into<PathBuf>, B: Into<Vec<u8>>>(
        files: impl IntoIterator<Item = (P, B)>,
    ) -> Self {
        let content = |bytes: B| Ok(Content::from(bytes.into()));
        let files: BTreeMap<PathBuf, _> = files
            .into_iter()
            .map(|(path, bytes)| (path.into(), content(bytes)))
            .collect();
        let mut lists: BTreeMap<PathBuf, Result<Vec<PathBuf>, Failure>> = BTreeMap::new();
        for path in files.keys() {
            for pair in path.ancestors().collect::<Vec<_>>().windows(2) {
                let entries = lists
                    .entry(pair[1].to_owned())
                    .or_insert_with(|| Ok(Vec::new()));
                match entries {
                    Ok(entries) if !entries.iter().any(|entry| entry == pair[0]) => {
                        entries.push(pair[0].to_owned())
                    }
                    _ => {}
                }
            }
        }
        Self {
            files,
            lists,
            ..Self::default()
        }
    }

    /// Add a variable of the environment.
    #[must_use]
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), Some(value.to_owned()));
        self
    }

    /// Set the permission bits of a file.
    #[must_use]
    pub fn with_mode(mut self, path: &str, mode: u32) -> Self {
        self.modes.insert(path.into(), Some(mode));
        self
    }
}

impl Reader for Bundle {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        match self.files.get(path) {
            Some(Ok(content)) => Ok(content.into()),
            Some(Err(failure)) => Err(failure.into()),
            None if self.lists.contains_key(path) => {
                Err(io::Error::from_raw_os_error(libc::EISDIR))
            }
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        match self.lists.get(path) {
            Some(Ok(entries)) => Ok(entries.clone()),
            Some(Err(failure)) => Err(failure.into()),
            None if self.files.contains_key(path) => {
                Err(io::Error::from_raw_os_error(libc::ENOTDIR))
            }
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    fn mode(&self, path: &Path) -> Option<u32> {
        self.modes.get(path).copied().flatten()
    }

    fn env(&self, name: &str) -> Option<String> {
        self.env.get(name).cloned().flatten()
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<_> = self.files.keys().collect();
        let env: Vec<_> = self.env.keys().collect();
        f.debug_struct("Bundle")
            .field("files", &files)
            .field("env", &env)
            .finish_non_exhaustive()
    }
}

/// Reads from another reader and keeps what it answered.
pub struct RecordingReader<'r> {
    inner: &'r dyn Reader,
    bundle: RefCell<Bundle>,
}

impl<'r> RecordingReader<'r> {
    /// Nothing recorded yet.
    pub fn new(inner: &'r dyn Reader) -> Self {
        Self {
            inner,
            bundle: RefCell::default(),
        }
    }

    /// What was read so far.
    pub fn into_bundle(self) -> Bundle {
        self.bundle.into_inner()
    }
}

impl Reader for RecordingReader<'_> {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let answer = self.inner.read(path);
        let kept = answer
            .as_ref()
            .map(|bytes| Content::from(bytes.clone()))
            .map_err(Failure::from);
        self.bundle.borrow_mut().files.insert(path.to_owned(), kept);
        answer
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let answer = self.inner.list(path);
        let kept = answer.as_ref().map(Clone::clone).map_err(Failure::from);
        self.bundle.borrow_mut().lists.insert(path.to_owned(), kept);
        answer
    }

    fn mode(&self, path: &Path) -> Option<u32> {
        let answer = self.inner.mode(path);
        self.bundle
            .borrow_mut()
            .modes
            .insert(path.to_owned(), answer);
        answer
    }

    fn env(&self, name: &str) -> Option<String> {
        let answer = self.inner.env(name);
        self.bundle
            .borrow_mut()
            .env
            .insert(name.to_owned(), answer.clone());
        answer
    }
}

/// An error of reading as a sentence's end, alike on every system and after a bundle's journey.
pub(super) fn failure(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "there is no such file".to_owned(),
        Some(libc::EACCES) => "permission denied".to_owned(),
        Some(libc::EISDIR) => "it is a directory".to_owned(),
        Some(libc::ENOTDIR) => "it is not a directory".to_owned(),
        _ if error.kind() == io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_answers_as_the_reader_did_whom_it_recorded_even_after_a_journey() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.toml");
        std::fs::write(&file, "x = 1").expect("written");
        let missing = folder.path().join("missing");
        let recording = RecordingReader::new(&Disk);
        assert_eq!(recording.read(&file).expect("there"), b"x = 1");
        assert!(recording.read(&missing).is_err());
        assert_eq!(
            recording.list(folder.path()).expect("a folder"),
            std::slice::from_ref(&file)
        );
        assert!(recording.mode(&file).is_some());
        let bundle = recording.into_bundle();
        let sent = serde_json::to_vec(&bundle).expect("JSON");
        let bundle: Bundle = serde_json::from_slice(&sent).expect("JSON");
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(bundle.read(&file).expect("recorded"), b"x = 1");
        assert_eq!(
            bundle.read(&missing).map_err(|error| error.kind()),
            Err(io::ErrorKind::NotFound)
        );
        assert_eq!(bundle.list(folder.path()).expect("recorded"), [file]);
    }

    #[test]
    fn what_is_no_regular_file_or_too_large_is_refused_without_waiting() {
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        assert!(Disk.read(&pipe).is_err());
        assert!(Disk.read(Path::new("/dev/zero")).is_err());
        let large = folder.path().join("large");
        std::fs::write(&large, vec![b'#'; (1 << 20) + 1]).expect("written");
        assert_eq!(
            Disk.read(&large).map_err(|error| error.kind()),
            Err(io::ErrorKind::FileTooLarge)
        );
    }

    #[test]
    fn a_bundle_never_prints_what_it_holds() {
        let bundle =
            Bundle::of_files([("/etc/key.pem", "canary-file")]).with_env("TOKEN", "canary-env");
        assert!(!format!("{bundle:?}").contains("canary"));
    }
}
