//! Chunked bodies, in pieces of all sizes, beside a reader written from the grammar.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| sluice::codec::h1::fuzz::chunked(data));
