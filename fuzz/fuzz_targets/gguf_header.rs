//! Parses a GGUF header.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oxllama_format::gguf::GgufHeader;

fuzz_target!(|input: &[u8]| {
    let Ok(header) = GgufHeader::parse(input) else {
        return;
    };
    for tensor in &header.tensors {
        // Every tensor's data must lie in the file.
        assert!(tensor.size_bytes <= input.len());
        assert!(tensor.elements() as u64 <= 8 * input.len() as u64);
    }
});
