//! The access log's file: opened by the keeper, which may, and written by the daemon, which may not.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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
    let path = &check_folder(path)?;
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

/// The path without links. In a folder that others may write to, they could put anything of ours in the file's place, and
/// above it, in one of somebody else's or where anybody may rename what is there, another folder in the place of this one.
fn check_folder(path: &Path) -> Result<PathBuf, Box<Diagnostic>> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let cannot = |error: std::io::Error| {
        let fault = Diagnostic::error(format!("cannot look at {}: {error}", folder.display()));
        match error.kind() {
            ErrorKind::NotFound => fault.help(format!("mkdir -p {}", folder.display())),
            _ => fault,
        }
    };
    let folder = folder.canonicalize().map_err(cannot)?;
    let own = Uid::effective().as_raw();
    for (depth, above) in folder.ancestors().enumerate() {
        let found = fs::metadata(above).map_err(cannot)?;
        let is_ours = found.uid() == own || found.uid() == 0;
        let is_closed = match depth {
            0 => found.mode() & 0o022 == 0,
            // A group may have been given the folder of all logs.
            _ => found.mode() & 0o002 == 0 || found.mode() & libc::S_ISVTX != 0,
        };
        if !(is_ours && is_closed) {
            let message = format!(
                "others may write to {}, and so could let the access log end up in any file",
                above.display()
            );
            let help = format!(
                "give it a folder of its own: chown {own} {0} && chmod go-w {0}",
                above.display()
            );
            return Err(Diagnostic::error(message).help(help).into());
        }
    }
    Ok(folder.join(path.file_name().unwrap_or_default()))
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

    #[test]
    fn whoever_owns_a_folder_above_cannot_turn_the_way_to_the_file() -> std::io::Result<()> {
        if !Uid::effective().is_root() {
            eprintln!("skipped: only root can give a folder away");
            return Ok(());
        }
        let folder = tempfile::tempdir()?;
        let above = folder.path().join("of-somebody");
        fs::create_dir_all(above.join("logs"))?;
        let path = above.join("logs/access.log");
        assert!(open_file(&path).is_ok());
        std::os::unix::fs::chown(&above, Some(65_534), None)?;
        let fault = open_file(&path).expect_err("opened");
        assert!(fault.message.contains("of-somebody,"), "{}", fault.message);
        std::os::unix::fs::chown(&above, Some(0), None)?;
        fs::set_permissions(&above, fs::Permissions::from_mode(0o777))?;
        assert!(open_file(&path).is_err());
        // As in /tmp, where nobody can rename what is another's.
        fs::set_permissions(&above, fs::Permissions::from_mode(0o1777))?;
        assert!(open_file(&path).is_ok());
        // A link on the way is followed once, when its folders were looked at.
        let link = folder.path().join("link");
        symlink(above.join("logs"), &link)?;
        assert!(open_file(&link.join("access.log")).is_ok());
        Ok(())
    }
}
