//! The program at the command line: what it refuses, in which words, with which exit code. Needs no root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use rig::certificate::Authority;
use rig::sluice;

const GOOD: &str = r#"[[listener]]
name    = "web"
address = "127.0.0.1:8080"

[[route]]
match    = { path = "/*" }
upstream = "app"

[[upstream]]
name      = "app"
endpoints = ["127.0.0.1:9000"]
"#;

/// What is wrong, what it becomes, where it is found, and a word of the remedy.
const BAD: &[(&str, &str, &str, &str)] = &[
    (
        "name    = \"web\"",
        "nmae    = \"web\"",
        ":2:",
        "did you mean",
    ),
    (
        "upstream = \"app\"",
        "upstream = \"ap\"",
        ":7:",
        "did you mean",
    ),
    ("\"127.0.0.1:9000\"", "\"127.0.0.1\"", ":11:", "127.0.0.1"),
    (
        "[[upstream]]",
        "[[upstream]]\nname = \"app\"\nendpoints = [\"127.0.0.1:1\"]\n[[upstream]]",
        ":13:",
        "app",
    ),
    ("path = \"/*\"", "path = 7", ":6:", "path"),
];

#[test]
fn a_good_configuration_passes_and_each_bad_one_is_told_with_its_place() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sluice.toml");
    fs::write(&path, GOOD)?;
    ensure!(
        check(&path)?.status.code() == Some(0),
        "{:?}",
        check(&path)?
    );
    for (right, wrong, place, remedy) in BAD {
        let text = GOOD.replacen(right, wrong, 1);
        ensure!(text != GOOD, "{right} is not in the configuration");
        fs::write(&path, text)?;
        let done = check(&path)?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned()
            + &String::from_utf8_lossy(&done.stdout);
        ensure!(done.status.code() == Some(1), "{wrong}: {:?}", done.status);
        ensure!(
            said.contains(place) && said.contains(remedy) && said.contains("sluice.toml"),
            "{wrong}:\n{said}"
        );
    }
    Ok(())
}

#[test]
fn wrong_use_has_an_exit_code_of_its_own() -> Result<()> {
    ensure!(sluice_with(&["no-such-command"])?.status.code() == Some(2));
    ensure!(sluice_with(&["check", "--no-such-flag"])?.status.code() == Some(2));
    Ok(())
}

#[test]
fn the_daemon_is_started_by_its_keeper_and_says_so_to_others() -> Result<()> {
    let done = sluice_with(&["daemon"])?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(1) && said.contains("sluice run"),
        "{done:?}"
    );
    Ok(())
}

#[test]
fn a_file_that_is_not_there_is_named() -> Result<()> {
    let done = check(Path::new("/nowhere/sluice.toml"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.code() == Some(1) && said.contains("/nowhere/sluice.toml"),
        "{done:?}"
    );
    Ok(())
}

#[test]
fn a_key_that_does_not_match_its_certificate_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let certs = folder.path().join("certs");
    let authority = Authority::create(&folder.path().join("authority"))?;
    for stem in ["one", "two"] {
        authority.sign(&certs, stem, &["web.test"])?;
    }
    fs::copy(certs.join("two.key"), certs.join("one.key"))?;
    let tls = "address = \"127.0.0.1:8080\"\nserve = \"https\"\ntls = { certificates = \"certs\" }";
    let path = folder.path().join("sluice.toml");
    fs::write(&path, GOOD.replace("address = \"127.0.0.1:8080\"", tls))?;
    let done = check(&path)?;
    let said =
        String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
    ensure!(
        done.status.code() == Some(1) && said.contains("one.pem"),
        "{:?}\n{said}",
        done.status
    );
    Ok(())
}

#[test]
fn a_log_in_a_folder_that_others_may_write_to_is_found_before_the_start() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let logs = folder.path().join("logs");
    fs::create_dir(&logs)?;
    let path = folder.path().join("sluice.toml");
    let log = "[log]\naccess = { file = \"logs/access.log\" }\n";
    fs::write(&path, format!("{log}{GOOD}"))?;
    for (mode, code) in [(0o755, 0), (0o777, 1)] {
        fs::set_permissions(&logs, fs::Permissions::from_mode(mode))?;
        let done = check(&path)?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.code() == Some(code), "{mode:o}: {said}");
        ensure!(
            said.contains("others may write to") == (code == 1),
            "{said}"
        );
    }
    ensure!(!logs.join("access.log").exists(), "check has made the file");
    Ok(())
}

fn check(path: &Path) -> Result<Output> {
    let path = path.to_str().context("a path in UTF-8")?;
    sluice_with(&["check", "-c", path])
}

fn sluice_with(arguments: &[&str]) -> Result<Output> {
    Command::new(sluice::built()?)
        .args(arguments)
        .output()
        .context("start sluice")
}
