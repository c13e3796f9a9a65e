//! Streamed decoding against the whole.

use std::sync::LazyLock;

use oxllama_text::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{TINY_TOKENIZERS, tiny, tiny_file};

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = tokenizer.stream_decoder(skip_special);
    let mut text = String::new();
    for &id in ids {
        text.push_str(decoder.push(id));
    }
    text.push_str(decoder.finish());
    text
}

/// Decoders that occur in tokenizer.json files, and some odd ones, over the same vocabulary.
fn decoders() -> Vec<Value> {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let fallback = json!({"type": "ByteFallback"});
    let fuse = json!({"type": "Fuse"});
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let metaspace =
        |scheme| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme});
    let pattern = json!({"type": "Replace", "pattern": {"Regex": "[ae]+"}, "content": "<>"});
    let sequence = |decoders: &[&Value]| json!({"type": "Sequence", "decoders": decoders});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true});
    vec![
        Value::Null,
        byte_level.clone(),
        metaspace("always"),
        metaspace("never"),
        sequence(&[&replace, &fallback, &fuse]),
        sequence(&[&replace, &fallback, &fuse, &strip]),
        sequence(&[&fallback, &metaspace("first")]),
        sequence(&[&fallback, &fuse, &metaspace("first")]),
        sequence(&[&fallback, &fuse, &replace, &strip]),
        sequence(&[&pattern, &fallback, &strip, &metaspace("always")]),
        sequence(&[&byte_level, &strip]),
    ]
}

/// What is compared, our tokenizer, and theirs.
type Compared = (String, Tokenizer, tokenizers::Tokenizer);

fn compared(label: String, file: &[u8]) -> Compared {
    let ours = Tokenizer::new(file, None, &Value::Null, None).expect("valid");
    (
        label,
        ours,
        tokenizers::Tokenizer::from_bytes(file).expect("valid"),
    )
}

static AS_THEY_ARE: LazyLock<Vec<Compared>> = LazyLock::new(|| {
    TINY_TOKENIZERS
        .iter()
        .map(|name| compared((*name).to_owned(), &tiny_file(name)))
        .collect()
});

static WITH_EVERY_DECODER: LazyLock<Vec<Compared>> = LazyLock::new(|| {
    let mut all = Vec::new();
    for name in ["sentencepiece", "byte_level"] {
        for decoder in decoders() {
            let mut file: Value = serde_json::from_slice(&tiny_file(name)).expect("JSON");
            file["decoder"] = decoder.clone();
            let file = serde_json::to_vec(&file).expect("serializes");
            all.push(compared(format!("{name} {decoder}"), &file));
        }
    }
    all
});

proptest! {
    /// The pieces add up to what Hugging Face tokenizers decodes from the whole list.
    #[test]
    fn stream_is_the_full_decode(
        list in prop::collection::vec(0u32..420, 0..40),
        low in prop::collection::vec(3u32..259, 0..12),
        skip_special: bool,
    ) {
        // Runs of byte tokens, ordinary tokens, unknown ids; then bytes alone.
        let mixed = [list.as_slice(), &low].concat();
        for (label, ours, theirs) in &*AS_THEY_ARE {
            for ids in [&list, &low, &mixed] {
                let expected = theirs.decode(ids, skip_special).expect("decodes");
                prop_assert_eq!(streamed(ours, ids, skip_special), expected, "{}", label);
            }
        }
    }

    #[test]
    fn stream_is_the_full_decode_for_every_decoder(
        list in prop::collection::vec(0u32..340, 0..24),
        skip_special: bool,
    ) {
        for (label, ours, theirs) in &*WITH_EVERY_DECODER {
            let expected = theirs.decode(&list, skip_special).expect("decodes");
            prop_assert_eq!(streamed(ours, &list, skip_special), expected, "{}", label);
        }
    }

    /// Text comes back whole from any tokenizer that can spell it, and no piece holds half a
    /// character.
    #[test]
    fn text_survives(input in "\\PC{0,40}") {
        for name in ["byte_level", "sentencepiece"] {
            let tokenizer = tiny(name);
            let ids = tokenizer
                .encode(&input, oxllama_text::EncodeOptions::PLAIN)
                .expect("encodes");
            // SentencePiece writes spaces as ▁, so it cannot tell the two apart.
            let expected =
                if name == "sentencepiece" { input.replace('▁', " ") } else { input.clone() };
            prop_assert_eq!(streamed(&tokenizer, &ids, true), expected, "{}", name);
        }
    }
}

#[test]
fn incomplete_characters_are_held_back() {
    let tokenizer = tiny("byte_level");
    let byte = |byte: u8| {
        (0..tokenizer.vocab_size() as u32)
            .find(|&id| tokenizer.token_bytes(id) == Some(vec![byte]))
            .expect("every byte has a token")
    };
    let mut decoder = tokenizer.stream_decoder(true);
    let crab = "🦀".as_bytes();
    for &part in &crab[..3] {
        assert_eq!(decoder.push(byte(part)), "");
    }
    assert_eq!(decoder.push(byte(crab[3])), "🦀");
    assert_eq!(decoder.push(byte(0xf0)), "");
    assert_eq!(decoder.push(byte(b'a')), "\u{fffd}a");
    assert_eq!(decoder.push(byte(0xe6)), "");
    assert_eq!(decoder.push(byte(0x97)), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
    // After the end a new text begins.
    assert_eq!(decoder.push(byte(b'x')), "x");
    assert_eq!(decoder.finish(), "");
}

#[test]
fn sentencepiece_drops_only_the_first_space() {
    let tokenizer = tiny("sentencepiece");
    let the = tokenizer.token_id("▁the").expect("known");
    let byte = |byte: u8| {
        tokenizer
            .token_id(&format!("<0x{byte:02X}>"))
            .expect("known")
    };
    let mut decoder = tokenizer.stream_decoder(true);
    assert_eq!(decoder.push(1), "", "<s> is skipped and is no first token");
    assert_eq!(decoder.push(the), "the");
    assert_eq!(decoder.push(the), " the");
    assert_eq!(decoder.push(byte(0xc3)), "");
    assert_eq!(
        decoder.push(byte(0xa9)),
        "",
        "a run of bytes is settled when it ends"
    );
    assert_eq!(decoder.push(the), "é the");
    assert_eq!(decoder.push(byte(0xc3)), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
}
