//! What is asked of the engine, and what it answers.

use serde::Serialize;

use crate::SamplingSettings;

/// One request for text.
#[derive(Debug, Clone)]
pub struct Job {
    /// The prompt, special tokens included.
    pub prompt_ids: Vec<u32>,
    /// At most this many tokens are generated.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingSettings,
    /// Decides every draw.
    pub seed: u64,
    /// Generation ends at any of these; they are not part of the answer.
    pub stop_token_ids: Vec<u32>,
    /// Generation ends where any of these would appear; they are not part of the text.
    pub stop_strings: Vec<String>,
    /// `Some(k)`: report each token's log probability and those of the `k` most likely.
    pub logprobs: Option<usize>,
}

/// Why a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// The job failed; what was generated before stands.
    Error,
}

/// A token with its log probability (natural logarithm) under the model: the softmax of the
/// logits as they are, before penalties, temperature and truncation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RankedToken {
    /// The token.
    pub token_id: u32,
    /// ln p.
    pub logprob: f32,
}

/// A generated token's log probability, and the most likely tokens at its place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token that was drawn.
    pub token_id: u32,
    /// Its ln p.
    pub logprob: f32,
    /// The most likely tokens, in order; equal ones by id.
    pub top: Vec<RankedToken>,
}

/// Progress of a job.
#[derive(Debug)]
pub enum Event<'a> {
    /// `done` of `total` prompt tokens are in the cache.
    Prefill {
        /// Tokens done, those reused from an earlier job included.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// Text that can no longer change. May be several tokens' worth, and never splits a
    /// character.
    Text(&'a str),
}

/// Where a job's time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, tokens whose keys and values were still in the cache.
    pub cached_tokens: usize,
    /// Seconds until the prompt's last logits.
    pub prefill_s: f64,
    /// Tokens of the answer, without a stop token.
    pub generated_tokens: usize,
    /// Forward steps after the prefill.
    pub decode_steps: usize,
    /// Seconds from there to the end.
    pub decode_s: f64,
}

impl Timings {
    /// Decode steps a second; `None` if there was none (the first token comes with the
    /// prefill).
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        (self.decode_steps > 0 && self.decode_s > 0.0)
            .then(|| self.decode_steps as f64 / self.decode_s)
    }
}

/// The whole answer.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The text, without stop strings.
    pub text: String,
    /// The tokens, without a stop token.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry a token of `token_ids`, if asked for.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// Where the time went.
    pub timings: Timings,
}
