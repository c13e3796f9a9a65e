//! Parses a safetensors header. Input: 8 bytes with the length of the data, then the JSON.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use oxllama_format::SafetensorsHeader;

fuzz_target!(|input: &[u8]| {
    let Some((length, json)) = input.split_first_chunk::<8>() else {
        return;
    };
    let data_bytes = u64::from_le_bytes(*length);
    if let Ok(header) = SafetensorsHeader::parse(Path::new("fuzz"), json, data_bytes) {
        // What the reader relies on when it slices the mapped file.
        let mut position = 0;
        for entry in &header.entries {
            assert_eq!(entry.begin, position);
            assert!(entry.end >= entry.begin);
            position = entry.end;
        }
        assert_eq!(position, data_bytes);
    }
});
