//! Malformed tokenizer.json files: an error that says what is wrong, never a panic.

use oxllama_text::{EncodeOptions, TextError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{TINY_TOKENIZERS, tiny_file};

fn load(file: &Value) -> Result<Tokenizer, TextError> {
    let bytes = serde_json::to_vec(file).expect("serializes");
    Tokenizer::new(&bytes, None, &Value::Null, None)
}

fn file(name: &str) -> Value {
    serde_json::from_slice(&tiny_file(name)).expect("JSON")
}

fn refused(file: &Value) -> TextError {
    load(file).expect_err("the file is refused")
}

#[test]
fn truncated_files_are_refused() {
    for name in TINY_TOKENIZERS {
        let bytes = tiny_file(name);
        for length in (0..bytes.len() - 1).step_by(7) {
            let loaded = Tokenizer::new(&bytes[..length], None, &Value::Null, None);
            assert!(
                matches!(loaded, Err(TextError::TokenizerJson { .. })),
                "{name} {length}"
            );
        }
    }
}

#[test]
fn invalid_utf8_is_refused() {
    let mut bytes = tiny_file("byte_level");
    let place = bytes
        .windows(5)
        .position(|window| window == b"model")
        .expect("found");
    bytes[place + 20] = 0xff;
    let loaded = Tokenizer::new(&bytes, None, &Value::Null, None);
    assert!(matches!(loaded, Err(TextError::TokenizerJson { .. })));
}

#[test]
fn vocabularies_with_holes_work() {
    let mut file = file("byte_level");
    let vocab = file["model"]["vocab"].as_object_mut().expect("a map");
    vocab.insert("hole".to_owned(), json!(5_000));
    let tokenizer = load(&file).expect("valid");
    assert_eq!(tokenizer.vocab_size(), 5_001);
    assert_eq!(tokenizer.token_text(4_000), None);
    assert_eq!(tokenizer.decode(&[4_000, 5_000, u32::MAX], false), "hole");
}

#[test]
fn added_tokens_keep_their_declared_ids() {
    let mut file = file("byte_level");
    let token = json!({"id": 900, "content": "<|late|>", "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false, "special": true});
    file["added_tokens"]
        .as_array_mut()
        .expect("a list")
        .push(token);
    let tokenizer = load(&file).expect("valid");
    assert_eq!(
        tokenizer.encode("<|late|>", EncodeOptions::CHAT),
        Ok(vec![900])
    );
    assert_eq!(tokenizer.vocab_size(), 901);
}

#[test]
fn absurd_ids_are_refused() {
    for id in [json!(u32::MAX), json!(u64::MAX), json!(1 << 24)] {
        let mut added = file("byte_level");
        added["added_tokens"][0]["id"] = id.clone();
        assert!(
            matches!(refused(&added), TextError::TokenIdOutOfRange { .. }),
            "{id}"
        );
    }
    let mut vocab = file("byte_level");
    vocab["model"]["vocab"]["x-absurd"] = json!(4_000_000_000u32);
    assert!(matches!(
        refused(&vocab),
        TextError::TokenIdOutOfRange { .. }
    ));
    for id in [json!(-1), json!(1.5), json!("1")] {
        let mut vocab = file("byte_level");
        vocab["model"]["vocab"]["x-absurd"] = id;
        assert!(matches!(refused(&vocab), TextError::TokenizerJson { .. }));
    }
}

#[test]
fn contradicting_ids_are_refused() {
    let mut twice = file("byte_level");
    let token = json!({"id": 40, "content": "<|other|>", "special": true});
    twice["added_tokens"]
        .as_array_mut()
        .expect("a list")
        .push(token);
    assert!(matches!(
        refused(&twice),
        TextError::TokenIdTwice { id: 40, .. }
    ));
    let mut moved = file("byte_level");
    moved["added_tokens"][0]["id"] = json!(30);
    assert!(matches!(
        refused(&moved),
        TextError::TokenizerInconsistent { .. }
    ));
}

#[test]
fn bad_merges_are_refused() {
    let long = "x".repeat(500);
    for merge in [
        json!(["nosuch", "token"]),
        json!([long, long]),
        json!("a b c"),
        json!(["a"]),
        json!(3),
    ] {
        let mut file = file("byte_level");
        file["model"]["merges"]
            .as_array_mut()
            .expect("a list")
            .push(merge.clone());
        let error = refused(&file);
        assert!(
            matches!(
                error,
                TextError::TokenizerInconsistent { .. } | TextError::TokenizerJson { .. }
            ),
            "{merge} {error}"
        );
    }
    // Two known tokens whose union is longer than any token.
    let mut joined = file("byte_level");
    let vocab = joined["model"]["vocab"].as_object().expect("a map");
    let longest = vocab
        .keys()
        .max_by_key(|token| token.len())
        .expect("not empty")
        .clone();
    joined["model"]["merges"]
        .as_array_mut()
        .expect("a list")
        .push(json!([longest.clone(), longest]));
    assert!(matches!(
        refused(&joined),
        TextError::TokenizerInconsistent { .. }
    ));
    let mut prefixed = file("byte_level");
    prefixed["model"]["continuing_subword_prefix"] = json!("##########");
    assert!(matches!(
        refused(&prefixed),
        TextError::TokenizerInconsistent { .. }
    ));
}

#[test]
fn old_merges_of_one_string_work() {
    let mut file = file("byte_level");
    for merge in file["model"]["merges"].as_array_mut().expect("a list") {
        *merge = format!(
            "{} {}",
            merge[0].as_str().unwrap(),
            merge[1].as_str().unwrap()
        )
        .into();
    }
    let options = EncodeOptions::PROMPT;
    let expected = crate::tiny("byte_level")
        .encode("the cat sat", options)
        .expect("encodes");
    assert_eq!(
        load(&file).expect("valid").encode("the cat sat", options),
        Ok(expected)
    );
}

#[test]
fn unknown_parts_are_named() {
    for (part, value) in [
        (
            "decoder",
            json!({"type": "CTC", "pad_token": "", "word_delimiter_token": ""}),
        ),
        (
            "decoder",
            json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
        ),
        ("decoder", json!([1, 2])),
        ("model", json!({"type": "WordPiece", "vocab": {}})),
    ] {
        let mut file = file("byte_level");
        file[part] = value;
        let error = refused(&file);
        assert!(
            matches!(error, TextError::UnsupportedPart { .. }),
            "{error}"
        );
    }
    for (part, value) in [
        ("normalizer", json!({"type": "NoSuch"})),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false}),
        ),
        ("normalizer", json!(7)),
        (
            "post_processor",
            json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]}),
        ),
        ("model", json!({"type": "Unigram", "vocab": {"a": 9}})),
        (
            "model",
            json!({"type": "Unigram", "vocab": [], "unk_id": 3}),
        ),
        ("model", json!({"type": "BPE", "vocab": {"a": 9}})),
        ("model", json!(null)),
    ] {
        let mut file = file("byte_level");
        file[part] = value.clone();
        let error = refused(&file);
        assert!(
            matches!(
                error,
                TextError::TokenizerInconsistent { .. } | TextError::TokenizerJson { .. }
            ),
            "{part} {value} {error}"
        );
    }
}

#[test]
fn truncation_and_padding_left_in_the_file_are_ignored() {
    let mut file = file("byte_level");
    file["truncation"] = json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0,
                                "direction": "Right"});
    file["padding"] = json!({"strategy": {"Fixed": 100}, "direction": "Right", "pad_id": 0,
                             "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": null});
    let options = EncodeOptions::PROMPT;
    let expected = crate::tiny("byte_level")
        .encode("the cat sat", options)
        .expect("encodes");
    assert_eq!(
        load(&file).expect("valid").encode("the cat sat", options),
        Ok(expected)
    );
}

#[test]
fn tokens_beyond_the_model_are_refused() {
    let config = json!({"vocab_size": 100});
    let tokenizer = Tokenizer::new(&tiny_file("byte_level"), None, &config, None).expect("valid");
    let error = tokenizer
        .encode("the cat", EncodeOptions::PROMPT)
        .expect_err("beyond 100");
    assert!(
        matches!(
            error,
            TextError::TokenBeyondModel {
                vocab_size: 100,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn id_fields_of_a_wrong_type_are_named() {
    for wrong in [
        json!("2"),
        json!([1, null]),
        json!({"id": 2}),
        json!(1.5),
        json!(true),
    ] {
        let config = json!({"eos_token_id": wrong});
        let loaded = Tokenizer::new(&tiny_file("byte_level"), None, &config, None);
        assert!(
            matches!(
                loaded,
                Err(TextError::ConfigField {
                    field: "eos_token_id",
                    ..
                })
            ),
            "{wrong}"
        );
    }
}

proptest! {
    /// Any byte of the file may be wrong.
    #[test]
    fn damaged_files_never_panic(
        name in prop::sample::select(TINY_TOKENIZERS.to_vec()),
        place: prop::sample::Index,
        byte: u8,
    ) {
        let mut bytes = tiny_file(name);
        let place = place.index(bytes.len());
        bytes[place] = byte;
        if let Ok(tokenizer) = Tokenizer::new(&bytes, None, &Value::Null, None) {
            let ids = tokenizer.encode("the cat </s>", EncodeOptions::PROMPT);
            tokenizer.decode(&ids.unwrap_or_default(), false);
        }
    }
}
