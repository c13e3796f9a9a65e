//! A real model against its golden outputs.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use oxllama_model::Runner;
use serde_json::Value;

use crate::checks::Checks;
use crate::models::{feed, ids, load, request};

/// How far logits may be from the golden ones, which were computed in f32 from exactly decoded
/// weights.
const TOLERANCE: f64 = 0.05;

pub(crate) fn run(checks: &mut Checks<'_>, model: &Path, golden: &Path) -> Result<()> {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
    let cases = golden["exl2_4.0bpw"]
        .as_array()
        .context("no golden cases")?;
    let (device, books) = (checks.device, checks.books()?);
    for case in cases {
        let prompt = case["prompt"].as_str().unwrap_or_default();
        let name: String = prompt.chars().take(30).collect();
        checks.check(&format!("golden {name:?}"), || {
            let mut model = load(model, &request(512, 1), device, &books)?;
            against_golden(&mut model, case)
        });
    }
    Ok(())
}

/// The prompt's ten largest logits within the tolerance, and the greedy tokens as far as their
/// margins allow.
fn against_golden(model: &mut dyn Runner, case: &Value) -> Result<String> {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let numbers = |value: &Value| -> Vec<f64> {
        let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
        items.iter().map(number).collect()
    };
    let prompt = ids(&case["prompt_ids"]);
    let vocab_size = model.spec().vocab_size;
    let logits = feed(model, &prompt, 0, 0)?;
    let mut last = logits[logits.len() - vocab_size..].to_vec();
    let mut largest = 0.0_f64;
    let expected = numbers(&case["next_top10_logits"]);
    for (id, expected) in ids(&case["next_top10_ids"]).into_iter().zip(expected) {
        let difference = (f64::from(last[id as usize]) - expected).abs();
        ensure!(
            difference <= TOLERANCE,
            "token {id} differs by {difference:.3}"
        );
        largest = largest.max(difference);
    }
    let greedy = ids(&case["greedy_ids"]);
    let mut steps = 0;
    for (margin, &expected) in numbers(&case["margins"]).into_iter().zip(&greedy) {
        if margin < 2.0 * TOLERANCE {
            break;
        }
        let best = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        let best = best.map_or(0, |(id, _)| id as u32);
        ensure!(
            best == expected,
            "step {steps}: token {best}, golden {expected}"
        );
        last = feed(model, &[expected], prompt.len() + steps, 0)?;
        steps += 1;
    }
    Ok(format!("logits within {largest:.4}, {steps} greedy tokens"))
}
