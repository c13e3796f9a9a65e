//! Guessing ahead: from n-grams, and from a smaller model if a second directory is given. The
//! answer stays the same, the steps become fewer.
//!
//! `cargo run --release --example speculative -- MODEL_DIRECTORY [DRAFT_MODEL_DIRECTORY]`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use oxllama_engine::{Job, SamplingSettings, Speculation};
use oxllama_text::EncodeOptions;

/// Something that repeats itself, as code and lists do.
const PROMPT: &str = "let red = Color::new(\"red\");\nlet green = Color::new(\"green\");\n\
                      let blue = Color::new(\"blue\");\nlet yellow = Color::new(\"yellow\");\n";

fn main() -> common::Result<()> {
    let model = common::path_argument(1, "a model directory")?;
    let draft = common::path_argument(2, "a draft model directory").ok();
    let engine = common::engine(&model, draft.as_deref())?;
    let prompt_ids = engine.tokenizer().encode(PROMPT, EncodeOptions::PROMPT)?;

    let mut ways = vec![Speculation::Off, Speculation::Ngram];
    ways.extend(draft.map(|_| Speculation::DraftModel));
    let mut plain = None;
    for speculation in ways {
        let stream = engine.submit(Job {
            sampling: SamplingSettings::greedy(),
            speculation,
            ..Job::new(prompt_ids.clone(), 64)
        })?;
        let answer = stream.wait();
        println!(
            "{speculation:?}: {} tokens in {} steps, {} of {} guesses right, {:.1} tokens/s",
            answer.usage.generated_tokens,
            answer.timings.decode_steps,
            answer.usage.accepted_tokens,
            answer.usage.drafted_tokens,
            answer.decode_tokens_per_second().unwrap_or(0.0),
        );
        let plain = plain.get_or_insert_with(|| answer.token_ids.clone());
        assert_eq!(*plain, answer.token_ids, "guesses never change the answer");
    }
    Ok(())
}
