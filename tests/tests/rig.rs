//! The rig itself, without Sluice: what the other tests take for granted.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rig::certificate::Authority;
use rig::client::{tcp_echo, udp_echo};
use rig::field::{Field, at, origin_v4, origin_v6};
use rig::http::Curl;
use rig::origin::{ECHO_PORT, HTTP_PORT, Origin};
use rig::{harness, namespace, sandbox, tests};

/// The mounts of the machine outside, kept open from before the sandbox.
static OUTSIDE: OnceLock<OwnedFd> = OnceLock::new();

struct World {
    field: Field,
    origins: Vec<Origin>,
}

fn main() -> ExitCode {
    if let Ok(file) = File::open("/proc/self/ns/mnt") {
        let fd = OwnedFd::from(file);
        // nsenter, our child, opens it by its number.
        let _ = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()));
        let _ = OUTSIDE.set(fd);
    }
    harness::main(
        || {
            let field = Field::build()?;
            let origins = field
                .origins
                .iter()
                .map(Origin::start)
                .collect::<Result<_>>()?;
            Ok(World { field, origins })
        },
        |_| String::new(),
        tests![
            the_edge_reaches_every_origin_in_both_families,
            echoes_say_who_they_are,
            the_client_has_no_way_around_the_edge,
            a_quiet_field_sends_nothing,
            a_signed_certificate_is_trusted_and_another_is_not,
            the_rest_of_the_machine_sees_none_of_our_namespaces,
        ],
    )
}

fn the_edge_reaches_every_origin_in_both_families(world: &mut World) -> Result<()> {
    for number in 1..=3 {
        for address in [origin_v4(number), origin_v6(number)] {
            let response = Curl::new(&world.field.edge, &address)
                .fetch(&format!("http://any.test:{HTTP_PORT}/a"), &[])?;
            ensure!(
                response.status == 200,
                "{address} answered {}",
                response.status
            );
            ensure!(
                response.origin() == Some(&format!("origin{number}")),
                "{:?}",
                response.fields
            );
            ensure!(
                response.text() == format!("origin{number} GET /a\n"),
                "{}",
                response.text()
            );
        }
    }
    ensure!(
        world.origins[0].requests().len() == 2,
        "{:?}",
        world.origins[0].requests()
    );
    Ok(())
}

fn echoes_say_who_they_are(world: &mut World) -> Result<()> {
    for address in [origin_v4(2), origin_v6(2)] {
        let to = at(&address, ECHO_PORT).parse()?;
        let (name, bytes) = world.field.edge.inside(|| tcp_echo(to, 100_000, 7))?;
        ensure!(
            (name.as_str(), bytes) == ("origin2", 100_000),
            "{name} {bytes}"
        );
        let (name, _) = world.field.edge.inside(|| udp_echo(to, b"hello"))?;
        ensure!(name == "origin2", "{name}");
    }
    Ok(())
}

fn the_client_has_no_way_around_the_edge(world: &mut World) -> Result<()> {
    let to = at(&origin_v4(1), ECHO_PORT).parse()?;
    let result = world.field.client.inside(|| udp_echo(to, b"hello"));
    ensure!(result.is_err(), "an origin answered without Sluice");
    Ok(())
}

fn a_quiet_field_sends_nothing(world: &mut World) -> Result<()> {
    // What earlier tests left on its way (neighbour probes five seconds after their answers) is let come first.
    let count = || rig::ledger::sent(&world.field.client, "eth0");
    let before = count()?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    ensure!(
        count()? == before,
        "the client's end sent packets by itself"
    );
    Ok(())
}

fn a_signed_certificate_is_trusted_and_another_is_not(_: &mut World) -> Result<()> {
    let folder = sandbox::folder("certificates")?;
    let (ours, other) = (
        Authority::create(&folder.join("ours"))?,
        Authority::create(&folder.join("other"))?,
    );
    ours.sign(&folder, "leaf", &["shop.test", "203.0.113.10"])?;
    let verify = |authority: &Authority| {
        namespace::output(
            Command::new("openssl")
                .args([
                    "verify",
                    "-x509_strict",
                    "-verify_hostname",
                    "shop.test",
                    "-purpose",
                    "sslserver",
                    "-CAfile",
                ])
                .arg(authority.certificate())
                .arg(folder.join("leaf.pem")),
        )
    };
    verify(&ours)?;
    ensure!(verify(&other).is_err(), "a stranger's signature was taken");
    Ok(())
}

fn the_rest_of_the_machine_sees_none_of_our_namespaces(world: &mut World) -> Result<()> {
    let name = world.field.edge.name();
    ensure!(
        Path::new("/run/netns").join(name).exists(),
        "the name is missing inside"
    );
    let outside = OUTSIDE.get().context("main kept no view of the outside")?;
    let mounts = format!("--mount=/proc/self/fd/{}", outside.as_raw_fd());
    let seen = Command::new("nsenter")
        .args([mounts.as_str(), "find", "/run", "-name", name])
        .output()?;
    ensure!(
        seen.stdout.is_empty(),
        "outside: {}",
        String::from_utf8_lossy(&seen.stdout)
    );
    Ok(())
}
