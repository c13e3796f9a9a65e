//! SmolLM2-135M, the original and its EXL2 file, against the float32 outputs of the shared
//! data.

use oxllama_backend::reference::ReferenceDevice;
use oxllama_format::ModelSource;
use oxllama_model::{ModelSpec, Runner, inspect};
use serde_json::Value;

use crate::harness::{Sequence, cpu_device, demo_model, exact_request, load, shared};

/// How far the logits of the scalar and of the fast backend may be from the golden ones.
const REFERENCE_TOLERANCE: f64 = 0.002;
const CPU_TOLERANCE: f64 = 0.02;

fn numbers(value: &Value) -> Vec<f64> {
    let items = value.as_array().expect("a list");
    items
        .iter()
        .map(|item| item.as_f64().expect("a number"))
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("a vocabulary").0 as u32
}

/// Holds a model to one set of golden outputs: the prompt's logits within `tolerance`, and
/// the first `steps` greedy tokens up to the first that is decided by less than twice that.
fn check_against_golden(mut model: impl Runner, cases: &Value, tolerance: f64, steps: usize) {
    for case in cases.as_array().expect("a list of cases") {
        let prompt = ids(&case["prompt_ids"]);
        let mut sequence = Sequence::new(&model);
        let all = sequence.feed(&mut model, &prompt);
        let vocab_size = model.spec().vocab_size;
        let mut last = all[all.len() - vocab_size..].to_vec();
        let expected = numbers(&case["next_top10_logits"]);
        for (&id, expected) in ids(&case["next_top10_ids"]).iter().zip(expected) {
            let found = f64::from(last[id as usize]);
            assert!(
                (found - expected).abs() <= tolerance,
                "{}: token {id}: {found}, golden {expected}",
                case["prompt"]
            );
        }
        let greedy = ids(&case["greedy_ids"]);
        for (step, margin) in numbers(&case["margins"])
            .into_iter()
            .enumerate()
            .take(steps)
        {
            if margin < 2.0 * tolerance {
                break;
            }
            assert_eq!(
                argmax(&last),
                greedy[step],
                "{} step {step}",
                case["prompt"]
            );
            last = sequence.feed(&mut model, &greedy[step..=step]);
        }
    }
}

fn golden() -> Option<Value> {
    let path = shared("golden/smollm2-135m.json")?;
    let text = std::fs::read_to_string(path).expect("the golden file");
    Some(serde_json::from_str(&text).expect("JSON"))
}

const EXL2: &str = "models/smollm2-135m-exl2-4.0bpw";

#[test]
fn exl2_file_matches_golden() {
    let (Some(golden), Some(path)) = (golden(), shared(EXL2)) else {
        return;
    };
    let model = load(&path, &exact_request(512), ReferenceDevice::new).model;
    check_against_golden(model, &golden["exl2_4.0bpw"], REFERENCE_TOLERANCE, 8);
}

#[test]
fn exl2_file_matches_golden_on_the_fast_backend() {
    let (Some(golden), Some(path)) = (golden(), shared(EXL2)) else {
        return;
    };
    let model = load(&path, &exact_request(512), cpu_device).model;
    check_against_golden(model, &golden["exl2_4.0bpw"], CPU_TOLERANCE, 64);
}

#[test]
fn original_matches_golden() {
    let (Some(golden), Some(path)) = (golden(), demo_model()) else {
        return;
    };
    let cases = &golden["original"];
    let model = load(&path, &exact_request(512), ReferenceDevice::new).model;
    check_against_golden(model, cases, REFERENCE_TOLERANCE, 2);
    let model = load(&path, &exact_request(512), cpu_device).model;
    check_against_golden(model, cases, CPU_TOLERANCE, 16);
}

#[test]
fn inspection_finds_the_bits_of_the_exl2_file() {
    let Some(path) = shared(EXL2) else {
        return;
    };
    let source = ModelSource::open(&path).expect("a model");
    let spec = ModelSpec::from_config(source.config()).expect("a configuration");
    let inspection = inspect(&source, &spec).expect("headers");
    // The embedding, seven linears in each of 30 layers, the quantised head.
    assert_eq!(inspection.linears.len(), 1 + 7 * 30 + 1);
    assert!((inspection.layer_bits_per_weight - 4.0).abs() < 0.1);
    let head = inspection.linears.last().expect("the head");
    assert_eq!((head.name.as_str(), head.out_features), ("lm_head", 49152));
    assert!((6.0..6.5).contains(&head.bits_per_weight));
    let stored: u64 = inspection
        .linears
        .iter()
        .map(|linear| linear.stored_bytes)
        .sum();
    let norms = 61 * 576 * 2;
    // What is left of the file is its header.
    assert!((stored + norms..stored + norms + (1 << 20)).contains(&inspection.stored_bytes));
}
