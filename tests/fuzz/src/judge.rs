//! Packets one after the other through the model.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rig::fuzz::judge(data));
