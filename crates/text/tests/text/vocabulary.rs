//! Tokens by their bytes, and token healing.

use oxllama_text::{EncodeOptions, Healing, Tokenizer, VocabularyIndex};
use proptest::prelude::*;

use crate::{TINY_TOKENIZERS, shared, tiny};

fn naive<'a>(tokenizer: &'a Tokenizer, prefix: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
    (0..tokenizer.vocab_size() as u32).filter(move |&id| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        !tokenizer.is_special(id) && !bytes.is_empty() && bytes.starts_with(prefix)
    })
}

fn check_prefix(tokenizer: &Tokenizer, index: &VocabularyIndex, prefix: &[u8]) {
    let found: Vec<u32> = index.tokens_with_prefix(prefix).collect();
    assert!(
        found.is_sorted_by_key(|&id| (index.token_bytes(id), id)),
        "{found:?}"
    );
    let mut by_id = found;
    by_id.sort_unstable();
    assert!(by_id.iter().copied().eq(naive(tokenizer, prefix)));
}

#[test]
fn prefixes_find_what_a_naive_search_finds() {
    for name in TINY_TOKENIZERS {
        let tokenizer = tiny(name);
        let index = VocabularyIndex::new(&tokenizer);
        assert_eq!(index.vocab_size(), tokenizer.vocab_size());
        for id in 0..tokenizer.vocab_size() as u32 {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            assert_eq!(index.token_bytes(id), bytes);
            assert_eq!(index.is_special(id), tokenizer.is_special(id));
            check_prefix(&tokenizer, &index, &bytes);
            check_prefix(&tokenizer, &index, &bytes[..bytes.len() / 2]);
        }
        assert!(index.token_bytes(u32::MAX).is_empty() && !index.is_special(u32::MAX));
    }
}

proptest! {
    #[test]
    fn any_prefix_finds_what_a_naive_search_finds(prefix in "[ a-zéà日<>|]{0,3}") {
        let tokenizer = tiny("byte_level");
        let index = VocabularyIndex::new(&tokenizer);
        check_prefix(&tokenizer, &index, prefix.as_bytes());
    }
}

fn heal(tokenizer: &Tokenizer, tokens: &[&str]) -> Option<Healing> {
    let ids: Vec<u32> = tokens
        .iter()
        .map(|token| tokenizer.token_id(token).expect("it is in the vocabulary"))
        .collect();
    VocabularyIndex::new(tokenizer).heal(&ids)
}

#[test]
fn prompts_that_end_inside_a_word_are_healed() {
    let tokenizer = tiny("byte_level");
    let healing = |kept_tokens, prefix: &str| {
        Some(Healing {
            kept_tokens,
            prefix: prefix.as_bytes().to_vec(),
        })
    };
    assert_eq!(heal(&tokenizer, &["<|bos|>", "Ġ"]), healing(1, " "));
    assert_eq!(heal(&tokenizer, &["once", "Ġupon", "Ġt"]), healing(2, " t"));
    assert_eq!(
        heal(&tokenizer, &["h", "e"]),
        None,
        "the longer ones of `e` are missing"
    );
    assert_eq!(
        heal(&tokenizer, &["once", "Ġupon"]),
        None,
        "nothing is longer"
    );
    assert_eq!(heal(&tokenizer, &["Ġt"]), None, "the only token");
    assert_eq!(heal(&tokenizer, &[]), None);
    assert_eq!(heal(&tokenizer, &["once", "<|im_end|>"]), None, "special");
    assert_eq!(
        heal(&tokenizer, &["once", "æ"]),
        None,
        "part of a character"
    );
}

#[test]
fn a_real_vocabulary_heals_a_url() {
    let Some(file) = shared("models/smollm2-135m-exl2-4.0bpw/tokenizer.json") else {
        return;
    };
    let tokenizer = Tokenizer::new(&file, None, &serde_json::Value::Null, None).expect("valid");
    let index = VocabularyIndex::new(&tokenizer);
    let prompt = "The address is http:";
    let ids = tokenizer
        .encode(prompt, EncodeOptions::PLAIN)
        .expect("plain text");
    let healing = index.heal(&ids).expect("a colon may become ://");
    assert_eq!(
        healing,
        Healing {
            kept_tokens: ids.len() - 1,
            prefix: b":".to_vec()
        }
    );
    let slashes = tokenizer.token_id("://").expect("the vocabulary has it");
    assert!(
        index
            .tokens_with_prefix(&healing.prefix)
            .any(|id| id == slashes)
    );
}

#[test]
fn a_continuation_gets_no_space_in_front() {
    for name in TINY_TOKENIZERS {
        let tokenizer = tiny(name);
        for text in ["hello", " hello", "he", " the cat", "<s>"] {
            let ids = tokenizer.encode_continuation(text).expect("plain text");
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|&id| tokenizer.token_bytes(id).unwrap_or_default())
                .collect();
            assert_eq!(bytes, text.as_bytes(), "{name}: {ids:?}");
        }
    }
}
