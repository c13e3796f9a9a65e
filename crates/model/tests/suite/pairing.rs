//! A draft model held against its target, from files alone.

use std::path::{Path, PathBuf};

use oxllama_format::ModelSource;
use oxllama_model::{DraftError, DraftWarning, ModelSpec, PairedModel, diagnose_draft};
use oxllama_text::Tokenizer;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::files::{Tensor, altered_copy};
use crate::harness::workspace_root;

/// Tokens of the fixture that every model here is made from.
const VOCABULARY: usize = 151;
/// Ids below this are special tokens.
const SPECIAL: usize = 4;

fn fixture() -> PathBuf {
    workspace_root().join("tests/fixtures/models/qwen2")
}

/// A tokenizer.json of `tokens`, of which the first [`SPECIAL`] are special.
fn write_tokenizer(directory: &Path, tokens: &[String]) {
    let added = tokens[..SPECIAL]
        .iter()
        .enumerate()
        .map(|(id, token)| json!({"id": id, "content": token, "special": true}));
    let vocab: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let document = json!({
        "added_tokens": added.collect::<Vec<_>>(),
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[SPECIAL]},
    });
    std::fs::write(directory.join("tokenizer.json"), document.to_string()).expect("a file");
}

fn tokens(count: usize) -> Vec<String> {
    (0..count).map(|id| format!("token{id}")).collect()
}

/// The fixture with a vocabulary, and with whatever else is changed.
fn model(
    tokens: &[String],
    config: impl FnOnce(&mut Map<String, Value>),
    tensors: impl FnOnce(&mut Vec<Tensor>),
) -> TempDir {
    let directory = altered_copy(&fixture(), config, tensors);
    write_tokenizer(directory.path(), tokens);
    directory
}

fn unchanged() -> TempDir {
    model(&tokens(VOCABULARY), |_| {}, |_| {})
}

/// The fixture's first layer alone: another model, less than half as large.
fn first_layer(tokens: &[String], config: impl FnOnce(&mut Map<String, Value>)) -> TempDir {
    let config = |map: &mut Map<String, Value>| {
        map.insert("num_hidden_layers".to_owned(), 1.into());
        config(map);
    };
    model(tokens, config, |tensors| {
        tensors.retain(|tensor| {
            !tensor.name.contains(".layers.") || tensor.name.contains(".layers.0.")
        });
    })
}

fn diagnose(target: &Path, draft: &Path) -> Result<Vec<DraftWarning>, DraftError> {
    let open = |path: &Path| {
        let source = ModelSource::open(path).expect("a model");
        let spec = ModelSpec::from_config(source.config()).expect("a known family");
        let json = source.tokenizer_json().expect("tokenizer.json");
        let tokenizer = Tokenizer::new(
            &json,
            source.tokenizer_config(),
            source.config(),
            source.generation_config(),
        );
        let tokenizer = tokenizer.expect("a tokenizer");
        drop(json);
        (source, spec, tokenizer)
    };
    let (target, draft) = (open(target), open(draft));
    diagnose_draft(paired(&target), paired(&draft))
}

fn paired((source, spec, tokenizer): &(ModelSource, ModelSpec, Tokenizer)) -> PairedModel<'_> {
    PairedModel {
        source,
        spec,
        tokenizer,
    }
}

#[test]
fn a_smaller_model_of_the_family_is_fine() {
    let (target, draft) = (unchanged(), first_layer(&tokens(VOCABULARY), |_| {}));
    let warnings = diagnose(target.path(), draft.path()).expect("a pair");
    assert_eq!(warnings, []);
}

#[test]
fn a_model_is_no_draft_of_itself() {
    let target = unchanged();
    let error = diagnose(target.path(), target.path()).expect_err("the same model");
    assert!(matches!(error, DraftError::SameFiles { .. }), "{error}");
    assert!(error.to_string().contains("n-grams"), "{error}");
}

#[cfg(unix)]
#[test]
fn links_do_not_hide_that_two_models_are_one() {
    let target = unchanged();
    let elsewhere = tempfile::tempdir().expect("a directory");
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink(target.path(), &link).expect("a link");
    let error = diagnose(target.path(), &link).expect_err("the same model");
    assert!(matches!(error, DraftError::SameFiles { .. }), "{error}");

    // As the cache of huggingface_hub has it: a directory of links to files.
    let linked = elsewhere.path().join("linked");
    std::fs::create_dir(&linked).expect("a directory");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::os::unix::fs::symlink(target.path().join(name), linked.join(name)).expect("a link");
    }
    let error = diagnose(target.path(), &linked).expect_err("the same model");
    assert!(matches!(error, DraftError::SameFiles { .. }), "{error}");
}

#[test]
fn a_copy_is_recognised() {
    let (target, copy) = (unchanged(), unchanged());
    let error = diagnose(target.path(), copy.path()).expect_err("the same weights");
    assert!(matches!(error, DraftError::SameWeights { .. }), "{error}");
}

#[test]
fn a_copy_of_a_gguf_file_is_recognised() {
    let target = workspace_root().join("tests/fixtures/gguf/llama.gguf");
    let directory = tempfile::tempdir().expect("a directory");
    let copy = directory.path().join("copy.gguf");
    std::fs::copy(&target, &copy).expect("a copy");
    let error = diagnose(&target, &copy).expect_err("the same weights");
    assert!(matches!(error, DraftError::SameWeights { .. }), "{error}");
}

#[test]
fn one_changed_weight_makes_another_model() {
    let target = unchanged();
    let changed = model(
        &tokens(VOCABULARY),
        |_| {},
        |tensors| {
            let last = tensors.last_mut().expect("a tensor");
            let bytes = last.bytes.as_mut().expect("its data");
            bytes[0] ^= 1;
        },
    );
    let warnings = diagnose(target.path(), changed.path()).expect("another model");
    assert!(
        matches!(warnings[..], [DraftWarning::NotMuchSmaller { draft, target, .. }] if draft == target),
        "{warnings:?}"
    );
}

#[test]
fn a_draft_larger_than_its_target_is_warned_of() {
    let (large, small) = (unchanged(), first_layer(&tokens(VOCABULARY), |_| {}));
    let warnings = diagnose(small.path(), large.path()).expect("a pair");
    assert!(
        matches!(warnings[..], [DraftWarning::Larger { draft, target, .. }] if draft > target),
        "{warnings:?}"
    );
}

#[test]
fn another_vocabulary_is_refused_with_its_first_token() {
    let target = unchanged();
    let mut others = tokens(VOCABULARY);
    others[1] = "a special token".to_owned();
    others[40] = "forty".to_owned();
    others[99] = "ninety-nine".to_owned();
    let draft = first_layer(&others, |_| {});
    let error = diagnose(target.path(), draft.path()).expect_err("another vocabulary");
    let DraftError::OtherVocabulary {
        first,
        differing,
        compared,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(
        (first.id, &*first.target, &*first.draft),
        (40, "token40", "forty")
    );
    assert_eq!((*differing, *compared), (3, VOCABULARY));
}

#[test]
fn renamed_special_tokens_are_warned_of() {
    let target = unchanged();
    let mut others = tokens(VOCABULARY);
    others[2] = "<|im_end|>".to_owned();
    let draft = first_layer(&others, |_| {});
    let warnings = diagnose(target.path(), draft.path()).expect("a pair");
    let [
        DraftWarning::OtherSpecialTokens {
            first, differing, ..
        },
    ] = &warnings[..]
    else {
        panic!("{warnings:?}");
    };
    assert_eq!((first.id, *differing), (2, 1));
    assert_eq!(first.draft, "<|im_end|>");
}

#[test]
fn padding_of_a_vocabulary_makes_no_difference_but_missing_tokens_do() {
    let shorter = |rows: usize| {
        model(
            &tokens(VOCABULARY - 8),
            |map| {
                map.insert("vocab_size".to_owned(), rows.into());
                map.insert("num_hidden_layers".to_owned(), 1.into());
            },
            |tensors| {
                tensors.retain(|tensor| {
                    !tensor.name.contains(".layers.") || tensor.name.contains(".layers.0.")
                });
                for tensor in tensors.iter_mut() {
                    if tensor.shape[0] == VOCABULARY {
                        tensor.shape[0] = rows;
                        let bytes = tensor.bytes.as_mut().expect("its data");
                        bytes.truncate(bytes.len() / VOCABULARY * rows);
                    }
                }
            },
        )
    };
    // The target writes no id from 143 on: the draft need not know them.
    let target = model(&tokens(VOCABULARY - 8), |_| {}, |_| {});
    let draft = shorter(VOCABULARY - 8);
    let warnings = diagnose(target.path(), draft.path()).expect("a pair");
    assert_eq!(warnings, []);

    let target = unchanged();
    let error = diagnose(target.path(), draft.path()).expect_err("tokens are missing");
    assert!(
        matches!(
            error,
            DraftError::MissingTokens {
                found: 143,
                expected: 151,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_base_model_for_a_chat_model_is_warned_of() {
    let target = unchanged();
    std::fs::write(
        target.path().join("tokenizer_config.json"),
        json!({"chat_template": "{{ messages }}"}).to_string(),
    )
    .expect("a file");
    let draft = first_layer(&tokens(VOCABULARY), |map| {
        map.insert("eos_token_id".to_owned(), 3.into());
    });
    let warnings = diagnose(target.path(), draft.path()).expect("a pair");
    assert!(
        matches!(
            &warnings[..],
            [
                DraftWarning::OtherEndTokens { draft, .. },
                DraftWarning::NoChatTemplate { .. },
            ] if *draft == [3]
        ),
        "{warnings:?}"
    );
}
