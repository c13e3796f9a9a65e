//! What is asked of the engine, and what it answers.

use std::sync::Arc;
use std::time::Instant;

use oxllama_model::AdapterId;
use serde::Serialize;

use crate::{ConstraintSpec, EngineError, SamplingSettings};

/// One request for text.
///
/// [`Job::new`] fills in what most jobs leave alone:
///
/// ```
/// use oxllama_engine::{Job, SamplingSettings};
/// let job = Job {
///     sampling: SamplingSettings::greedy(),
///     stop_strings: vec!["\n\n".to_owned()],
///     ..Job::new(vec![1, 2, 3], 128)
/// };
/// assert_eq!(job.max_skips, 4);
/// ```
#[derive(Debug, Clone)]
pub struct Job {
    /// The prompt, special tokens included.
    pub prompt_ids: Vec<u32>,
    /// Exactly this many tokens are generated unless something ends the job before.
    pub max_new_tokens: usize,
    /// Stop tokens are not drawn before this many tokens; stop strings still end the job.
    pub min_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingSettings,
    /// Decides every draw.
    pub seed: u64,
    /// Generation ends at any of these; they are not part of the answer.
    pub stop_token_ids: Vec<u32>,
    /// Generation ends where any of these would appear; they are not part of the text.
    pub stop_strings: Vec<String>,
    /// The answer never contains these, in whatever case: where one would appear, generation
    /// goes back to its first token and takes another.
    pub banned_strings: Vec<String>,
    /// `Some(k)`: report each token's log probability and those of the `k` most likely.
    pub logprobs: Option<usize>,
    /// Report the logits that each token was drawn from, f32 `[vocab_size]`.
    pub return_logits: bool,
    /// Steer away from another prompt.
    pub guidance: Option<Guidance>,
    /// What the answer must look like.
    pub constraint: Option<ConstraintSpec>,
    /// Draw the prompt's last token anew, as any token that begins with its text: a prompt that
    /// ends inside a word or a URL goes on as if it had not been cut there.
    pub token_healing: bool,
    /// A LoRA adapter; see [`Engine::load_adapter`](crate::Engine::load_adapter).
    pub adapter: Option<AdapterId>,
    /// Whether tokens are guessed ahead. Changes how fast the answer comes, not the answer.
    pub speculation: Speculation,
    /// A higher one goes first, and may take the room of a lower one.
    pub priority: i32,
    /// How many later jobs may start before this one while it does not fit.
    pub max_skips: u32,
    /// The job ends when this has passed, with what it has by then.
    pub deadline: Option<Instant>,
}

impl Job {
    /// A job with ExLlamaV2's default sampling, seed 0, and nothing else asked for.
    pub fn new(prompt_ids: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompt_ids,
            max_new_tokens,
            min_new_tokens: 0,
            sampling: SamplingSettings::default(),
            seed: 0,
            stop_token_ids: Vec::new(),
            stop_strings: Vec::new(),
            banned_strings: Vec::new(),
            logprobs: None,
            return_logits: false,
            guidance: None,
            constraint: None,
            token_healing: false,
            adapter: None,
            speculation: Speculation::default(),
            priority: 0,
            max_skips: 4,
            deadline: None,
        }
    }
}

/// Classifier-free guidance: logits become `scale · positive + (1 − scale) · negative`, both as
/// log probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Guidance {
    /// The prompt to steer away from; it takes a sequence and pages of its own.
    pub negative_ids: Vec<u32>,
    /// 1 is no guidance, 0 the negative prompt alone.
    pub scale: f32,
}

/// Where guesses at the next tokens come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Speculation {
    /// From the engine's draft model, if it has one.
    #[default]
    DraftModel,
    /// From what followed the same few tokens earlier in the prompt or the answer.
    Ngram,
    /// No guesses.
    Off,
}

/// Why a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or stop string, or the end of what the constraint allows.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// Its stream was dropped, or the engine shut down.
    Cancelled,
    /// Its deadline passed.
    Deadline,
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
#[derive(Debug, Clone)]
pub enum Event {
    /// The job waits: at first, whenever its place changes, and when it had to give up its room.
    Queued {
        /// Jobs that would start before it.
        position: usize,
    },
    /// The job runs.
    Started {
        /// Prompt tokens whose keys and values the cache had.
        cached_tokens: usize,
    },
    /// `done` of `total` prompt tokens are in the cache.
    Prefill {
        /// Tokens done, those that the cache had included.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// Text that can no longer change.
    Token {
        /// The text: may be several tokens' worth or none, and never splits a character.
        text: String,
        /// The tokens whose text is complete with it.
        ids: Vec<u32>,
        /// One for each of `ids`, if asked for.
        logprobs: Vec<TokenLogprob>,
        /// Logits f32 `[vocab_size]` for each of `ids`, if asked for.
        logits: Vec<Vec<f32>>,
    },
    /// The last event.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What was counted.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
        /// What failed, with [`FinishReason::Error`].
        error: Option<Arc<EngineError>>,
    },
}

/// What a job counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, tokens whose keys and values the cache had when the job first started.
    pub cached_tokens: usize,
    /// Tokens of the answer, without a stop token.
    pub generated_tokens: usize,
    /// Tokens that were guessed ahead.
    pub drafted_tokens: usize,
    /// Of those, tokens that turned out right.
    pub accepted_tokens: usize,
    /// How often the job had to give up its room.
    pub preemptions: usize,
}

/// Where a job's time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Seconds from submission to the first start.
    pub queue_s: f64,
    /// Seconds from there to the prompt's last logits.
    pub prefill_s: f64,
    /// Seconds from there to the end.
    pub decode_s: f64,
    /// Forward steps after the prefill.
    pub decode_steps: usize,
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
    /// Logits of each token of `token_ids`, if asked for.
    pub logits: Option<Vec<Vec<f32>>>,
    /// What was counted.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
    /// What failed, with [`FinishReason::Error`].
    pub error: Option<Arc<EngineError>>,
}

impl Completion {
    /// Tokens after the first a second; `None` if there was none (the first token comes with
    /// the prefill).
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        let tokens = self.usage.generated_tokens.saturating_sub(1);
        (tokens > 0 && self.timings.decode_s > 0.0).then(|| tokens as f64 / self.timings.decode_s)
    }
}
