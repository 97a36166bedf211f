//! Rewriting and encapsulating against the model's writing.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rig::fuzz::write(data));
