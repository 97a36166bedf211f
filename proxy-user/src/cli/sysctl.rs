//! `sluice sysctl`: tunables, asked for as sysctl(8) asks for the kernel's.

use std::process::ExitCode;

use crate::tunable::{Form, Query, Tunables, render};

#[derive(clap::Args)]
pub struct Arguments {
    /// Every key
    #[arg(short = 'a', long)]
    all: bool,
    /// Values only
    #[arg(short = 'n', long)]
    values: bool,
    /// Names only
    #[arg(short = 'N', long, conflicts_with = "values")]
    names: bool,
    /// Only keys that match this regular expression
    #[arg(short = 'r', long, value_name = "REGEX")]
    pattern: Option<String>,
    /// With default, range, class, origin and help
    #[arg(long, conflicts_with_all = ["values", "names"])]
    long: bool,
    /// One JSON array with all of that
    #[arg(long, conflicts_with_all = ["values", "names", "long"])]
    json: bool,
    /// Keys; the name of an area stands for all in it
    keys: Vec<String>,
}

/// Prints the defaults; 1 when a key is unknown.
pub fn run(arguments: Arguments) -> ExitCode {
    let form = match arguments {
        Arguments { json: true, .. } => Form::Json,
        Arguments { long: true, .. } => Form::Long,
        Arguments { names: true, .. } => Form::Names,
        Arguments { values: true, .. } => Form::Values,
        _ => Form::Pairs,
    };
    let answer = render(
        &Tunables::default(),
        &Query {
            all: arguments.all,
            keys: arguments.keys,
            pattern: arguments.pattern,
            form,
        },
    );
    print!("{}", answer.text);
    for line in answer.notes.iter().chain(&answer.errors) {
        eprintln!("sluice: {line}");
    }
    ExitCode::from(u8::from(!answer.errors.is_empty()))
}
