//! Log lines: level, process, message, on the standard error output, in one write each.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Lines {
    process: &'static str,
}

static KEEPER: Lines = Lines { process: "sluice" };
static DAEMON: Lines = Lines { process: "daemon" };

/// Lets `log::info!` and the like print, warnings of libraries included.
pub fn start(is_daemon: bool) {
    let lines = if is_daemon { &DAEMON } else { &KEEPER };
    if log::set_logger(lines).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("sluice") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            let line = format!("{level:<5} {}: {}\n", self.process, record.args());
            // Nobody reads it: then there is nobody to tell.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}
