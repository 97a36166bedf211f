//! The access log's file: opened by the keeper, which may, and written by the daemon, which may not.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::unistd::Uid;

use crate::config::{Config, Diagnostic, LogTarget};

/// Who may read it, where it is made: root and its group, as other logs.
const MODE: u32 = 0o640;

/// Opens what the configuration names; `None`: it names nothing.
///
/// # Errors
/// It cannot be opened, or must not be.
pub fn open(config: &Config) -> Result<Option<OwnedFd>, Vec<Diagnostic>> {
    let Some(access_log) = &config.access_log else {
        return Ok(None);
    };
    let opened = match &access_log.to {
        LogTarget::Stdout => std::io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| {
                Diagnostic::error(format!("the standard output cannot be written to: {error}"))
            }),
        LogTarget::File(path) => open_file(path).map_err(|fault| *fault),
    };
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(fault) => Err(vec![fault.at(&access_log.at)]),
    }
}

/// What would keep [`open`] from it, as far as that can be said without making the file.
pub fn fault(config: &Config) -> Option<Diagnostic> {
    let access_log = config.access_log.as_ref()?;
    let LogTarget::File(path) = &access_log.to else {
        return None;
    };
    check_folder(path)
        .err()
        .map(|fault| fault.at(&access_log.at))
}

fn open_file(path: &Path) -> Result<OwnedFd, Box<Diagnostic>> {
    check_folder(path)?;
    let cannot = |why: String| {
        Box::new(Diagnostic::error(format!(
            "cannot write {}: {why}",
            path.display()
        )))
    };
    // Not blocked by a pipe that nobody reads, which is refused just below.
    let file = File::options()
        .append(true)
        .create(true)
        .mode(MODE)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ELOOP) => cannot("it is a link, and somebody else could turn it".into()),
            _ => cannot(error.to_string()),
        })?;
    match file.metadata() {
        Ok(found) if found.is_file() => Ok(file.into()),
        Ok(_) => Err(cannot("it is no regular file".into())),
        Err(error) => Err(cannot(error.to_string())),
    }
}

/// In a folder that others may write to, they could put anything of ours in the file's place, and let us write into it.
fn check_folder(path: &Path) -> Result<(), Box<Diagnostic>> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let found = fs::metadata(folder).map_err(|error| {
        let fault = Diagnostic::error(format!("cannot look at {}: {error}", folder.display()));
        match error.kind() {
            ErrorKind::NotFound => fault.help(format!("mkdir -p {}", folder.display())),
            _ => fault,
        }
    })?;
    let own = Uid::effective().as_raw();
    let is_ours = found.uid() == own || found.uid() == 0;
    if is_ours && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    let message = format!(
        "others may write to {}, and so could let the access log end up in any file",
        folder.display()
    );
    let help = format!(
        "give it a folder of its own: chown {own} {0} && chmod go-w {0}",
        folder.display()
    );
    Err(Diagnostic::error(message).help(help).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_file_is_made_for_its_group_and_written_at_its_end() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("access.log");
        for line in ["one\n", "two\n"] {
            let file = open_file(&path).map_err(|fault| std::io::Error::other(fault.message))?;
            File::from(file).write_all(line.as_bytes())?;
        }
        assert_eq!(fs::read_to_string(&path)?, "one\ntwo\n");
        assert_eq!(fs::metadata(&path)?.mode() & 0o777 & !MODE, 0);
        Ok(())
    }

    #[test]
    fn what_is_no_file_of_ours_is_not_written_to() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        let why = |path: &Path| open_file(path).expect_err("opened").message;
        fs::write(path("precious"), "precious")?;
        symlink(path("precious"), path("link"))?;
        assert!(why(&path("link")).contains("is a link"));
        nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU)?;
        assert!(why(&path("pipe")).contains("cannot write"));
        assert!(why(&path("none/access.log")).contains("cannot look at"));
        fs::create_dir(path("open"))?;
        for mode in [0o777, 0o1777, 0o775] {
            fs::set_permissions(path("open"), fs::Permissions::from_mode(mode))?;
            assert!(
                why(&path("open/access.log")).contains("others may write"),
                "{mode:o}"
            );
        }
        assert_eq!(fs::read_to_string(path("precious"))?, "precious");
        Ok(())
    }
}
