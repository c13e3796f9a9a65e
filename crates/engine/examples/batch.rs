//! Many jobs at once: different questions that share an instruction, and one question answered
//! several times. What prompts have in common is computed once.
//!
//! `cargo run --release --example batch -- MODEL_DIRECTORY`
#![allow(clippy::print_stdout, reason = "an example shows what it got")]

mod common;

use oxllama_engine::{Job, SamplingSettings};
use oxllama_text::EncodeOptions;

const INSTRUCTION: &str = "Question: What is the capital of Italy?\nAnswer: Rome\n";
const COUNTRIES: [&str; 4] = ["France", "Spain", "Japan", "Egypt"];

fn main() -> common::Result<()> {
    let engine = common::engine(&common::path_argument(1, "a model directory")?, None)?;
    let job = |country: &str| -> common::Result<Job> {
        let prompt = format!("{INSTRUCTION}Question: What is the capital of {country}?\nAnswer:");
        let prompt_ids = engine.tokenizer().encode(&prompt, EncodeOptions::PROMPT)?;
        Ok(Job {
            sampling: SamplingSettings::greedy(),
            stop_strings: vec!["\n".to_owned()],
            ..Job::new(prompt_ids, 12)
        })
    };

    // All are under way before the first answer is read: a slow reader holds nobody up.
    let mut streams = Vec::new();
    for country in COUNTRIES {
        streams.push(engine.submit(job(country)?)?);
    }
    for (country, stream) in COUNTRIES.iter().zip(streams) {
        println!("{country}:{}", stream.wait().text);
    }

    let sampled = Job {
        sampling: SamplingSettings::default(),
        seed: 7,
        ..job("Peru")?
    };
    for (choice, stream) in engine.submit_choices(sampled, 3)?.into_iter().enumerate() {
        println!("Peru, choice {choice}:{}", stream.wait().text);
    }
    println!("{:?}", engine.stats()?);
    Ok(())
}
