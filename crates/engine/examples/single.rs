//! One prompt, one answer.
//!
//! `cargo run --release --example single -- MODEL_DIRECTORY`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use oxllama_engine::{Job, SamplingSettings};
use oxllama_text::EncodeOptions;

fn main() -> common::Result<()> {
    let engine = common::engine(&common::path_argument(1, "a model directory")?, None)?;
    let prompt = "The three largest planets of the solar system are";
    let job = Job {
        sampling: SamplingSettings::greedy(),
        stop_token_ids: engine.tokenizer().eos_ids().to_vec(),
        stop_strings: vec!["\n".to_owned()],
        ..Job::new(
            engine.tokenizer().encode(prompt, EncodeOptions::PROMPT)?,
            40,
        )
    };
    let answer = engine.submit(job)?.wait();
    if let Some(error) = answer.error {
        return Err(error.into());
    }
    println!("{prompt}{}", answer.text);
    println!("[{:?}; {:?}]", answer.finish_reason, answer.usage);
    Ok(())
}
