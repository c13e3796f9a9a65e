//! One tiny model of each family: names, values, configuration and tokenizer.
//!
//! Models, expectations and the script that made them: tests/fixtures/gguf.

use std::fs;
use std::path::{Path, PathBuf};

use oxllama_format::gguf::{GgufError, GgufModel};
use oxllama_format::import::import_gguf;
use oxllama_format::{DType, FormatError, SafetensorsDir, TensorSource};
use serde_json::Value;
use sha2::{Digest, Sha256};

const MODELS: [&str; 7] = [
    "llama", "llama3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3",
];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/gguf")
        .join(name)
}

fn fixture_json(name: &str) -> Value {
    let path = fixture(name);
    let text = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

fn open(name: &str) -> GgufModel {
    GgufModel::open(&fixture(&format!("{name}.gguf"))).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Compares every tensor with the expected shapes and hashes.
fn check_tensors(source: &dyn TensorSource, expected: &Value) {
    let expected = expected["tensors"].as_object().unwrap();
    let mut names: Vec<&String> = expected.keys().collect();
    names.sort();
    let found: Vec<&String> = source.infos().map(|info| &info.name).collect();
    assert_eq!(found, names);
    for (name, entry) in expected {
        let shape: Vec<u64> = entry[0]
            .as_array()
            .unwrap()
            .iter()
            .map(|extent| extent.as_u64().unwrap())
            .collect();
        let info = source.info(name).unwrap();
        let found: Vec<u64> = info.shape.iter().map(|&extent| extent as u64).collect();
        assert_eq!(found, shape, "{name}");
        assert_eq!(info.dtype, DType::F16, "{name}");
        let data = source.read(name).unwrap();
        assert_eq!(data.bytes.len() as u64, info.size_bytes(), "{name}");
        assert_eq!(sha256(&data.bytes), entry[1].as_str().unwrap(), "{name}");
    }
}

/// Every expected key has the expected value; numbers compare by value.
fn check_document(found: &Value, expected: &Value) {
    for (key, expected) in expected.as_object().unwrap() {
        let found = found.get(key).unwrap_or_else(|| panic!("{key} is missing"));
        match (found.as_f64(), expected.as_f64()) {
            (Some(found), Some(expected)) => assert_eq!(found, expected, "{key}"),
            _ => assert_eq!(found, expected, "{key}"),
        }
    }
}

#[test]
fn tensors_have_their_names_shapes_and_values() {
    for name in MODELS {
        check_tensors(&open(name), &fixture_json(&format!("{name}.expected.json")));
    }
}

#[test]
fn configurations_have_their_values() {
    for name in MODELS {
        let model = open(name);
        let expected = fixture_json(&format!("{name}.expected.json"));
        check_document(model.config(), &expected["config"]);
        check_document(model.tokenizer_config(), &expected["tokenizer_config"]);
        let has_scaling = expected["config"].get("rope_scaling").is_some();
        assert_eq!(
            model.config().get("rope_scaling").is_some(),
            has_scaling,
            "{name}"
        );
    }
}

#[test]
fn tokenizers_are_the_expected_documents() {
    for name in MODELS {
        let found: Value = serde_json::from_slice(&open(name).tokenizer_json().unwrap()).unwrap();
        let mut expected = fixture_json(&format!("{name}.tokenizer.json"));
        // The Python package lists added tokens in the order in which they were added.
        let added = expected["added_tokens"].as_array_mut().unwrap();
        added.sort_by_key(|token| token["id"].as_u64());
        for part in [
            "normalizer",
            "pre_tokenizer",
            "post_processor",
            "decoder",
            "added_tokens",
        ] {
            assert_eq!(found[part], expected[part], "{name}: {part}");
        }
        for part in [
            "vocab",
            "merges",
            "unk_token",
            "fuse_unk",
            "byte_fallback",
            "ignore_merges",
        ] {
            assert_eq!(
                found["model"][part], expected["model"][part],
                "{name}: model.{part}"
            );
        }
    }
}

#[test]
fn generation_ends_at_every_end_of_turn() {
    let llama3 = open("llama3");
    let tokens: Value = serde_json::from_slice(&llama3.tokenizer_json().unwrap()).unwrap();
    let vocabulary = &tokens["model"]["vocab"];
    let ends = &llama3.generation_config().unwrap()["eos_token_id"];
    assert_eq!(ends[0], vocabulary["<|end_of_text|>"]);
    assert_eq!(ends[1], vocabulary["<|eot_id|>"]);
    assert_eq!(ends.as_array().unwrap().len(), 2);
    // Where EOS itself is the end of a turn, it stands alone.
    let qwen2 = open("qwen2");
    let generation = qwen2.generation_config().unwrap();
    assert_eq!(generation["eos_token_id"], qwen2.config()["eos_token_id"]);
    assert_eq!(generation["pad_token_id"], generation["bos_token_id"]);
}

#[test]
fn an_import_holds_the_model() {
    let work = tempfile::tempdir().unwrap();
    for name in MODELS {
        let target = work.path().join(name);
        let mut calls = Vec::new();
        let source = fixture(&format!("{name}.gguf"));
        let mut progress = |done, total| calls.push((done, total));
        let summary = import_gguf(&source, &target, &mut progress).unwrap();
        let expected = fixture_json(&format!("{name}.expected.json"));
        let imported = SafetensorsDir::open(&target).unwrap();
        check_tensors(&imported, &expected);
        assert_eq!(
            summary.tensors,
            expected["tensors"].as_object().unwrap().len()
        );
        assert_eq!(summary.shards, 1);
        assert_eq!(summary.directory, target);
        assert_eq!(calls[0], (0, summary.tensor_bytes));
        assert_eq!(
            calls.last(),
            Some(&(summary.tensor_bytes, summary.tensor_bytes))
        );
        assert!(calls.is_sorted());
        let model = open(name);
        let written = |file: &str| -> Value {
            serde_json::from_slice(&fs::read(target.join(file)).unwrap()).unwrap()
        };
        assert_eq!(&written("config.json"), model.config());
        assert_eq!(&written("tokenizer_config.json"), model.tokenizer_config());
        assert_eq!(
            Some(&written("generation_config.json")),
            model.generation_config()
        );
        let tokenizer = fs::read(target.join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer, model.tokenizer_json().unwrap());
        assert_eq!(
            summary.model_type,
            expected["config"]["model_type"].as_str().unwrap()
        );
    }
    // Nothing but the seven directories is left behind.
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), MODELS.len());
}

#[test]
fn an_import_overwrites_nothing_and_leaves_no_half_directory() {
    let work = tempfile::tempdir().unwrap();
    let source = fixture("qwen2.gguf");
    let occupied = work.path().join("occupied");
    fs::create_dir(&occupied).unwrap();
    fs::write(occupied.join("mine.txt"), "mine").unwrap();
    let error = import_gguf(&source, &occupied, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
    assert_eq!(fs::read_dir(&occupied).unwrap().count(), 1);

    // An interrupted import's leftover is replaced; an empty directory gives way.
    let target = work.path().join("target");
    let partial = work.path().join("target.partial");
    fs::create_dir(&target).unwrap();
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("model.safetensors"), "half").unwrap();
    import_gguf(&source, &target, &mut |_, _| {}).unwrap();
    assert!(!partial.exists());
    assert!(SafetensorsDir::open(&target).is_ok());

    // A weight that fp16 cannot hold ends the import, and nothing is left.
    let spoiled = work.path().join("spoiled.gguf");
    fs::write(&spoiled, with_infinite_norm(&source)).unwrap();
    let target = work.path().join("spoiled");
    let error = import_gguf(&spoiled, &target, &mut |_, _| {}).unwrap_err();
    let FormatError::Gguf { path, source } = error else {
        panic!("{error}");
    };
    assert_eq!(path, spoiled);
    assert_eq!(
        source,
        GgufError::NotRepresentable {
            tensor: "model.norm.weight".to_owned(),
            index: 3,
            value: 1e6
        }
    );
    assert!(!target.exists());
    assert!(!work.path().join("spoiled.partial").exists());
}

/// The file at `path` with element 3 of the last norm set to a million.
fn with_infinite_norm(path: &Path) -> Vec<u8> {
    let model = GgufModel::open(path).unwrap();
    let norm = model.stored("model.norm.weight").unwrap();
    let data = model.file().data(norm);
    let mut bytes = fs::read(path).unwrap();
    let start = bytes
        .windows(data.len())
        .position(|window| window == data)
        .unwrap();
    bytes[start + 12..start + 16].copy_from_slice(&1e6_f32.to_le_bytes());
    bytes
}

#[test]
fn a_missing_tensor_is_named() {
    let error = open("qwen2")
        .read("model.layers.2.mlp.up_proj.weight")
        .unwrap_err();
    assert!(
        matches!(error, FormatError::MissingTensor { .. }),
        "{error}"
    );
}
