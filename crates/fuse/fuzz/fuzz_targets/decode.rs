//! No message from the kernel and no saved parameters make a decoder panic or read out of bounds.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lazarette_fuse::operation::decode(bytes));
