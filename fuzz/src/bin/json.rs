//! Of any HTTP body each record is accepted or rejected, and its samples are read back as printed.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| laws::json(bytes));
