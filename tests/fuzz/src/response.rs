//! Heads of responses: parsed, written for the client, parsed again.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sluice::message::fuzz::response(data));
