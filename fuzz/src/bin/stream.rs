//! A stream is the same however it was cut on its way.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| laws::stream(bytes));
