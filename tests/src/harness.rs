//! Runs the tests of one program, one after the other on the main thread, inside one sandbox.
//!
//! libtest runs tests on threads of its own, where neither mounts can be unshared nor children be tied to our life.
//! The output is libtest's, so that whoever reads one can read the other.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::sandbox::{self, Interrupt};

/// A test: its name, and what it does in the world that all tests of the program share.
pub struct Test<W> {
    pub name: &'static str,
    pub body: fn(&mut W) -> Result<()>,
}

/// The tests of a program, named after their functions.
#[macro_export]
macro_rules! tests {
    ($($name:ident),+ $(,)?) => {
        &[$($crate::harness::Test { name: stringify!($name), body: $name }),+]
    };
}

/// An error that is none: the test cannot run here, for this reason.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// After this a test counts as hung, and the program ends.
const TEST_LIMIT: Duration = Duration::from_secs(120);

/// What the arguments ask for: libtest's filters, its `--exact`, `--skip` and `--list`; its other flags change nothing here.
struct Choice {
    filters: Vec<String>,
    skipped: Vec<String>,
    exact: bool,
    list: bool,
}

#[derive(Default)]
struct Count {
    passed: u32,
    failed: u32,
    skipped: u32,
    filtered: u32,
}

/// The `main` of a test program: enters the sandbox, builds the world, runs the tests that the arguments choose.
///
/// Without root each is skipped, aloud. `failure` tells what a reader of a failure wants to know besides the error.
pub fn main<W>(build: fn() -> Result<W>, failure: fn(&W) -> String, tests: &[Test<W>]) -> ExitCode {
    let choice = Choice::read(std::env::args().skip(1));
    if choice.list {
        for test in tests {
            println!("{}: test", test.name);
        }
        return ExitCode::SUCCESS;
    }
    let chosen: Vec<&Test<W>> = tests
        .iter()
        .filter(|test| choice.takes(test.name))
        .collect();
    let mut count = Count {
        filtered: (tests.len() - chosen.len()) as u32,
        ..Count::default()
    };
    if !sandbox::may_enter() {
        println!("\nrunning {} tests", chosen.len());
        for test in &chosen {
            println!("test {} ... ignored, needs root", test.name);
            count.skipped += 1;
        }
        return count.close(Instant::now());
    }
    if let Err(error) = sandbox::enter(Interrupt::Ends) {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    println!("\nrunning {} tests", chosen.len());
    let start = Instant::now();
    match build() {
        Ok(mut world) => run(&mut world, failure, &chosen, &mut count),
        Err(error) if error.is::<Skip>() => {
            for test in &chosen {
                println!("test {} ... ignored, {error:#}", test.name);
            }
            count.skipped += chosen.len() as u32;
        }
        Err(error) => {
            eprintln!("the tests' world cannot be built: {error:#}");
            count.failed += chosen.len() as u32;
        }
    }
    count.close(start)
}

fn run<W>(world: &mut W, failure: fn(&W) -> String, tests: &[&Test<W>], count: &mut Count) {
    let watch = Watch::start();
    for test in tests {
        watch.set(Some(test.name));
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (test.body)(world)))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", words_of(&*panic))));
        watch.set(None);
        let took = start.elapsed().as_secs_f32();
        match result {
            Ok(()) => {
                count.passed += 1;
                println!("test {} ... ok ({took:.1} s)", test.name);
            }
            Err(error) if error.is::<Skip>() => {
                count.skipped += 1;
                println!("test {} ... ignored, {error:#}", test.name);
            }
            Err(error) => {
                count.failed += 1;
                println!("test {} ... FAILED ({took:.1} s)\n    {error:#}", test.name);
                println!("{}", indented(&failure(world)));
            }
        }
    }
}

impl Choice {
    fn read(arguments: impl Iterator<Item = String>) -> Self {
        let mut choice = Self {
            filters: Vec::new(),
            skipped: Vec::new(),
            exact: false,
            list: false,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--exact" => choice.exact = true,
                "--list" => choice.list = true,
                "--skip" => choice.skipped.extend(arguments.next()),
                "--test-threads" | "--format" | "--color" | "-Z" => drop(arguments.next()),
                flag if flag.starts_with('-') => {}
                _ => choice.filters.push(argument),
            }
        }
        choice
    }

    fn takes(&self, name: &str) -> bool {
        let matches = |filter: &String| {
            if self.exact {
                name == filter
            } else {
                name.contains(filter.as_str())
            }
        };
        (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skipped.iter().any(matches)
    }
}

impl Count {
    fn close(&self, start: Instant) -> ExitCode {
        let result = if self.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "\ntest result: {result}. {} passed; {} failed; {} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
            self.passed,
            self.failed,
            self.skipped,
            self.filtered,
            start.elapsed().as_secs_f32()
        );
        if self.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Ends the program when a test hangs: everything it started goes with it.
struct Watch(&'static Mutex<Option<(&'static str, Instant)>>);

impl Watch {
    fn start() -> Self {
        let current: &'static Mutex<_> = Box::leak(Box::new(Mutex::new(None)));
        thread::spawn(move || {
            loop {
                thread::sleep(Duration::from_secs(1));
                let hung = current.lock().is_ok_and(|current| {
                    current.is_some_and(|(name, since): (&str, Instant)| {
                        let hung = since.elapsed() > TEST_LIMIT;
                        if hung {
                            println!("test {name} ... FAILED, no end after {TEST_LIMIT:?}; the rest is not run");
                            println!("\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n");
                        }
                        hung
                    })
                });
                if hung {
                    std::process::exit(101);
                }
            }
        });
        Self(current)
    }

    fn set(&self, name: Option<&'static str>) {
        if let Ok(mut current) = self.0.lock() {
            *current = name.map(|name| (name, Instant::now()));
        }
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("something that is no text")
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    | {line}\n")).collect()
}
