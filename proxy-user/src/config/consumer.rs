//! The file of consumers: who may call, by the SHA-256 of a key.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use toml::de::DeTable;

use super::Consumer;
use super::context::Context;
use super::names::parse_name;
use super::problem::Source;
use super::table::{Section, Value};

/// Most consumers of one file.
const CONSUMERS_MAX: usize = 100_000;

/// Read the file that `consumers` names. Its own mistakes are told with its own lines, though never showing one.
pub(super) fn consumers(value: &Value<'_>, context: &Context<'_>) -> Option<Vec<Consumer>> {
    let (path, bytes) = context.file(value)?;
    let Ok(text) = String::from_utf8(bytes) else {
        return value
            .spot
            .refuse(format!("{} is no text in UTF-8", path.display()), "", None);
    };
    let source = Source::new(context.next_index(), &path, text, true);
    let (document, errors) = DeTable::parse_recoverable(&source.text);
    for error in &errors {
        let spot = source.spot(context.problems, error.span().unwrap_or(0..0));
        spot.refuse_unseen::<()>(format!("no TOML: {}", error.message()));
    }
    if !errors.is_empty() {
        return None;
    }
    let root = Section::new(
        source.spot(context.problems, 0..0),
        "a file of consumers".to_owned(),
        document.get_ref(),
    );
    let items = root
        .need("consumer", "[[consumer]]")
        .and_then(|value| value.items());
    root.finish();
    let items = items?;
    if items.len() > CONSUMERS_MAX {
        return value.spot.refuse(
            format!(
                "{} names more than {CONSUMERS_MAX} consumers",
                path.display()
            ),
            "",
            None,
        );
    }
    let mut seen = Seen {
        names: HashMap::new(),
        keys: HashMap::new(),
        is_plain: false,
    };
    let consumers: Vec<_> = items
        .iter()
        .map(|item| consumer(item, context, &mut seen))
        .collect();
    if seen.is_plain {
        context.warn_if_open(value, &path);
    }
    consumers.into_iter().collect()
}

/// What stood in the file so far.
struct Seen<'s> {
    names: HashMap<&'s str, Value<'s>>,
    keys: HashMap<[u8; 32], Value<'s>>,
    /// A key itself stands in the file.
    is_plain: bool,
}

fn consumer<'s>(item: &Value<'s>, context: &Context<'_>, seen: &mut Seen<'s>) -> Option<Consumer> {
    let mut section = item.section()?;
    section.name = "[[consumer]]".to_owned();
    let name_value = section.need("name", "name = \"alice\"");
    let (key, hash) = (section.find("key"), section.find("key_sha256"));
    section.finish();
    let name_value = name_value?;
    let Some(name) = name_value.text().filter(|text| parse_name(text).is_ok()) else {
        return name_value.spot.refuse(
            "the name of a consumer is made of letters, digits, `-`, `_` and `.`",
            "",
            None,
        );
    };
    if let Some(first) = seen.names.insert(name, name_value.clone()) {
        let message = format!("the consumer `{name}` is defined twice");
        return name_value.spot.refuse_with(message, "", first.spot, "");
    }
    let (value, key_sha256) = match (key, hash) {
        (Some(key), None) => {
            seen.is_plain |= !key.is_table();
            let text = context.secret(&key)?;
            if text.is_empty() {
                return key
                    .spot
                    .refuse(format!("the key of `{name}` is empty"), "", None);
            }
            (key, Sha256::digest(text.as_bytes()).into())
        }
        (None, Some(hash)) => {
            let parsed = hash.as_text().and_then(parse_sha256);
            let Some(key_sha256) = parsed else {
                return hash.spot.refuse(
                    format!("`key_sha256` of `{name}` is 64 hexadecimal digits"),
                    "",
                    None,
                );
            };
            (hash, key_sha256)
        }
        _ => {
            let help =
                "write key = { file = \"...\" } or key = { env = \"...\" } or key_sha256 = \"...\""
                    .to_owned();
            return item.spot.refuse(
                format!("the consumer `{name}` needs `key` or `key_sha256`, one of both"),
                "",
                Some(help),
            );
        }
    };
    if let Some(first) = seen.keys.insert(key_sha256, value.clone()) {
        let message = format!("the consumer `{name}` has the key of another one");
        return value.spot.refuse_with(message, "", first.spot, "");
    }
    Some(Consumer {
        name: name.to_owned(),
        key_sha256,
    })
}

fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[index * 2..index * 2 + 2], 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_exactly_64_hexadecimal_digits() {
        let digits = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let expected: [u8; 32] = Sha256::digest(b"abc").into();
        assert_eq!(parse_sha256(digits), Some(expected));
        let (short, sign, accent) = (
            "ab".repeat(31),
            format!("+{}", &digits[1..]),
            "é".repeat(32),
        );
        for text in ["", &short, &sign, &accent] {
            assert_eq!(parse_sha256(text), None, "{text}");
        }
    }
}
