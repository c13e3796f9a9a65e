//! Greedy text of the real model against the float32 reference outputs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::Oxllama;
use crate::support::{ids, json, shared, skipped};

/// How far the fast backend's logits may be off. A choice with twice this margin is certain.
const TOLERANCE: f64 = 0.02;

/// End of sequence in this vocabulary.
const EOS: u64 = 2;

/// Runs every prompt of one section through `model` and compares token by token.
fn greedy_continuations_agree(section: &str, model: &Path) {
    let Some(golden) = shared("golden/smollm2-135m.json") else {
        return;
    };
    let golden: Value = serde_json::from_str(&fs::read_to_string(golden).unwrap()).unwrap();
    let cases = golden[section].as_array().unwrap();
    assert_eq!(cases.len(), 6);
    for case in cases {
        compare(case, model);
    }
}

fn compare(case: &Value, model: &Path) {
    let prompt = case["prompt"].as_str().unwrap();
    let output = Oxllama::new()
        .arg("generate")
        .arg(model)
        .args(["--greedy", "--json", "--max-tokens", "64"])
        .args(["--context", "256", "--prompt", prompt])
        .run()
        .succeeded();
    let answer = json(&output);
    assert_eq!(answer["prompt_token_ids"], case["prompt_ids"], "{prompt:?}");

    let golden_ids = ids(&case["greedy_ids"]);
    let margins = case["margins"].as_array().unwrap();
    let ends = golden_ids.iter().position(|&id| id == EOS);
    let uncertain = margins
        .iter()
        .position(|margin| margin.as_f64().unwrap() < 2.0 * TOLERANCE);
    let token_ids = ids(&answer["token_ids"]);
    assert!(!token_ids.contains(&EOS), "{token_ids:?}");
    let certain = uncertain
        .unwrap_or(usize::MAX)
        .min(ends.unwrap_or(golden_ids.len()));
    assert!(certain > 0);
    assert_eq!(
        token_ids.get(..certain),
        Some(&golden_ids[..certain]),
        "{prompt:?}"
    );
    match (uncertain, ends) {
        (None, None) => {
            assert_eq!(answer["text"], case["greedy_text"]);
            assert_eq!(answer["finish_reason"], "length");
        }
        (uncertain, Some(end)) if uncertain.is_none_or(|step| step > end) => {
            assert_eq!(token_ids.len(), end, "{prompt:?}");
            assert_eq!(answer["finish_reason"], "stop");
        }
        _ => {}
    }
}

#[test]
fn the_exl2_model_continues_as_the_reference_does() {
    if let Some(model) = shared("models/smollm2-135m-exl2-4.0bpw") {
        greedy_continuations_agree("exl2_4.0bpw", &model);
    }
}

#[test]
fn the_original_continues_as_the_reference_does() {
    match cached_demo_model() {
        Some(model) => greedy_continuations_agree("original", &model),
        None => skipped("smollm2-135m is not in the cache: `oxllama pull smollm2-135m` first"),
    }
}

/// The demo model in the cache of whoever runs the tests, found as the program finds it.
fn cached_demo_model() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let mut pull = Oxllama::new().args(["pull", "--offline", "smollm2-135m"]);
    for name in ["HOME", "XDG_CACHE_HOME", "OXLLAMA_CACHE"] {
        if let Some(value) = variable(name) {
            pull = pull.env(name, value);
        }
    }
    let output = pull.run();
    (output.code == 0).then(|| PathBuf::from(output.stdout.trim()))
}
