//! What `sluice sysctl` prints: queries and writes as pure functions, in the manner of procps.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Assignment, Change, TREE, Tunable, TunableError, Tunables, unit};

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// `-a`: every key.
    pub all: bool,
    /// Keys; the name of an area stands for all in it.
    pub keys: Vec<String>,
    /// `-r`: only keys that match this regular expression.
    pub pattern: Option<String>,
    pub form: Form,
}

/// How it is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// `key = value`
    #[default]
    Pairs,
    /// `-n`: values only.
    Values,
    /// `-N`: names only.
    Names,
    /// `--long`: with default, range, class, origin and help.
    Long,
    /// `--json`: an array of objects with all of that.
    Json,
}

/// What is to be printed. The exit code is 0 where `errors` is empty, else 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// For the standard output, whole lines.
    pub text: String,
    /// For the standard error output: what an operator should know all the same.
    pub notes: Vec<String>,
    /// For the standard error output: what failed.
    pub errors: Vec<String>,
}

/// One row with its present value, for a program to read.
type Row<'t> = (&'static Tunable, String, &'t super::Origin);

/// Answer a query. What cannot be found is an error each; the rest is answered all the same.
pub fn render(tunables: &Tunables, query: &Query) -> Answer {
    let mut answer = Answer::default();
    let pattern = match query.pattern.as_deref().map(pattern) {
        Some(Err(error)) => {
            answer.errors.push(error);
            return answer;
        }
        Some(Ok(pattern)) => Some(pattern),
        None => None,
    };
    let everything = query.all || (query.keys.is_empty() && pattern.is_some());
    let mut rows: Vec<Row> = Vec::new();
    if everything {
        rows.extend(tunables.iter());
        rows.sort_by_key(|(tunable, ..)| tunable.key);
    }
    for key in &query.keys {
        let found = rows_of(tunables, key);
        if found.is_empty() {
            answer.errors.push(unknown(key).to_string());
        }
        rows.extend(found);
    }
    rows.retain(|(tunable, ..)| {
        pattern
            .as_ref()
            .is_none_or(|pattern| pattern.is_match(tunable.key))
    });
    answer.text = print(&rows, query.form);
    answer
}

/// Assign everything, in order, and print what was assigned. A failed assignment is an error unless it says `-key`;
/// the others are made all the same, as procps does.
pub fn write(tunables: &mut Tunables, assignments: &[Assignment], form: Form) -> Answer {
    let mut answer = Answer::default();
    let mut changes = Vec::new();
    for assignment in assignments {
        match tunables.assign(
            &assignment.key,
            &assignment.value,
            assignment.origin.clone(),
        ) {
            Ok(change) => changes.push(change),
            Err(error) if assignment.ignore_failure => {
                answer.notes.push(format!("ignored: {error}"))
            }
            Err(error) => answer.errors.push(match &assignment.origin {
                super::Origin::File { .. } => format!("{}: {error}", assignment.origin),
                _ => error.to_string(),
            }),
        }
    }
    answer.notes.extend(changes.iter().filter_map(Change::note));
    answer.text = match form {
        Form::Json => changes_json(&changes),
        _ => changes
            .iter()
            .map(|change| line(change.key, &change.after, form))
            .collect(),
    };
    answer
}

/// A key's row, or all rows of an area.
fn rows_of<'t>(tunables: &'t Tunables, key: &str) -> Vec<Row<'t>> {
    let key = key.trim().replace('/', ".");
    let area = key.trim_end_matches('*').trim_end_matches('.');
    let in_area = |other: &str| {
        other
            .strip_prefix(area)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    let mut rows: Vec<Row> = tunables
        .iter()
        .filter(|(tunable, ..)| tunable.key == key || in_area(tunable.key))
        .collect();
    rows.sort_by_key(|(tunable, ..)| tunable.key);
    rows
}

fn unknown(key: &str) -> TunableError {
    TunableError::Unknown {
        key: unit::shown(key),
        nearest: unit::nearest(key, TREE.iter().map(|tunable| tunable.key)),
    }
}

fn pattern(text: &str) -> Result<regex_lite::Regex, String> {
    let built = regex_lite::RegexBuilder::new(text)
        .size_limit(1 << 20)
        .build();
    built.map_err(|error| {
        format!(
            "the pattern `{}` is no regular expression: {error}",
            unit::shown(text)
        )
    })
}

fn print(rows: &[Row], form: Form) -> String {
    match form {
        Form::Json => {
            let rows: Vec<_> = rows.iter().map(row_json).collect();
            format!("{}\n", serde_json::Value::from(rows))
        }
        Form::Long => rows.iter().map(long).collect(),
        _ => rows
            .iter()
            .map(|(tunable, value, _)| line(tunable.key, value, form))
            .collect(),
    }
}

fn line(key: &str, value: &str, form: Form) -> String {
    match form {
        Form::Values => format!("{value}\n"),
        Form::Names => format!("{key}\n"),
        _ => format!("{key} = {value}\n"),
    }
}

fn long((tunable, value, origin): &Row) -> String {
    format!(
        "{key} = {value}\n    {kind}, {range}; default {default}; {class}; from {origin}\n    {help}\n",
        key = tunable.key,
        kind = tunable.kind.name(),
        range = tunable.range(),
        default = tunable.format(tunable.default),
        class = tunable.class.name(),
        help = tunable.help,
    )
}

fn row_json((tunable, value, origin): &Row) -> serde_json::Value {
    json!({
        "key": tunable.key,
        "value": value,
        "default": tunable.format(tunable.default),
        "kind": tunable.kind.name(),
        "range": tunable.range(),
        "class": tunable.class.name(),
        "origin": origin.to_string(),
        "help": tunable.help,
    })
}

fn changes_json(changes: &[Change]) -> String {
    let changes: Vec<_> = changes
        .iter()
        .map(|change| {
            json!({
                "key": change.key,
                "before": change.before,
                "after": change.after,
                "class": change.class.name(),
                "note": change.note(),
            })
        })
        .collect();
    format!("{}\n", serde_json::Value::from(changes))
}

#[cfg(test)]
mod tests {
    use super::super::{Origin, parse_assignment};
    use super::*;

    fn ask(keys: &[&str], form: Form) -> Answer {
        let keys = keys.iter().map(|key| (*key).to_owned()).collect();
        render(
            &Tunables::default(),
            &Query {
                keys,
                form,
                ..Query::default()
            },
        )
    }

    fn runtime(text: &str) -> Assignment {
        parse_assignment(text, Origin::Runtime).expect("an assignment")
    }

    #[test]
    fn a_key_is_printed_as_procps_prints_it() {
        assert_eq!(
            ask(&["http.head_timeout"], Form::Pairs).text,
            "http.head_timeout = 10s\n"
        );
        assert_eq!(ask(&["http/head_timeout"], Form::Values).text, "10s\n");
        assert_eq!(
            ask(&["http.head_timeout"], Form::Names).text,
            "http.head_timeout\n"
        );
        let long = ask(&["http.head_timeout"], Form::Long).text;
        assert!(
            long.contains("duration, 100ms to 10m; default 10s; live; from default"),
            "{long}"
        );
    }

    #[test]
    fn an_area_stands_for_all_its_keys_sorted() {
        let answer = ask(&["flow"], Form::Names);
        assert_eq!(
            answer.text,
            "flow.tcp_brief_timeout\nflow.tcp_idle_timeout\nflow.udp_idle_timeout\n"
        );
        assert_eq!(ask(&["flow.*"], Form::Names), answer);
    }

    #[test]
    fn all_keys_can_be_narrowed_by_a_regular_expression() {
        let query = Query {
            all: true,
            pattern: Some("^http\\..*_max$".into()),
            form: Form::Names,
            ..Query::default()
        };
        let text = render(&Tunables::default(), &query).text;
        assert!(
            text.lines()
                .all(|key| key.starts_with("http.") && key.ends_with("_max"))
                && text.lines().count() > 3
        );
        let bad = Query {
            all: true,
            pattern: Some("(".into()),
            ..Query::default()
        };
        assert_eq!(render(&Tunables::default(), &bad).errors.len(), 1);
    }

    #[test]
    fn what_cannot_be_found_is_an_error_and_the_rest_is_answered() {
        let answer = ask(&["http.head_timeuot", "worker.count"], Form::Pairs);
        assert_eq!(answer.text, "worker.count = 0\n");
        assert_eq!(
            answer.errors,
            ["there is no tunable `http.head_timeuot`; did you mean `http.head_timeout`?"]
        );
    }

    #[test]
    fn json_carries_everything_that_long_prints() {
        let answer = ask(&["http.head_timeout"], Form::Json);
        let rows: serde_json::Value = serde_json::from_str(&answer.text).expect("JSON");
        for (field, value) in [
            ("key", "http.head_timeout"),
            ("value", "10s"),
            ("class", "live"),
            ("origin", "default"),
        ] {
            assert_eq!(rows[0][field], value);
        }
    }

    #[test]
    fn a_failed_write_leaves_the_others_done_and_a_dash_makes_it_a_note() {
        let mut tunables = Tunables::default();
        let lines = ["http.head_timeout=5s", "-h2.none=1", "http.fields_max=0"].map(runtime);
        let answer = write(&mut tunables, &lines, Form::Pairs);
        assert_eq!(answer.text, "http.head_timeout = 5s\n");
        assert_eq!(
            answer.errors,
            ["http.fields_max: 0 is out of range: 1 to 256"]
        );
        assert!(
            answer.notes[0].starts_with("ignored: there is no tunable `h2.none`"),
            "{:?}",
            answer.notes
        );
        assert!(
            answer.notes[1].contains("lost at the next start"),
            "{:?}",
            answer.notes
        );
        assert_eq!(
            tunables.http.head_timeout,
            std::time::Duration::from_secs(5)
        );
    }
}
