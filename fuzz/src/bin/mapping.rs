//! No text of a mapping file and no name bring the rules down.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| laws::mapping(bytes));
