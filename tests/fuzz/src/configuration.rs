//! Configurations: taken, or told what is wrong and where.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sluice::config::fuzz::configuration(data));
