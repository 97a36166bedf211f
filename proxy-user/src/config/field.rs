//! Header fields that the operator may name, and changes to them.

use super::HeaderEdit;
use super::context::Context;
use super::table::Value;
use crate::tunable::unit::shown;

/// Fields that belong to one connection or that frame the message (RFC 9110 section 7.6.1, RFC 9112 section 6):
/// Sluice writes them anew from its own parse, so nobody else may.
const OURS: [&str; 9] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// Longest field name and value, in bytes, and most changes of one kind.
const NAME_BYTES_MAX: usize = 256;
const VALUE_BYTES_MAX: usize = 8192;
const FIELDS_MAX: usize = 128;

/// Parse a field name (RFC 9110 section 5.1) into lower case.
///
/// # Errors
/// A sentence: no token, or a field that is ours alone.
pub fn parse_field_name(text: &str) -> Result<String, String> {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(token) {
        return Err(format!(
            "`{}` is no field name: letters, digits and `-`, like x-request-id",
            shown(text)
        ));
    }
    let name = text.to_ascii_lowercase();
    if OURS.contains(&name.as_str()) {
        return Err(format!(
            "the field `{name}` frames the message or belongs to the connection, and Sluice writes it itself"
        ));
    }
    Ok(name)
}

/// Check a field value (RFC 9110 section 5.5): visible ASCII, blanks and tabs between.
///
/// # Errors
/// A sentence that does not repeat the value, for it may be a secret.
pub fn check_field_value(value: &str) -> Result<(), String> {
    if value.len() > VALUE_BYTES_MAX {
        return Err(format!(
            "a field value is at most {VALUE_BYTES_MAX} bytes long"
        ));
    }
    if !value
        .bytes()
        .all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte))
    {
        return Err(
            "a field value is made of visible ASCII characters, blanks and tabs".to_owned(),
        );
    }
    if value.trim() != value {
        return Err("a field value neither begins nor ends with a blank".to_owned());
    }
    Ok(())
}

/// `{ remove = [..], set = {..}, add = {..} }`. The Host of a request can be set, never removed or doubled.
pub(super) fn edit(
    value: &Value<'_>,
    context: &Context<'_>,
    is_request: bool,
) -> Option<HeaderEdit> {
    let section = value.section()?;
    let remove = section.find("remove").map(|value| removed(&value));
    let set = section
        .find("set")
        .map(|value| named_values(&value, context, is_request));
    let add = section
        .find("add")
        .map(|value| named_values(&value, context, false));
    section.finish();
    let edit = HeaderEdit {
        remove: absent(remove)?,
        set: absent(set)?,
        add: absent(add)?,
    };
    if edit == HeaderEdit::default() {
        return value.spot.refuse(
            format!("`{}` changes nothing", value.name),
            "",
            Some("give it remove, set or add".to_owned()),
        );
    }
    Some(edit)
}

/// `{ name = "value", other = ["a", "b"], third = { file = "..." } }`, in the order written.
pub(super) fn named_values(
    value: &Value<'_>,
    context: &Context<'_>,
    may_be_host: bool,
) -> Option<Vec<(String, String)>> {
    let section = value.section()?;
    let (mut fields, mut is_good) = (Vec::new(), true);
    for (name, spot, value) in section.entries() {
        let parsed = match parse_field_name(name) {
            Ok(name) if name == "host" && !may_be_host => {
                Err("the field `host` can only be set, in a request".to_owned())
            }
            parsed => parsed,
        };
        let name = match parsed {
            Ok(name) => Some(name),
            Err(message) => spot.refuse(message, "", None),
        };
        for item in value.one_or_more().unwrap_or_default() {
            let text = context
                .secret(&item)
                .and_then(|text| match check_field_value(&text) {
                    Ok(()) => Some(text),
                    Err(message) => item.spot.refuse_unseen(message),
                });
            is_good &= text.is_some();
            fields.extend(name.clone().zip(text));
        }
        is_good &= name.is_some();
    }
    if fields.len() > FIELDS_MAX {
        return value.spot.refuse(
            format!("`{}` has more than {FIELDS_MAX} fields", value.name),
            "",
            None,
        );
    }
    is_good.then_some(fields)
}

fn removed(value: &Value<'_>) -> Option<Vec<String>> {
    let items = value.one_or_more()?;
    if items.len() > FIELDS_MAX {
        return value.spot.refuse(
            format!("`remove` has more than {FIELDS_MAX} fields"),
            "",
            None,
        );
    }
    let names: Vec<_> = items
        .iter()
        .map(|item| {
            item.parsed(|text| match parse_field_name(text)? {
                name if name == "host" => {
                    Err("a request without the field `host` is no request".to_owned())
                }
                name => Ok(name),
            })
        })
        .collect();
    names.into_iter().collect()
}

/// What is not there is empty; what is there and wrong stays wrong.
fn absent<T: Default>(found: Option<Option<T>>) -> Option<T> {
    found.unwrap_or_else(|| Some(T::default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_name_is_a_token_in_lower_case_and_none_that_frames_the_message() {
        assert_eq!(parse_field_name("X-Request-Id"), Ok("x-request-id".into()));
        for name in [
            "",
            "x y",
            "x:y",
            "é",
            "x\r\ny",
            "Content-Length",
            "TRANSFER-ENCODING",
            "connection",
            "upgrade",
        ] {
            assert!(parse_field_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_field_value_cannot_end_the_field_nor_is_it_repeated_in_the_message() {
        assert_eq!(check_field_value("max-age=3600, public"), Ok(()));
        for value in [
            "canary\r\nx: y",
            "canary\0",
            " canary",
            "canary ",
            "canary\u{e9}",
            "canary\u{7f}",
        ] {
            let error = check_field_value(value).expect_err(value);
            assert!(!error.contains("canary"), "{error}");
        }
    }
}
