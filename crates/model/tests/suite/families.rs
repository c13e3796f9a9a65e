//! Every family against Hugging Face transformers: tiny random models with all of a family's
//! features, their logits computed in float32 (see tests/fixtures/README.md).

use std::path::{Path, PathBuf};

use oxllama_backend::Device;
use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::{SafetensorsDir, TensorSource};
use oxllama_memory::DeviceId;
use oxllama_model::Runner;
use serde_json::Value;

use crate::harness::{Sequence, cpu_device, exact_request, load, workspace_root};

/// Largest difference of a logit; they spread over about 2.
const REFERENCE_TOLERANCE: f32 = 1e-4;
const CPU_TOLERANCE: f32 = 1e-3;

/// The fixture of this name.
pub(crate) fn fixture(name: &str) -> PathBuf {
    workspace_root().join("tests/fixtures/models").join(name)
}

/// Every fixture.
pub(crate) fn fixtures() -> Vec<PathBuf> {
    let root = workspace_root().join("tests/fixtures/models");
    let entries = std::fs::read_dir(root).expect("the fixtures");
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    paths.sort();
    paths
}

/// A tensor of the expected logits, which lie in a file of the model's own directory.
fn expected(path: &Path, name: &str) -> Vec<f32> {
    let tensors = SafetensorsDir::open(path).expect("the fixture's tensors");
    let tensor = tensors.read(name).expect("expected logits");
    let (values, rest) = tensor.bytes.as_chunks();
    assert!(rest.is_empty());
    values
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    let items = value.as_array().expect("a list");
    let id = |item: &Value| item.as_u64().expect("a token id") as u32;
    items.iter().map(id).collect()
}

pub(crate) fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// The largest error of any case, prompt at once and step by step.
fn largest_error<D: Device>(path: &Path, device: fn(DeviceId) -> D) -> f32 {
    let cases = std::fs::read_to_string(path.join("cases.json")).expect("cases.json");
    let cases: Value = serde_json::from_str(&cases).expect("JSON");
    let mut largest = 0.0f32;
    for case in cases["cases"].as_array().expect("a list of cases") {
        let name = case["name"].as_str().expect("a name");
        let context = case["planned_context"].as_u64().expect("a context");
        let (prompt, steps) = (ids(&case["prompt_ids"]), ids(&case["step_ids"]));
        let prompt_logits = expected(path, &format!("{name}.prompt_logits"));
        let step_logits = expected(path, &format!("{name}.step_logits"));
        let mut model = load(path, &exact_request(context), device).model;

        let mut sequence = Sequence::new(&model);
        let mut found = sequence.feed(&mut model, &prompt);
        largest = largest.max(worst(&found, &prompt_logits));
        found.clear();
        for step in &steps {
            found.extend(sequence.feed(&mut model, &[*step]));
        }
        largest = largest.max(worst(&found, &step_logits));

        // Everything token by token: the same bits as at once.
        let mut sequence = Sequence::new(&model);
        let at_once = Sequence::new(&model).feed(&mut model, &prompt);
        let mut one_by_one = Vec::new();
        for token in &prompt {
            one_by_one.extend(sequence.feed(&mut model, &[*token]));
        }
        assert_eq!(at_once, one_by_one, "{} {name}", path.display());
        assert_eq!(model.limits().context_tokens as u64, context);
    }
    largest
}

/// Every fixture on one backend.
fn check_all<D: Device>(device: fn(DeviceId) -> D, tolerance: f32) {
    let fixtures = fixtures();
    assert!(fixtures.len() >= 12, "{} fixtures", fixtures.len());
    let errors: Vec<(String, f32)> = fixtures
        .iter()
        .map(|path| {
            let name = path.file_name().expect("a name").to_string_lossy();
            (name.into_owned(), largest_error(path, device))
        })
        .collect();
    let failed: Vec<_> = errors
        .iter()
        .filter(|(_, error)| error.is_nan() || *error > tolerance)
        .collect();
    assert!(
        failed.is_empty(),
        "above {tolerance}: {failed:?}; all: {errors:?}"
    );
}

#[test]
fn every_family_agrees_with_transformers() {
    check_all(ReferenceDevice::new, REFERENCE_TOLERANCE);
}

#[test]
fn every_family_agrees_with_transformers_on_the_fast_backend() {
    check_all(cpu_device, CPU_TOLERANCE);
}
