//! Parses a JSON document and takes values of every type out of it.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use oxllama_format::{ConfigView, GptqConfig, parse_json_object};

/// Keys of every type, nested ones included.
const KEYS: [&str; 8] = [
    "architectures",
    "eos_token_id",
    "hidden_size",
    "model_type",
    "rms_norm_eps",
    "rope_scaling.factor",
    "rope_scaling.long_factor",
    "tie_word_embeddings",
];

fuzz_target!(|input: &[u8]| {
    let path = Path::new("config.json");
    let Ok(document) = parse_json_object(path, input) else {
        return;
    };
    let config = ConfigView::new(&document, path);
    for key in KEYS {
        // Values and errors alike must come without a panic; the messages are made as well.
        let failures = [
            config.usize(key).err(),
            config.f64(key).err(),
            config.bool_or(key, false).err(),
            config.str(key).err(),
            config.optional_f64_list(key).err(),
            config.optional_str_list(key).err(),
            config.token_ids(key).err(),
        ];
        for error in failures.into_iter().flatten() {
            assert!(error.to_string().len() < 1000);
        }
    }
    let _ = GptqConfig::from_config(&document, path);
});
