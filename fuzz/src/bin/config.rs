//! No text of a file, a variable or an argument brings the reader of the configuration down.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| laws::config(bytes));
