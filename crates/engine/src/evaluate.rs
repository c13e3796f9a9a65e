//! Quality of a model on a text: perplexity, and distance from a reference model.

use oxllama_backend::PAGE_TOKENS;
use oxllama_model::{Runner, StepPlan};
use serde::Serialize;

use crate::EngineError;

/// Result of [`evaluate`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Rows evaluated.
    pub rows: usize,
    /// Tokens of each.
    pub length: usize,
    /// exp of the mean negative log probability of tokens 1.. of each row.
    pub perplexity: f64,
    /// Distance from the reference, if there was one.
    pub comparison: Option<Comparison>,
}

/// Distance from a reference model, over all positions of all rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// Mean KL(reference ‖ model) in nats.
    pub kl: f64,
    /// Share of positions where both find the same token most likely.
    pub top1: f64,
    /// The reference's own perplexity.
    pub reference_perplexity: f64,
}

/// Evaluates `runner` on the first `rows` rows of `length` tokens of `token_ids`.
///
/// Each row stands by itself, with no token added. Rows are run in chunks of as many tokens
/// as both runners give logits for at once. `on_row` is called after each row with its
/// number and the perplexity so far.
///
/// # Errors
/// The text is too short for that many rows, a row is shorter than 2 tokens or longer than
/// the context, the vocabularies differ, or a model fails.
pub fn evaluate(
    runner: &mut dyn Runner,
    mut reference: Option<&mut dyn Runner>,
    token_ids: &[u32],
    rows: usize,
    length: usize,
    on_row: &mut dyn FnMut(usize, f64),
) -> Result<Evaluation, EngineError> {
    check(runner, reference.as_deref(), token_ids, rows, length)?;
    let chunk = reference
        .as_deref()
        .map_or(usize::MAX, chunk_tokens)
        .min(chunk_tokens(runner));
    let vocab_size = runner.spec().vocab_size;
    let mut sums = Sums::default();
    let mut reference_sums = Sums::default();
    let mut reference_log_probs = vec![0f32; if reference.is_some() { vocab_size } else { 0 }];
    let mut log_probs = vec![0f32; vocab_size];
    for (row, row_ids) in token_ids.chunks_exact(length).take(rows).enumerate() {
        for first in (0..length).step_by(chunk) {
            let end = (first + chunk).min(length);
            let logits = run_chunk(runner, &row_ids[first..end], first)?;
            let reference_logits = match &mut reference {
                Some(reference) => Some(run_chunk(*reference, &row_ids[first..end], first)?),
                None => None,
            };
            for position in first..end {
                let span = (position - first) * vocab_size..(position - first + 1) * vocab_size;
                let best = log_softmax(&logits[span.clone()], &mut log_probs);
                let target = row_ids.get(position + 1).map(|&id| id as usize);
                sums.add_target(target, &log_probs);
                if let Some(reference_logits) = reference_logits {
                    let reference_best =
                        log_softmax(&reference_logits[span], &mut reference_log_probs);
                    reference_sums.add_target(target, &reference_log_probs);
                    sums.kl += divergence(&reference_log_probs, &log_probs);
                    sums.top1 += usize::from(best == reference_best);
                }
            }
        }
        on_row(row + 1, sums.perplexity());
    }
    let positions = (rows * length) as f64;
    Ok(Evaluation {
        rows,
        length,
        perplexity: sums.perplexity(),
        comparison: reference.is_some().then(|| Comparison {
            kl: sums.kl / positions,
            top1: sums.top1 as f64 / positions,
            reference_perplexity: reference_sums.perplexity(),
        }),
    })
}

#[derive(Default)]
struct Sums {
    negative_log_likelihood: f64,
    targets: usize,
    kl: f64,
    top1: usize,
}

impl Sums {
    fn add_target(&mut self, target: Option<usize>, log_probs: &[f32]) {
        if let Some(target) = target {
            self.negative_log_likelihood -= f64::from(log_probs[target]);
            self.targets += 1;
        }
    }

    fn perplexity(&self) -> f64 {
        (self.negative_log_likelihood / self.targets as f64).exp()
    }
}

fn check(
    runner: &dyn Runner,
    reference: Option<&dyn Runner>,
    token_ids: &[u32],
    rows: usize,
    length: usize,
) -> Result<(), EngineError> {
    let text_error = |hint| EngineError::EvaluationText {
        found_tokens: token_ids.len(),
        rows,
        length,
        hint,
    };
    if rows == 0 || length < 2 {
        return Err(text_error("ask for at least 1 row of at least 2 tokens"));
    }
    if rows
        .checked_mul(length)
        .is_none_or(|needed| needed > token_ids.len())
    {
        return Err(text_error("give a longer text, or fewer or shorter rows"));
    }
    if let Some(reference) = reference {
        let (reference, model) = (reference.spec().vocab_size, runner.spec().vocab_size);
        if reference != model {
            return Err(EngineError::VocabularyMismatch { reference, model });
        }
    }
    let context = reference.map_or(usize::MAX, |reference| reference.limits().context_tokens);
    let context_tokens = context.min(runner.limits().context_tokens);
    if length > context_tokens {
        return Err(EngineError::PromptTooLong {
            prompt_tokens: length,
            context_tokens,
        });
    }
    let vocab_size = runner.spec().vocab_size;
    match token_ids[..rows * length]
        .iter()
        .find(|&&id| id as usize >= vocab_size)
    {
        Some(&token_id) => Err(EngineError::TokenOutOfRange {
            token_id,
            vocab_size,
        }),
        None => Ok(()),
    }
}

fn chunk_tokens(runner: &dyn Runner) -> usize {
    runner.limits().max_rows.min(runner.limits().max_logit_rows)
}

/// Logits f32 `[token_ids.len(), vocab_size]` of a chunk that starts at `first`.
fn run_chunk<'r>(
    runner: &'r mut dyn Runner,
    token_ids: &[u32],
    first: usize,
) -> Result<&'r [f32], EngineError> {
    let pages = (first + token_ids.len()).div_ceil(PAGE_TOKENS);
    let mut step = StepPlan {
        pages_per_sequence: pages,
        ..StepPlan::default()
    };
    let tokens = token_ids.iter().copied();
    step.push_sequence(tokens, first, 0..pages as u32, token_ids.len());
    Ok(runner.run(&step)?.logits)
}

/// Fills `log_probs` and returns the index of the largest logit.
fn log_softmax(logits: &[f32], log_probs: &mut [f32]) -> usize {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    let largest = logits[best];
    let sum: f64 = logits
        .iter()
        .map(|&logit| f64::from((logit - largest).exp()))
        .sum();
    let log_sum = f64::from(largest) + sum.ln();
    for (log_prob, &logit) in log_probs.iter_mut().zip(logits) {
        *log_prob = (f64::from(logit) - log_sum) as f32;
    }
    best
}

/// KL(p ‖ q) in nats from log probabilities.
fn divergence(log_p: &[f32], log_q: &[f32]) -> f64 {
    log_p
        .iter()
        .zip(log_q)
        .filter(|(p, _)| p.is_finite())
        .map(|(&p, &q)| f64::from(p.exp()) * f64::from(p - q))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_and_divergence_agree_with_the_formulas() {
        let mut p = [0f32; 3];
        let mut q = [0f32; 3];
        assert_eq!(log_softmax(&[1.0, 3.0, 2.0], &mut p), 1);
        assert_eq!(log_softmax(&[0.0, 0.0, f32::ln(2.0)], &mut q), 2);
        let exp_sum = 1f64.exp() + 3f64.exp() + 2f64.exp();
        let probabilities = [
            1f64.exp() / exp_sum,
            3f64.exp() / exp_sum,
            2f64.exp() / exp_sum,
        ];
        let expected: f64 = probabilities
            .iter()
            .zip([0.25f64, 0.25, 0.5])
            .map(|(p, q)| p * (p / q).ln())
            .sum();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6);
        assert!(divergence(&p, &p).abs() < 1e-9);
    }
}
