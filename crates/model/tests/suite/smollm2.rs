//! SmolLM2-135M against the float32 outputs of the shared data: the EXL2 file, and the
//! original where a converted copy of it is at hand.

use std::path::Path;

use oxllama_model::Runner;
use serde_json::Value;

use crate::harness::{Sequence, exact_request, load, shared};

/// How far the reference backend's logits may be from the golden ones.
const TOLERANCE: f64 = 0.002;

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

/// Holds the model at `path` to one set of golden outputs.
fn check_against_golden(path: &Path, cases: &Value, steps: usize) {
    let mut model = load(path, &exact_request(512)).model;
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
                (found - expected).abs() <= TOLERANCE,
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
            if margin < 2.0 * TOLERANCE {
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

#[test]
fn exl2_file_matches_golden() {
    let (Some(golden), Some(model)) = (golden(), shared("models/smollm2-135m-exl2-4.0bpw")) else {
        return;
    };
    check_against_golden(&model, &golden["exl2_4.0bpw"], 8);
}
