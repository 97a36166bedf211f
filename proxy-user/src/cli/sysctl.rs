//! `sluice sysctl`: tunables of the running daemon, or the defaults where none runs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::{Common, client};
use crate::control::SysctlRequest;
use crate::tunable::{self, Answer, Assignment, Form, Query, Tunables};

#[derive(Debug, clap::Args)]
pub struct Sysctl {
    /// Every key
    #[arg(short, long)]
    all: bool,
    /// Values only
    #[arg(short = 'n', long)]
    values: bool,
    /// Names only
    #[arg(short = 'N', long)]
    names: bool,
    /// Set: each KEY is KEY=VALUE
    #[arg(short, long)]
    write: bool,
    /// Set what a file says [default: /etc/sluice/sysctl.d/99-local.conf]; - is the standard input
    #[arg(short = 'p', long, value_name = "FILE", num_args = 0..=1, default_missing_value = tunable::LOCAL_FILE)]
    load: Option<PathBuf>,
    /// Set what all drop-in files say
    #[arg(long)]
    system: bool,
    /// Only keys that match
    #[arg(short = 'r', long, value_name = "REGEX")]
    pattern: Option<String>,
    /// With default, range, class, origin and help
    #[arg(long)]
    long: bool,
    /// Keys, or areas; with -w assignments
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
}

impl Sysctl {
    pub fn perform(self, common: &Common) -> Result<ExitCode> {
        let form = self.form(common)?;
        let writes = self.write
            || self.load.is_some()
            || self.system
            || self.keys.iter().any(|key| key.contains('='));
        let answer = if writes {
            self.set(common, form)?
        } else {
            self.query(common, form)?
        };
        print!("{}", answer.text);
        for note in &answer.notes {
            eprintln!("note: {note}");
        }
        for error in &answer.errors {
            eprintln!("sluice: {error}");
        }
        Ok(if answer.errors.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn form(&self, common: &Common) -> Result<Form> {
        let forms = [
            (self.values, Form::Values),
            (self.names, Form::Names),
            (self.long, Form::Long),
            (common.json, Form::Json),
        ];
        let chosen: Vec<Form> = forms
            .into_iter()
            .filter(|(set, _)| *set)
            .map(|(_, form)| form)
            .collect();
        match chosen.as_slice() {
            [] => Ok(Form::Pairs),
            [one] => Ok(*one),
            _ => bail!("-n, -N, --long and --json exclude each other"),
        }
    }

    fn query(self, common: &Common, form: Form) -> Result<Answer> {
        if !self.all && self.keys.is_empty() && self.pattern.is_none() {
            bail!("name a key, or -a for all of them");
        }
        let query = Query {
            all: self.all,
            keys: self.keys,
            pattern: self.pattern,
            form,
        };
        let body = serde_json::to_value(SysctlRequest::Query(query.clone()))?;
        match client::ask(common, "POST", "/sysctl", Some(&body))? {
            Some(answer) => answer.json(),
            None => {
                let mut answer = tunable::render(&Tunables::default(), &query);
                answer.notes.push(format!(
                    "no Sluice runs as instance {}: these are the defaults",
                    common.instance
                ));
                Ok(answer)
            }
        }
    }

    fn set(self, common: &Common, form: Form) -> Result<Answer> {
        let mut assignments = Vec::new();
        let mut errors = Vec::new();
        if self.system {
            for path in drop_in_files() {
                read_file(&path, &mut assignments, &mut errors)?;
            }
        }
        if let Some(path) = &self.load {
            read_file(path, &mut assignments, &mut errors)?;
        }
        assignments.extend(self.keys);
        if assignments.is_empty() && errors.is_empty() {
            bail!("-w wants KEY=VALUE");
        }
        let body = serde_json::to_value(SysctlRequest::Write { assignments, form })?;
        let answer = client::ask(common, "POST", "/sysctl", Some(&body))?
            .ok_or_else(|| client::nobody(common))?;
        let mut answer: Answer = answer.json()?;
        errors.append(&mut answer.errors);
        Ok(Answer { errors, ..answer })
    }
}

/// The drop-in files that count, weakest first.
fn drop_in_files() -> Vec<PathBuf> {
    let entries = tunable::DIRECTORIES
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .flatten();
    tunable::select(entries.map(|entry| entry.path()))
}

/// Adds a file's assignments as they are written on a command line.
fn read_file(
    path: &PathBuf,
    assignments: &mut Vec<String>,
    errors: &mut Vec<String>,
) -> Result<()> {
    let text = match path.to_str() {
        Some("-") => {
            std::io::read_to_string(std::io::stdin()).context("read the standard input")?
        }
        _ => std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?,
    };
    let (good, bad) = tunable::parse_file(&path.to_string_lossy(), &text);
    assignments.extend(good.iter().map(as_argument));
    errors.extend(
        bad.iter()
            .map(|line| format!("{}: {}", line.origin, line.reason)),
    );
    Ok(())
}

fn as_argument(assignment: &Assignment) -> String {
    let minus = if assignment.ignore_failure { "-" } else { "" };
    format!("{minus}{}={}", assignment.key, assignment.value)
}
