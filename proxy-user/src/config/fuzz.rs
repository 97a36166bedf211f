//! What must hold of any text taken for a configuration: fed by fuzzing, and by the corpus that fuzzing left.

use std::path::Path;

use super::{Bundle, diagnostic, load};

const MAIN: &str = "/etc/sluice/sluice.toml";

/// A target of fuzzing: the bytes are the configuration. It is taken, or each error says where it stands; twice the same.
pub fn configuration(data: &[u8]) {
    let consumers = "[[consumer]]\nname = \"a\"\nkey  = { env = \"KEY\" }\n";
    let files = [
        (MAIN, data),
        ("/etc/sluice/consumers.toml", consumers.as_bytes()),
        ("/etc/sluice/page.html", b"a page".as_slice()),
    ];
    let bundle = Bundle::of_files(files).with_env("KEY", "0123456789abcdef0123456789abcdef");
    let loaded = load(&bundle, Path::new(MAIN));
    assert_eq!(
        load(&bundle, Path::new(MAIN)),
        loaded,
        "pure over what it read"
    );
    let found = match &loaded {
        Ok(loaded) => &loaded.warnings,
        Err(found) => found,
    };
    let has_errors = found.iter().any(|diagnostic| diagnostic.is_error());
    assert_eq!(has_errors, loaded.is_err());
    let lines = data.split(|byte| *byte == b'\n').count();
    for diagnostic in found {
        let Some(place) = &diagnostic.place else {
            let message = &diagnostic.message;
            assert!(is_general(message), "no place: {message}");
            continue;
        };
        let is_there = (1..=lines.max(1)).contains(&(place.line as usize)) && place.column > 0;
        assert!(is_there || &*place.path != MAIN, "{place:?}");
    }
    diagnostic::render(found, true);
}

/// What cannot stand at a line: that something is missing from the whole, and bytes that are no text.
fn is_general(message: &str) -> bool {
    [" is no text in UTF-8", "there is no listener", " not shown"]
        .iter()
        .any(|general| message.contains(general))
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_fuzzing_left_of_configurations_keeps_the_rules() {
        crate::message::fuzz::replay("configuration", super::configuration);
    }
}
