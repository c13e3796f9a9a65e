//! What is printed of a completion.

use anyhow::Result;
use oxllama_engine::{Completion, FinishReason, TokenLogprob, Usage};
use serde::Serialize;

/// What became of a request, as `--json` prints it.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Outcome<'a> {
    One(Box<Answer<'a>>),
    Choices { choices: Vec<Answer<'a>> },
    Failed { error: String },
}

/// One answer.
#[derive(Serialize)]
pub(crate) struct Answer<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    prompt_token_ids: &'a [u32],
    finish_reason: FinishReason,
    logprobs: Option<&'a [TokenLogprob]>,
    usage: Usage,
    timings: AnswerTimings,
}

#[derive(Serialize)]
struct AnswerTimings {
    load_s: f64,
    queue_s: f64,
    prompt_tokens: usize,
    prefill_s: f64,
    generated_tokens: usize,
    decode_s: f64,
    decode_steps: usize,
}

impl<'a> Answer<'a> {
    pub(crate) fn new(completion: &'a Completion, prompt_ids: &'a [u32], load_s: f64) -> Self {
        let Completion { usage, timings, .. } = completion;
        Self {
            text: &completion.text,
            token_ids: &completion.token_ids,
            prompt_token_ids: prompt_ids,
            finish_reason: completion.finish_reason,
            logprobs: completion.logprobs.as_deref(),
            usage: *usage,
            timings: AnswerTimings {
                load_s,
                queue_s: timings.queue_s,
                prompt_tokens: usage.prompt_tokens,
                prefill_s: timings.prefill_s,
                generated_tokens: usage.generated_tokens,
                decode_s: timings.decode_s,
                decode_steps: timings.decode_steps,
            },
        }
    }
}

impl<'a> Outcome<'a> {
    /// One answer is an object, several a list of them.
    pub(crate) fn new(completions: &'a [Completion], prompt_ids: &'a [u32], load_s: f64) -> Self {
        let mut choices: Vec<Answer<'a>> = completions
            .iter()
            .map(|completion| Answer::new(completion, prompt_ids, load_s))
            .collect();
        match (choices.len(), choices.pop()) {
            (1, Some(answer)) => Self::One(Box::new(answer)),
            (_, last) => {
                choices.extend(last);
                Self::Choices { choices }
            }
        }
    }

    pub(crate) fn failed(error: &anyhow::Error) -> Self {
        Self::Failed {
            error: crate::output::message(error),
        }
    }
}

/// The error that a completion ended with, if it did.
pub(crate) fn failure(completion: &Completion) -> Result<()> {
    match &completion.error {
        // A copy would do, but the engine's errors are not to be copied: keep the words.
        Some(error) => Err(anyhow::anyhow!("{error}")),
        None => Ok(()),
    }
}

/// One line about where the time went.
pub(crate) fn summary(completion: &Completion) -> String {
    let Completion { usage, timings, .. } = completion;
    let rate = completion
        .decode_tokens_per_second()
        .map_or_else(String::new, |rate| format!(" ({rate:.1} tokens/s)"));
    let guesses = match usage.drafted_tokens {
        0 => String::new(),
        drafted => format!(", {} of {drafted} guesses right", usage.accepted_tokens),
    };
    format!(
        "[{} prompt tokens in {:.3} s, {} new in {:.3} s{rate}{guesses}]",
        usage.prompt_tokens, timings.prefill_s, usage.generated_tokens, timings.decode_s,
    )
}
