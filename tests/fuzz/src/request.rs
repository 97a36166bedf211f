//! Heads of requests: parsed, written anew, parsed again.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sluice::message::fuzz::request(data));
