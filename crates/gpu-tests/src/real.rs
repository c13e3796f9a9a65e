//! Real weights: a cut of a model against what the CPU computed when it was made, and a whole
//! model against the CPU here and against golden outputs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use oxllama_format::{ModelSource, SafetensorsDir, TensorSource};
use oxllama_model::Runner;
use serde_json::Value;

use crate::checks::Checks;
use crate::cut;
use crate::models::{feed, ids, load, request};

/// How far logits may be from golden ones, which were computed in f32 from exactly decoded
/// weights, and from the CPU's.
const TOLERANCE: f64 = 0.05;

/// How far the distribution of the next token may be from the CPU's: mean KL in nats.
const KL_TOLERANCE: f64 = 0.002;

/// Tokens of the text that are brought in as one step; the others come one by one.
const PROMPT_TOKENS: usize = 192;

/// Tokens of the text that a whole model is tested on.
const WHOLE_TOKENS: usize = 512;

/// Real weights to test with.
#[derive(Debug, Default)]
pub(crate) struct RealModels {
    /// A folder that [`cut::make`] made.
    pub(crate) cut: Option<PathBuf>,
    pub(crate) model: Option<PathBuf>,
    /// What `model` is compared with the CPU on.
    pub(crate) text: Option<PathBuf>,
    /// Outputs of `model`.
    pub(crate) golden: Option<PathBuf>,
}

pub(crate) fn run(checks: &mut Checks<'_>, models: &RealModels) -> Result<()> {
    const CUT: &str = "real weights: a cut against the CPU's logits";
    const WHOLE: &str = "real weights: a whole model against the CPU";
    const GOLDEN: &str = "real weights: golden outputs";
    match &models.cut {
        Some(cut) => {
            let (device, books) = (checks.device, checks.books()?);
            checks.check(CUT, || {
                let (token_ids, expected) = expected_of(cut)?;
                let mut model = load(cut, &request(512, 1), device, &books)?;
                let distance = distance(&mut model, &token_ids, &expected)?;
                ensure!(
                    distance.largest <= TOLERANCE && distance.kl <= KL_TOLERANCE,
                    "{distance}"
                );
                Ok(distance.to_string())
            });
        }
        None => checks.skip(CUT, "none was given"),
    }
    match (&models.model, &models.text) {
        (Some(path), Some(text)) => {
            let (device, books) = (checks.device, checks.books()?);
            checks.check(WHOLE, || {
                let text = std::fs::read_to_string(text)?;
                let mut token_ids = cut::encode(&ModelSource::open(path)?, &text)?;
                token_ids.truncate(WHOLE_TOKENS);
                let expected = cut::on_cpu(path, &token_ids)?;
                let mut model = load(path, &request(512, 1), device, &books)?;
                let distance = distance(&mut model, &token_ids, &expected)?;
                // Among some ten million logits the largest difference says little.
                ensure!(distance.kl <= KL_TOLERANCE, "{distance}");
                Ok(distance.to_string())
            });
        }
        _ => checks.skip(WHOLE, "no model was given"),
    }
    match (&models.model, &models.golden) {
        (Some(model), Some(golden)) => against_all_golden(checks, model, golden)?,
        _ => checks.skip(GOLDEN, "none were given"),
    }
    Ok(())
}

/// The tokens of a cut's text and their logits.
fn expected_of(cut: &Path) -> Result<(Vec<u32>, Vec<f32>)> {
    let tensors = SafetensorsDir::open(cut)?;
    let words = |name: &str| -> Result<Vec<[u8; 4]>> {
        let tensor = tensors.read(name)?;
        Ok(tensor.bytes.as_chunks().0.to_vec())
    };
    let ids = words(cut::TOKEN_IDS)?;
    let logits = words(cut::LOGITS)?;
    Ok((
        ids.into_iter().map(u32::from_le_bytes).collect(),
        logits.into_iter().map(f32::from_le_bytes).collect(),
    ))
}

/// How one model's logits differ from another's.
#[derive(Debug)]
struct Distance {
    /// The largest difference of a logit.
    largest: f64,
    /// Mean KL(expected ‖ found) in nats.
    kl: f64,
    /// Rows whose most likely token is the same.
    same_best: usize,
    rows: usize,
}

impl std::fmt::Display for Distance {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            largest,
            kl,
            same_best,
            rows,
        } = self;
        write!(
            formatter,
            "logits within {largest:.4}, KL {kl:.6}, the same token first in {same_best} of {rows}"
        )
    }
}

/// Runs a text, the first part of it at once and the rest token by token.
fn distance(model: &mut dyn Runner, token_ids: &[u32], expected: &[f32]) -> Result<Distance> {
    let (prompt, rest) = token_ids.split_at(PROMPT_TOKENS.min(token_ids.len()));
    let mut found = feed(model, prompt, 0, 0)?;
    for (index, &token) in rest.iter().enumerate() {
        found.extend(feed(model, &[token], prompt.len() + index, 0)?);
    }
    distance_of(&found, expected, model.spec().vocab_size)
}

fn distance_of(found: &[f32], expected: &[f32], vocab_size: usize) -> Result<Distance> {
    ensure!(
        !found.is_empty() && found.len() == expected.len(),
        "{} logits, expected {}",
        found.len(),
        expected.len()
    );
    ensure!(
        found.iter().all(|x| x.is_finite()),
        "some logit is no number"
    );
    let mut distance = Distance {
        largest: 0.0,
        kl: 0.0,
        same_best: 0,
        rows: found.len() / vocab_size,
    };
    let rows = found
        .chunks_exact(vocab_size)
        .zip(expected.chunks_exact(vocab_size));
    for (found, expected) in rows {
        let (found_sum, expected_sum) = (log_sum(found), log_sum(expected));
        for (&found, &expected) in found.iter().zip(expected) {
            let (found, expected) = (f64::from(found), f64::from(expected));
            distance.largest = distance.largest.max((found - expected).abs());
            let (log_found, log_expected) = (found - found_sum, expected - expected_sum);
            distance.kl += log_expected.exp() * (log_expected - log_found);
        }
        distance.same_best += usize::from(best(found) == best(expected));
    }
    distance.kl /= distance.rows as f64;
    Ok(distance)
}

/// ln Σ exp(x)
fn log_sum(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let terms = logits.iter().map(|&x| (f64::from(x) - largest).exp());
    largest + terms.sum::<f64>().ln()
}

/// The place of the largest.
fn best(logits: &[f32]) -> usize {
    let best = logits
        .iter()
        .enumerate()
        .max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(index, _)| index)
}

fn against_all_golden(checks: &mut Checks<'_>, model: &Path, golden: &Path) -> Result<()> {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden)?)?;
    let cases = golden["exl2_4.0bpw"]
        .as_array()
        .context("no golden cases")?;
    let (device, books) = (checks.device, checks.books()?);
    for case in cases {
        let prompt = case["prompt"].as_str().unwrap_or_default();
        let name: String = prompt.chars().take(30).collect();
        checks.check(&format!("real weights: golden {name:?}"), || {
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
        let best = best(&last) as u32;
        ensure!(
            best == expected,
            "step {steps}: token {best}, golden {expected}"
        );
        last = feed(model, &[expected], prompt.len() + steps, 0)?;
        steps += 1;
    }
    Ok(format!("logits within {largest:.4}, {steps} greedy tokens"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_distributions() {
        // Halves, and then a quarter and three quarters.
        let (even, uneven) = ([1.0, 1.0], [0.0, 3.0_f32.ln()]);
        let found = [even, even].concat();
        let expected = [even, uneven].concat();
        let distance = distance_of(&found, &expected, 2).unwrap();
        let kl = 0.25 * 0.5_f64.ln() + 0.75 * 1.5_f64.ln();
        assert!((distance.kl - kl / 2.0).abs() < 1e-7, "{distance}");
        assert!((distance.largest - 1.0).abs() < 1e-7, "{distance}");
        assert_eq!(distance.rows, 2);
        assert!(distance_of(&found, &expected[..2], 2).is_err());
        assert!(distance_of(&[f32::NAN, 1.0], &even, 2).is_err());
    }
}
