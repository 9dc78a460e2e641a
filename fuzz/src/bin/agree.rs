//! The fast path and the plain grammar read any datagram alike.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| laws::agree(bytes));
