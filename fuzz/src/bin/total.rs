//! What a topic of totals holds is of its kind and adds up, or is left out.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    laws::total(bytes);
});
