//! Certificates of a listener: a file with chain and key, a pair of files, or a folder of them.

use std::path::{Path, PathBuf};

use super::CertificatePem;
use super::context::{Context, read};
use super::source::failure;
use super::table::Value;

/// Most certificates of one listener.
const CERTIFICATES_MAX: usize = 10_000;

/// Ends of files that hold a chain.
const CHAIN_EXTENSIONS: [&str; 3] = ["pem", "crt", "cer"];

/// Read everything that `certificates` names: one path or a list; a folder stands for all chains in it.
///
/// In a folder: `NAME.pem`, `NAME.crt` or `NAME.cer` with the key in the same file or in `NAME.key`; and
/// folders with `fullchain.pem` and `privkey.pem`, as ACME clients leave them.
pub(super) fn certificates(
    value: &Value<'_>,
    context: &Context<'_>,
) -> Option<Vec<CertificatePem>> {
    let (mut certificates, mut is_good) = (Vec::new(), true);
    for item in value.one_or_more()? {
        match item_certificates(&item, context) {
            Some(found) => certificates.extend(found),
            None => is_good = false,
        }
    }
    if is_good && certificates.is_empty() {
        return value.spot.refuse("no certificate is named", "", None);
    }
    if certificates.len() > CERTIFICATES_MAX {
        return value.spot.refuse(
            format!("there are more than {CERTIFICATES_MAX} certificates"),
            "",
            None,
        );
    }
    is_good.then_some(certificates)
}

fn item_certificates(item: &Value<'_>, context: &Context<'_>) -> Option<Vec<CertificatePem>> {
    let path = context.path(item)?;
    // A list that fails says that this is a file, or nothing: reading it will tell.
    let Ok(entries) = context.reader.list(&path) else {
        return certificate(item, context, &path, None).map(|one| vec![one]);
    };
    let (mut found, mut is_good) = (Vec::new(), true);
    for (chain, key) in chains(&entries, context) {
        match certificate(item, context, &chain, key.as_deref()) {
            Some(certificate) => found.push(certificate),
            None => is_good = false,
        }
    }
    if is_good && found.is_empty() {
        let help = "expected NAME.pem with chain and key, NAME.crt beside NAME.key, or NAME/fullchain.pem with privkey.pem";
        return item.spot.refuse(
            format!("there is no certificate in {}", path.display()),
            "",
            Some(help.to_owned()),
        );
    }
    is_good.then_some(found)
}

/// Chains in a folder, by name, each with the file of its key where that is another one.
fn chains(entries: &[PathBuf], context: &Context<'_>) -> Vec<(PathBuf, Option<PathBuf>)> {
    let mut chains = Vec::new();
    for entry in entries {
        let hidden = entry
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = entry
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        if hidden || extension == "key" {
            continue;
        }
        if CHAIN_EXTENSIONS.contains(&extension) {
            let key = entry.with_extension("key");
            let key = entries.contains(&key).then_some(key);
            chains.push((entry.clone(), key));
            continue;
        }
        let (chain, key) = (entry.join("fullchain.pem"), entry.join("privkey.pem"));
        if context
            .reader
            .list(entry)
            .is_ok_and(|entries| entries.contains(&chain))
        {
            chains.push((chain, Some(key)));
        }
    }
    chains
}

/// One chain with its key, checked.
fn certificate(
    item: &Value<'_>,
    context: &Context<'_>,
    chain_path: &Path,
    key_path: Option<&Path>,
) -> Option<CertificatePem> {
    let chain = match read(context.reader, chain_path) {
        Ok(bytes) => bytes,
        Err(error) => {
            let message = format!("cannot read {}: {}", chain_path.display(), failure(&error));
            return item.spot.refuse(message, "", None);
        }
    };
    if !has_block(&chain, "CERTIFICATE-----") {
        return item.spot.refuse(
            format!("there is no certificate in {}", chain_path.display()),
            "",
            Some("it needs a PEM block -----BEGIN CERTIFICATE-----".to_owned()),
        );
    }
    let key_path = match key_path {
        Some(path) => path.to_owned(),
        None if has_block(&chain, "PRIVATE KEY-----") => chain_path.to_owned(),
        None => chain_path.with_extension("key"),
    };
    let key = if key_path == chain_path {
        chain.clone()
    } else {
        match read(context.reader, &key_path) {
            Ok(bytes) => bytes,
            Err(error) => {
                let (chain, key) = (chain_path.display(), key_path.display());
                let message = format!(
                    "there is no private key in {chain}, and {key} cannot be read: {}",
                    failure(&error)
                );
                return item.spot.refuse(message, "", None);
            }
        }
    };
    if !has_block(&key, "PRIVATE KEY-----") {
        return item.spot.refuse(
            format!("there is no private key in {}", key_path.display()),
            "",
            Some("it needs a PEM block -----BEGIN PRIVATE KEY-----".to_owned()),
        );
    }
    context.warn_if_open(item, &key_path);
    let certificate = CertificatePem {
        path: chain_path.to_owned(),
        chain,
        key,
    };
    match (context.check_certificate)(&certificate) {
        Ok(()) => Some(certificate),
        Err(why) => item
            .spot
            .refuse(format!("{}: {why}", chain_path.display()), "", None),
    }
}

/// Whether there is a PEM block whose first line ends like this.
pub(super) fn has_block(bytes: &[u8], end: &str) -> bool {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    lines.any(|line| {
        let line = line.trim_ascii_end();
        line.starts_with(b"-----BEGIN ") && line.ends_with(end.as_bytes())
    })
}
