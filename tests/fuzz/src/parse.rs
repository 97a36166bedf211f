//! The parser against the model's reading.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rig::fuzz::parse(data));
