//! The documents beside a synthetic model's tensors.

use serde_json::{Map, Value, json};

use super::SyntheticShape;

/// Tokens with a meaning, from id 0 on.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// The least vocabulary: the special tokens and one token for each byte.
pub(super) const LEAST_VOCABULARY: usize = SPECIAL.len() + 256;

/// Long enough for every context that benches look at; nothing else depends on it.
const MAX_POSITIONS: usize = 32_768;

/// config.json of a Llama of this shape.
pub(super) fn config(shape: &SyntheticShape) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": false,
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "quantization_config": {
            "quant_method": "exl2",
            "version": "0.3.2",
            "bits": shape.bits_per_weight,
            "head_bits": super::HEAD_BITS,
        },
    })
}

/// tokenizer_config.json.
pub(super) fn tokenizer_config() -> Value {
    json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
}

/// tokenizer.json of a byte-level vocabulary without merges, padded to `vocab_size` tokens.
pub(super) fn tokenizer_json(vocab_size: usize) -> String {
    let mut vocabulary = Map::new();
    let bytes = byte_characters();
    let known = SPECIAL.into_iter().map(str::to_owned).chain(bytes);
    for (id, token) in known.enumerate() {
        vocabulary.insert(token, json!(id));
    }
    for id in vocabulary.len()..vocab_size {
        vocabulary.insert(format!("<t{id}>"), json!(id));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        },
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": [],
        },
    })
    .to_string()
}

/// The characters that stand for the 256 bytes in byte-level vocabularies, in ascending order:
/// printable bytes of Latin-1 for themselves, the others from U+0100 on.
fn byte_characters() -> impl Iterator<Item = String> {
    let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff_u32);
    let others = 256 - printable.clone().count() as u32;
    printable
        .chain(0x100..0x100 + others)
        .filter_map(char::from_u32)
        .map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vocabulary_has_every_byte_and_every_id_once() {
        let document: Value = serde_json::from_str(&tokenizer_json(320)).unwrap();
        let vocabulary = document["model"]["vocab"].as_object().unwrap();
        let mut ids: Vec<u64> = vocabulary.values().filter_map(Value::as_u64).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..320));
        for (token, id) in [
            ("<unk>", 0),
            ("<s>", 1),
            ("</s>", 2),
            ("!", 3),
            ("<t259>", 259),
        ] {
            assert_eq!(vocabulary[token], id, "{token}");
        }
        // A space is byte 0x20, the last of the first run of those that are not printable.
        assert!(vocabulary.contains_key("\u{120}"));
        assert!(!vocabulary.contains_key(" "));
    }
}
