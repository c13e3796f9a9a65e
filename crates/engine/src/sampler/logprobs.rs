//! Log probabilities under the model, and the mixing of two models' opinions.

use super::numbers;
use super::row::RowScratch;
use crate::{RankedToken, TokenLogprob};

/// The log probability of `token_id` and of the `top` most likely tokens, by the softmax of
/// `logits`, f32 `[vocab_size]`, as they are.
///
/// An id outside the vocabulary has negative infinity. Of logits that are NaN or positive
/// infinity no ranking is made: `top` is empty then.
pub fn token_logprobs(logits: &[f32], token_id: u32, top: usize) -> TokenLogprob {
    let log_sum = numbers::log_sum_exp(logits);
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let own = logits.get(token_id as usize).copied();
    let mut ranked = Vec::new();
    let mut scratch = RowScratch::default();
    if let Ok(mut row) = scratch.begin(logits, None, logits.len()) {
        row.rank(None, top.min(logits.len()), &mut ranked);
    }
    TokenLogprob {
        token_id,
        logprob: logprob(own.unwrap_or(f32::NEG_INFINITY)),
        top: ranked
            .into_iter()
            .map(|candidate| RankedToken {
                token_id: candidate.token_id,
                logprob: logprob(candidate.logit),
            })
            .collect(),
    }
}

/// Classifier-free guidance as in ExLlamaV2: both rows, f32 `[vocab_size]`, become log
/// probabilities, and `positive` becomes `scale * positive + (1 - scale) * negative`.
///
/// Where either says that a token is impossible the positive prompt's word counts alone: the
/// formula would give an infinity or no number.
pub fn mix_guidance(positive: &mut [f32], negative: &[f32], scale: f32) {
    let positive_sum = numbers::log_sum_exp(positive) as f32;
    let negative_sum = numbers::log_sum_exp(negative) as f32;
    for (positive, negative) in positive.iter_mut().zip(negative) {
        let wanted = *positive - positive_sum;
        let unwanted = *negative - negative_sum;
        let is_possible = wanted > f32::NEG_INFINITY && unwanted > f32::NEG_INFINITY;
        let mixed = scale * wanted + (1.0 - scale) * unwanted;
        // NaN goes through, for the sampler to find.
        *positive = if is_possible || wanted.is_nan() || unwanted.is_nan() {
            mixed
        } else {
            wanted
        };
    }
}
