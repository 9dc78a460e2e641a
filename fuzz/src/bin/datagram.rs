//! Any datagram is accounted for, its lines do not meddle with each other, and its samples are read back as printed.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| laws::datagram(bytes));
